#include "compile/uniform_constants.h"

#include <ATen/ExpandUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/core/ivalue.h>
#include <c10/util/accumulate.h>

#include <vector>

#include "core/boxed.h"
#include "core/keys.h"

namespace torchlift::compile {
namespace {

using c10::IValue;
using torch::jit::Stack;

constexpr int64_t kLargeBytes = 1 << 20;

// All elements lie in one place.
bool is_one_number(const at::Tensor& t) {
  if (t.layout() != c10::kStrided || !kPlainKeys.has_all(t.key_set())) return false;
  for (int64_t dim = 0; dim < t.dim(); ++dim) {
    if (t.size(dim) > 1 && t.stride(dim) != 0) return false;
  }
  return t.numel() > 0;
}

at::Tensor number_of(const at::Tensor& t) {
  return t.as_strided(std::vector<int64_t>(static_cast<size_t>(t.dim()), 1),
                      std::vector<int64_t>(static_cast<size_t>(t.dim()), 1));
}

// Of each element alone, by its numbers; not a copy, which is made to be written to.
bool works_on_elements(const c10::OperatorHandle& op) {
  if (!op.hasTag(at::Tag::pointwise) || op.hasTag(at::Tag::nondeterministic_seeded)) return false;
  const auto& schema = op.schema();
  const bool copies = schema.argumentIndexWithName("memory_format").has_value();
  return !copies && schema.returns().size() == 1 &&
         schema.returns()[0].type()->kind() == c10::TypeKind::TensorType;
}

// The shape that the arguments are broadcast to; false if one of them is more than one number.
bool uniform_shape(const c10::OperatorHandle& op, const Stack& stack, std::vector<int64_t>* shape) {
  const size_t first = stack.size() - op.schema().arguments().size();
  bool found = false;
  for (size_t i = first; i < stack.size(); ++i) {
    if (stack[i].isTensorList() || stack[i].isOptionalTensorList()) return false;
    if (!stack[i].isTensor() || !stack[i].toTensor().defined()) continue;
    const at::Tensor& t = stack[i].toTensor();
    if (!is_one_number(t)) return false;
    *shape = at::infer_size(*shape, t.sizes());
    found = true;
  }
  return found;
}

}  // namespace

bool UniformConstantsScope::Filter::call(const c10::OperatorHandle& op, Stack* stack) {
  if (!works_on_elements(op)) return false;
  std::vector<int64_t> shape;
  if (!uniform_shape(op, *stack, &shape)) return false;
  constexpr auto kElement = static_cast<int64_t>(sizeof(float));
  if (c10::multiply_integers(shape) < kLargeBytes / kElement) return false;
  // In place, all elements of the target are the one that is written.
  at::Tensor target;
  const size_t first = stack->size() - op.schema().arguments().size();
  for (size_t i = first; i < stack->size(); ++i) {
    IValue& value = (*stack)[i];
    if (!value.isTensor() || !value.toTensor().defined()) continue;
    if (writes_argument(op, i - first)) target = value.toTensor();
    value = number_of(value.toTensor());
  }
  if (target.defined() && target.sizes() != at::IntArrayRef(shape)) {
    TORCH_CHECK(false, op.schema().name(), ": the result, of shape ", at::IntArrayRef(shape),
                ", cannot be written into a tensor of shape ", target.sizes());
  }
  op.callBoxed(*stack);
  IValue& result = stack->back();
  result = target.defined() ? target : result.toTensor().expand(shape);
  return true;
}

}  // namespace torchlift::compile
