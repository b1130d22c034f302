#include "autodiff/jet_interpreter.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/div.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/result_type.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "autodiff/forward.h"
#include "autodiff/jet_products.h"
#include "autodiff/jet_rules.h"
#include "autodiff/jet_series.h"
#include "batching/out_forms.h"
#include "core/boxed.h"
#include "core/dispatch.h"
#include "core/domain.h"
#include "core/error.h"
#include "core/grad_mode.h"
#include "core/lifted_tensor.h"
#include "core/promotion.h"

namespace torchlift::jet_internal {
namespace {

using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;
using Args = std::vector<IValue>;

std::vector<JetRule>& all_rules() {
  static auto* rules = new std::vector<JetRule>();
  return *rules;
}

// --- finding rules -------------------------------------------------------------------------------

// The name of the operator that does the same and does not write, if its last letter says that this
// one does: "aten::mul_.Tensor" -> "aten::mul.Tensor".
std::string functional_name(const c10::OperatorName& name) {
  std::string base = name.name;
  if (base == "aten::pow_") return "aten::pow.Tensor_" + name.overload_name;  // pow.Scalar is 2^x.
  if (base.size() > 1 && base.back() == '_' && base[base.size() - 2] != '_') base.pop_back();
  return name.overload_name.empty() ? base : base + "." + name.overload_name;
}

// What is looked up once for each operator.
struct OperatorInfo {
  const JetRule* rule;
  bool writes = false;
  bool changes_view = false;         // of its argument: squeeze_
  std::optional<size_t> type_index;  // of an argument `dtype`
  // The operator that does the same and writes nothing, where there is one: formulas of those that
  // write take it that a tensor is written once.
  std::optional<OperatorHandle> functional;
};

std::optional<OperatorHandle> find_functional(const OperatorHandle& op, const std::string& name) {
  const size_t dot = name.find('.');
  const std::string overload = dot == std::string::npos ? "" : name.substr(dot + 1);
  const auto other = c10::Dispatcher::singleton().findSchema({name.substr(0, dot), overload});
  if (!other.has_value() || other->schema().is_mutable()) return std::nullopt;
  const auto& own = op.schema().arguments();
  const auto& others = other->schema().arguments();
  if (own.size() != others.size() || other->schema().returns().size() != 1) return std::nullopt;
  for (size_t i = 0; i < own.size(); ++i) {
    if (*own[i].type() != *others[i].type()) return std::nullopt;
  }
  return other;
}

const OperatorInfo& find_info(const OperatorHandle& op) {
  static const auto* by_name = [] {
    auto* rules = new std::unordered_map<std::string, const JetRule*>();
    for (const JetRule& rule : all_rules()) {
      TORCH_INTERNAL_ASSERT(rules->emplace(rule.name, &rule).second, "jet: two rules for ",
                            rule.name);
    }
    return rules;
  }();
  static const auto* none = new JetRule();
  static thread_local std::unordered_map<c10::OperatorName, OperatorInfo> seen;
  const auto [found, added] = seen.try_emplace(op.operator_name());
  OperatorInfo& info = found->second;
  if (!added) return info;
  const auto row = by_name->find(functional_name(op.operator_name()));
  info.rule = row == by_name->end() ? none : row->second;
  const auto& formals = op.schema().arguments();
  for (size_t i = 0; i < formals.size(); ++i) info.writes = info.writes || writes_argument(op, i);
  info.changes_view = op.hasTag(at::Tag::inplace_view);
  const auto type = op.schema().argumentIndexWithName("dtype");
  if (type.has_value()) info.type_index = static_cast<size_t>(*type);
  if (info.writes && !info.changes_view) {
    info.functional = find_functional(op, functional_name(op.operator_name()));
  }
  return info;
}

// --- one call of an operator ---------------------------------------------------------------------

struct Call {
  const OperatorHandle& op;
  const LevelPtr& level;
  const JetRule& rule;
  Args args;

