// The copying forms of view operators (functionalization and some derivative formulas use them).
// libtorch makes them of the view and a clone, but as backend kernels; here they are decomposed
// above autograd.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_conj_copy_compositeexplicitautogradnonfunctional_dispatch.h>
#include <ATen/ops/_conj_copy_ops.h>
#include <ATen/ops/_neg_view_copy_compositeexplicitautogradnonfunctional_dispatch.h>
#include <ATen/ops/_neg_view_copy_ops.h>
#include <ATen/ops/_reshape_alias_copy_compositeexplicitautogradnonfunctional_dispatch.h>
#include <ATen/ops/_reshape_alias_copy_ops.h>
#include <ATen/ops/alias_copy_compositeexplicitautogradnonfunctional_dispatch.h>
#include <ATen/ops/alias_copy_ops.h>
#include <ATen/ops/as_strided_copy_compositeexplicitautogradnonfunctional_dispatch.h>
#include <ATen/ops/as_strided_copy_ops.h>
#include <ATen/ops/detach_copy_compositeexplicitautogradnonfunctional_dispatch.h>
#include <ATen/ops/detach_copy_ops.h>
#include <ATen/ops/diagonal_copy_compositeexplicitautogradnonfunctional_dispatch.h>
#include <ATen/ops/diagonal_copy_ops.h>
#include <ATen/ops/expand_copy_compositeexplicitautogradnonfunctional_dispatch.h>
#include <ATen/ops/expand_copy_ops.h>
#include <ATen/ops/narrow_copy_compositeexplicitautogradnonfunctional_dispatch.h>
#include <ATen/ops/narrow_copy_ops.h>
#include <ATen/ops/permute_copy_compositeexplicitautogradnonfunctional_dispatch.h>
#include <ATen/ops/permute_copy_ops.h>
#include <ATen/ops/select_copy_compositeexplicitautogradnonfunctional_dispatch.h>
#include <ATen/ops/select_copy_ops.h>
#include <ATen/ops/slice_copy_compositeexplicitautogradnonfunctional_dispatch.h>
#include <ATen/ops/slice_copy_ops.h>
#include <ATen/ops/split_copy_compositeexplicitautogradnonfunctional_dispatch.h>
#include <ATen/ops/split_copy_ops.h>
#include <ATen/ops/split_with_sizes_copy_compositeexplicitautogradnonfunctional_dispatch.h>
#include <ATen/ops/split_with_sizes_copy_ops.h>
#include <ATen/ops/squeeze_copy_compositeexplicitautogradnonfunctional_dispatch.h>
#include <ATen/ops/squeeze_copy_ops.h>
#include <ATen/ops/t_copy_compositeexplicitautogradnonfunctional_dispatch.h>
#include <ATen/ops/t_copy_ops.h>
#include <ATen/ops/transpose_copy_compositeexplicitautogradnonfunctional_dispatch.h>
#include <ATen/ops/transpose_copy_ops.h>
#include <ATen/ops/unbind_copy_compositeexplicitautogradnonfunctional_dispatch.h>
#include <ATen/ops/unbind_copy_ops.h>
#include <ATen/ops/unfold_copy_compositeexplicitautogradnonfunctional_dispatch.h>
#include <ATen/ops/unfold_copy_ops.h>
#include <ATen/ops/unsqueeze_copy_compositeexplicitautogradnonfunctional_dispatch.h>
#include <ATen/ops/unsqueeze_copy_ops.h>
#include <ATen/ops/view_as_complex_copy_compositeexplicitautogradnonfunctional_dispatch.h>
#include <ATen/ops/view_as_complex_copy_ops.h>
#include <ATen/ops/view_as_real_copy_compositeexplicitautogradnonfunctional_dispatch.h>
#include <ATen/ops/view_as_real_copy_ops.h>
#include <ATen/ops/view_copy_compositeexplicitautogradnonfunctional_dispatch.h>
#include <ATen/ops/view_copy_ops.h>

#include "core/registry.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;
namespace copies = at::compositeexplicitautogradnonfunctional;

// The overload of a function that has an operator's type.
template <class Op>
using Fn = typename Op::schema*;

[[maybe_unused]] const RuleSet kCopies{
    composite<ops::_conj_copy, &copies::_conj_copy>(),
    composite<ops::_neg_view_copy, &copies::_neg_view_copy>(),
    composite<ops::_reshape_alias_copy, &copies::_reshape_alias_copy_symint>(),
    composite<ops::alias_copy, &copies::alias_copy>(),
    composite<ops::as_strided_copy, &copies::as_strided_copy_symint>(),
    composite<ops::detach_copy, &copies::detach_copy>(),
    composite<ops::diagonal_copy, &copies::diagonal_copy>(),
    composite<ops::expand_copy, &copies::expand_copy_symint>(),
    composite<ops::permute_copy, &copies::permute_copy>(),
    composite<ops::select_copy_int, &copies::select_copy_symint>(),
    composite<ops::slice_copy_Tensor, &copies::slice_copy_symint>(),
    composite<ops::split_copy_Tensor, &copies::split_copy_symint>(),
    composite<ops::split_with_sizes_copy, &copies::split_with_sizes_copy_symint>(),
    composite<ops::squeeze_copy, Fn<ops::squeeze_copy>(&copies::squeeze_copy)>(),
    composite<ops::squeeze_copy_dim, Fn<ops::squeeze_copy_dim>(&copies::squeeze_copy)>(),
    composite<ops::squeeze_copy_dims, Fn<ops::squeeze_copy_dims>(&copies::squeeze_copy)>(),
    composite<ops::t_copy, &copies::t_copy>(),
    composite<ops::transpose_copy_int, &copies::transpose_copy>(),
    composite<ops::unbind_copy_int, &copies::unbind_copy>(),
    composite<ops::unfold_copy, &copies::unfold_copy>(),
    composite<ops::unsqueeze_copy, &copies::unsqueeze_copy>(),
    composite<ops::view_as_complex_copy, &copies::view_as_complex_copy>(),
    composite<ops::view_as_real_copy, &copies::view_as_real_copy>(),
    composite<ops::view_copy, &copies::view_copy_symint>(),
    composite<ops::view_copy_dtype, Fn<ops::view_copy_dtype>(&copies::view_copy)>(),
    composite<ops::narrow_copy, &copies::narrow_copy_symint>(),
};

}  // namespace
}  // namespace torchlift
