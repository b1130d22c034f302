// Operators that make sparse tensors of batched ones: they are computed dense. See NOTE [sparse
// tensors under vmap] in batching/sparse_results.h.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_sparse_coo_tensor_with_dims_and_tensors_ops.h>
#include <ATen/ops/_sparse_mm_reduce_impl_backward_ops.h>
#include <ATen/ops/_sparse_mm_reduce_impl_ops.h>
#include <ATen/ops/alias.h>
#include <ATen/ops/coalesce_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/coalesce_ops.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sparse_coo_tensor.h>
#include <ATen/ops/sparse_mask_ops.h>
#include <ATen/ops/to_dense_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/to_dense_ops.h>
#include <ATen/ops/zeros_like.h>

#include <array>
#include <numeric>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "batching/rules/dims.h"
#include "batching/sparse_results.h"
#include "core/error.h"
#include "core/lifted_tensor.h"
#include "core/registry.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;

// --- a dense tensor as a sparse one --------------------------------------------------------------

at::Tensor copy_of(const at::Tensor& t, const LevelPtr& level) {
  const Lowered self = lower(t, *level);
  return lift(self.value.clone(), self.bdim, level);
}

// self, sparse_dim
void to_sparse_of_dims(const c10::OperatorHandle& op, const LevelPtr& level,
                       torch::jit::Stack* stack) {
  const std::vector<c10::IValue> args = torch::jit::pop(*stack, op.schema().arguments().size());
  const at::Tensor& self = args[0].toTensor();
  const int64_t sparse_dims = args[1].toInt();
  TORCH_CHECK(0 <= sparse_dims && sparse_dims <= self.dim(),
              "[vmap] to_sparse: sparse_dim must be from 0 to ", self.dim(),
              ", the dims of an example, but it is ", sparse_dims, ".");
  at::Tensor result = copy_of(self, level);
  mark_sparse(result, sparse_dims);
  stack->emplace_back(std::move(result));
}

// self, layout, blocksize, dense_dim
void to_sparse(const c10::OperatorHandle& op, const LevelPtr& level, torch::jit::Stack* stack) {
  const std::vector<c10::IValue> args = torch::jit::pop(*stack, op.schema().arguments().size());
  const at::Tensor& self = args[0].toTensor();
  at::Tensor result = copy_of(self, level);
  const auto layout = args[1].toOptional<at::Layout>();
  if (layout.value_or(at::kSparse) == at::kSparse) {
    mark_sparse(result, self.dim() - args[3].toOptional<int64_t>().value_or(0));
  }
  stack->emplace_back(std::move(result));
}

// Compressed layouts: examples with as many nonzeros each would be needed to stack them.
void to_compressed(const c10::OperatorHandle& op, const LevelPtr& level, torch::jit::Stack* stack) {
  const std::vector<c10::IValue> args = torch::jit::pop(*stack, op.schema().arguments().size());
  stack->emplace_back(copy_of(args[0].toTensor(), level));
}

// Whether an element is none of those that to_sparse takes: those in which a number is not zero.
at::Tensor is_left_out(const at::Tensor& dense, int64_t sparse_dims) {
  if (sparse_dims == dense.dim()) return dense.eq(0);
  std::vector<int64_t> dims(static_cast<size_t>(dense.dim() - sparse_dims));
  std::iota(dims.begin(), dims.end(), sparse_dims);
  return dense.ne(0).any(dims, /*keepdim=*/true).logical_not();
}

// What libtorch gives for the sparse tensor that t, of a trace, stands for: the numbers, added to
// zeros, so that none is a negative zero. Unless masked_grad is false, a gradient reaches the
// elements alone.
at::Tensor dense_of_recorded(const at::Tensor& t, int64_t sparse_dims, bool masked_grad) {
  const ReadsAsDense reading;
  if (!t.is_floating_point() && !t.is_complex()) return t.clone();
  const at::Tensor numbers = t.add(0);
  return masked_grad ? numbers.masked_fill(is_left_out(t, sparse_dims), 0) : numbers;
}

