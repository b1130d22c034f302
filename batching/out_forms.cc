#include "batching/out_forms.h"

#include <c10/core/ScalarType.h>

#include <mutex>
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

using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;

// Whether what `op` writes are keyword arguments, and what it returns are these.
bool writes_out_only(const OperatorHandle& op) {
  const auto& arguments = op.schema().arguments();
  size_t written = 0;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (!writes_argument(op, i)) continue;
    if (!arguments[i].kwarg_only() || arguments[i].type()->str() != "Tensor") return false;
    ++written;
  }
  return written > 0 && op.schema().returns().size() == written;
}

// Whether `other` takes the same arguments but for those, and returns as many new tensors.
bool is_functional_form(const OperatorHandle& other, const OperatorHandle& op) {
  for (const auto& result : other.schema().returns()) {
    if (result.alias_info() != nullptr || result.type()->str() != "Tensor") return false;
  }
  if (other.schema().returns().size() != op.schema().returns().size()) return false;
  const auto& own = other.schema().arguments();
  const auto& arguments = op.schema().arguments();
  size_t next = 0;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (writes_argument(op, i)) continue;
    if (next == own.size() || own[next].name() != arguments[i].name() ||
        *own[next].type() != *arguments[i].type() || writes_argument(other, next)) {
      return false;
    }
    ++next;
  }
  return next == own.size();
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

std::optional<OperatorHandle> find_functional_form(const OperatorHandle& op) {
  if (!writes_out_only(op)) return std::nullopt;
  const auto same_name = overloads().find(op.schema().name());
  if (same_name == overloads().end()) return std::nullopt;
  for (const OperatorHandle& other : same_name->second) {
    if (is_functional_form(other, op)) return other;
  }
  return std::nullopt;
}

std::optional<OperatorHandle> functional_form(const OperatorHandle& op) {
  static auto* found = new std::unordered_map<c10::OperatorName, std::optional<OperatorHandle>>();
  static auto* mutex = new std::mutex();
  const std::lock_guard<std::mutex> lock(*mutex);
  const auto [form, added] = found->try_emplace(op.operator_name());
  if (added) form->second = find_functional_form(op);
  return form->second;
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
