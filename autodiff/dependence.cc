#include "autodiff/dependence.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "autodiff/dependence_rules.h"
#include "core/boxed.h"
#include "core/error.h"
#include "core/grad_mode.h"
#include "core/lifted_tensor.h"
#include "core/promotion.h"

namespace torchlift {
namespace {

using at::Tensor;
using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;
using Kind = DependenceKind;

constexpr const char* kSparsity = "sparsity";

// --- about operators -----------------------------------------------------------------------------

bool is_view(const OperatorHandle& op) {
  const auto& results = op.schema().returns();
  return std::any_of(results.begin(), results.end(), [](const auto& result) {
    return result.alias_info() != nullptr && !result.alias_info()->isWrite();
  });
}

bool returns_tensors(const OperatorHandle& op) {
  const auto& results = op.schema().returns();
  return std::any_of(results.begin(), results.end(), [](const auto& result) {
    return result.type()->str().find("Tensor") != std::string::npos;
  });
}

std::vector<size_t> written_arguments(const OperatorHandle& op) {
  std::vector<size_t> written;
  for (size_t i = 0; i < op.schema().arguments().size(); ++i) {
    if (writes_argument(op, i)) written.push_back(i);
  }
  return written;
}

// "mul_", whose first argument is the target.
bool is_in_place(const OperatorHandle& op) {
  return op.schema().name().back() == '_' && writes_argument(op, 0);
}

bool is_out_form(const OperatorHandle& op, const std::vector<size_t>& written) {
  return std::all_of(written.begin(), written.end(),
                     [&](size_t i) { return op.schema().arguments()[i].is_out(); });
}

// "mul" for aten::mul and aten::mul_; other namespaces keep their names.
std::string plain_name(const OperatorHandle& op) {
  std::string name = op.schema().name();
  if (name.rfind("aten::", 0) == 0) name = name.substr(std::strlen("aten::"));
  if (is_in_place(op)) name.pop_back();
  return name;
}

// In-place operators that make another view of their target: the batching rules serve.
bool changes_metadata(const std::string& name) {
  static const std::set<std::string> names{"squeeze",   "unsqueeze",  "t",
                                           "transpose", "as_strided", "_conj"};
  return names.count(name) > 0;
}

// --- errors --------------------------------------------------------------------------------------

[[noreturn]] void throw_reads_values(const OperatorHandle& op) {
  if (op.schema().name() == "aten::_local_scalar_dense") {
    unsupported_error(
        kSparsity,
        "A number was asked for (.item(), float(x), int(x), bool(x), `if x > 0:`) of a tensor that "
        "is computed from the inputs. A sparsity pattern is for every input of this shape, so the "
        "function cannot look at values. Choose by torch.where(x > 0, a, b), which counts both "
        "branches; compute with tensors; or take the number from something that is no input.");
  }
  unsupported_error(
      kSparsity, op.schema().name(),
      " looks at the values of a tensor that is computed from the inputs: its answer, "
      "or the shape of its result, depends on them. A sparsity pattern is for every "
      "input of this shape. Use an operator whose shapes are fixed (torch.where, "
      "masks, torch.sort), or compute it from something that is no input.");
}

[[noreturn]] void throw_function() {
  unsupported_error(
      kSparsity,
      "The function calls an autograd Function, or a function with a derivative of its own "
      "(custom_jvp, custom_vjp): what its derivative depends on cannot be told from what it "
      "computes. Write it with operators, or give the pattern yourself: coloring(pattern) takes "
      "any "
      "that contains the nonzeros. (A no_grad block right after an operator on plain tensors looks "
      "the same; move it.)");
}

[[noreturn]] void throw_write(const OperatorHandle& op) {
  unsupported_error(kSparsity, toString(op.operator_name()),
                    " writes into its arguments in a way that is not known to the propagation of "
                    "sparsity patterns. Use an operator that returns new tensors.");
}

// --- the shapes of results -----------------------------------------------------------------------

Tensor on_meta(const Tensor& t) {
  const auto options = at::TensorOptions().dtype(t.scalar_type()).device(c10::kMeta);
  Tensor result = t.layout() == at::kStrided ? at::empty_strided(t.sizes(), t.strides(), options)
                                             : at::empty(t.sizes(), options);
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) {
    result.unsafeGetTensorImpl()->set_wrapped_number(true);
  }
  return result;
}

std::vector<IValue> call_on(const OperatorHandle& op, Stack stack) {
  op.callBoxed(stack);
  return stack;
}

std::vector<IValue> results_on_meta(const DependenceCall& call) {
  Stack stack;
  for (const IValue& arg : call.args()) {
    stack.push_back(arg.isDevice() ? IValue(c10::Device(c10::kMeta)) : map_tensors(arg, on_meta));
  }
  return call_on(call.op(), std::move(stack));
}

// For operators that do not run on the meta device.
std::vector<IValue> results_on_ones(const DependenceCall& call) {
  const auto value = [&](const Tensor& t) {
    const Tensor own = lower(t, *call.level()).value;
    return call.unknown(t) ? at::ones(t.sizes(), own.options()) : own;
  };
  Stack stack;
  for (const IValue& arg : call.args()) stack.push_back(map_tensors(arg, value));
  std::vector<IValue> results = call_on(call.op(), std::move(stack));
  for (IValue& result : results) result = map_tensors(result, on_meta);
  return results;
}

std::vector<IValue> shapes_of_results(const DependenceCall& call) {
  try {
    return results_on_meta(call);
  } catch (const c10::Error&) {
    return results_on_ones(call);
  }
}

// --- masks as values -----------------------------------------------------------------------------

bool has_derivative(const Tensor& t) { return t.is_floating_point() || t.is_complex(); }

c10::Device device_of(const DependenceCall& call) {
  for (const Tensor& t : call.tensors()) {
    if (call.unknown(t)) return t.device();
  }
  return c10::kCPU;
}

// The mask of all inputs in memory of its own: [inputs, ...like's shape], laid out as `like`.
Tensor filled(const DependenceCall& call, const Tensor& mask, const Tensor& like) {
  std::vector<int64_t> sizes{call.inputs()};
  sizes.insert(sizes.end(), like.sizes().begin(), like.sizes().end());
  const auto options = at::TensorOptions().dtype(like.scalar_type()).device(device_of(call));
  if (!mask.defined()) return at::zeros(sizes, options);
  const Tensor whole = as_dtype(align(mask, like.dim()).expand(sizes), like.scalar_type());
  if (like.is_contiguous() || !like.is_non_overlapping_and_dense()) return whole.contiguous();
  std::vector<int64_t> strides{like.numel()};
  strides.insert(strides.end(), like.strides().begin(), like.strides().end());
  Tensor result = at::empty_strided(sizes, strides, options);
  result.copy_(whole);
  return result;
}

// --- operators that move elements ----------------------------------------------------------------

bool is_moved(const DependenceRow& row, const std::string& argument) {
  return row.moved.empty() || std::any_of(row.moved.begin(), row.moved.end(),
                                          [&](const char* name) { return argument == name; });
}

// Whether an index is unknown: the batching rule would read zeros.
bool has_unknown_index(const DependenceCall& call) {
  const std::vector<Tensor> all = call.tensors();
  const bool moves_numbers = std::any_of(all.begin(), all.end(), has_derivative);
  return moves_numbers && std::any_of(all.begin(), all.end(), [&](const Tensor& t) {
           return !has_derivative(t) && call.unknown(t);
         });
}

// Whether the shape of the results depends on a mask that is unknown.
bool has_unknown_shape(const DependenceCall& call, const std::string& name) {
  if (name != "index" && name != "_unsafe_index" && name != "masked_select") return false;
  const std::vector<Tensor> all = call.tensors();
  return std::any_of(all.begin(), all.end(), [&](const Tensor& t) {
    return (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte) && call.unknown(t);
  });
}

// The argument as the batching rule is to see it.
IValue moved_argument(const DependenceCall& call, const DependenceRow& row, size_t index) {
  const IValue& arg = call.args()[index];
  const std::string& name = call.op().schema().arguments()[index].name();
  // What is filled in is a constant; what is subtracted is depended on.
  if (arg.isScalar() && (name == "value" || name == "fill_value")) return at::Scalar(0);
  if (arg.isScalar() && name == "alpha") return at::Scalar(1);
  return map_tensors(arg, [&](const Tensor& t) -> Tensor {
    if (!has_derivative(t)) return t;
    if (!is_moved(row, name)) return at::zeros(t.sizes(), lower(t, *call.level()).value.options());
    Tensor mask = call.mask(t);
    std::vector<int64_t> sizes{call.inputs()};
    sizes.insert(sizes.end(), t.sizes().begin(), t.sizes().end());
    const auto options = at::TensorOptions().dtype(t.scalar_type()).device(device_of(call));
    mask = mask.defined() ? as_dtype(mask, t.scalar_type()) : at::zeros({1}, options).expand(sizes);
    return lift(std::move(mask), 0, call.level());
  });
}

// The results of a batching rule, as masks.
std::vector<IValue> moved_results(const OperatorHandle& op, const DependenceCall& call,
                                  const DependenceRow& row) {
  Stack stack;
  for (size_t i = 0; i < call.args().size(); ++i) stack.push_back(moved_argument(call, row, i));
  call_batching_rule(op, call.level(), &stack);
  for (IValue& result : stack) {
    result = map_tensors(result, [&](const Tensor& t) -> Tensor {
      const Lowered lowered = lower(t, *call.level());
      if (!lowered.bdim.has_value()) return lift(filled(call, {}, t), 0, call.level());
      const Tensor value = lowered.value.movedim(*lowered.bdim, 0);
      if (row.kind == Kind::kMoves) return lift(value, 0, call.level());
      return lift(as_dtype(value.ne(0), t.scalar_type()), 0, call.level());
    });
  }
  return stack;
}

// --- operators that write ------------------------------------------------------------------------

// The form of an in-place operator that returns a new tensor.
std::optional<OperatorHandle> functional_form(const OperatorHandle& op) {
  if (!is_in_place(op)) return std::nullopt;
  std::string name = op.schema().name();
  name.pop_back();
  return c10::Dispatcher::singleton().findSchema({name, op.schema().overload_name()});
}

void write(const DependenceCall& call, const Tensor& target, const Tensor& mask) {
  LiftedTensorImpl* impl = as_lifted(target);
  const WriteScope writing(impl);
  const Tensor value = impl->value().movedim(*impl->bdim(), 0);
  value.copy_(filled(call, mask, on_meta(target)));
}

// A call without the tensors that `out=` names, whose contents it does not read.
DependenceCall without_targets(const DependenceCall& call) {
  std::vector<IValue> args = call.args();
  for (size_t i = 0; i < args.size(); ++i) {
    if (call.op().schema().arguments()[i].is_out()) args[i] = IValue();
  }
  return {call.op(), call.level(), std::move(args)};
}

}  // namespace

