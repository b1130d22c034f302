#include "batching/out_forms.h"

#include <c10/core/ScalarType.h>

#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/boxed.h"
#include "core/error.h"
#include "core/lifted_tensor.h"
#include "core/promotion.h"

namespace torchlift {
namespace {

using c10::FunctionSchema;
using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;

bool is_written(const c10::Argument& argument) {
  return argument.alias_info() != nullptr && argument.alias_info()->isWrite();
}

// Whether what `op` writes are keyword arguments, and what it returns are these.
bool writes_out_only(const FunctionSchema& op) {
  size_t written = 0;
  for (const auto& argument : op.arguments()) {
    if (!is_written(argument)) continue;
    if (!argument.kwarg_only() || argument.type()->str() != "Tensor") return false;
    ++written;
  }
  return written > 0 && op.returns().size() == written;
}

// Whether `other` takes the same arguments but for those, and returns as many new tensors.
bool is_functional_form(const FunctionSchema& other, const FunctionSchema& op) {
  for (const auto& result : other.returns()) {
    if (result.alias_info() != nullptr || result.type()->str() != "Tensor") return false;
  }
  if (other.returns().size() != op.returns().size()) return false;
  auto next = other.arguments().begin();
  for (const auto& argument : op.arguments()) {
    if (is_written(argument)) continue;
    if (next == other.arguments().end() || next->name() != argument.name() ||
        *next->type() != *argument.type() || is_written(*next)) {
      return false;
    }
    ++next;
  }
  return next == other.arguments().end();
}

using Overloads = std::unordered_map<std::string, std::vector<OperatorHandle>>;

const Overloads& overloads() {
  static const auto* all = [] {
    auto* found = new Overloads();
    auto& dispatcher = c10::Dispatcher::singleton();
    for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
      const auto op = dispatcher.findSchema(name);
      if (op.has_value()) (*found)[name.name].push_back(*op);
    }
    return found;
  }();
  return *all;
}

std::optional<OperatorHandle> functional_form(const OperatorHandle& op) {
  if (!writes_out_only(op.schema())) return std::nullopt;
  const auto same_name = overloads().find(op.schema().name());
  if (same_name == overloads().end()) return std::nullopt;
  for (const OperatorHandle& other : same_name->second) {
    if (is_functional_form(other.schema(), op.schema())) return other;
  }
  return std::nullopt;
}

void write(const OperatorHandle& op, const at::Tensor& result, const at::Tensor& out,
           const LevelPtr& level) {
  if (!c10::canCast(result.scalar_type(), out.scalar_type())) {
    unsupported_error("vmap", toString(op.operator_name()), ": a result of type ",
                      result.scalar_type(), " cannot be written into `out`, which has type ",
                      out.scalar_type(), ". Give an `out` of the result's type.");
  }
  promote(op.schema().name().c_str(), out, level);
  if (out.sizes().equals(result.sizes())) {
    out.copy_(result);
    return;
  }
  if (out.numel() != 0) {
    unsupported_error("vmap", toString(op.operator_name()), ": `out` has shape ", out.sizes(),
                      ", and the result ", result.sizes(),
                      ". Give an `out` of that shape, or one without elements.");
  }
  Lowered shown = lower(result.to(out.scalar_type()), *level);
  const WriteScope writing(as_lifted(out));
  as_lifted(out)->replace_value(std::move(shown.value), shown.bdim);
}

}  // namespace

bool run_out_form(const OperatorHandle& op, const LevelPtr& level, Stack* stack) {
  const auto form = functional_form(op);
  if (!form.has_value()) return false;
  const std::vector<IValue> args = torch::jit::pop(*stack, op.schema().arguments().size());
  Stack results;
  std::vector<at::Tensor> targets;
  for (size_t i = 0; i < args.size(); ++i) {
    if (writes_argument(op, i)) {
      targets.push_back(args[i].toTensor());
    } else {
      results.push_back(args[i]);
    }
  }
  form->callBoxed(results);
  for (size_t i = 0; i < targets.size(); ++i) {
    write(op, results[i].toTensor(), targets[i], level);
    stack->emplace_back(targets[i]);
  }
  return true;
}

}  // namespace torchlift
