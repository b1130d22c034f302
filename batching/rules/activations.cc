#include <ATen/core/Tensor.h>
#include <ATen/ops/_prelu_kernel_backward_ops.h>
#include <ATen/ops/_prelu_kernel_ops.h>
#include <ATen/ops/celu_ops.h>
#include <ATen/ops/elu_backward_ops.h>
#include <ATen/ops/elu_ops.h>
#include <ATen/ops/gelu_backward_ops.h>
#include <ATen/ops/gelu_ops.h>
#include <ATen/ops/hardshrink_backward_ops.h>
#include <ATen/ops/hardshrink_ops.h>
#include <ATen/ops/hardsigmoid_backward_ops.h>
#include <ATen/ops/hardsigmoid_ops.h>
#include <ATen/ops/hardswish_backward_ops.h>
#include <ATen/ops/hardswish_ops.h>
#include <ATen/ops/hardtanh_backward_ops.h>
#include <ATen/ops/hardtanh_ops.h>
#include <ATen/ops/leaky_relu_backward_ops.h>
#include <ATen/ops/leaky_relu_ops.h>
#include <ATen/ops/log_sigmoid_backward_ops.h>
#include <ATen/ops/log_sigmoid_forward_ops.h>
#include <ATen/ops/logit_backward_ops.h>
#include <ATen/ops/mish_backward_ops.h>
#include <ATen/ops/mish_ops.h>
#include <ATen/ops/relu_ops.h>
#include <ATen/ops/rrelu_with_noise_backward_ops.h>
#include <ATen/ops/sigmoid_backward_ops.h>
#include <ATen/ops/silu_backward_ops.h>
#include <ATen/ops/silu_ops.h>
#include <ATen/ops/softplus_backward_ops.h>
#include <ATen/ops/softplus_ops.h>
#include <ATen/ops/softshrink_backward_ops.h>
#include <ATen/ops/softshrink_ops.h>
#include <ATen/ops/tanh_backward_ops.h>
#include <ATen/ops/threshold_backward_ops.h>
#include <ATen/ops/threshold_ops.h>

#include "batching/rules/pointwise.h"

// Activation functions and the operators that their derivative formulas call.

namespace torchlift {
namespace {

namespace ops = at::_ops;

[[maybe_unused]] const RuleSet kRules{pointwise_rows<
    ops::relu, ops::relu_, ops::gelu, ops::gelu_, ops::silu, ops::silu_, ops::elu, ops::elu_,
    ops::celu, ops::celu_, ops::leaky_relu, ops::leaky_relu_, ops::softplus, ops::hardtanh,
    ops::hardtanh_, ops::hardswish, ops::hardswish_, ops::hardsigmoid, ops::hardsigmoid_,
    ops::hardshrink, ops::softshrink, ops::mish, ops::mish_, ops::threshold, ops::threshold_,
    ops::_prelu_kernel, ops::tanh_backward, ops::sigmoid_backward, ops::threshold_backward,
    ops::silu_backward, ops::elu_backward, ops::leaky_relu_backward, ops::softplus_backward,
    ops::hardtanh_backward, ops::hardswish_backward, ops::hardsigmoid_backward,
    ops::hardshrink_backward, ops::softshrink_backward, ops::mish_backward,
    ops::_prelu_kernel_backward, ops::rrelu_with_noise_backward, ops::logit_backward>()};

// --- gelu_backward: oneDNN's kernel, unlike ATen's, takes no operands that are to be broadcast
// -----

Batched gelu_backward_rule(BatchedArg grad, BatchedArg self, c10::string_view approximate) {
  const bool alike = grad.bdim == self.bdim && grad.value.sizes().equals(self.value.sizes());
  if (alike || logical_sizes(grad) != logical_sizes(self)) {
    return pointwise<ops::gelu_backward>(grad, self, approximate);
  }
  const int64_t size = batch_size_of({&grad, &self});
  return {ops::gelu_backward::call(expanded(grad, size).contiguous(),
                                   expanded(self, size).contiguous(), approximate),
          0};
}

[[maybe_unused]] const RuleSet kGelu{rule<ops::gelu_backward, &gelu_backward_rule>()};

// --- log_sigmoid: its buffer is [0] on CUDA, which has no batch dim ------------------------------

std::tuple<Batched, Batched> log_sigmoid_forward_rule(BatchedArg self) {
  auto [output, buffer] = ops::log_sigmoid_forward::call(self.value);
  const bool has_buffer = buffer.dim() == output.dim() && buffer.sizes() == output.sizes();
  return {Batched{output, self.bdim}, Batched{buffer, has_buffer ? self.bdim : std::nullopt}};
}

Batched log_sigmoid_backward_rule(BatchedArg grad, BatchedArg self, BatchedArg buffer) {
  using Op = ops::log_sigmoid_backward;
  if (buffer.value.sizes() != at::IntArrayRef({0})) return pointwise<Op>(grad, self, buffer);
  const auto call = [&](const at::Tensor& g, const at::Tensor& s) {
    return Op::call(g, s, buffer.value);
  };
  return pointwise_internal::call_pointwise(call, grad, self);
}

[[maybe_unused]] const RuleSet kLogSigmoid{
    rule<ops::log_sigmoid_forward, &log_sigmoid_forward_rule>(),
    rule<ops::log_sigmoid_backward, &log_sigmoid_backward_rule>(),
};

}  // namespace
}  // namespace torchlift