Tensor Dependence::spread(const Tensor& value, int64_t size) const {
  std::vector<int64_t> sizes{size};
  sizes.insert(sizes.end(), value.sizes().begin(), value.sizes().end());
  return at::zeros(sizes, value.options());
}

void Dependence::note_dense(const std::string& op) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  dense_.insert(op);
}

std::vector<std::string> Dependence::dense_operators() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return {dense_.begin(), dense_.end()};
}

void check_no_dependence(const std::vector<Tensor>& tensors) {
  for (const Tensor& t : tensors) {
    if (!t.defined()) continue;
    for (const LiftedTensorImpl* impl = as_lifted(t); impl != nullptr;
         impl = as_lifted(impl->value())) {
      const bool found = dynamic_cast<const Dependence*>(impl->level().interpreter()) != nullptr;
      if (found && impl->bdim().has_value()) throw_function();
    }
  }
}

// --- one call -----------------------------------------------------------------------------------

namespace {

// What is done for an operator.
struct Plan {
  Kind kind = Kind::kRule;
  DependenceRule rule = nullptr;       // with kRule
  const DependenceRow* row = nullptr;  // with kMoves and kAdds
  bool unlisted = false;               // to be taken for dense, where there is a derivative
};

bool moves(Kind kind) { return kind == Kind::kMoves || kind == Kind::kAdds; }

Plan plan_for(const DependenceCall& call, const std::string& name, bool constant) {
  const DependenceRow* row = find_dependence_row(name, call.op().schema().overload_name());
  Plan plan;
  if (row != nullptr) plan = {row->kind, row->rule, row, false};
  if (plan.kind == Kind::kReadsValues || has_unknown_shape(call, name)) {
    throw_reads_values(call.op());
  }
  if (constant && plan.kind != Kind::kMade) plan.kind = Kind::kNothing;
  if (moves(plan.kind) && has_unknown_index(call)) plan.kind = Kind::kRule;
  if (plan.kind == Kind::kRule && plan.rule == nullptr) {
    plan.rule = &dense;
    plan.unlisted = true;
  }
  return plan;
}

// The mask of one result. `unlisted` becomes true where it is dense for want of a rule.
Tensor mask_by(const Plan& plan, const DependenceCall& call, const Tensor& like, size_t result,
               bool& unlisted) {
  if (plan.kind != Kind::kRule || !has_derivative(like)) return {};
  unlisted = unlisted || plan.unlisted;
  return plan.rule(call, like, result);
}

// Of an operator whose results depend on shapes alone.
std::vector<IValue> made_results(const DependenceCall& call) {
  Stack shapes;
  for (const IValue& arg : call.args()) {
    shapes.push_back(map_tensors(arg, [&](const Tensor& t) {
      return at::empty(t.sizes(), lower(t, *call.level()).value.options());
    }));
  }
  std::vector<IValue> results = call_on(call.op(), std::move(shapes));
  for (IValue& result : results) {
    result = map_tensors(result, [&](const Tensor& t) { return lift_shared(t, call.level()); });
  }
  return results;
}

std::vector<IValue> new_results(const Plan& plan, const DependenceCall& call, bool& unlisted) {
  if (plan.kind == Kind::kMade) return made_results(call);
  if (moves(plan.kind)) return moved_results(call.op(), call, *plan.row);
  std::vector<IValue> results = shapes_of_results(call);
  for (size_t r = 0; r < results.size(); ++r) {
    results[r] = map_tensors(results[r], [&](const Tensor& like) {
      return lift(filled(call, mask_by(plan, call, like, r, unlisted), like), 0, call.level());
    });
  }
  return results;
}

// What is written into each of the targets.
std::vector<Tensor> written_masks(const Plan& plan, const DependenceCall& call, bool out_form,
                                  const std::vector<Tensor>& targets, bool& unlisted) {
  if (moves(plan.kind)) {
    const auto functional = functional_form(call.op());
    if (!functional.has_value()) throw_write(call.op());
    return {call.mask(moved_results(*functional, call, *plan.row)[0].toTensor())};
  }
  const DependenceCall read = out_form ? without_targets(call) : call;
  std::vector<Tensor> masks;
  for (size_t r = 0; r < targets.size(); ++r) {
    masks.push_back(mask_by(plan, read, on_meta(targets[r]), r, unlisted));
  }
  return masks;
}

// An operator that writes; returns its targets. What is written under no_grad changes no gradient.
std::vector<IValue> write_results(const Plan& plan, const DependenceCall& call,
                                  const std::string& name, const std::vector<size_t>& written,
                                  bool constant, bool& unlisted) {
  const bool out_form = is_out_form(call.op(), written);
  if (!is_in_place(call.op()) && !out_form) throw_write(call.op());
  std::vector<Tensor> targets;
  for (const size_t i : written) {
    for_each_tensor(call.args()[i], [&](const Tensor& t) {
      promote(call.op().schema().name().c_str(), t, call.level());
      targets.push_back(t);
    });
  }
  if (name == "detach") {
    // The target alone: what it shares memory with is not detached.
    as_lifted(targets[0])->replace_value(filled(call, {}, on_meta(targets[0])), 0);
  } else if (!constant) {
    const std::vector<Tensor> masks = written_masks(plan, call, out_form, targets, unlisted);
    for (size_t r = 0; r < targets.size(); ++r) write(call, targets[r], masks[r]);
  }
  std::vector<IValue> results;
  for (size_t r = 0; r < call.op().schema().returns().size() && r < written.size(); ++r) {
    results.push_back(call.args()[written[r]]);
  }
  return results;
}

bool has_dependent_argument(const OperatorHandle& op, const Level& level, const Stack& stack) {
  bool found = false;
  for (const IValue& arg : torch::jit::last(stack, op.schema().arguments().size())) {
    for_each_tensor(arg, [&](const Tensor& t) {
      const LiftedTensorImpl* impl = as_lifted(t);
      found = found || (impl != nullptr && &impl->level() == &level && impl->bdim().has_value());
    });
  }
  return found;
}

}  // namespace

bool Dependence::run(const OperatorHandle& op, const LevelPtr& level, Stack* stack) const {
  if (!has_dependent_argument(op, *level, *stack)) return false;  // Random numbers of no tensor.
  const std::string name = plain_name(op);
  const bool constant = !c10::GradMode::is_enabled();
  if (constant && OuterGradScope::suspicious(*level)) throw_function();
  const std::vector<size_t> written = written_arguments(op);
  if (is_view(op) && name != "detach" && !constant) return false;
  if (!written.empty() && changes_metadata(name)) return false;

  const size_t count = op.schema().arguments().size();
  const DependenceCall call(op, level, {stack->end() - static_cast<int64_t>(count), stack->end()});
  const Plan plan = plan_for(call, name, constant);
  if (!returns_tensors(op) && written.empty()) return false;
  bool unlisted = false;
  std::vector<IValue> results = written.empty()
                                    ? new_results(plan, call, unlisted)
                                    : write_results(plan, call, name, written, constant, unlisted);
  if (unlisted) note_dense(toString(op.operator_name()));
  torch::jit::drop(*stack, count);
  for (IValue& result : results) stack->push_back(std::move(result));
  return true;
}

}  // namespace torchlift
