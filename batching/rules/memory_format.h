#ifndef TORCHLIFT_BATCHING_RULES_MEMORY_FORMAT_H_
#define TORCHLIFT_BATCHING_RULES_MEMORY_FORMAT_H_

// File: batching/rules/memory_format.h
//
// The memory_format argument of clone, zeros_like and the like speaks of one example.

#include <ATen/core/Tensor.h>

#include <optional>

#include "batching/rules/dims.h"

namespace torchlift {

// Calls make(value, format) such that every example of the result has the memory format asked for.
// `make` makes a tensor of value's sizes. Throws when the format does not fit the logical rank.
template <class Make>
Batched with_memory_format(const BatchedArg& self, std::optional<at::MemoryFormat> format,
                           const Make& make) {
  using at::MemoryFormat;
  if (!format.has_value() || *format == MemoryFormat::Preserve) {
    return {make(self.value, format), self.bdim};
  }
  const at::Tensor value = batch_first(self);
  if (*format == MemoryFormat::Contiguous) return {make(value, format), 0};
  // [B, N, C, H, W]: as [B, N, H, W, C] it is to be contiguous.
  const int64_t rank = *format == MemoryFormat::ChannelsLast ? 4 : 5;
  TORCH_CHECK(self.logical_dim() == rank, "required rank ", rank, " tensor to use ",
              rank == 4 ? "channels_last" : "channels_last_3d", " format, got shape ",
              at::IntArrayRef(logical_sizes(self)));
  const at::Tensor made = make(value.movedim(2, -1), MemoryFormat::Contiguous);
  return {made.movedim(-1, 2), 0};
}

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_RULES_MEMORY_FORMAT_H_
