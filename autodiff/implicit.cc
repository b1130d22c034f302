#include "autodiff/implicit.h"

#include <ATen/ops/isfinite.h>
#include <ATen/ops/view_as_real.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <utility>

#include "autodiff/custom_rules.h"
#include "autodiff/jvp.h"
#include "autodiff/leaf_pullback.h"
#include "autodiff/stages.h"
#include "batching/control_flow.h"
#include "core/error.h"
#include "core/level.h"
#include "core/lifted_tensor.h"
#include "core/tensor_operators.h"

namespace torchlift::implicit_internal {
namespace {

using at::Tensor;
using custom_internal::Rules;
using linear_solvers_internal::Vectors;
using ProblemPtr = std::shared_ptr<const Problem>;

Leaves joined(Leaves a, const Leaves& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

Leaves part(const Leaves& all, size_t start, size_t count) {
  return Leaves(all.begin() + start, all.begin() + start + count);
}

Leaves negated(Leaves all) {
  for (Tensor& t : all) {
    if (t.defined()) t = t.neg();
  }
  return all;
}

Leaves constants(Leaves tensors) {
  for (Tensor& t : tensors) t = constant_from(t, 0);
  return tensors;
}

// What solve returned, for the domain at work. It may close over a tensor of a jvp inside of that
// (of the point, say): then so is what it returns, and the value in it is meant.
Leaves roots_here(Leaves y, const Leaves& arguments) {
  const Level* domain = current_level();
  const int64_t depth =
      std::max(deepest_of(arguments), domain == nullptr ? int64_t{0} : domain->depth());
  for (Tensor& t : y) {
    t = constant_from(t, 0);  // however it was found
    while (t.defined() && depth_of(t) > depth && !as_lifted(t)->bdim().has_value()) {
      t = Tensor(as_lifted(t)->value());
    }
  }
  return y;
}

// The product of J, the derivative of f by y, or of its transpose, with x.
Leaves product(const Problem& problem, bool transposed, const Leaves& x, const Leaves& y,
               const Leaves& params) {
  const auto of_y = [&](const Leaves& at) { return problem.f(at, params); };
  return transposed ? LeafPullback(y, of_y)(x) : jvp(of_y, y, x).second;
}

// The x with J x = b, or with J^T x = b: differentiable by b, y and the params.
Leaves solve_linear(const ProblemPtr& problem, bool transposed, const Leaves& b, const Leaves& y,
                    const Leaves& params) {
  const size_t count = y.size(), rest = params.size();
  Rules rules;
  rules.transform = problem->transform;
  rules.value = [problem, transposed, count, rest](const Leaves& all) {
    const Leaves goal = part(all, 0, count), at = part(all, count, count);
    const Leaves given = part(all, 2 * count, rest);
    if (!transposed) {
      return problem->tangent_solve(
          [&](const Leaves& x) { return product(*problem, false, x, at, given); }, goal);
    }
    const LeafPullback pullback(at, [&](const Leaves& z) { return problem->f(z, given); });
    return problem->tangent_solve([&](const Leaves& x) { return pullback(x); }, goal);
  };
  rules.fwd = [problem, transposed, count, rest](const Leaves& all) {
    Leaves x = solve_linear(problem, transposed, part(all, 0, count), part(all, count, count),
                            part(all, 2 * count, rest));
    Leaves residuals = joined(x, part(all, count, count + rest));
    return std::pair(std::move(x), std::move(residuals));
  };
  rules.bwd = [problem, transposed, count, rest](
                  const Leaves& /*arguments*/, const Leaves& residuals, const Leaves& cotangents) {
    const Leaves x = part(residuals, 0, count), at = part(residuals, count, count);
    const Leaves given = part(residuals, 2 * count, rest);
    const Leaves w = solve_linear(problem, !transposed, cotangents, at, given);
    const LeafPullback of_matrix(part(residuals, count, count + rest), [&](const Leaves& matrix) {
      return product(*problem, transposed, x, part(matrix, 0, count), part(matrix, count, rest));
    });
    return joined(w, negated(of_matrix(w)));
  };
  return custom_internal::call(std::move(rules), joined(joined(b, y), params));
}

Leaves call_root(const ProblemPtr& problem, const Leaves& initial, const Leaves& params) {
  const size_t count = initial.size(), rest = params.size();
  Rules rules;
  rules.transform = problem->transform;
  rules.value = [problem, count, rest](const Leaves& all) {
    Leaves y = problem->solve(part(all, 0, count), part(all, count, rest));
    Vectors(problem->transform, part(all, 0, count)).check("what solve returned", y);
    return roots_here(std::move(y), all);
  };
  rules.fwd = [problem, count, rest](const Leaves& all) {
    const Leaves given = part(all, count, rest);
    Leaves y = call_root(problem, part(all, 0, count), given);
    Leaves residuals = joined(y, given);
    return std::pair(std::move(y), std::move(residuals));
  };
  rules.bwd = [problem, count, rest](const Leaves& /*arguments*/, const Leaves& residuals,
                                     const Leaves& cotangents) {
    const Leaves y = part(residuals, 0, count), given = part(residuals, count, rest);
    const Leaves u = solve_linear(problem, /*transposed=*/true, cotangents, y, given);
    const LeafPullback of_params(given, [&](const Leaves& p) { return problem->f(y, p); });
    return joined(Leaves(count), negated(of_params(u)));  // none for initial
  };
  return custom_internal::call(std::move(rules), joined(initial, params));
}

void check_params(const Problem& problem, const Leaves& params) {
  for (const Tensor& t : params) {
    if (!t.defined() || !t.is_complex()) continue;
    transform_error(problem.transform, "the params must be real tensors, got one of dtype ",
                    t.scalar_type(), " (shape ", t.sizes(),
                    "). Write it as its real view (at::view_as_real).");
  }
}

// That f returns what it must, and that its result depends on the params alone.
void check_function(const Problem& problem, const Leaves& y, const Leaves& params) {
  const Leaves residual = problem.f(constants(y), constants(params));
  Vectors(problem.transform, y).check("what f returned", residual);
  if (!differentiated_anywhere(residual)) return;
  transform_error(problem.transform,
                  "f closes over a tensor that is differentiated, and the root would lose its "
                  "gradient. Pass it as one of the params, or use stop_gradient on it.");
}

}  // namespace

Leaves root(std::shared_ptr<const Problem> problem, const Leaves& initial, const Leaves& params) {
  const Vectors unknowns(problem->transform, initial);
  check_params(*problem, params);
  const Leaves start = constants(initial);
  if (unknowns.size() == 0) return start;
  Leaves y = call_root(problem, start, params);
  check_function(*problem, y, params);
  return y;
}

Leaves iterate(const Map& g, const Leaves& start, const FixedPointOptions& options) {
  const Vectors vectors("fixed_point", start);
  const double small =
      options.tol.value_or(linear_solvers_internal::default_tolerance(vectors.dtype()));
  using Carry = std::tuple<Tensor, Tensor, Tensor>;  // y, the size of the last step, steps
  const auto arrived = [&](const Carry& carry) {
    const auto& [y, step, count] = carry;
    return step <= small * (1 + y.norm());
  };
  const auto go_on = [&](const Carry& carry) {
    const auto& [y, step, count] = carry;
    const Leaves image = g(vectors.split(y));
    vectors.check("what f returned", image);
    const Tensor next = vectors.join(image);
    return Carry(next, (next - y).norm(), count + 1);
  };
  const auto moving = [&](const Carry& carry) {
    const auto& [y, step, count] = carry;
    return arrived(carry)
        .logical_not()
        .logical_and(count < options.max_steps)
        .logical_and(at::isfinite(step));
  };
  const Tensor first = vectors.join(start);
  const Tensor none = at::zeros({}, first.options().dtype(at::kLong));
  // One step first: the loop's condition looks at the step.
  const Carry end = while_loop(moving, go_on, go_on(Carry(first, Tensor(), none)));
  return vectors.split(linear_solvers_internal::known(arrived(end), std::get<0>(end)));
}

Leaves minus(const Leaves& a, const Leaves& b) {
  Leaves difference;
  for (size_t i = 0; i < a.size(); ++i) difference.push_back(a[i] - b[i]);
  return difference;
}

void throw_structure(const char* transform, const char* who, const std::string& mismatch) {
  transform_error(transform, "what ", who,
                  " returned must have the structure of initial, but does not: ", mismatch, ".");
}

}  // namespace torchlift::implicit_internal
