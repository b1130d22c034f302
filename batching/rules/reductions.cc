// Reductions to one value a slice: sum, mean, max, any, norms, variance...

#include <ATen/core/Tensor.h>
#include <ATen/ops/all.h>
#include <ATen/ops/all_ops.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/amax_ops.h>
#include <ATen/ops/amin.h>
#include <ATen/ops/amin_ops.h>
#include <ATen/ops/any.h>
#include <ATen/ops/any_ops.h>
#include <ATen/ops/count_nonzero.h>
#include <ATen/ops/count_nonzero_ops.h>
#include <ATen/ops/diagonal.h>
#include <ATen/ops/hash_tensor_ops.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/linalg_vector_norm_ops.h>
#include <ATen/ops/logsumexp_ops.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/mean_ops.h>
#include <ATen/ops/nansum_ops.h>
#include <ATen/ops/norm.h>
#include <ATen/ops/norm_ops.h>
#include <ATen/ops/prod.h>
#include <ATen/ops/prod_ops.h>
#include <ATen/ops/std_mean_ops.h>
#include <ATen/ops/std_ops.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/sum_ops.h>
#include <ATen/ops/trace_ops.h>
#include <ATen/ops/var_mean_ops.h>
#include <ATen/ops/var_ops.h>

#include "batching/rules/reduction.h"

namespace torchlift {
namespace {
namespace ops = at::_ops;

// --- full reductions that have a form with a list of dims ----------------------------------------

// DimOp is the same reduction over a list of dims.
template <class DimOp, class... Rest>
Batched over_all_dims(const BatchedArg& self, const Rest&... rest) {
  const Dimmed in = dimmed(self);
  return {DimOp::call(in.value, in.all_dims(), /*keepdim=*/false, rest...), 0};
}

Batched sum_rule(BatchedArg self, std::optional<at::ScalarType> dtype) {
  return over_all_dims<ops::sum_dim_IntList>(self, dtype);
}

Batched mean_rule(BatchedArg self, std::optional<at::ScalarType> dtype) {
  return over_all_dims<ops::mean_dim>(self, dtype);
}

template <class DimOp>
Batched full_rule(BatchedArg self) {
  return over_all_dims<DimOp>(self);
}

Batched prod_rule(BatchedArg self, std::optional<at::ScalarType> dtype) {
  return {at::prod(flattened(self), 1, /*keepdim=*/false, dtype), 0};
}

// any and all over a list of dims: an empty list means none, unlike everywhere else.
template <class Op>
Batched any_dims_rule(BatchedArg self, at::OptionalIntArrayRef dim, bool keepdim) {
  if (dim.has_value() && dim->empty()) {
    return {Op::call(self.value, at::OptionalIntArrayRef(at::IntArrayRef{}), keepdim), self.bdim};
  }
  return reduction<Op>(self, dim, keepdim);
}

Batched count_nonzero_rule(BatchedArg self, std::optional<int64_t> dim) {
  const Dimmed in = dimmed(self);
  const DimList dims = dim ? DimList{in.physical(*dim)} : in.all_dims();
  return {at::count_nonzero(in.value, dims), bdim_after(in.bdim, dims)};
}

// --- norms ---------------------------------------------------------------------------------------

Batched norm_scalar(BatchedArg self, const at::Scalar& p) {
  const Dimmed in = dimmed(self);
  return {at::norm(in.value, p, in.all_dims(), /*keepdim=*/false), 0};
}

Batched norm_scalar_dtype(BatchedArg self, const std::optional<at::Scalar>& p,
                          at::ScalarType dtype) {
  const Dimmed in = dimmed(self);
  return {at::norm(in.value, p, in.all_dims(), /*keepdim=*/false, dtype), 0};
}

// --- others --------------------------------------------------------------------------------------

// BNN -> B
Batched trace_rule(BatchedArg self) {
  TORCH_CHECK(self.logical_dim() == 2, "[vmap] trace: expected a matrix, but each example has ",
              self.logical_dim(), " dims");
  const at::Tensor value = batch_first(self);
  return {value.diagonal(0, 1, 2).sum(-1), 0};
}

[[maybe_unused]] const RuleSet kFull{
    rule<ops::sum, &sum_rule>(),
    rule<ops::mean, &mean_rule>(),
    rule<ops::prod, &prod_rule>(),
    rule<ops::max, &full_rule<ops::amax>>(),
    rule<ops::min, &full_rule<ops::amin>>(),
    rule<ops::any, &full_rule<ops::any_dims>>(),
    rule<ops::all, &full_rule<ops::all_dims>>(),
    rule<ops::count_nonzero, &count_nonzero_rule>(),
    rule<ops::norm_Scalar, &norm_scalar>(),
    rule<ops::norm_ScalarOpt_dtype, &norm_scalar_dtype>(),
    rule<ops::trace, &trace_rule>(),
};

[[maybe_unused]] const RuleSet kAlongDims{
    reduction_rows<ops::sum_dim_IntList, ops::mean_dim, ops::prod_dim_int, ops::nansum, ops::amax,
                   ops::amin, ops::any_dim, ops::all_dim, ops::logsumexp, ops::linalg_vector_norm,
                   ops::norm_ScalarOpt_dim, ops::norm_ScalarOpt_dim_dtype, ops::std_correction,
                   ops::var_correction, ops::std_mean_correction, ops::var_mean_correction,
                   ops::count_nonzero_dim_IntList, ops::hash_tensor>()};

[[maybe_unused]] const RuleSet kAnyDims{
    rule<ops::any_dims, &any_dims_rule<ops::any_dims>>(),
    rule<ops::all_dims, &any_dims_rule<ops::all_dims>>(),
};

}  // namespace
}  // namespace torchlift
