// Softmax and its kin.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_log_softmax_backward_data_ops.h>
#include <ATen/ops/_log_softmax_ops.h>
#include <ATen/ops/_masked_softmax.h>
#include <ATen/ops/_masked_softmax_backward.h>
#include <ATen/ops/_masked_softmax_backward_ops.h>
#include <ATen/ops/_masked_softmax_ops.h>
#include <ATen/ops/_safe_softmax_ops.h>
#include <ATen/ops/_softmax.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/_softmax_backward_data_ops.h>
#include <ATen/ops/_softmax_ops.h>
#include <ATen/ops/log_softmax_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/log_softmax_ops.h>
#include <ATen/ops/softmax_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/softmax_ops.h>

#include <limits>
#include <type_traits>

#include "batching/rules/narrow_softmax.h"
#include "batching/rules/reduction.h"

namespace torchlift {
namespace {
namespace ops = at::_ops;

using Kernel = at::Tensor (*)(const at::Tensor& x, int64_t dim, bool half_to_float);
using BackwardKernel = at::Tensor (*)(const at::Tensor& grad, const at::Tensor& output, int64_t dim,
                                      at::ScalarType input_dtype);

template <Kernel kernel>
Batched softmax_rule(BatchedArg self, int64_t dim, bool half_to_float) {
  if (self.logical_dim() > 0) {
    return {kernel(self.value, physical_dim(self, dim), half_to_float), self.bdim};
  }
  wrap_dim(dim, 0);
  return {kernel(self.value.unsqueeze(-1), 1, half_to_float).squeeze(-1), 0};
}

// grad and output have the same logical shape. ...N, ...N -> ...N along dim.
template <BackwardKernel kernel>
Batched softmax_backward(BatchedArg grad, BatchedArg output, int64_t dim,
                         at::ScalarType input_dtype) {
  if (grad.bdim == output.bdim && grad.value.dim() > 1) {
    return {kernel(grad.value, output.value, physical_dim(grad, dim), input_dtype), grad.bdim};
  }
  const int64_t size = batch_size_of({&grad, &output});
  const at::Tensor g = expanded(grad, size);
  const at::Tensor out = expanded(output, size);
  if (g.dim() == 1) {
    const at::Tensor result = kernel(g.unsqueeze(-1), out.unsqueeze(-1), 1, input_dtype);
    return {result.squeeze(-1), 0};
  }
  return {kernel(g, out, wrap_dim(dim, g.dim() - 1) + 1, input_dtype), 0};
}

// The kernel takes its mask in three fixed layouts that have no room for a batch dim, so the rule
// spells it out: true means masked, and a row that is masked throughout is nan, as in the kernel.
at::Tensor masked_rows(const at::Tensor& input, const at::Tensor& mask, int64_t dim) {
  const at::Tensor filled = input.masked_fill(mask, -std::numeric_limits<double>::infinity());
  return at::_softmax(filled, dim, /*half_to_float=*/false);
}

// mask_type 0: [L, L], 1: [B, L] (input [B, H, L, L]), 2: the input's shape.
at::Tensor mask_in_input_layout(const at::Tensor& mask, std::optional<int64_t> mask_type,
                                const at::Tensor& input) {
  if (mask.dim() == input.dim()) return mask;
  // Physical shapes with the batch first: [b, L, L] or [b, B, L].
  if (mask_type.value_or(2) == 0) return mask.unsqueeze(1).unsqueeze(1);
  return mask.unsqueeze(2).unsqueeze(2);
}

Batched masked_softmax(BatchedArg self, BatchedArg mask, std::optional<int64_t> dim,
                       std::optional<int64_t> mask_type) {
  const int64_t size = batch_size_of({&self, &mask});
  const at::Tensor input = expanded(self, size);
  const at::Tensor m = mask_in_input_layout(expanded(mask, size), mask_type, input);
  const int64_t physical = wrap_dim(dim.value_or(-1), input.dim() - 1) + 1;
  return {masked_rows(input, m.expand(input.sizes()), physical), 0};
}

Batched masked_softmax_backward(BatchedArg grad, BatchedArg output, BatchedArg mask,
                                std::optional<int64_t> dim) {
  const int64_t size = batch_size_of({&grad, &output, &mask});
  const at::Tensor out = expanded(output, size);
  const at::Tensor m = expanded(mask, size);
  const at::Tensor g = expanded(grad, size).masked_fill(m, 0);
  const int64_t physical = wrap_dim(dim.value_or(-1), out.dim() - 1) + 1;
  // A masked element has no gradient, not even in a row that is masked throughout (all nan).
  const at::Tensor d_input = at::_softmax_backward_data(g, out, physical, out.scalar_type());
  return {d_input.masked_fill(m, 0), 0};
}

[[maybe_unused]] const RuleSet kRules{along_dim_rows<ops::_safe_softmax>()};

// The overload set has one function or two, with the version of torch.
template <class Op>
using SchemaOf = std::add_pointer_t<typename Op::schema>;

[[maybe_unused]] const RuleSet kKernels{
    rule<ops::_softmax, &softmax_rule<&softmax_along>>(),
    rule<ops::_log_softmax, &softmax_rule<&log_softmax_along>>(),
    rule<ops::_softmax_backward_data, &softmax_backward<&softmax_backward_along>>(),
    rule<ops::_log_softmax_backward_data, &softmax_backward<&log_softmax_backward_along>>(),
    rule<ops::_masked_softmax, &masked_softmax>(),
    rule<ops::_masked_softmax_backward, &masked_softmax_backward>(),
    composite<ops::softmax_int,
              static_cast<SchemaOf<ops::softmax_int>>(&at::compositeimplicitautograd::softmax)>(),
    composite<ops::log_softmax_int, static_cast<SchemaOf<ops::log_softmax_int>>(
                                        &at::compositeimplicitautograd::log_softmax)>(),
};

}  // namespace
}  // namespace torchlift
