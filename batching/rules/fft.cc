// Discrete Fourier transforms. All of torch.fft is made of three operators, which leave other dims
// alone.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_fft_c2c.h>
#include <ATen/ops/_fft_c2c_ops.h>
#include <ATen/ops/_fft_c2r.h>
#include <ATen/ops/_fft_c2r_ops.h>
#include <ATen/ops/_fft_r2c.h>
#include <ATen/ops/_fft_r2c_ops.h>

#include "batching/rules/dims.h"
#include "core/registry.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;

using Dims = c10::SmallVector<int64_t, 4>;

Dims physical_dims(const BatchedArg& self, at::IntArrayRef dims) {
  Dims physical;
  for (const int64_t dim : dims) physical.push_back(physical_dim(self, dim));
  return physical;
}

Batched r2c_rule(BatchedArg self, at::IntArrayRef dims, int64_t normalization, bool onesided) {
  return {at::_fft_r2c(self.value, physical_dims(self, dims), normalization, onesided), self.bdim};
}

Batched c2r_rule(BatchedArg self, at::IntArrayRef dims, int64_t normalization, int64_t last_size) {
  return {at::_fft_c2r(self.value, physical_dims(self, dims), normalization, last_size), self.bdim};
}

Batched c2c_rule(BatchedArg self, at::IntArrayRef dims, int64_t normalization, bool forward) {
  return {at::_fft_c2c(self.value, physical_dims(self, dims), normalization, forward), self.bdim};
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::_fft_r2c, &r2c_rule>(),
    rule<ops::_fft_c2r, &c2r_rule>(),
    rule<ops::_fft_c2c, &c2c_rule>(),
};

}  // namespace
}  // namespace torchlift
