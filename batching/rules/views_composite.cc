// Shape operators that libtorch makes of others. They are decomposed in any case; a row here spares
// the common ones the boxing. Those that ask for bits of the value which a lifted tensor does not
// show (conjugate, negative) are done again here.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_conj.h>
#include <ATen/ops/_neg_view.h>
#include <ATen/ops/adjoint_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/adjoint_ops.h>
#include <ATen/ops/alias.h>
#include <ATen/ops/broadcast_to_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/broadcast_to_ops.h>
#include <ATen/ops/chunk_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/chunk_ops.h>
#include <ATen/ops/expand_as_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/expand_as_ops.h>
#include <ATen/ops/flatten_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/flatten_ops.h>
#include <ATen/ops/imag_ops.h>
#include <ATen/ops/mT_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/mT_ops.h>
#include <ATen/ops/movedim_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/movedim_ops.h>
#include <ATen/ops/narrow_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/narrow_ops.h>
#include <ATen/ops/real_ops.h>
#include <ATen/ops/reshape_as_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/reshape_as_ops.h>
#include <ATen/ops/reshape_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/reshape_ops.h>
#include <ATen/ops/resolve_conj_ops.h>
#include <ATen/ops/resolve_neg_ops.h>
#include <ATen/ops/split_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/split_ops.h>
#include <ATen/ops/swapaxes_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/swapaxes_ops.h>
#include <ATen/ops/tensor_split_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/tensor_split_ops.h>
#include <ATen/ops/unflatten_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/unflatten_ops.h>
#include <ATen/ops/view_as_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/view_as_ops.h>
#include <ATen/ops/view_as_real.h>

#include "core/lifted_tensor.h"
#include "core/registry.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;
namespace implicit = at::compositeimplicitautograd;

// The overload of a function that has an operator's type.
template <class Op>
using Fn = typename Op::schema*;

// NOTE [conjugate bits]
// conj() of a lifted tensor sets the bit on the value. The lifted tensor itself has none:
// libtorch's kernels for that bit would resolve it before we are asked. So is_conj() says no, and
// what depends on the answer must look below.
at::Tensor innermost(const at::Tensor& t) {
  at::Tensor value = t;
  while (const LiftedTensorImpl* impl = as_lifted(value)) value = at::Tensor(impl->value());
  return value;
}

at::Tensor resolve_conj(const at::Tensor& self) {
  return innermost(self).is_conj() ? self.clone() : self;
}

at::Tensor resolve_neg(const at::Tensor& self) {
  return innermost(self).is_neg() ? self.clone() : self;
}

at::Tensor real(const at::Tensor& self) {
  if (!self.is_complex()) return self;
  const bool conjugate = innermost(self).is_conj();
  return at::view_as_real(conjugate ? at::_conj(self) : self).select(-1, 0);
}

at::Tensor imag(const at::Tensor& self) {
  TORCH_CHECK(self.is_complex(), "imag is not implemented for tensors with non-complex dtypes.");
  if (!innermost(self).is_conj()) return at::view_as_real(self).select(-1, 1);
  return at::_neg_view(at::view_as_real(at::_conj(self)).select(-1, 1));
}

[[maybe_unused]] const RuleSet kComposites{
    composite<ops::reshape, &implicit::reshape_symint>(),
    composite<ops::reshape_as, &implicit::reshape_as>(),
    composite<ops::view_as, &implicit::view_as>(),
    composite<ops::flatten_using_ints,
              static_cast<Fn<ops::flatten_using_ints>>(&implicit::flatten)>(),
    composite<ops::unflatten_int,
              static_cast<Fn<ops::unflatten_int>>(&implicit::unflatten_symint)>(),
    composite<ops::movedim_int, static_cast<Fn<ops::movedim_int>>(&implicit::movedim)>(),
    composite<ops::movedim_intlist, static_cast<Fn<ops::movedim_intlist>>(&implicit::movedim)>(),
    composite<ops::swapaxes, &implicit::swapaxes>(),
    composite<ops::mT, &implicit::mT>(),
    composite<ops::adjoint, &implicit::adjoint>(),
    composite<ops::expand_as, &implicit::expand_as>(),
    composite<ops::broadcast_to, &implicit::broadcast_to_symint>(),
    composite<ops::narrow, static_cast<Fn<ops::narrow>>(&implicit::narrow_symint)>(),
    composite<ops::chunk, &implicit::chunk>(),
    composite<ops::split_sizes, static_cast<Fn<ops::split_sizes>>(&implicit::split_symint)>(),
    composite<ops::tensor_split_sections,
              static_cast<Fn<ops::tensor_split_sections>>(&implicit::tensor_split_symint)>(),
    composite<ops::tensor_split_indices,
              static_cast<Fn<ops::tensor_split_indices>>(&implicit::tensor_split_symint)>(),
    composite<ops::resolve_conj, &resolve_conj>(),
    composite<ops::resolve_neg, &resolve_neg>(),
    composite<ops::real, &real>(),
    composite<ops::imag, &imag>(),
};

}  // namespace
}  // namespace torchlift
