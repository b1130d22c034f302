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

// Of the keyword arguments that `op` writes, if it writes no others and returns these or nothing
// (foreach operators do): "Tensor" or "Tensor[]" each. Else empty.
std::vector<std::string> types_of_out(const OperatorHandle& op) {
  const auto& arguments = op.schema().arguments();
  std::vector<std::string> types;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (!writes_argument(op, i)) continue;
    types.push_back(arguments[i].type()->str());
    if (!arguments[i].kwarg_only() || (types.back() != "Tensor" && types.back() != "Tensor[]")) {
      return {};
    }
  }
  const size_t returned = op.schema().returns().size();
  if (returned != 0 && returned != types.size()) return {};
  return types;
}

// Whether `other` takes the same arguments but for those, and returns new tensors of these types.
bool is_functional_form(const OperatorHandle& other, const OperatorHandle& op,
                        const std::vector<std::string>& types) {
  const auto& returns = other.schema().returns();
  if (returns.size() != types.size()) return false;
  for (size_t i = 0; i < returns.size(); ++i) {
    if (returns[i].alias_info() != nullptr || returns[i].type()->str() != types[i]) return false;
  }
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
  const std::vector<std::string> types = types_of_out(op);
  if (types.empty()) return std::nullopt;
  const auto same_name = overloads().find(op.schema().name());
  if (same_name == overloads().end()) return std::nullopt;
  for (const OperatorHandle& other : same_name->second) {
    if (is_functional_form(other, op, types)) return other;
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

void write(const OperatorHandle& op, const IValue& result, const IValue& out,
           const LevelPtr& level) {
  if (!out.isTensorList()) return write(op, result.toTensor(), out.toTensor(), level);
  const std::vector<at::Tensor> results = result.toTensorVector(), targets = out.toTensorVector();
  TORCH_CHECK(results.size() == targets.size(), "[vmap] ", toString(op.operator_name()),
              ": `out` has ", targets.size(), " tensors, but there are ", results.size(),
              " results.");
  for (size_t i = 0; i < results.size(); ++i) write(op, results[i], targets[i], level);
}

}  // namespace

bool run_out_form(const OperatorHandle& op, const LevelPtr& level, Stack* stack) {
  const auto form = functional_form(op);
  if (!form.has_value()) return false;
  const std::vector<IValue> args = torch::jit::pop(*stack, op.schema().arguments().size());
  Stack results;
  std::vector<IValue> targets;
  for (size_t i = 0; i < args.size(); ++i) {
    if (writes_argument(op, i)) {
      targets.push_back(args[i]);
    } else {
      results.push_back(args[i]);
    }
  }
  form->callBoxed(results);
  for (size_t i = 0; i < targets.size(); ++i) {
    write(op, results[i], targets[i], level);
    if (!op.schema().returns().empty()) stack->push_back(targets[i]);
  }
  return true;
}

}  // namespace torchlift
