#include <ATen/core/Tensor.h>
#include <ATen/ops/affine_grid_generator.h>
#include <ATen/ops/col2im.h>
#include <ATen/ops/grid_sampler_2d.h>
#include <ATen/ops/grid_sampler_3d.h>
#include <ATen/ops/im2col.h>
#include <ATen/ops/pixel_shuffle.h>
#include <ATen/ops/pixel_unshuffle.h>
#include <ATen/ops/upsample_bicubic2d.h>
#include <ATen/ops/upsample_bilinear2d.h>
#include <ATen/ops/upsample_linear1d.h>
#include <ATen/ops/upsample_nearest2d.h>
#include <ATen/ops/upsample_nearest3d.h>
#include <ATen/ops/upsample_trilinear3d.h>
#include <gtest/gtest.h>

#include "batching/testing/rule_check.h"

namespace torchlift {
namespace {

using testing::check_rule;
using testing::randn;
using testing::Tensors;

void check(const char* name, std::function<at::Tensor(const Tensors&)> f,
           std::vector<std::vector<int64_t>> shapes) {
  check_rule({.name = name,
              .f =
                  [&](const Tensors& in) {
                    const at::Tensor out = f(in);
                    // The gradient of the square differs from example to example.
                    return Tensors{out, out.mul(out)};
                  },
              .make =
                  [&](int64_t) {
                    Tensors in;
                    for (const auto& shape : shapes) in.push_back(randn(shape));
                    return in;
                  }});
}

TEST(UpsampleRules, Upsample) {
  check("nearest 2d",
        [](const Tensors& in) {
          return at::upsample_nearest2d(in[0], {7, 4});
        },
        {{2, 3, 4, 5}});
  check("nearest 3d",
        [](const Tensors& in) {
          return at::upsample_nearest3d(in[0], {3, 4, 5});
        },
        {{2, 1, 2, 2, 3}});
  check("linear 1d", [](const Tensors& in) { return at::upsample_linear1d(in[0], {7}, false); },
        {{2, 3, 4}});
  check("bilinear",
        [](const Tensors& in) {
          return at::upsample_bilinear2d(in[0], {7, 4}, true);
        },
        {{2, 3, 4, 5}});
  check("bicubic",
        [](const Tensors& in) {
          return at::upsample_bicubic2d(in[0], {7, 4}, false);
        },
        {{2, 3, 4, 5}});
  check("trilinear",
        [](const Tensors& in) {
          return at::upsample_trilinear3d(in[0], {3, 4, 5}, false);
        },
        {{2, 1, 2, 2, 3}});
}

TEST(UpsampleRules, Grids) {
  check("grid_sampler_2d",
        [](const Tensors& in) { return at::grid_sampler_2d(in[0], in[1].tanh(), 0, 0, false); },
        {{2, 3, 4, 5}, {2, 3, 3, 2}});
  check("grid_sampler_3d",
        [](const Tensors& in) { return at::grid_sampler_3d(in[0], in[1].tanh(), 0, 0, false); },
        {{2, 1, 3, 4, 5}, {2, 2, 3, 3, 3}});
  check("affine_grid",
        [](const Tensors& in) {
          return at::affine_grid_generator(in[0], {2, 1, 3, 4}, false);
        },
        {{2, 2, 3}});
}

TEST(UpsampleRules, WindowsAndShuffles) {
  check("im2col",
        [](const Tensors& in) {
          return at::im2col(in[0], {2, 3}, {1, 1}, {1, 0}, {2, 1});
        },
        {{2, 3, 5, 6}});
  check("im2col of [C, H, W]",
        [](const Tensors& in) {
          return at::im2col(in[0], {2, 3}, {1, 1}, {0, 0}, {1, 1});
        },
        {{3, 5, 6}});
  check("col2im",
        [](const Tensors& in) {
          return at::col2im(in[0], {4, 5}, {2, 2}, {1, 1}, {0, 0}, {1, 1});
        },
        {{2, 8, 12}});
  check("pixel_shuffle", [](const Tensors& in) { return at::pixel_shuffle(in[0], 2); },
        {{4, 3, 2}});
  check("pixel_unshuffle", [](const Tensors& in) { return at::pixel_unshuffle(in[0], 2); },
        {{1, 4, 6}});
}

}  // namespace
}  // namespace torchlift
