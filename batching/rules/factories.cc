#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like_ops.h>
#include <ATen/ops/full_like_ops.h>
#include <ATen/ops/new_empty_ops.h>
#include <ATen/ops/new_empty_strided_ops.h>
#include <ATen/ops/new_full_ops.h>
#include <ATen/ops/new_ones_ops.h>
#include <ATen/ops/new_zeros_ops.h>
#include <ATen/ops/ones_like_ops.h>
#include <ATen/ops/zeros_like_ops.h>

#include "batching/rules/memory_format.h"
#include "core/registry.h"

// New tensors made after the pattern of a batched one. Each example gets its own, so that writes
// into it work.

namespace torchlift {
namespace {

namespace ops = at::_ops;

using Dtype = std::optional<at::ScalarType>;
using OptLayout = std::optional<at::Layout>;
using OptDevice = std::optional<at::Device>;
using OptPin = std::optional<bool>;
using OptFormat = std::optional<at::MemoryFormat>;
using Sizes = c10::SmallVector<int64_t, 8>;

// --- zeros_like and the like ---------------------------------------------------------------------

template <class Op>
Batched like(BatchedArg self, Dtype dtype, OptLayout layout, OptDevice device, OptPin pin,
             OptFormat format) {
  return with_memory_format(self, format, [&](const at::Tensor& value, auto physical) {
    return Op::call(value, dtype, layout, device, pin, physical);
  });
}

Batched full_like_rule(BatchedArg self, const at::Scalar& fill, Dtype dtype, OptLayout layout,
                       OptDevice device, OptPin pin, OptFormat format) {
  return with_memory_format(self, format, [&](const at::Tensor& value, auto physical) {
    return ops::full_like::call(value, fill, dtype, layout, device, pin, physical);
  });
}

[[maybe_unused]] const RuleSet kLike{
    rule<ops::zeros_like, &like<ops::zeros_like>>(),
    rule<ops::ones_like, &like<ops::ones_like>>(),
    rule<ops::empty_like, &like<ops::empty_like>>(),
    rule<ops::full_like, &full_like_rule>(),
};

// --- new_zeros and the like: [size] -> [B, size] -------------------------------------------------

Sizes with_batch(const BatchedArg& self, at::IntArrayRef size) {
  Sizes sizes{self.value.size(*self.bdim)};
  sizes.append(size.begin(), size.end());
  return sizes;
}

template <class Op>
Batched new_of(BatchedArg self, at::IntArrayRef size, Dtype dtype, OptLayout layout,
               OptDevice device, OptPin pin) {
  const Sizes sizes = with_batch(self, size);
  return {Op::call(self.value, c10::fromIntArrayRefSlow(sizes), dtype, layout, device, pin), 0};
}

Batched new_full_rule(BatchedArg self, at::IntArrayRef size, const at::Scalar& fill, Dtype dtype,
                      OptLayout layout, OptDevice device, OptPin pin) {
  const Sizes sizes = with_batch(self, size);
  return {ops::new_full::call(self.value, c10::fromIntArrayRefSlow(sizes), fill, dtype, layout,
                              device, pin),
          0};
}

// Number of elements from the first to the last of a strided tensor.
int64_t extent(at::IntArrayRef size, at::IntArrayRef stride) {
  int64_t last = 0;
  for (size_t i = 0; i < size.size(); ++i) {
    if (size[i] == 0) return 0;
    last += (size[i] - 1) * stride[i];
  }
  return last + 1;
}

Batched new_empty_strided_rule(BatchedArg self, at::IntArrayRef size, at::IntArrayRef stride,
                               Dtype dtype, OptLayout layout, OptDevice device, OptPin pin) {
  TORCH_CHECK(size.size() == stride.size(), "new_empty_strided: dimensionality of sizes (",
              size.size(), ") must match dimensionality of strides (", stride.size(), ")");
  const Sizes sizes = with_batch(self, size);
  Sizes strides{extent(size, stride)};
  strides.append(stride.begin(), stride.end());
  return {
      ops::new_empty_strided::call(self.value, c10::fromIntArrayRefSlow(sizes),
                                   c10::fromIntArrayRefSlow(strides), dtype, layout, device, pin),
      0};
}

[[maybe_unused]] const RuleSet kNew{
    rule<ops::new_zeros, &new_of<ops::new_zeros>>(),
    rule<ops::new_ones, &new_of<ops::new_ones>>(),
    rule<ops::new_empty, &new_of<ops::new_empty>>(),
    rule<ops::new_full, &new_full_rule>(),
    rule<ops::new_empty_strided, &new_empty_strided_rule>(),
};

}  // namespace
}  // namespace torchlift