  std::string name() const { return toString(op.operator_name()); }
  const char* transform() const { return level->interpreter()->transform(); }
  bool has_series(size_t i) const {
    bool found = false;
    for_each_tensor(args[i], [&](const at::Tensor& t) { found = found || is_series(t, *level); });
    return found;
  }
  at::Tensor lowered(const at::Tensor& t) const { return lower(t, *level).value; }
};

bool is_differentiable(const at::Tensor& t) { return t.is_floating_point() || t.is_complex(); }

bool contains(const Group& group, size_t i) {
  return std::find(group.begin(), group.end(), i) != group.end();
}

// The group that all series belong to, or null. A target that does not depend on t must be one of
// those that add up: as a factor, it stands for the same number in all terms, and could not be
// spread.
const Group* linear_group(const Call& call) {
  for (const Group& group : call.rule.linear_in) {
    bool holds = true;
    for (size_t i = 0; i < call.args.size() && holds; ++i) {
      holds = contains(group, i) || !(call.has_series(i) || writes_argument(call.op, i));
    }
    if (holds) return &group;
  }
  return nullptr;
}

// Whether the caller asks for a result of integers, which do not depend on t.
bool asks_for_integers(const OperatorInfo& info, const Args& args) {
  if (!info.type_index.has_value() || !args[*info.type_index].isInt()) return false;
  const at::ScalarType type = args[*info.type_index].toScalarType();
  return !at::isFloatingType(type) && !at::isComplexType(type);
}

// What an operator returned, of several tensors and lists of them: f of each tensor.
void map_results(const OperatorHandle& op, Stack* stack,
                 const std::function<at::Tensor(const at::Tensor&)>& f) {
  const size_t count = op.schema().returns().size();
  for (size_t i = stack->size() - count; i < stack->size(); ++i) {
    (*stack)[i] = map_tensors((*stack)[i], f);
  }
}

std::vector<at::Tensor> result_tensors(const OperatorHandle& op, const Stack& stack) {
  std::vector<at::Tensor> tensors;
  for (size_t i = stack.size() - op.schema().returns().size(); i < stack.size(); ++i) {
    for_each_tensor(stack[i], [&](const at::Tensor& t) { tensors.push_back(t); });
  }
  return tensors;
}

// --- linear operators ----------------------------------------------------------------------------

// A constant as a series. A number that was written in the program (x + 2.0) does not decide on the
// type of the result, which its series would.
at::Tensor spread_constant(const at::Tensor& t, const at::Tensor& partner, const LevelPtr& level) {
  at::Tensor value = lower(t, *level).value;
  if (value.unsafeGetTensorImpl()->is_wrapped_number()) {
    value = value.to(at::result_type(partner, value));
  }
  return to_series(spread_value(value, level->size()), level);
}

at::Tensor first_series(const Call& call) {
  at::Tensor found;
  for (const IValue& arg : call.args) {
    for_each_tensor(arg, [&](const at::Tensor& t) {
      if (!found.defined() && is_series(t, *call.level)) found = t;
    });
  }
  return found;
}

// Spreads the constants of the group. A target is written by the batching rule itself: what is
// given in its place shares its memory.
void run_linear(Call& call, const Group& group, Stack* stack) {
  const at::Tensor partner = first_series(call);
  const std::string name = call.name();
  at::Tensor target;
  for (size_t i = 0; i < call.args.size(); ++i) {
    const bool written = writes_argument(call.op, i);
    call.args[i] = map_tensors(call.args[i], [&](const at::Tensor& t) {
      if (written) {
        promote(call.op.schema().name().c_str(), t, call.level);
        target = t;
        const LiftedTensorImpl* impl = as_lifted(t);
        return lift_alias(impl->value(), impl->bdim(), call.level);
      }
      if (!is_series(t, *call.level) && contains(group, i)) {
        return spread_constant(t, partner, call.level);
      }
      return untracked(t, call.level);
    });
  }
  std::optional<WriteScope> writing;
  if (target.defined()) writing.emplace(as_lifted(target));
  for (const IValue& arg : call.args) stack->push_back(arg);
  call_batching_rule(call.op, call.level, stack);
  if (target.defined()) stack->back() = target;
}

// --- constants and piecewise affine operators ----------------------------------------------------

// Of coefficients 0.
void run_constant(const Call& call, Stack* stack) {
  for (const IValue& arg : call.args) {
    stack->push_back(map_tensors(
        arg, [&](const at::Tensor& t) { return untracked(primal(t, call.level), call.level); }));
  }
  call.op.callBoxed(*stack);
}

// Results that do not depend on t, and the first terms of those that do, apart from the rest. In
// values of `call.level`, which are taken out of the levels that worked on them while these are
// open, and put together when they have ended: what a function makes belongs to all open levels.
struct Parts {
  at::Tensor first;
  at::Tensor rest;  // [size - 1, ...]; undefined for a constant
};

void put_results(const Call& call, const std::vector<Parts>& parts, Stack* stack) {
  size_t next = 0;
  map_results(call.op, stack, [&](const at::Tensor& /*seen*/) {
    const Parts& each = parts[next++];
    if (!each.rest.defined()) return lift_shared(each.first, call.level);
    return to_series(at::cat({each.first.unsqueeze(0), each.rest}), call.level);
  });
}

// The two parts of every series among the arguments, in their order.
std::vector<Parts> argument_parts(const Call& call) {
  std::vector<Parts> parts;
  for (const IValue& arg : call.args) {
    for_each_tensor(arg, [&](const at::Tensor& t) {
      if (!is_series(t, *call.level)) return;
      const at::Tensor all = stacked(t, *call.level);
      parts.push_back({all.select(0, 0).clone(), all.narrow(0, 1, all.size(0) - 1).clone()});
    });
  }
  return parts;
}

// The arguments with make(index) in place of each series, and constants of `scope`.
template <class Make>
void push_arguments(const Call& call, ForwardScope& scope, Stack* stack, const Make& make) {
  size_t next = 0;
  for (const IValue& arg : call.args) {
    stack->push_back(map_tensors(arg, [&](const at::Tensor& t) {
      return is_series(t, *call.level) ? make(next++) : scope.constant(call.lowered(t));
    }));
  }
}

// A tangent for each of the directions, in dim 0.
at::Tensor in_front(const at::Tensor& tangent, std::optional<int64_t> bdim, int64_t directions) {
  if (bdim.has_value()) return tangent.movedim(*bdim, 0);
  std::vector<int64_t> sizes = tangent.sizes().vec();
  sizes.insert(sizes.begin(), directions);
  return tangent.expand(sizes);
}

// See kPiecewise: the other coefficients are the directions of one derivative.
void run_piecewise(const Call& call, Stack* stack) {
  const int64_t directions = call.level->size() - 1;
  const std::vector<Parts> series = argument_parts(call);
  std::vector<Parts> results;
  {
    const DomainScope around(call.level->depth() - 1);
    ForwardScope scope(directions);
    push_arguments(call, scope, stack,
                   [&](size_t i) { return scope.dual(series[i].first, series[i].rest); });
    call.op.callBoxed(*stack);
    for (const ForwardOutput& output : scope.finish(result_tensors(call.op, *stack))) {
      results.push_back({output.primal, {}});
      if (!output.tangent.defined() || !is_differentiable(output.primal)) continue;
      results.back().rest = in_front(output.tangent, output.bdim, directions);
    }
  }
  put_results(call, results, stack);
}

// --- products ------------------------------------------------------------------------------------

void run_product(const Call& call, Stack* stack) {
  const auto [a, b] = call.rule.factors;
  Args args = call.args;
  for (size_t i = 0; i < args.size(); ++i) {
    if (i == a || i == b || i == call.rule.addend) continue;
    args[i] = map_tensors(args[i], [&](const at::Tensor& t) { return call.lowered(t); });
  }
  const auto run = [&](const at::Tensor& left, const at::Tensor& right, const at::Tensor& addend) {
    Stack inner(args.begin(), args.end());
    inner[a] = left;
    inner[b] = right;
    if (addend.defined()) inner[*call.rule.addend] = addend;
    call.op.callBoxed(inner);
    return inner.back().toTensor();
  };
  at::Tensor addend;
  if (call.rule.addend.has_value() && args[*call.rule.addend].isTensor()) {
    addend = args[*call.rule.addend].toTensor();
  }
  stack->emplace_back(product(args[a].toTensor(), args[b].toTensor(), addend, run));
}

// --- formulas ------------------------------------------------------------------------------------

// 1, 2, ..., n as [n, 1, 1...], to multiply the coefficients `like` with.
at::Tensor orders(int64_t n, const at::Tensor& like) {
  std::vector<int64_t> sizes(static_cast<size_t>(like.dim()), 1);
  sizes[0] = n;
  const auto type = c10::toRealValueType(like.scalar_type());
  return at::arange(1, n + 1, like.options().dtype(type)).view(sizes);
}

std::shared_ptr<const Interpreter> formula_interpreter();

// What libtorch says when it has no formula of forward mode.
bool lacks_formula(const c10::Error& error) {
  return std::string(error.what_without_backtrace()).find("forward AD") != std::string::npos;
}

void call_with_formula(const Call& call, Stack* stack) {
  try {
    call.op.callBoxed(*stack);
  } catch (const c10::Error& error) {
    if (!lacks_formula(error)) throw;
    unsupported_error(call.transform(), call.name(),
                      " has no derivative formula of forward mode, so it cannot be expanded in a "
                      "Taylor series. Write the function with other operators.");
  }
}

// NOTE [formulas as series]
// y(t) = f(x(t)) has y'(t) = f'(x(t)) x'(t), and libtorch has a formula for the right side. It is
// evaluated on the series x and x', of one term less, which is a jet of a jvp of one operator: the
// formula's own operators come back to the interpreter. (If it needs f again, then with a term less
// each time; so the recursion ends, with f itself of x_0.) Integrated, that gives all terms of y
// but the first, which is f(x_0). f runs once, so that what it draws is the same for all terms.
void run_formula(const Call& call, Stack* stack) {
  const int64_t terms = call.level->size() - 1;
  std::vector<Parts> series = argument_parts(call);  // the terms of x, and of x'
  for (Parts& each : series) {
    if (terms > 1) {
      each.first = at::cat({each.first.unsqueeze(0), each.rest.narrow(0, 0, terms - 1)});
    } else {
      each.first = each.first.unsqueeze(0);
    }
    each.rest = at::mul(each.rest, orders(terms, each.rest));
  }
  std::vector<Parts> results;
  std::vector<bool> is_constant_slope;
  {
    const LevelScope shorter(
        {.kind = LevelKind::kInterpreted, .size = terms, .interpreter = formula_interpreter()});
    const LevelPtr& level = shorter.level();
    ForwardScope scope;
    push_arguments(call, scope, stack, [&](size_t i) {
      return scope.dual(lift(series[i].first, 0, level), lift(series[i].rest, 0, level));
    });
    call_with_formula(call, stack);
    for (const ForwardOutput& output : scope.finish(result_tensors(call.op, *stack))) {
      const Lowered y = lower(output.primal, *level);
      results.push_back({y.bdim ? y.value.select(*y.bdim, 0) : y.value, {}});
      is_constant_slope.push_back(false);
      if (!output.tangent.defined() || !is_differentiable(output.primal)) continue;
      const Lowered slope = lower(output.tangent, *level);
      results.back().rest = slope.bdim ? slope.value.movedim(*slope.bdim, 0) : slope.value;
      is_constant_slope.back() = !slope.bdim.has_value();
    }
  }
  for (size_t i = 0; i < results.size(); ++i) {
    at::Tensor& slope = results[i].rest;
    if (!slope.defined()) continue;
    if (is_constant_slope[i]) slope = spread_value(slope, terms);
    slope = at::div(slope, orders(terms, slope));
  }
  put_results(call, results, stack);
}

// --- formulas in many directions -----------------------------------------------------------------

// Of a Laplacian: one series of order 2 for each direction, [3, D, ...]. The sum of the
// coefficients 2 may be that of the first one: the sum of the results is the same.
at::Tensor expanded(const at::Tensor& summed) {
  const int64_t directions = summed.size(0) - 2;
  std::vector<int64_t> sizes = summed.sizes().vec();
  sizes[0] = directions;
  return at::stack({summed.narrow(0, 0, 1).expand(sizes), summed.narrow(0, 1, directions),
                    spread_value(summed.select(0, directions + 1), directions)});
}

// The parts of a result of series of order 2, at `orders`, one for each direction, at `batch`.
Parts summed_parts(const at::Tensor& result, const Level& orders, const Level& batch) {
  const Lowered each = lower(result, batch);
  const at::Tensor series = each.bdim ? each.value.movedim(*each.bdim, 0) : each.value;
  const Lowered all = lower(series, orders);
  if (!all.bdim) return {each.bdim ? all.value.select(0, 0) : all.value, {}};
  at::Tensor parts = all.value.movedim(*all.bdim, 0);  // [3, D, ...]
  if (!each.bdim) {
    std::vector<int64_t> sizes = parts.sizes().vec();
    sizes.insert(sizes.begin() + 1, batch.size());
    parts = parts.unsqueeze(1).expand(sizes);
  }
  return {parts.select(0, 0).select(0, 0),
          at::cat({parts.select(0, 1), parts.select(0, 2).sum(0, /*keepdim=*/true)})};
}

// The level of the directions is inside of that of
// the series: its rule comes first, and the interpreter, which opens levels, works on what is left.
void run_summed_formula(const Call& call, Stack* stack) {
  const int64_t directions = call.level->size() - 2;
  std::vector<at::Tensor> series;
  for (const IValue& arg : call.args) {
    for_each_tensor(arg, [&](const at::Tensor& t) {
      if (is_series(t, *call.level)) series.push_back(expanded(stacked(t, *call.level)));
    });
  }
  std::vector<Parts> results;
  {
    const LevelScope orders(
        {.kind = LevelKind::kInterpreted, .size = 3, .interpreter = formula_interpreter()});
    const LevelScope batch({.size = directions, .randomness = Randomness::kSame});
    size_t next = 0;
    for (const IValue& arg : call.args) {
      stack->push_back(map_tensors(arg, [&](const at::Tensor& t) {
        if (!is_series(t, *call.level)) return call.lowered(t);
        return lift(lift(series[next++], 0, orders.level()), 0, batch.level());
      }));
    }
    call.op.callBoxed(*stack);
    for (const at::Tensor& result : result_tensors(call.op, *stack)) {
      results.push_back(summed_parts(result, *orders.level(), *batch.level()));
    }
  }
  put_results(call, results, stack);
}

// Of a Hessian: the parts that a jvp of a jvp works on, with an example for each pair of
// directions.
struct PairedParts {
  at::Tensor value;         // [...]
  at::Tensor outer, inner;  // [D^2, ...]: the first derivatives in both directions of the pair
  at::Tensor second;        // [D^2, ...]
};

// In memory of their own: formulas may write.
PairedParts paired(const at::Tensor& parts, const Terms& terms) {
  const at::Tensor firsts = terms.first_parts(parts);
  const int64_t count = firsts.size(0);
  std::vector<int64_t> sizes = firsts.sizes().vec();
  sizes.insert(sizes.begin(), count);
  const auto for_each_pair = [&](int64_t dim) {
    return firsts.unsqueeze(dim).expand(sizes).flatten(0, 1).clone();
  };
  return {parts.select(0, 0).clone(), for_each_pair(1), for_each_pair(0),
          at::mul(terms.second_parts(parts), 2)};
}

void run_paired_formula(const Call& call, Stack* stack) {
  const Terms terms(call.level);
  const int64_t directions = terms.directions();
  std::vector<PairedParts> series;
  for (const IValue& arg : call.args) {
    for_each_tensor(arg, [&](const at::Tensor& t) {
      if (is_series(t, *call.level)) series.push_back(paired(stacked(t, *call.level), terms));
    });
  }
  std::vector<Parts> results;
  {
    const LevelScope pairs({.size = directions * directions, .randomness = Randomness::kSame});
    const auto lifted = [&](const at::Tensor& t) { return lift(t, 0, pairs.level()); };
    const auto rows = [&](const at::Tensor& t) {
      const Lowered each = lower(t, *pairs.level());
      return in_front(each.value, each.bdim, directions * directions);
    };
    ForwardScope outer;
    std::optional<ForwardScope> inner(std::in_place);
    size_t next = 0;
    for (const IValue& arg : call.args) {
      stack->push_back(map_tensors(arg, [&](const at::Tensor& t) {
        if (!is_series(t, *call.level)) return inner->constant(outer.constant(call.lowered(t)));
        const PairedParts& each = series[next++];
        return inner->dual(outer.dual(each.value, lifted(each.outer)),
                           outer.dual(lifted(each.inner), lifted(each.second)));
      }));
    }
    call_with_formula(call, stack);
    std::vector<at::Tensor> values, slopes;
    for (ForwardOutput& output : inner->finish(result_tensors(call.op, *stack))) {
      values.push_back(std::move(output.primal));
      slopes.push_back(std::move(output.tangent));
    }
    inner.reset();
    const size_t count = values.size();
    values.insert(values.end(), slopes.begin(), slopes.end());
    const std::vector<ForwardOutput> outputs = outer.finish(values);
    for (size_t i = 0; i < count; ++i) {
      const Lowered value = lower(outputs[i].primal, *pairs.level());
      results.push_back({value.bdim ? value.value.select(*value.bdim, 0) : value.value, {}});
      const ForwardOutput& slope = outputs[count + i];
      if (!slope.primal.defined() || !is_differentiable(outputs[i].primal)) continue;
      const at::Tensor firsts = rows(slope.primal).narrow(0, 0, directions);
      const at::Tensor seconds = slope.tangent.defined() ? at::mul(rows(slope.tangent), 0.5)
                                                         : at::zeros_like(rows(slope.primal));
      results.back().rest = at::cat({firsts, seconds});
    }
  }
  put_results(call, results, stack);
}

void run_formula_of_kind(const Call& call, Stack* stack) {
  switch (series_kind(*call.level)) {
    case SeriesKind::kTaylor:
      return run_formula(call, stack);
    case SeriesKind::kSummed:
      return run_summed_formula(call, stack);
    case SeriesKind::kPaired:
      return run_paired_formula(call, stack);
  }
}

// --- operators that write ------------------------------------------------------------------------

void replace_selectors(Call& call) {
  for (const size_t i : call.rule.selectors) {
    call.args[i] = map_tensors(call.args[i], [&](const at::Tensor& t) {
      return is_series(t, *call.level) ? primal(t, call.level) : t;
    });
  }
}

bool any_series(const Call& call) {
  for (size_t i = 0; i < call.args.size(); ++i) {
    if (call.has_series(i)) return true;
  }
  return false;
}

// A series of one term is its value.
void run_order_zero(const Call& call, Stack* stack) {
  for (const IValue& arg : call.args) {
    stack->push_back(map_tensors(arg, [&](const at::Tensor& t) {
      return is_series(t, *call.level) ? stacked(t, *call.level).select(0, 0) : call.lowered(t);
    }));
  }
  call.op.callBoxed(*stack);
  map_results(call.op, stack, [&](const at::Tensor& result) {
    return is_differentiable(result) ? to_series(result.unsqueeze(0), call.level)
                                     : lift_shared(result, call.level);
  });
}

void run_function(Call& call, const c10::KernelFunction& function, Stack* stack) {
  for (const IValue& arg : call.args) {
    stack->push_back(
        map_tensors(arg, [&](const at::Tensor& t) { return untracked(t, call.level); }));
  }
  function.callBoxed(call.op, c10::DispatchKeySet(), stack);
}

// The results of an operator that returns new tensors; one that writes writes into its argument.
void compute(Call& call, Stack* stack) {
  replace_selectors(call);
  if (!any_series(call) || call.rule.otherwise == Otherwise::kConstant) {
    return run_constant(call, stack);
  }
  if (call.rule.constant_addend.isValid() && !call.has_series(*call.rule.addend)) {
    return run_function(call, call.rule.constant_addend, stack);
  }
  if (const Group* group = linear_group(call)) return run_linear(call, *group, stack);
  if (call.level->size() == 1) return run_order_zero(call, stack);
  switch (call.rule.otherwise) {
    case Otherwise::kConstant:
      break;
    case Otherwise::kPiecewise:
      return run_piecewise(call, stack);
    case Otherwise::kProduct:
      return run_product(call, stack);
    case Otherwise::kFunction:
      return run_function(call, call.rule.function, stack);
    case Otherwise::kFormula:
      return run_formula_of_kind(call, stack);
  }
}

[[noreturn]] void throw_writes(const Call& call) {
  unsupported_error(call.transform(), call.name(),
                    " writes into its arguments in a way that jet does not know. Use an operator "
                    "that returns a new tensor.");
}

// Only `op_(self, ...) -> self`, which writes numbers.
void check_writes_self(const Call& call, const OperatorInfo& info) {
  for (size_t i = 1; i < call.args.size(); ++i) {
    if (writes_argument(call.op, i)) throw_writes(call);
  }
  const bool changes_view = info.changes_view && call.rule.otherwise != Otherwise::kConstant;
  if (changes_view || !call.args[0].isTensor() || call.op.schema().returns().size() != 1) {
    throw_writes(call);
  }
}

// A target that is none of the level's has no place for derivatives.
void check_targets_belong(const Call& call) {
  for (size_t i = 0; i < call.args.size(); ++i) {
    if (!writes_argument(call.op, i)) continue;
    for_each_tensor(call.args[i], [&](const at::Tensor& t) {
      const LiftedTensorImpl* impl = as_lifted(t);
      if (impl != nullptr && &impl->level() == call.level.get()) return;
      throw_write_to_unbatched(call.op.schema().name().c_str(), t, *call.level);
    });
  }
}

// Checks what libtorch would, where the result was computed apart from its target.
void check_fits(const Call& call, const at::Tensor& result, const at::Tensor& target) {
  if (result.sizes() != target.sizes()) {
    transform_error(call.transform(), call.name(), " has a result of shape ", result.sizes(),
                    ", which cannot be written into a tensor of shape ", target.sizes(),
                    ". Use the operator that returns a new tensor.");
  }
  if (!c10::canCast(result.scalar_type(), target.scalar_type())) {
    transform_error(call.transform(), call.name(), " has a result of type ", result.scalar_type(),
                    ", which cannot be written into a tensor of type ", target.scalar_type(),
                    ". Use the operator that returns a new tensor.");
  }
}

void write(const Call& call, const at::Tensor& result, const at::Tensor& target) {
  check_fits(call, result, target);
  if (is_series(result, *call.level)) {
    promote(call.op.schema().name().c_str(), target, call.level);
  }
  LiftedTensorImpl* impl = as_lifted(target);
  const WriteScope writing(impl);
  at::Tensor alias = lift_alias(impl->value(), impl->bdim(), call.level);
  alias.copy_(result);
}

// The result is computed on a copy of the target, and then written into it.
void run_in_place(const Call& written, const OperatorInfo& info, Stack* stack) {
  Call call{info.functional.has_value() ? *info.functional : written.op, written.level,
            written.rule, written.args};
  const at::Tensor target = call.args[0].toTensor();
  const bool depends = call.rule.otherwise != Otherwise::kConstant && any_series(call);
  at::Tensor copy = lower(depends ? target : primal(target, call.level), *call.level).value.clone();
  if (!depends || !is_differentiable(target)) {
    copy = lift(std::move(copy), std::nullopt, call.level);
  } else if (is_series(target, *call.level)) {
    copy = lift(std::move(copy), as_lifted(target)->bdim(), call.level);
  } else {
    copy = to_series(spread_value(copy, call.level->size()), call.level);
  }
  call.args[0] = copy;
  compute(call, stack);
  write(written, stack->back().toTensor(), target);
  stack->back() = target;
}

// --- no_grad -------------------------------------------------------------------------------------

// Coefficient 0 as a constant that shares its memory.
at::Tensor primal_view(const at::Tensor& t, const LevelPtr& level) {
  return untracked(primal(t, level), level);
}

// Under no_grad the arguments are constants; a target keeps its derivatives, as its tangent in
// forward mode.
void run_cut(const Call& call, Stack* stack) {
  for (const IValue& arg : call.args) {
    stack->push_back(
        map_tensors(arg, [&](const at::Tensor& t) { return primal_view(t, call.level); }));
  }
  std::vector<at::Tensor> targets;
  std::optional<WriteScopes> writing(std::in_place, call.op, call.args);
  call.op.callBoxed(*stack);
  writing.reset();
  const size_t count = call.op.schema().returns().size();
  size_t next = 0;
  for (size_t r = 0; r < count; ++r) {
    const auto* alias = call.op.schema().returns()[r].alias_info();
    if (alias == nullptr || !alias->isWrite()) continue;
    while (next < call.args.size() && !writes_argument(call.op, next)) ++next;
    if (next < call.args.size()) (*stack)[stack->size() - count + r] = call.args[next++];
  }
}

// An autograd Function runs its forward with GradMode off, which looks like no_grad, and its result
// would be a constant. See NOTE [autograd Functions and outer domains] in core/grad_mode.h for how
// one is recognized.
[[noreturn]] void throw_function(const char* transform, const OperatorHandle& op) {
  unsupported_error(transform, toString(op.operator_name()),
                    " runs with gradients off inside an autograd Function (or in a no_grad block "
                    "that follows an operator on plain tensors; the two look alike). jet does not "
                    "know the Function's derivatives. Call the operators that it is made of.");
}

// --- the interpreter -----------------------------------------------------------------------------

class JetInterpreter final : public Interpreter {
 public:
  // no_grad in a formula means nothing.
  JetInterpreter(const char* transform, bool of_formula)
      : transform_(transform), of_formula_(of_formula) {}

