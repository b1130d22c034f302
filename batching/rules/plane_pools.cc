#include "batching/rules/plane_pools.h"

#include <ATen/ops/max_pool2d_with_indices.h>
#include <c10/core/MemoryFormat.h>

#include <vector>

#include "core/dispatch.h"
#include "core/lifted_tensor.h"

namespace torchlift {
namespace {

constexpr int64_t kWorthCopies = 8192;
constexpr int64_t kVectorBytes = 128;

}  // namespace

int64_t planes_at_a_time(const at::Tensor& x) {
  const bool taken = x.is_cpu() && x.dim() >= 3 && x.is_contiguous() && x.numel() >= kWorthCopies &&
                     (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble);
  if (!taken || is_lifted(x) || is_tracked(x)) return 0;
  const int64_t planes = x.numel() / (x.size(-1) * x.size(-2));
  int64_t count = kVectorBytes / static_cast<int64_t>(x.element_size());
  while (count >= 8 && planes % count != 0) count /= 2;
  return count >= 8 ? count : 0;
}

std::tuple<at::Tensor, at::Tensor> max_pool_of_planes(const at::Tensor& x, int64_t channels,
                                                      at::IntArrayRef kernel_size,
                                                      at::IntArrayRef stride,
                                                      at::IntArrayRef padding,
                                                      at::IntArrayRef dilation, bool ceil_mode) {
  const auto [values, indices] = at::max_pool2d_with_indices(
      x.view({-1, channels, x.size(-2), x.size(-1)}).contiguous(c10::MemoryFormat::ChannelsLast),
      kernel_size, stride, padding, dilation, ceil_mode);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.end()[-2] = values.size(-2);
  sizes.end()[-1] = values.size(-1);
  return {values.contiguous().view(sizes), indices.contiguous().view(sizes)};
}

}  // namespace torchlift
