#include "batching/rules/dims.h"

#include <ATen/WrapDimUtils.h>
#include <c10/util/SmallVector.h>

#include "core/error.h"

namespace torchlift {
namespace {

// The sizes of a value. See NOTE [nested and quantized tensors] in core/lifted_tensor.cc.
at::IntArrayRef sizes_of(const at::Tensor& value) {
  if (C10_UNLIKELY(value.is_nested())) {
    unsupported_error("vmap",
                      "an operator has a nested tensor among its arguments, and one that differs "
                      "between the examples of a batch. Use to_padded_tensor() on the nested one, "
                      "or work on its unbind().");
  }
  return value.sizes();
}

}  // namespace

int64_t wrap_dim(int64_t dim, int64_t rank) {
  return c10::maybe_wrap_dim(dim, rank, /*wrap_scalar=*/true);
}

int64_t physical_dim(const BatchedArg& arg, int64_t logical) {
  const int64_t dim = wrap_dim(logical, arg.logical_dim());
  return arg.bdim && dim >= *arg.bdim ? dim + 1 : dim;
}

at::Tensor batch_first(const BatchedArg& arg) {
  if (arg.bdim.value_or(0) == 0) return arg.value;
  return arg.value.movedim(*arg.bdim, 0);
}

at::Tensor aligned(const BatchedArg& arg, int64_t rank) {
  at::Tensor value = batch_first(arg);
  if (!arg.bdim) return value;
  const int64_t missing = rank - (value.dim() - 1);
  if (missing <= 0) return value;
  const auto sizes = value.sizes();
  c10::SmallVector<int64_t, 8> new_sizes{sizes[0]};
  new_sizes.append(missing, 1);
  new_sizes.append(sizes.begin() + 1, sizes.end());
  // Inserting 1-sized dims never copies, whatever the strides.
  return value.view(new_sizes);
}

at::Tensor expanded(const BatchedArg& arg, int64_t size) {
  if (arg.bdim) return batch_first(arg);
  c10::SmallVector<int64_t, 8> sizes{size};
  const at::IntArrayRef own = sizes_of(arg.value);
  sizes.append(own.begin(), own.end());
  return arg.value.expand(sizes);
}

c10::SmallVector<int64_t, 6> logical_sizes(const BatchedArg& arg) {
  const at::IntArrayRef own = sizes_of(arg.value);
  c10::SmallVector<int64_t, 6> sizes(own.begin(), own.end());
  if (arg.bdim) sizes.erase(sizes.begin() + *arg.bdim);
  return sizes;
}

at::Tensor merge_dim(const at::Tensor& value, int64_t from, int64_t into) {
  at::Tensor moved = value.movedim(from, into);
  return moved.flatten(into, into + 1);
}

at::Tensor split_dim(const at::Tensor& value, int64_t dim, int64_t outer_size) {
  const int64_t size = value.size(dim);
  const int64_t inner_size = outer_size == 0 ? 0 : size / outer_size;
  return value.unflatten(dim, at::IntArrayRef({outer_size, inner_size}));
}

int64_t batch_size_of(std::initializer_list<const BatchedArg*> args) {
  for (const BatchedArg* arg : args) {
    if (arg->bdim) return arg->value.size(*arg->bdim);
  }
  TORCH_INTERNAL_ASSERT(false, "torchlift: a rule was called without a batched argument");
}

}  // namespace torchlift
