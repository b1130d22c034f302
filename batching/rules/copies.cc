#include <ATen/core/Tensor.h>
#include <ATen/ops/_lazy_clone_ops.h>
#include <ATen/ops/_to_copy_ops.h>
#include <ATen/ops/clone_ops.h>
#include <ATen/ops/contiguous_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/contiguous_ops.h>
#include <ATen/ops/copy_ops.h>
#include <ATen/ops/fill_ops.h>
#include <ATen/ops/lift_fresh_copy_ops.h>
#include <ATen/ops/lift_fresh_ops.h>
#include <ATen/ops/lift_ops.h>
#include <ATen/ops/to_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/to_ops.h>
#include <ATen/ops/type_as_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/type_as_ops.h>
#include <ATen/ops/zero_ops.h>

#include "batching/rules/memory_format.h"
#include "batching/rules/pointwise.h"

// Copies, conversions, and filling with one value.

namespace torchlift {
namespace {

namespace ops = at::_ops;

// --- copies --------------------------------------------------------------------------------------

Batched clone_rule(BatchedArg self, std::optional<at::MemoryFormat> format) {
  return with_memory_format(self, format, [](const at::Tensor& value, auto physical) {
    return ops::clone::call(value, physical);
  });
}

Batched to_copy_rule(BatchedArg self, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout> layout, std::optional<at::Device> device,
                     std::optional<bool> pin_memory, bool non_blocking,
                     std::optional<at::MemoryFormat> format) {
  return with_memory_format(self, format, [&](const at::Tensor& value, auto physical) {
    return ops::_to_copy::call(value, dtype, layout, device, pin_memory, non_blocking, physical);
  });
}

// No type promotion: the source is converted to the target's dtype.
void copy__rule(BatchedArg self, BatchedArg src, bool non_blocking) {
  at::Tensor target = self.value;
  pointwise_internal::LinedUp lined;
  lined(self);
  lined(src);
  lined.dtypes_differ = false;
  if (lined.holds()) {
    ops::copy_::call(target, src.value, non_blocking);
    return;
  }
  pointwise_internal::check_target_rank("copy_", self, src.logical_dim());
  target = batch_first(self);
  ops::copy_::call(target, aligned(src, self.logical_dim()), non_blocking);
}

// The source in the shape and dtype of self: [B, *self.sizes()].
Batched copy_rule(const Level& level, BatchedArg self, BatchedArg src, bool non_blocking) {
  pointwise_internal::check_target_rank("copy", self, src.logical_dim());
  c10::SmallVector<int64_t, 8> sizes{level.size()};
  sizes.append(logical_sizes(self));
  const at::Tensor converted = aligned(src, self.logical_dim())
                                   .to(self.value.device(), self.value.scalar_type(), non_blocking);
  return {converted.expand(sizes).clone(at::MemoryFormat::Contiguous), 0};
}

Batched lift_fresh_rule(BatchedArg self) { return {self.value.alias(), self.bdim}; }

Batched plain_clone_rule(BatchedArg self) { return {self.value.clone(), self.bdim}; }

[[maybe_unused]] const RuleSet kCopies{
    rule<ops::clone, &clone_rule>(),
    rule<ops::_to_copy, &to_copy_rule>(),
    rule<ops::copy_, &copy__rule>(),
    rule<ops::copy, &copy_rule>(),
    rule<ops::lift_fresh, &lift_fresh_rule, OpKind::kView>(),
    rule<ops::lift_fresh_copy, &plain_clone_rule>(),
    rule<ops::lift, &plain_clone_rule>(),
    rule<ops::_lazy_clone, &plain_clone_rule>(),
};

// --- conversions that libtorch makes of these ----------------------------------------------------

namespace implicit = at::compositeimplicitautograd;

// The overloads of at::to by the C++ type of the operator.
template <class Op>
constexpr typename Op::ptr_schema to_function = &implicit::to;

[[maybe_unused]] const RuleSet kConversions{
    composite<ops::contiguous, &implicit::contiguous>(),
    composite<ops::type_as, &implicit::type_as>(),
    composite<ops::to_dtype, to_function<ops::to_dtype>>(),
    composite<ops::to_dtype_layout, to_function<ops::to_dtype_layout>>(),
    composite<ops::to_device, to_function<ops::to_device>>(),
    composite<ops::to_other, to_function<ops::to_other>>(),
};

// --- filling -------------------------------------------------------------------------------------

void check_fill_value(const BatchedArg& value) {
  TORCH_CHECK(value.logical_dim() == 0,
              "fill_ only supports 0-dimension value tensor but got tensor with ",
              value.logical_dim(), " dimensions.");
}

void fill__tensor_rule(BatchedArg self, BatchedArg value) {
  check_fill_value(value);
  copy__rule(self, value, /*non_blocking=*/false);
}

Batched fill_tensor_rule(const Level& level, BatchedArg self, BatchedArg value) {
  check_fill_value(value);
  return copy_rule(level, self, value, /*non_blocking=*/false);
}

[[maybe_unused]] const RuleSet kFills{
    rule<ops::fill__Tensor, &fill__tensor_rule>(),
    rule<ops::fill_Tensor, &fill_tensor_rule>(),
    pointwise_row<ops::fill__Scalar>(),
    pointwise_row<ops::fill_Scalar>(),
    pointwise_row<ops::zero_>(),
    pointwise_row<ops::zero>(),
};

}  // namespace
}  // namespace torchlift