// A marked tensor is dense, and this one has no mark.
at::Tensor to_dense(const at::Tensor& self, std::optional<at::ScalarType> dtype,
                    std::optional<bool> masked_grad) {
  at::Tensor dense = is_marked_sparse(self) ? at::alias(self) : self;
  if (const auto sparse_dims = recorded_sparse_dims(self)) {
    TORCH_CHECK(!dtype.has_value(), "dtype argument is not supported by sparse_to_dense");
    dense = dense_of_recorded(self, *sparse_dims, masked_grad.value_or(true));
  }
  return at::compositeimplicitautograd::to_dense(dense, dtype, masked_grad);
}

// What was made by to_sparse has each place once, and so have the numbers of others.
at::Tensor coalesce(const at::Tensor& self) {
  const bool stands_for_one = is_marked_sparse(self) || recorded_sparse_dims(self).has_value();
  return stands_for_one ? self : at::compositeimplicitautograd::coalesce(self);
}

// --- indices and values --------------------------------------------------------------------------

bool is_shared(const at::Tensor& t) {
  const LiftedTensorImpl* impl = as_lifted(t);
  return impl == nullptr || (!impl->bdim().has_value() && is_shared(impl->value()));
}

// Whether all examples share t, and nobody differentiates it.
bool is_constant(const at::Tensor& t) {
  if (t.requires_grad() || t._fw_grad(/*level=*/0).defined()) return false;
  const LiftedTensorImpl* impl = as_lifted(t);
  return impl == nullptr || (!impl->bdim().has_value() && is_constant(impl->value()));
}

at::Tensor innermost(const at::Tensor& t) {
  at::Tensor value = t;
  while (const LiftedTensorImpl* impl = as_lifted(value)) value = at::Tensor(impl->value());
  return value;
}

using SparseCoo = ops::_sparse_coo_tensor_with_dims_and_tensors;

// A constant remains a sparse tensor. Made of other operators, in front of autograd, since
// libtorch's formula takes gradients that are sparse.
at::Tensor sparse_coo(int64_t sparse_dim, int64_t dense_dim, c10::SymIntArrayRef size,
                      const at::Tensor& indices, const at::Tensor& values,
                      std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
                      std::optional<at::Device> device, std::optional<bool> pin_memory,
                      std::optional<bool> is_coalesced) {
  if (is_constant(indices) && is_constant(values)) {
    return SparseCoo::call(sparse_dim, dense_dim, size, innermost(indices), innermost(values),
                           dtype, layout, device, pin_memory, is_coalesced);
  }
  at::Tensor result = dense_coo(sparse_dim, size, indices, values, dtype);
  if (is_lifted(result)) mark_sparse(result, sparse_dim);
  return result;
}

// --- elements of a pattern -----------------------------------------------------------------------

// Where a sparse tensor has elements, dense.
at::Tensor pattern_of(const at::Tensor& mask) {
  const at::Tensor coo = mask.layout() == at::kSparse ? mask : mask.to_sparse();
  const at::Tensor values = at::ones_like(coo._values(), coo._values().options().dtype(at::kBool));
  return at::sparse_coo_tensor(coo._indices(), values, coo.sizes()).to_dense();
}

// In front of autograd, too. The mask has no derivative.
at::Tensor sparse_mask(const at::Tensor& self, const at::Tensor& mask) {
  if (!is_shared(mask)) {
    unsupported_error("vmap",
                      "sparse_mask by a mask that differs between the examples: so would the "
                      "elements that the result has. Use torch.where(mask != 0, x, 0), which is "
                      "dense.");
  }
  const at::Tensor shared = innermost(mask).detach();
  if (is_constant(self)) return ops::sparse_mask::call(innermost(self), shared);
  TORCH_CHECK(shared.layout() != at::kStrided, "[vmap] sparse_mask: the mask has to be sparse.");
  at::Tensor result = self.masked_fill(pattern_of(shared).logical_not(), 0);
  const bool coo = shared.layout() == at::kSparse;
  if (is_lifted(result)) mark_sparse(result, coo ? shared.sparse_dim() : shared.dim());
  return result;
}

// --- products that reduce by mean, amax or amin --------------------------------------------------
//
// Of a sparse matrix that all examples share: their columns side by side, as each is reduced alone.

using Reduce = ops::_sparse_mm_reduce_impl;
using ReduceBackward = ops::_sparse_mm_reduce_impl_backward;

// BKN -> K(BN)
at::Tensor side_by_side(const BatchedArg& arg, int64_t size) {
  return expanded(arg, size).transpose(0, 1).flatten(1, 2);
}