  const char* transform() const override { return transform_; }

  bool run(const OperatorHandle& op, const LevelPtr& level, Stack* stack) const override {
    const size_t count = op.schema().arguments().size();
    const OperatorInfo& info = find_info(op);
    Call call{op, level, *info.rule,
              Args(stack->end() - static_cast<int64_t>(count), stack->end())};
    if (!first_series(call).defined()) return false;  // Random numbers of no tensor at all.
    const bool cut = is_cut(*level) && !info.changes_view;
    if (C10_UNLIKELY(cut && unnoted_nodes())) throw_function(transform(), op);
    const bool constant = asks_for_integers(info, call.args) || is_integral_target(info, call);
    if (!cut && !constant && info.rule->selectors.empty()) {
      const Group* group = linear_group(call);
      if (group != nullptr && serves_as_it_is(call, *group)) return false;
      if (group == nullptr && info.writes && run_out_form(op, level, stack)) return true;
    }
    torch::jit::drop(*stack, count);
    if (cut) {
      run_cut(call, stack);
    } else if (constant) {
      run_integers(call, stack);
    } else if (!info.writes) {
      compute(call, stack);
    } else if (const Group* group = linear_group(call)) {
      check_targets_belong(call);
      run_linear(call, *group, stack);
    } else {
      check_writes_self(call, info);
      check_targets_belong(call);
      run_in_place(call, info, stack);
    }
    return true;
  }

