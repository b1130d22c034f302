#include "batching/testing/rule_check.h"

#include <ATen/Context.h>
#include <ATen/ops/alias.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cos.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <exception>
#include <optional>
#include <sstream>
#include <string_view>

#include "batching/fallback.h"
#include "core/level.h"
#include "core/lifted_tensor.h"

namespace torchlift::testing {
namespace {

// Where each argument has its batch dim: none, or a position of the stacked value.
using Plan = std::vector<std::optional<int64_t>>;

std::string describe(const RuleCase& c, const Plan& plan, int64_t size, const char* what) {
  std::ostringstream out;
  out << c.name << ", " << what << ", batch of " << size << ", in_dims (";
  for (const auto& dim : plan) out << (dim ? std::to_string(*dim) : "None") << ", ";
  out << ")";
  return out.str();
}

bool contains(const std::vector<size_t>& list, size_t item) {
  return std::find(list.begin(), list.end(), item) != list.end();
}

// Example number i: the same whenever it is asked for, whatever was drawn before.
Tensors make_example(const RuleCase& c, int64_t i) {
  at::manual_seed(static_cast<uint64_t>(i) + 1);
  return c.make(i);
}

Tensors copies(const Tensors& in) {
  Tensors out;
  for (const at::Tensor& t : in) out.push_back(t.defined() ? t.clone() : t);
  return out;
}

// The examples of a batch; arguments that the plan does not batch are those of example 0.
std::vector<Tensors> make_examples(const RuleCase& c, const Plan& plan, int64_t size) {
  std::vector<Tensors> examples;
  const Tensors shared = make_example(c, 0);
  for (int64_t i = 0; i < std::max<int64_t>(size, 1); ++i) {
    Tensors example = i == 0 ? shared : make_example(c, i);
    for (size_t a = 0; a < plan.size(); ++a) {
      if (!plan[a]) example[a] = shared[a];
    }
    examples.push_back(example);
  }
  return examples;
}

at::Tensor stack_examples(const std::vector<Tensors>& examples, size_t a, int64_t dim,
                          int64_t size) {
  Tensors column;
  for (const Tensors& example : examples) column.push_back(example[a]);
  const at::Tensor stacked = at::stack(column, dim);
  return size == 0 ? stacked.narrow(dim, 0, 0) : stacked;
}

Tensors batch_inputs(const std::vector<Tensors>& examples, const Plan& plan, int64_t size) {
  Tensors inputs;
  for (size_t a = 0; a < plan.size(); ++a) {
    inputs.push_back(plan[a] ? stack_examples(examples, a, *plan[a], size) : examples[0][a]);
  }
  return inputs;
}

// Runs f in a level; returns results with the batch first, unbatched ones expanded. If f
// differentiates inside the level, inputs that are not batched must belong to the level as well: a
// plain tensor that is tracked is of an outer domain.
Tensors run_level(const Tensors& inputs, const Plan& plan, int64_t size,
                  const std::function<Tensors(const Tensors&)>& f, bool lift_all = false) {
  LevelScope scope({.size = size, .randomness = Randomness::kDifferent});
  Tensors lifted;
  for (size_t a = 0; a < inputs.size(); ++a) {
    const bool lifts = plan[a].has_value() || (lift_all && inputs[a].defined());
    lifted.push_back(lifts ? lift_alias(inputs[a], plan[a], scope.level()) : inputs[a]);
  }
  Tensors results;
  for (const at::Tensor& out : f(lifted)) {
    const Lowered lowered = lower(out, *scope.level());
    c10::SmallVector<int64_t, 8> sizes{size};
    sizes.append(lowered.value.sizes().begin(), lowered.value.sizes().end());
    results.push_back(lowered.bdim ? lowered.value.movedim(*lowered.bdim, 0)
                                   : lowered.value.expand(sizes));
  }
  return results;
}

bool is_differentiable(const at::Tensor& t) {
  return t.defined() && (at::isFloatingType(t.scalar_type()) || at::isComplexType(t.scalar_type()));
}

// A cotangent that tells elements apart, and examples by their phase (a number each; batched where
// the cotangent is to be).
at::Tensor cotangent_for(const at::Tensor& out, const at::Tensor& phase) {
  return at::cos(at::arange(out.numel(), at::TensorOptions().dtype(at::kDouble))
                     .reshape(out.sizes())
                     .add(phase))
      .to(out.scalar_type());
}

// f gets copies of its inputs, into which it may write, or them as they lie in memory.
enum class Hands { kCopies, kInputs };

// The gradient of sum(cotangent * f) with regard to every floating input.
Tensors gradients(const std::function<Tensors(const Tensors&)>& f, const Tensors& in,
                  const at::Tensor& phase, bool create_graph, Hands hands = Hands::kCopies) {
  const c10::AutoGradMode enable(true);
  Tensors primals;
  Tensors wanted;
  for (const at::Tensor& t : in) {
    const bool outer = is_differentiable(t) && t.requires_grad();
    primals.push_back(!is_differentiable(t) ? t
                      : outer               ? at::alias(t)
                                            : t.detach().requires_grad_(true));
    if (is_differentiable(t)) wanted.push_back(primals.back());
  }
  Tensors used = primals;
  for (at::Tensor& t : used) {
    // A leaf forbids to write in place.
    if (hands == Hands::kCopies && is_differentiable(t)) t = t.clone();
  }
  Tensors outs;
  Tensors cotangents;
  for (const at::Tensor& out : f(used)) {
    if (!is_differentiable(out) || !out.requires_grad()) continue;
    outs.push_back(out);
    cotangents.push_back(cotangent_for(out, phase));
  }
  Tensors grads;
  if (!outs.empty()) {
    grads = torch::autograd::grad(outs, wanted, cotangents, /*retain_graph=*/create_graph,
                                  create_graph, /*allow_unused=*/true);
  }
  grads.resize(wanted.size());
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (!grads[i].defined()) grads[i] = at::zeros(wanted[i].sizes(), wanted[i].options());
  }
  return grads;
}

// Stacks what f gives for each example alone.
Tensors run_loop(const std::vector<Tensors>& examples,
                 const std::function<Tensors(const Tensors&)>& f) {
  std::vector<Tensors> columns;
  for (const Tensors& example : examples) {
    const Tensors out = f(copies(example));
    columns.resize(out.size());
    for (size_t r = 0; r < out.size(); ++r) columns[r].push_back(out[r]);
  }
  Tensors stacked;
  for (const Tensors& column : columns) stacked.push_back(at::stack(column));
  return stacked;
}

void expect_same(const Tensors& got, const Tensors& want, int64_t size, double tolerance,
                 const std::string& label) {
  ASSERT_EQ(got.size(), want.size()) << label;
  for (size_t r = 0; r < got.size(); ++r) {
    const at::Tensor expected = size == 0 ? want[r].narrow(0, 0, 0) : want[r];
    ASSERT_EQ(got[r].sizes(), expected.sizes()) << label << ", result " << r;
    ASSERT_EQ(got[r].scalar_type(), expected.scalar_type()) << label << ", result " << r;
    ASSERT_TRUE(at::allclose(got[r].detach(), expected.detach(), tolerance, tolerance,
                             /*equal_nan=*/true))
        << label << ", result " << r << "\ngot " << got[r] << "\nexpected " << expected;
  }
}

std::vector<Plan> plans_for(const RuleCase& c) {
  const Tensors shared = make_example(c, 0);
  const size_t count = shared.size();
  std::vector<Plan> plans;
  for (size_t mask = 1; mask < (size_t{1} << count); ++mask) {
    bool allowed = true;
    for (size_t a = 0; a < count; ++a) {
      const bool batched = ((mask >> a) & 1) != 0;
      allowed = allowed && !(batched && (contains(c.unbatched, a) || !shared[a].defined())) &&
                !(!batched && contains(c.always_batched, a));
    }
    if (!allowed) continue;
    for (int variant = 0; variant < 3; ++variant) {  // first, last, mixed
      Plan plan(count);
      for (size_t a = 0; a < count; ++a) {
        if (((mask >> a) & 1) == 0) continue;
        const int64_t rank = shared[a].dim();
        plan[a] = variant == 0 ? 0 : variant == 1 ? rank : static_cast<int64_t>(a) % (rank + 1);
      }
      if (std::find(plans.begin(), plans.end(), plan) == plans.end()) plans.push_back(plan);
    }
  }
  return plans;
}

// f with its gradient taken inside the level, compared with the loop's.
void check_inside(const RuleCase& c, const Plan& plan, int64_t size,
                  const std::function<Tensors(const Tensors&)>& f, const char* what) {
  const std::vector<Tensors> examples = make_examples(c, plan, size);
  const Tensors inputs = batch_inputs(examples, plan, size);
  const bool differentiates = std::string_view(what) != "forward";
  expect_same(run_level(copies(inputs), plan, size, f, differentiates), run_loop(examples, f), size,
              c.tolerance, describe(c, plan, size, what));
}

// Autograd outside: through the level against through the loop.
void check_through(const RuleCase& c, const Plan& plan, int64_t size) {
  const std::vector<Tensors> examples = make_examples(c, plan, size);
  const Tensors inputs = batch_inputs(examples, plan, size);
  const auto through_level = [&](const Tensors& in) { return run_level(in, plan, size, c.f); };
  const auto through_loop = [&](const Tensors& in) {
    std::vector<Tensors> split;
    for (int64_t i = 0; i < size; ++i) {
      Tensors example;
      for (size_t a = 0; a < in.size(); ++a) {
        example.push_back(plan[a] ? in[a].select(*plan[a], i) : in[a]);
      }
      split.push_back(example);
    }
    return run_loop(split, c.f);
  };
  const at::Tensor phase = at::zeros({}, at::kDouble);
  const Tensors got = gradients(through_level, inputs, phase, false);
  const Tensors want = gradients(through_loop, inputs, phase, false);
  expect_same(got, want, /*size=*/-1, c.tolerance,
              describe(c, plan, size, "backward through the level"));
}

// The gradients of a case, as a case with one more input: the phase of the cotangents.
RuleCase gradient_case(const RuleCase& c, int order, Hands hands = Hands::kCopies) {
  RuleCase with_phase = c;
  with_phase.make = [make = c.make](int64_t i) {
    Tensors in = make(i);
    in.push_back(at::full({}, 0.6 * static_cast<double>(i), at::kDouble));
    return in;
  };
  with_phase.f = [f = c.f, order, hands](const Tensors& in) {
    const Tensors primals(in.begin(), in.end() - 1);
    const at::Tensor phase = in.back();
    if (order == 1) return gradients(f, primals, phase, false, hands);
    const auto first = [&](const Tensors& again) { return gradients(f, again, phase, true); };
    return gradients(first, primals, phase, false);
  };
  return with_phase;
}

// A gradient of a case inside the level. The cotangent is batched; and, in the plainest of the
// plans, once shared by all examples.
void check_gradient(const RuleCase& c, const Plan& plan, int64_t size, int order,
                    const char* what) {
  const RuleCase g = gradient_case(c, order);
  Plan with_phase = plan;
  with_phase.emplace_back(0);
  check_inside(g, with_phase, size, g.f, what);
  const bool plain = std::all_of(plan.begin(), plan.end(), [](auto dim) { return dim == 0; });
  if (!plain || ::testing::Test::HasFatalFailure()) return;
  with_phase.back() = std::nullopt;
  check_inside(g, with_phase, size, g.f, what);
}

void check_plan(const RuleCase& c, const Plan& plan, int64_t size) {
  check_inside(c, plan, size, c.f, "forward");
  if (!c.differentiable || ::testing::Test::HasFatalFailure()) return;
  check_gradient(c, plan, size, 1, "backward inside the level");
  if (size == 0 || ::testing::Test::HasFatalFailure()) return;
  check_through(c, plan, size);
  if (!c.second_order || ::testing::Test::HasFatalFailure()) return;
  check_gradient(c, plan, size, 2, "second derivative inside the level");
}

// Nothing is batched but the cotangent: derivative formulas meet a batched gradient and arguments
// without a batch dim.
void check_cotangent_alone(const RuleCase& c) {
  if (!c.differentiable || !c.always_batched.empty()) return;
  const size_t count = make_example(c, 0).size();
  const RuleCase g = gradient_case(c, 1);
  Plan plan(count + 1);
  plan.back() = 0;
  check_inside(g, plan, 3, g.f, "backward inside the level, cotangent alone");
  if (!c.second_order || ::testing::Test::HasFatalFailure()) return;
  const RuleCase second = gradient_case(c, 2);
  check_inside(second, plan, 3, second.f, "second derivative, cotangent alone");
}

// Every other row of a larger tensor: the examples lie as they did, the batch does not.
at::Tensor spread(const at::Tensor& batch) {
  return at::stack({batch, at::ones_like(batch)}, 1).select(1, 0);
}

// Derivative formulas look at the strides of an example, rules at those of the batch.
void check_spread(const RuleCase& c) {
  if (!c.always_batched.empty()) return;  // writes in place
  constexpr int64_t kSize = 3;
  const auto check = [&](const RuleCase& spread_case, const char* what) {
    const Tensors shared = make_example(spread_case, 0);
    Plan plan(shared.size());
    for (size_t a = 0; a < shared.size(); ++a) {
      if (shared[a].defined() && !contains(c.unbatched, a)) plan[a] = 0;
    }
    const std::vector<Tensors> examples = make_examples(spread_case, plan, kSize);
    Tensors inputs = batch_inputs(examples, plan, kSize);
    for (size_t a = 0; a < inputs.size(); ++a) {
      if (plan[a]) inputs[a] = spread(inputs[a]);
    }
    const bool differentiates = std::string_view(what) != "forward";
    expect_same(run_level(inputs, plan, kSize, spread_case.f, differentiates),
                run_loop(examples, spread_case.f), kSize, c.tolerance,
                describe(c, plan, kSize, what) + ", a batch of every other row");
  };
  check(c, "forward");
  if (!c.differentiable || ::testing::Test::HasFatalFailure()) return;
  check(gradient_case(c, 1, Hands::kInputs), "backward inside the level");
}

// --- two nested levels ---------------------------------------------------------------------------

constexpr int64_t kOuter = 2;
constexpr int64_t kInner = 3;

// Bit 0 of a role: batched at the outer level; bit 1: at the inner one.
using Roles = std::vector<int>;

Tensors nested_example(const RuleCase& c, const Roles& roles, int64_t i, int64_t j) {
  Tensors example;
  for (size_t a = 0; a < roles.size(); ++a) {
    const int64_t index = ((roles[a] & 1) != 0 ? i * kInner : 0) + ((roles[a] & 2) != 0 ? j : 0);
    example.push_back(make_example(c, index)[a]);
  }
  return example;
}

at::Tensor nested_input(const RuleCase& c, const Roles& roles, size_t a) {
  Tensors rows;
  for (int64_t i = 0; i < ((roles[a] & 1) != 0 ? kOuter : 1); ++i) {
    Tensors row;
    for (int64_t j = 0; j < ((roles[a] & 2) != 0 ? kInner : 1); ++j) {
      row.push_back(nested_example(c, roles, i, j)[a]);
    }
    rows.push_back((roles[a] & 2) != 0 ? at::stack(row) : row[0]);
  }
  return (roles[a] & 1) != 0 ? at::stack(rows) : rows[0];
}

Tensors run_nested(const RuleCase& c, const Roles& roles,
                   const std::function<Tensors(const Tensors&)>& f, bool differentiates) {
  Plan outer(roles.size());
  Plan inner(roles.size());
  Tensors inputs;
  for (size_t a = 0; a < roles.size(); ++a) {
    if ((roles[a] & 1) != 0) outer[a] = 0;
    if ((roles[a] & 2) != 0) inner[a] = 0;
    inputs.push_back(roles[a] == 0 ? make_example(c, 0)[a] : nested_input(c, roles, a));
  }
  return run_level(inputs, outer, kOuter, [&](const Tensors& in) {
    return run_level(in, inner, kInner, f, differentiates);
  });
}

void check_nested(const RuleCase& c, const Roles& roles,
                  const std::function<Tensors(const Tensors&)>& f, const char* what) {
  std::vector<Tensors> rows;
  for (int64_t i = 0; i < kOuter; ++i) {
    std::vector<Tensors> examples;
    for (int64_t j = 0; j < kInner; ++j) examples.push_back(nested_example(c, roles, i, j));
    rows.push_back(run_loop(examples, f));
  }
  Tensors want;
  for (size_t r = 0; r < rows[0].size(); ++r) {
    Tensors column;
    for (const Tensors& row : rows) column.push_back(row[r]);
    want.push_back(at::stack(column));
  }
  std::string label = c.name + ", " + what + ", nested levels, roles";
  for (const int role : roles) label += " " + std::to_string(role);
  const bool differentiates = std::string_view(what) != "forward";
  expect_same(run_nested(c, roles, f, differentiates), want, /*size=*/-1, c.tolerance, label);
}

std::vector<Roles> nested_roles(const RuleCase& c) {
  const Tensors shared = make_example(c, 0);
  std::vector<Roles> all;
  // Every argument takes the roles in turn, out of step with its neighbours.
  for (int shift = 0; shift < 4; ++shift) {
    Roles roles;
    int64_t batched = 0;
    for (size_t a = 0; a < shared.size(); ++a) {
      int role = (shift + 3 * static_cast<int>(a)) % 4;
      if (contains(c.unbatched, a) || !shared[a].defined()) role = 0;
      if (contains(c.always_batched, a)) role = 3;
      batched += role != 0 ? 1 : 0;
      roles.push_back(role);
    }
    if (batched > 0) all.push_back(roles);
  }
  return all;
}

}  // namespace

