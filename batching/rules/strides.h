#ifndef TORCHLIFT_BATCHING_RULES_STRIDES_H_
#define TORCHLIFT_BATCHING_RULES_STRIDES_H_

// File: batching/rules/strides.h
//
// Arithmetic on sizes and strides: no tensors here.

#include <c10/util/ArrayRef.h>
#include <c10/util/SmallVector.h>

#include <cstdint>

namespace torchlift {

// A set of addresses in a storage.
struct Strided {
  c10::SmallVector<int64_t, 6> sizes;
  c10::SmallVector<int64_t, 6> strides;
  int64_t offset = 0;
};

// One more than the largest address, without the offset: 0 for an empty tensor.
int64_t extent_of(c10::IntArrayRef sizes, c10::IntArrayRef strides);

// Whether `request` stays in the memory of one example when others lie at multiples of
// `batch_stride`:
//   - it is a box of the example: each of its dims runs along dims of the example, in bounds;
//   - the example lies on every g-th address of its extent, and the request does too; or
//   - the examples do not interleave, and it stays in the block of `batch_stride` elements, or
//   between the
//     first and the last element, that belong to the example.
bool reachable(const Strided& example, const Strided& request, int64_t batch_stride);

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_RULES_STRIDES_H_