  at::Tensor spread(const at::Tensor& value, int64_t size) const override {
    return spread_value(value, size);
  }

 private:
  bool is_cut(const Level& level) const {
    return !of_formula_ && !c10::GradMode::is_enabled() && !in_derivative_code() &&
           level.outer_grad_mode() == OuterGradMode::kInherit;
  }

  // Whether the batching rule does right by these arguments. (A target that is a constant is
  // spread by it, as a promotion.)
  static bool serves_as_it_is(const Call& call, const Group& group) {
    for (const size_t i : group) {
      if (writes_argument(call.op, i)) continue;
      bool constants = false;
      for_each_tensor(call.args[i], [&](const at::Tensor& t) {
        constants = constants || !is_series(t, *call.level);
      });
      if (constants) return false;
    }
    return true;
  }

  static bool is_integral_target(const OperatorInfo& info, const Call& call) {
    return info.writes && writes_argument(call.op, 0) && call.args[0].isTensor() &&
           !is_differentiable(call.args[0].toTensor());
  }

  static void run_integers(const Call& call, Stack* stack) {
    for (const IValue& arg : call.args) {
      stack->push_back(
          map_tensors(arg, [&](const at::Tensor& t) { return primal(t, call.level); }));
    }
    call.op.callBoxed(*stack);
  }

