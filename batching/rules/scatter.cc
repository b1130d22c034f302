// gather and scatter: one index for every element.

#include <ATen/core/Tensor.h>
#include <ATen/ops/gather_ops.h>
#include <ATen/ops/scatter_add_ops.h>
#include <ATen/ops/scatter_ops.h>
#include <ATen/ops/scatter_reduce_ops.h>

#include "batching/rules/dims.h"
#include "core/registry.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;

// These operators take a 0-d tensor for a 1-d one of size 1.
at::Tensor with_dims(const at::Tensor& value, const BatchedArg& arg) {
  return arg.logical_dim() == 0 ? value.unsqueeze(-1) : value;
}

// Tensors get the batch in front; anything else stays as it is.
struct BatchInFront {
  int64_t size;

  at::Tensor operator()(const BatchedArg& arg) const { return with_dims(expanded(arg, size), arg); }
  template <class T>
  const T& operator()(const T& arg) const {
    return arg;
  }
};

// The result has the shape of the index.
//   self [B, ...], index [B, ...], dim + 1 -> [B, ...]
Batched gather_rule(const Level& level, BatchedArg self, int64_t dim, BatchedArg index,
                    bool sparse_grad) {
  const bool alike =
      self.bdim == index.bdim && self.value.dim() == index.value.dim() && self.logical_dim() > 0;
  if (alike) {
    return {self.value.gather(physical_dim(self, dim), index.value, sparse_grad), self.bdim};
  }
  const BatchInFront in_front{level.size()};
  const int64_t at = wrap_dim(dim, self.logical_dim()) + 1;
  const at::Tensor result = in_front(self).gather(at, in_front(index), sparse_grad);
  return {index.logical_dim() == 0 ? result.squeeze(1) : result, 0};
}

// The result has the shape of self. Rest: src or a value, and what the overload takes besides.
template <class Op, class... Rest>
Batched scatter_rule(const Level& level, BatchedArg self, int64_t dim, BatchedArg index,
                     Rest... rest) {
  const BatchInFront in_front{level.size()};
  const int64_t at = wrap_dim(dim, self.logical_dim()) + 1;
  const at::Tensor result = Op::call(in_front(self), at, in_front(index), in_front(rest)...);
  return {self.logical_dim() == 0 ? result.squeeze(1) : result, 0};
}

// Writes into a view of the target that has its batch dim in front.
template <class Op, class... Rest>
void scatter__rule(const Level& level, BatchedArg self, int64_t dim, BatchedArg index,
                   Rest... rest) {
  const BatchInFront in_front{level.size()};
  at::Tensor target = in_front(self);
  Op::call(target, wrap_dim(dim, self.logical_dim()) + 1, in_front(index), in_front(rest)...);
}

using Text = c10::string_view;

template <class Op, class... Rest>
RuleEntry functional() {
  return rule<Op, &scatter_rule<Op, Rest...>>();
}

template <class Op, class... Rest>
RuleEntry in_place() {
  return rule<Op, &scatter__rule<Op, Rest...>>();
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::gather, &gather_rule>(),
    functional<ops::scatter_src, BatchedArg>(),
    functional<ops::scatter_value, at::Scalar>(),
    functional<ops::scatter_reduce, BatchedArg, Text>(),
    functional<ops::scatter_value_reduce, at::Scalar, Text>(),
    functional<ops::scatter_add, BatchedArg>(),
    functional<ops::scatter_reduce_two, BatchedArg, Text, bool>(),
    in_place<ops::scatter__src, BatchedArg>(),
    in_place<ops::scatter__value, at::Scalar>(),
    in_place<ops::scatter__reduce, BatchedArg, Text>(),
    in_place<ops::scatter__value_reduce, at::Scalar, Text>(),
    in_place<ops::scatter_add_, BatchedArg>(),
    in_place<ops::scatter_reduce__two, BatchedArg, Text, bool>(),
};

}  // namespace
}  // namespace torchlift