// K(BN) -> BKN; a note that is not there (of a sum) has no dims for it.
Batched apart(const at::Tensor& columns, int64_t size) {
  if (columns.dim() != 2) return {columns, std::nullopt};
  return {columns.unflatten(1, at::IntArrayRef({size, columns.size(1) / size})).transpose(0, 1), 0};
}

void check_shared_matrix(const BatchedArg& matrix) {
  if (!matrix.batched()) return;
  unsupported_error("vmap",
                    "sparse.mm with a reduction, of a sparse matrix that differs between the "
                    "examples. Use to_dense(), or a loop.");
}

// libtorch's kernel notes which rows were the largest only where a tensor requires a gradient, and
// its backward pass reads that note, whether it is there or not.
std::tuple<at::Tensor, at::Tensor> reduce_with_note(const at::Tensor& matrix,
                                                    const at::Tensor& columns,
                                                    std::string_view reduce) {
  if (is_lifted(columns) || columns.requires_grad()) return Reduce::call(matrix, columns, reduce);
  const at::Tensor tracked = columns.detach().requires_grad_();
  const c10::AutoGradMode on(true);
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto [result, note] = Reduce::call(matrix.detach(), tracked, reduce);
  return {result.detach(), note};
}

std::tuple<Batched, Batched> sparse_reduce(BatchedArg matrix, BatchedArg other,
                                           std::string_view reduce) {
  check_shared_matrix(matrix);
  const int64_t size = other.value.size(*other.bdim);
  if (size == 0) {
    const at::Tensor none =
        other.value.new_zeros({0, matrix.value.size(0), logical_sizes(other)[1]});
    return {Batched{none, 0}, Batched{none.to(at::kLong), 0}};
  }
  const auto [result, note] = reduce_with_note(matrix.value, side_by_side(other, size), reduce);
  return {apart(result, size), apart(note, size)};
}

std::tuple<Batched, Batched> sparse_reduce_backward(BatchedArg matrix, BatchedArg grad,
                                                    BatchedArg other, std::string_view reduce,
                                                    BatchedArg note, std::array<bool, 2> mask) {
  check_shared_matrix(matrix);
  if (mask[0]) {
    unsupported_error("vmap",
                      "the gradient of sparse.mm with a reduction by its sparse matrix, which "
                      "would be another one for each example. Use to_dense().");
  }
  const BatchedArg& first = grad.batched() ? grad : other.batched() ? other : note;
  const int64_t size = first.value.size(*first.bdim);
  if (size == 0) return {Batched{}, Batched{at::zeros_like(expanded(other, 0)), 0}};
  const at::Tensor rows = note.logical_dim() == 2 ? side_by_side(note, size) : note.value;
  const auto [unused, result] = ReduceBackward::call(matrix.value, side_by_side(grad, size),
                                                     side_by_side(other, size), reduce, rows, mask);
  return {Batched{}, apart(result, size)};
}

// The row of an operator for which `Function` works, in front of autograd and behind it.
template <class Op, auto Function>
RuleEntry made_of_others() {
  const auto kernel = [] {
    return c10::KernelFunction::makeFromUnboxedFunction(TORCH_FN(Function));
  };
  return {.name = Op::name,
          .overload = Op::overload_name,
          .source = RuleEntry::Source::kRule,
          .make_front = kernel,
          .make_back = kernel,
          .signature = c10::impl::CppSignature::make<typename Op::schema>()};
}

[[maybe_unused]] const RuleSet kRules{
    boxed_rule("aten::_to_sparse", "", &to_sparse),
    boxed_rule("aten::_to_sparse", "sparse_dim", &to_sparse_of_dims),
    boxed_rule("aten::_to_sparse_csr", "", &to_compressed),
    boxed_rule("aten::_to_sparse_csc", "", &to_compressed),
    boxed_rule("aten::_to_sparse_bsr", "", &to_compressed),
    boxed_rule("aten::_to_sparse_bsc", "", &to_compressed),
    composite<ops::coalesce, &coalesce>(),
    composite<ops::to_dense, &to_dense>(),
    made_of_others<SparseCoo, &sparse_coo>(),
    made_of_others<ops::sparse_mask, &sparse_mask>(),
    rule<Reduce, &sparse_reduce>(),
    rule<ReduceBackward, &sparse_reduce_backward>(),
};

}  // namespace
}  // namespace torchlift
