#ifndef TORCHLIFT_BATCHING_RULES_PLANE_POOLS_H_
#define TORCHLIFT_BATCHING_RULES_PLANE_POOLS_H_

// File: batching/rules/plane_pools.h
//
// NOTE [planes as channels]
// A max pool works on each plane (the last two dims) by itself. libtorch's kernel for contiguous
// tensors on CPU takes number after number; that for channels last takes vectors of channels. As
// all leading dims, the batch dim too, are planes alike, any 32 planes that follow each other in
// memory can be taken for the channels of one image. On float tensors of CNNs (26 x 26 and 11 x 11,
// windows of 2 and 3) that is 2.4 to 4 times as fast, the copies to and from that layout included,
// from about 8,000 numbers on; results and indices are the same.

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <tuple>

namespace torchlift {

// How many planes to take at a time: 8, 16 or 32; 0 where the kernel is better called as it is.
int64_t planes_at_a_time(const at::Tensor& x);

// at::max_pool2d_with_indices of each plane of x, [..., H, W], contiguous: values and indices,
// contiguous. `channels` as planes_at_a_time(x) says, not 0.
std::tuple<at::Tensor, at::Tensor> max_pool_of_planes(const at::Tensor& x, int64_t channels,
                                                      at::IntArrayRef kernel_size,
                                                      at::IntArrayRef stride,
                                                      at::IntArrayRef padding,
                                                      at::IntArrayRef dilation, bool ceil_mode);

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_RULES_PLANE_POOLS_H_
