#ifndef TORCHLIFT_BATCHING_PADDED_H_
#define TORCHLIFT_BATCHING_PADDED_H_

// File: batching/padded.h
//
// nonzero, masked_select and unique with a result of a fixed size, so that they work under vmap,
// where every example finds another number of elements:
//
//   // x [batch, 100] -> the positive numbers of each row, 10 at most, padded by 0
//   auto positive = tl::vmap([](const at::Tensor& x) {
//     return tl::masked_select(x, x.gt(0), {.size = 10}).values;
//   });
//
// The first `size` elements are returned, and the rest is filled; `count` says how many there were
// (more than size if some were left out). They are made of ordinary operators: no loop under vmap,
// at any nesting; values are differentiable with respect to x.
//
// Throws TransformError for a negative size, and for a mask that is not bool or does not fit x.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "core/tree/fields.h"

namespace torchlift {

struct PaddedOptions {
  int64_t size;
  at::Scalar fill_value = 0;
};

struct NonzeroOptions {
  int64_t size;
  int64_t fill_value = -1;
};

struct UniqueOptions {
  int64_t size;
  // By default the smallest of the values.
  std::optional<at::Scalar> fill_value = std::nullopt;
};

struct PaddedNonzero {
  at::Tensor indices;  // [size, x.dim()], int64, in order
  at::Tensor count;    // [], int64
};
TORCHLIFT_PYTREE(PaddedNonzero, indices, count);

struct PaddedSelection {
  at::Tensor values;  // [size]
  at::Tensor count;   // [], int64
};
TORCHLIFT_PYTREE(PaddedSelection, values, count);

struct PaddedUnique {
  at::Tensor values;   // [size], ascending
  at::Tensor count;    // [], int64: how many different values there are
  at::Tensor counts;   // [size], int64: how often each occurs; 0 for the padding
  at::Tensor inverse;  // of x's shape, int64: values[inverse] is x, where size suffices
};
TORCHLIFT_PYTREE(PaddedUnique, values, count, counts, inverse);

// The indices of the elements that are not zero, a row each. torch.nonzero with a size.
PaddedNonzero nonzero(const at::Tensor& x, NonzeroOptions options);

// The elements of x where mask is true; the two are broadcast. torch.masked_select with a size.
PaddedSelection masked_select(const at::Tensor& x, const at::Tensor& mask, PaddedOptions options);

// The different values in x, sorted. A NaN differs from every other. The gradient of a value goes
// to one of the elements that have it. torch.unique with a size.
PaddedUnique unique(const at::Tensor& x, UniqueOptions options);

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_PADDED_H_