  const char* const transform_;
  const bool of_formula_;
};

std::shared_ptr<const Interpreter> formula_interpreter() {
  static const auto* interpreter =
      new std::shared_ptr<const Interpreter>(std::make_shared<JetInterpreter>("jet", true));
  return *interpreter;
}

}  // namespace

JetRules::JetRules(std::initializer_list<std::vector<JetRule>> rules) {
  for (const std::vector<JetRule>& each : rules) {
    for (const JetRule& rule : each) all_rules().push_back(rule);
  }
}

const std::vector<JetRule>& jet_rules() { return all_rules(); }

std::shared_ptr<const Interpreter> laplacian_interpreter() {
  static const auto* interpreter =
      new std::shared_ptr<const Interpreter>(std::make_shared<JetInterpreter>("laplacian", false));
  return *interpreter;
}

std::shared_ptr<const Interpreter> hessian_interpreter() {
  static const auto* interpreter =
      new std::shared_ptr<const Interpreter>(std::make_shared<JetInterpreter>("hessian", false));
  return *interpreter;
}

std::shared_ptr<const Interpreter> jet_interpreter() {
  static const auto* interpreter =
      new std::shared_ptr<const Interpreter>(std::make_shared<JetInterpreter>("jet", false));
  return *interpreter;
}

}  // namespace torchlift::jet_internal
