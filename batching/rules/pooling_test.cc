#include <ATen/core/Tensor.h>
#include <ATen/ops/adaptive_avg_pool2d.h>
#include <ATen/ops/adaptive_avg_pool3d.h>
#include <ATen/ops/adaptive_max_pool2d.h>
#include <ATen/ops/adaptive_max_pool3d.h>
#include <ATen/ops/avg_pool1d.h>
#include <ATen/ops/avg_pool2d.h>
#include <ATen/ops/avg_pool3d.h>
#include <ATen/ops/fractional_max_pool2d.h>
#include <ATen/ops/fractional_max_pool3d.h>
#include <ATen/ops/max_pool1d.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/max_pool2d_with_indices.h>
#include <ATen/ops/max_pool3d.h>
#include <ATen/ops/max_unpool2d.h>
#include <ATen/ops/randint.h>
#include <gtest/gtest.h>

#include <limits>
#include <tuple>
#include <vector>

#include "batching/testing/rule_check.h"

namespace torchlift {
namespace {

using testing::check_rule;
using testing::positive;
using testing::randn;
using testing::Tensors;

void check_pool(const char* name, std::function<at::Tensor(const at::Tensor&)> f,
                std::vector<std::vector<int64_t>> shapes, bool second_order = false) {
  for (const auto& shape : shapes) {
    check_rule({.name = name,
                .f =
                    [&](const Tensors& in) {
                      const at::Tensor out = f(in[0]);
                      // The gradient of the square differs from example to example.
                      return Tensors{out, out.mul(out)};
                    },
                .make = [&](int64_t) { return Tensors{randn(shape)}; },
                .second_order = second_order});
  }
}

TEST(PoolingRules, Max) {
  check_pool("max_pool1d", [](const at::Tensor& x) { return at::max_pool1d(x, 2); },
             {{2, 3, 7}, {3, 7}});
  check_pool(
      "max_pool2d",
      [](const at::Tensor& x) {
        return at::max_pool2d(x, {2, 3}, {2, 1}, {1, 1});
      },
      {{2, 3, 5, 6}, {3, 5, 6}}, true);
  check_pool("max_pool2d, dilated",
             [](const at::Tensor& x) { return at::max_pool2d(x, 2, 1, 0, 2, /*ceil_mode=*/true); },
             {{2, 3, 5, 6}});
  check_pool("max_pool3d", [](const at::Tensor& x) { return at::max_pool3d(x, 2); },
             {{2, 2, 4, 4, 5}, {2, 4, 4, 5}});
}

// Large enough for NOTE [planes as channels]; of small integers, so that windows have several
// largest numbers, and with a NaN.
at::Tensor many_planes(at::IntArrayRef shape) {
  at::Tensor x = at::randint(3, shape, at::kDouble);
  x.view({-1})[17].fill_(std::numeric_limits<double>::quiet_NaN());
  return x;
}

std::tuple<at::Tensor, at::Tensor> overlapping_pool(const at::Tensor& x) {
  return at::max_pool2d_with_indices(x, {3, 2}, {2, 2}, {1, 1}, 1, /*ceil_mode=*/true);
}

TEST(PoolingRules, ManyPlanes) {
  for (const std::vector<int64_t>& shape : std::vector<std::vector<int64_t>>{
           {2, 8, 30, 20}, {16, 30, 20}, {8, 30, 20}, {3, 5, 30, 20}}) {
    const auto make = [&](int64_t) { return Tensors{many_planes(shape)}; };
    const auto values = [](const Tensors& in) {
      const at::Tensor out = std::get<0>(overlapping_pool(in[0])).nan_to_num(7);
      return Tensors{out, out.mul(out)};
    };
    check_rule({.name = "max_pool2d, many planes", .f = values, .make = make});
    const auto indices = [](const Tensors& in) {
      return Tensors{std::get<1>(overlapping_pool(in[0]))};
    };
    check_rule({.name = "indices of max_pool2d, many planes",
                .f = indices,
                .make = make,
                .differentiable = false});
  }
}

TEST(PoolingRules, Indices) {
  check_rule({.name = "max_pool2d_with_indices",
              .f =
                  [](const Tensors& in) {
                    const auto [out, indices] = at::max_pool2d_with_indices(in[0], 2);
                    return Tensors{out, indices};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({2, 3, 5, 6})};
                  },
              .differentiable = false});
}

TEST(PoolingRules, Average) {
  check_pool("avg_pool1d", [](const at::Tensor& x) { return at::avg_pool1d(x, 2); },
             {{2, 3, 7}, {3, 7}});
  check_pool(
      "avg_pool2d",
      [](const at::Tensor& x) {
        return at::avg_pool2d(x, {2, 3}, {2, 1}, {1, 1});
      },
      {{2, 3, 5, 6}, {3, 5, 6}}, true);
  check_pool("avg_pool3d", [](const at::Tensor& x) { return at::avg_pool3d(x, 2); },
             {{2, 2, 4, 4, 5}, {2, 4, 4, 5}});
}

TEST(PoolingRules, Adaptive) {
  check_pool(
      "adaptive_avg_pool2d",
      [](const at::Tensor& x) {
        return at::adaptive_avg_pool2d(x, {2, 3});
      },
      {{2, 3, 5, 6}, {3, 5, 6}}, true);
  check_pool("adaptive_avg_pool2d to one",
             [](const at::Tensor& x) {
               return at::adaptive_avg_pool2d(x, {1, 1});
             },
             {{2, 3, 5, 6}});
  check_pool("adaptive_avg_pool3d",
             [](const at::Tensor& x) {
               return at::adaptive_avg_pool3d(x, {2, 3, 2});
             },
             {{2, 2, 4, 4, 5}, {2, 4, 4, 5}});
  check_pool("adaptive_max_pool2d",
             [](const at::Tensor& x) {
               return std::get<0>(at::adaptive_max_pool2d(x, {2, 3}));
             },
             {{2, 3, 5, 6}, {3, 5, 6}});
  check_pool("adaptive_max_pool3d",
             [](const at::Tensor& x) {
               return std::get<0>(at::adaptive_max_pool3d(x, {2, 3, 2}));
             },
             {{2, 2, 4, 4, 5}, {2, 4, 4, 5}});
}

TEST(PoolingRules, Fractional) {
  for (const bool has_n : {true, false}) {
    check_rule({.name = "fractional_max_pool2d",
                .f =
                    [](const Tensors& in) {
                      const auto [out, indices] =
                          at::fractional_max_pool2d(in[0], {2, 2}, {3, 4}, in[1].detach());
                      return Tensors{out, indices};
                    },
                .make =
                    [=](int64_t) {
                      const at::Tensor x = randn({2, 3, 7, 8});
                      const at::Tensor samples = positive({2, 3, 2}).sub(0.5);
                      return has_n ? Tensors{x, samples} : Tensors{x[0], samples.narrow(0, 0, 1)};
                    }});
    check_rule({.name = "fractional_max_pool3d",
                .f =
                    [](const Tensors& in) {
                      const auto [out, indices] =
                          at::fractional_max_pool3d(in[0], {2, 2, 2}, {2, 3, 2}, in[1].detach());
                      return Tensors{out, indices};
                    },
                .make =
                    [=](int64_t) {
                      const at::Tensor x = randn({2, 2, 5, 6, 5});
                      const at::Tensor samples = positive({2, 2, 3}).sub(0.5);
                      return has_n ? Tensors{x, samples} : Tensors{x[0], samples.narrow(0, 0, 1)};
                    }});
  }
}

TEST(PoolingRules, Unpool) {
  check_pool("max_unpool2d",
             [](const at::Tensor& x) {
               const auto [out, indices] = at::max_pool2d_with_indices(x, 2);
               return at::max_unpool2d(out, indices, {6, 6});
             },
             {{2, 3, 6, 6}, {3, 6, 6}});
}

}  // namespace
}  // namespace torchlift