void check_rule(const RuleCase& c) {
  for (const Plan& plan : plans_for(c)) {
    for (const int64_t size : {int64_t{3}, int64_t{1}, int64_t{0}}) {
      const StrictScope strict;
      try {
        check_plan(c, plan, size);
      } catch (const std::exception& e) {
        FAIL() << describe(c, plan, size, "threw") << ": " << e.what();
      }
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
  try {
    const StrictScope strict;
    check_cotangent_alone(c);
  } catch (const std::exception& e) {
    FAIL() << c.name << ", the cotangent alone batched, threw: " << e.what();
  }
  try {
    const StrictScope strict;
    check_spread(c);
  } catch (const std::exception& e) {
    FAIL() << c.name << ", a batch of every other row, threw: " << e.what();
  }
  if (::testing::Test::HasFatalFailure()) return;
  const RuleCase g = gradient_case(c, 1);
  for (Roles roles : nested_roles(c)) {
    const StrictScope strict;
    try {
      check_nested(c, roles, c.f, "forward");
      if (!c.differentiable || ::testing::Test::HasFatalFailure()) continue;
      roles.push_back(3);  // the phase is another one for each pair of examples
      check_nested(g, roles, g.f, "backward");
    } catch (const std::exception& e) {
      FAIL() << c.name << " threw in nested levels: " << e.what();
    }
    if (::testing::Test::HasFatalFailure()) return;
  }
}

at::Tensor randn(at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); }

at::Tensor positive(at::IntArrayRef sizes) { return at::rand(sizes, at::kDouble).add_(0.5); }

at::Tensor integers(int64_t low, int64_t high, at::IntArrayRef sizes) {
  return at::randint(low, high, sizes, at::kLong);
}

}  // namespace torchlift::testing
