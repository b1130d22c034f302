#include "compile/trace_rules.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/cat.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "batching/rules/numbers.h"
#include "compile/recording.h"
#include "core/error.h"
#include "core/lifted_tensor.h"

namespace torchlift::compile {
namespace {

using at::Tensor;
using c10::IValue;
using torch::jit::Stack;

std::vector<IValue> arguments(const TracedCall& call, const Stack& stack) {
  return {stack.end() - static_cast<int64_t>(call.op.schema().arguments().size()), stack.end()};
}

std::vector<IValue> take_arguments(const TracedCall& call, Stack* stack) {
  return torch::jit::pop(*stack, call.op.schema().arguments().size());
}

// The value of t, a tensor of `level`, which nobody differentiates.
Tensor untracked(const Tensor& t, const LevelPtr& level) {
  const LiftedTensorImpl* impl = as_lifted(t);
  return impl == nullptr ? t : lift(Tensor(impl->value()), impl->bdim(), level);
}

// --- ctc_loss ------------------------------------------------------------------------------------

// NOTE [ctc losses of one size]
// _ctc_loss gives, beside the losses, what its backward pass reads, as long as the longest target
// asks for. With lengths that are tensors that would be another shape in each run, so that the
// graph has one more example, whose target is as long as the targets can be.
bool ctc_loss(const TracedCall& call, Stack* stack) {
  if (call.op.schema().overload_name() != "Tensor") return false;
  std::vector<IValue> args = take_arguments(call, stack);
  const auto tensor = [&](size_t i) { return untracked(args[i].toTensor(), call.level); };
  const Tensor log_probs = tensor(0), targets = tensor(1);
  TORCH_CHECK(log_probs.dim() == 3 && (targets.dim() == 1 || targets.dim() == 2),
              "ctc_loss: expected log_probs of the shape [T, N, C] and targets of [N, S] or, one "
              "after the other, of one dim. Got ",
              log_probs.sizes(), " and ", targets.sizes());
  const int64_t steps = log_probs.size(0), count = log_probs.size(1), longest = targets.size(-1);
  const auto with = [&](size_t i, at::IntArrayRef sizes, int64_t value, int64_t dim) {
    stack->emplace_back(at::cat({tensor(i), tensor(i).new_full(sizes, value)}, dim));
  };
  with(0, {steps, 1, log_probs.size(2)}, 0, 1);
  if (targets.dim() == 1) with(1, {longest}, 0, 0);
  if (targets.dim() == 2) with(1, {1, longest}, 0, 0);
  with(2, {1}, steps, 0);
  with(3, {1}, longest, 0);
  stack->insert(stack->end(), args.begin() + 4, args.end());
  call.write_down(call.op, call.level, call.recording, stack);
  for (auto each = stack->end() - 2; each != stack->end(); ++each) {
    *each = each->toTensor().narrow(0, 0, count);
  }
  return true;
}

// cuDNN takes some lengths only, and may not take those of the next run.
bool use_cudnn_ctc_loss(const TracedCall& call, Stack* stack) {
  take_arguments(call, stack);
  stack->emplace_back(false);
  return true;
}

// --- answers that are assumed --------------------------------------------------------------------

// See NOTE [assumed answers] in batching/rules/numbers.h.
bool equal(const TracedCall& call, Stack* stack) {
  if (!AssumedAnswers::open()) return false;
  const std::vector<IValue> args = take_arguments(call, stack);
  const Tensor self = args[0].toTensor(), other = args[1].toTensor();
  const bool same_shape = self.sizes() == other.sizes();
  stack->emplace_back(same_shape && AssumedAnswers::answer(self.eq(other).all()).value());
  return true;
}

// There are no residuals of a system that has no more rows than columns, and none where a matrix
// has not its full rank, which two of the drivers tell.
bool lstsq(const TracedCall& call, Stack* stack) {
  const std::vector<IValue> args = arguments(call, *stack);  // self, b, rcond, driver
  const Tensor& a = args[0].toTensor();
  if (args[3].isNone() || a.dim() < 2 || a.size(-2) <= a.size(-1)) return false;
  const std::string& driver = args[3].toStringRef();
  if (driver != "gelsd" && driver != "gelss") return false;
  if (call.recording.by_shapes()) throw_shape_of_numbers(call.op, call.recording);
  call.write_down(call.op, call.level, call.recording, stack);
  const AssumedAnswers answers(
      "linalg.lstsq: with this driver there are residuals where all matrices have full rank, "
      "which they had, or had not, when the function was traced, unlike now. The driver "
      "\"gelsy\" gives none.",
      {true});
  AssumedAnswers::answer((*stack)[stack->size() - 2].toTensor().eq(a.size(-1)).all());
  return true;
}

// --- masks as indices ----------------------------------------------------------------------------

bool is_mask(const Tensor& t) {
  return t.scalar_type() == at::kBool || t.scalar_type() == at::kByte;
}

// Whether t depends on no input.
bool is_constant(const Tensor& t, const LevelPtr& level) {
  const LiftedTensorImpl* impl = as_lifted(t);
  if (impl == nullptr) return true;
  return &impl->level() == level.get() && !impl->bdim() && !is_lifted(impl->value());
}

// What is computed from constants alone is computed once: x[mask], where mask does not depend on
// the inputs, is x at the places that the mask has now.
bool index(const TracedCall& call, Stack* stack) {
  IValue& indices = stack->back();
  if (!indices.isOptionalTensorList()) return false;
  const Tensor self = (*stack)[stack->size() - 2].toTensor();
  c10::List<std::optional<Tensor>> places;
  for (const std::optional<Tensor>& each : indices.toOptionalTensorList()) {
    const auto dim = static_cast<int64_t>(places.size());
    if (!each.has_value() || !each->defined() || !is_mask(*each) || each->dim() == 0 ||
        !is_constant(*each, call.level) || dim + each->dim() > self.dim()) {
      places.push_back(each);
      continue;
    }
    TORCH_CHECK_INDEX(self.sizes().slice(dim, each->dim()) == each->sizes(),
                      "The shape of the mask ", each->sizes(), " at index ", dim,
                      " does not match the shape of the indexed tensor ", self.sizes());
    for (const Tensor& place : innermost(*each).nonzero().unbind(1)) places.push_back(place);
  }
  indices = places;
  return false;
}

// --- the table -----------------------------------------------------------------------------------

const std::unordered_map<std::string, TraceRule>& rules() {
  static const auto* all = new std::unordered_map<std::string, TraceRule>{
      {"aten::_ctc_loss", &ctc_loss}, {"aten::_use_cudnn_ctc_loss", &use_cudnn_ctc_loss},
      {"aten::equal", &equal},        {"aten::index", &index},
      {"aten::linalg_lstsq", &lstsq},
  };
  return *all;
}

}  // namespace

TraceRule find_trace_rule(const c10::OperatorHandle& op) {
  const auto found = rules().find(op.schema().name());
  return found == rules().end() ? nullptr : found->second;
}

void throw_shape_of_numbers(const c10::OperatorHandle& op, const Recording& recording) {
  unsupported_error(
      recording.transform(), toString(op.operator_name()),
      ": the shape of its result depends on numbers that are computed from the inputs. Use "
      "torchlift.nonzero, masked_select or unique, which take size=, or torch.where in place of "
      "a mask as an index.");
}

}  // namespace torchlift::compile
