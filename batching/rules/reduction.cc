#include "batching/rules/reduction.h"

namespace torchlift {

Dimmed dimmed(const BatchedArg& arg) {
  if (C10_UNLIKELY(arg.value.dim() == 1)) return {arg.value.unsqueeze(-1), 0, true};
  return {arg.value, *arg.bdim, false};
}

int64_t Dimmed::physical(int64_t logical) const {
  const int64_t dim = wrap_dim(logical, value.dim() - 1);
  return dim >= bdim ? dim + 1 : dim;
}

DimList Dimmed::all_dims() const {
  DimList dims;
  for (int64_t d = 0; d < value.dim(); ++d) {
    if (d != bdim) dims.push_back(d);
  }
  return dims;
}

DimList Dimmed::physical(at::IntArrayRef logical) const {
  if (logical.empty()) return all_dims();
  DimList dims;
  for (const int64_t dim : logical) dims.push_back(physical(dim));
  return dims;
}

int64_t bdim_after(int64_t bdim, const DimList& reduced) {
  int64_t before = 0;
  for (const int64_t dim : reduced) before += dim < bdim ? 1 : 0;
  return bdim - before;
}

at::Tensor flattened(const BatchedArg& arg) {
  const at::Tensor value = batch_first(arg);
  if (value.dim() == 2) return value;
  if (value.dim() == 1) return value.unsqueeze(-1);
  int64_t count = 1;
  for (int64_t d = 1; d < value.dim(); ++d) count *= value.size(d);
  return value.reshape({value.size(0), count});
}

at::Tensor with_ones(const at::Tensor& value, int64_t rank) {
  if (rank == 0) return value;
  c10::SmallVector<int64_t, 8> sizes{value.size(0)};
  sizes.append(rank, 1);
  return value.view(sizes);
}

bool is_tracked_outside(const at::Tensor& t) {
  if (is_tracked(t)) return true;
  const LiftedTensorImpl* impl = as_lifted(t);
  return impl != nullptr && is_tracked_outside(impl->value());
}

}  // namespace torchlift
