// Forward mode of grid_sample, made of gathers: libtorch's backward has no formula.

#include <ATen/core/Tensor.h>
#include <ATen/native/GridSamplerUtils.h>
#include <ATen/ops/grid_sampler_2d_backward_ops.h>
#include <ATen/ops/grid_sampler_2d_ops.h>
#include <ATen/ops/grid_sampler_3d_backward_ops.h>
#include <ATen/ops/grid_sampler_3d_ops.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros_like.h>

#include <array>
#include <cstdint>
#include <functional>
#include <vector>

#include "autodiff/forward_kernels.h"
#include "autodiff/forward_pass.h"
#include "core/tensor_operators.h"

namespace torchlift::forward_internal {
namespace {

namespace ops = at::_ops;
using at::Tensor;
using at::native::GridSamplerInterpolation;
using at::native::GridSamplerPadding;

struct Options {
  GridSamplerInterpolation interpolation;
  GridSamplerPadding padding;
  bool align_corners;
};

// --- coordinates along one dim, NP, P points -----------------------------------------------------

// From [-1, 1] to [0, size - 1], or to the pixels whose corners these are.
Tensor to_pixels(const Tensor& x, int64_t size, bool align_corners) {
  if (align_corners) return (x + 1) * (static_cast<double>(size - 1) / 2);
  return ((x + 1) * static_cast<double>(size) - 1) / 2;
}

// Mirrored at low and high until it lies between them.
Tensor reflect(const Tensor& x, double low, double high) {
  const double span = high - low;
  if (span == 0) return at::zeros_like(x);
  const Tensor distance = (x - low).abs();
  const Tensor flips = (distance.detach() / span).floor();
  const Tensor rest = distance - flips * span;
  const Tensor odd = flips.remainder(2);
  // rest + low, or span - rest + low
  return rest * (1 - 2 * odd) + odd * span + low;
}

// Into the image, as the padding says; unchanged where zeros are all around.
Tensor into_image(const Tensor& x, int64_t size, const Options& options) {
  if (options.padding == GridSamplerPadding::Zeros) return x;
  const auto last = static_cast<double>(size - 1);
  Tensor inside = x;
  if (options.padding == GridSamplerPadding::Reflection) {
    inside = options.align_corners ? reflect(x, 0, last) : reflect(x, -0.5, last + 0.5);
  }
  return inside.clamp(0, last);
}

// A pixel to read along a dim: where it is, and what it counts.
struct Tap {
  Tensor place;   // NP, whole numbers
  Tensor weight;  // NP
};

// The third power interpolation of Keys ("Cubic convolution interpolation for digital image
// processing", 1981) with libtorch's A: weights at distances d + 1, d, 1 - d, 2 - d.
std::array<Tensor, 4> cubic_weights(const Tensor& d) {
  constexpr double kA = -0.75;
  const auto near = [](const Tensor& t) { return ((kA + 2) * t - (kA + 3)) * t * t + 1; };
  const auto far = [](const Tensor& t) { return ((kA * t - 5 * kA) * t + 8 * kA) * t - 4 * kA; };
  return {far(d + 1), near(d), near(1 - d), far(2 - d)};
}

std::vector<Tap> taps(const Tensor& coordinate, int64_t size, const Options& options) {
  const Tensor pixel = to_pixels(coordinate, size, options.align_corners);
  if (options.interpolation == GridSamplerInterpolation::Bicubic) {
    const Tensor first = pixel.detach().floor();
    const std::array<Tensor, 4> weights = cubic_weights(pixel - first);
    std::vector<Tap> all;
    for (int i = 0; i < 4; ++i) {
      all.push_back({into_image(first + (i - 1), size, options), weights[i]});
    }
    return all;
  }
  const Tensor x = into_image(pixel, size, options);
  if (options.interpolation == GridSamplerInterpolation::Nearest) {
    const Tensor place = x.detach().round();
    return {{place, at::ones_like(place)}};
  }
  const Tensor first = x.detach().floor();
  const Tensor rest = x - first;
  return {{first, 1 - rest}, {first + 1, rest}};
}

// --- all dims ------------------------------------------------------------------------------------

// [N, C, sizes...], grid [N, points..., dims] -> [N, C, points...]. The last number of a point is
// for the first dim.
Tensor grid_sampler(const Tensor& input, const Tensor& grid, const Options& options) {
  const int64_t dims = input.dim() - 2, n = input.size(0), channels = input.size(1);
  const Tensor image = input.flatten(2), points = grid.flatten(1, -2);
  Tensor sum;
  // Every choice of one tap for each dim.
  const std::function<void(int64_t, const Tensor&, const Tensor&, const Tensor&)> visit =
      [&](int64_t dim, const Tensor& place, const Tensor& weight, const Tensor& inside) {
        if (dim == dims) {
          const Tensor index = place.unsqueeze(1).expand({n, channels, place.size(1)});
          const Tensor pixels = image.gather(2, index);
          const Tensor part = pixels * (weight * inside).unsqueeze(1);
          sum = sum.defined() ? sum + part : part;
          return;
        }
        const int64_t size = input.size(2 + dim);
        for (const Tap& tap : taps(points.select(-1, dims - 1 - dim), size, options)) {
          const Tensor is_here = (tap.place >= 0) & (tap.place <= static_cast<double>(size - 1));
          // An integer: the number of a pixel may be more than a floating point number can tell.
          const Tensor row = tap.place.masked_fill(is_here.logical_not(), 0).to(at::kLong);
          const Tensor here = is_here.to(tap.weight.scalar_type());
          const bool first = !place.defined();
          visit(dim + 1, first ? row : place * size + row, first ? tap.weight : weight * tap.weight,
                first ? here : inside * here);
        }
      };
  visit(0, {}, {}, {});
  std::vector<int64_t> sizes(grid.sizes().begin() + 1, grid.sizes().end() - 1);
  sizes.insert(sizes.begin(), {n, channels});
  return sum.reshape(sizes);
}

Tensor grid_sampler_kernel(const Tensor& input, const Tensor& grid, int64_t interpolation,
                           int64_t padding, bool align_corners) {
  const Options options = {.interpolation = static_cast<GridSamplerInterpolation>(interpolation),
                           .padding = static_cast<GridSamplerPadding>(padding),
                           .align_corners = align_corners};
  // Half precision cannot tell pixels apart.
  return grid_sampler(precise(input), precise(grid), options).to(input.scalar_type());
}

}  // namespace

std::vector<ForwardKernel> sampling_formulas() {
  std::vector<ForwardKernel> kernels;
  kernels.push_back(made<ops::grid_sampler_2d, &grid_sampler_kernel>());
  kernels.push_back(made<ops::grid_sampler_3d, &grid_sampler_kernel>());
  kernels.push_back(linear_in_first<ops::grid_sampler_2d_backward>());
  kernels.push_back(linear_in_first<ops::grid_sampler_3d_backward>());
  return kernels;
}

}  // namespace torchlift::forward_internal
