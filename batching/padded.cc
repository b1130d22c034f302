#include "batching/padded.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/broadcast_tensors.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/util/irange.h>

#include <vector>

#include "core/error.h"

namespace torchlift {
namespace {

using at::Tensor;

void check_size(const char* name, int64_t size) {
  if (size >= 0) return;
  transform_error(name, "size is ", size, ", but it is the number of elements to return.");
}

at::TensorOptions indices_like(const Tensor& x) { return x.options().dtype(at::kLong); }

// Where each element that the mask [n] chooses goes in a result of `size`, in order; `size` for
// those that are left out.
Tensor places(const Tensor& mask, int64_t size) {
  const Tensor before = mask.to(at::kLong).cumsum(0).sub(1);
  return at::where(mask, before.clamp_max(size), at::full({}, size, indices_like(mask)));
}

// The indices that the mask [n] chooses: [size], filled with n.
Tensor chosen(const Tensor& mask, int64_t size) {
  const int64_t n = mask.size(0);
  // One more, for what is left out.
  const Tensor none = at::full({size + 1}, n, indices_like(mask));
  const Tensor all = at::arange(n, indices_like(mask));
  return none.scatter(0, places(mask, size), all).narrow(0, 0, size);
}

// x [n] at indices, which are n where the fill value is wanted.
Tensor taken(const Tensor& x, const Tensor& indices, const Tensor& fill) {
  return at::cat({x, fill.reshape({1})}).index_select(0, indices);
}

Tensor scalar_like(const Tensor& x, const at::Scalar& value) {
  return at::full({}, value, x.options());
}

}  // namespace

PaddedNonzero nonzero(const Tensor& x, NonzeroOptions options) {
  check_size("nonzero", options.size);
  const Tensor mask = x.ne(0).flatten();
  const Tensor flat = chosen(mask, options.size);
  const Tensor is_fill = flat.eq(mask.size(0));
  const Tensor fill = scalar_like(flat, options.fill_value);
  std::vector<Tensor> columns(x.dim());
  int64_t stride = 1;
  for (int64_t dim = x.dim() - 1; dim >= 0; --dim) {
    const int64_t size = std::max<int64_t>(x.size(dim), 1);
    const Tensor index = flat.div(stride, "floor").remainder(size);
    columns[dim] = at::where(is_fill, fill, index);
    stride *= size;
  }
  Tensor indices = columns.empty() ? flat.unsqueeze(1).narrow(1, 0, 0) : at::stack(columns, 1);
  return {std::move(indices), mask.sum()};
}

PaddedSelection masked_select(const Tensor& x, const Tensor& mask, PaddedOptions options) {
  check_size("masked_select", options.size);
  if (mask.scalar_type() != at::kBool) {
    transform_error("masked_select", "the mask has dtype ", mask.scalar_type(),
                    ", but must be of bools. Compare it: mask != 0.");
  }
  const std::vector<Tensor> both = at::broadcast_tensors({x, mask});
  const Tensor flat_mask = both[1].flatten();
  const Tensor indices = chosen(flat_mask, options.size);
  return {taken(both[0].flatten(), indices, scalar_like(x, options.fill_value)), flat_mask.sum()};
}

PaddedUnique unique(const Tensor& x, UniqueOptions options) {
  check_size("unique", options.size);
  const Tensor flat = x.flatten();
  const int64_t n = flat.size(0);
  const auto [sorted, order] = flat.sort();
  // Whether an element starts a new value.
  const Tensor start = at::ones_like(sorted.narrow(0, 0, n == 0 ? 0 : 1), at::kBool);
  const Tensor is_new =
      n < 2 ? start : at::cat({start, sorted.narrow(0, 1, n - 1).ne(sorted.narrow(0, 0, n - 1))});
  const bool has_fill = options.fill_value.has_value() || n == 0;
  const Tensor fill =
      has_fill ? scalar_like(x, options.fill_value.value_or(0)) : sorted.select(0, 0).detach();
  const Tensor group = is_new.to(at::kLong).cumsum(0).sub(1);
  const Tensor ones = at::ones_like(group);
  const Tensor counts = at::zeros({options.size + 1}, indices_like(x))
                            .scatter_add(0, group.clamp_max(options.size), ones)
                            .narrow(0, 0, options.size);
  const Tensor inverse = at::zeros({n}, indices_like(x)).scatter(0, order, group);
  return {taken(sorted, chosen(is_new, options.size), fill), is_new.sum(), counts,
          inverse.reshape(x.sizes())};
}

}  // namespace torchlift
