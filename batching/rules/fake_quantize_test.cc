#include <ATen/core/Tensor.h>
#include <ATen/ops/fake_quantize_per_channel_affine.h>
#include <ATen/ops/fake_quantize_per_tensor_affine.h>
#include <gtest/gtest.h>

#include "batching/testing/rule_check.h"

namespace torchlift::testing {
namespace {

TEST(FakeQuantizeRules, PerTensor) {
  check_rule({.name = "per tensor",
              .f =
                  [](const Tensors& in) {
                    return Tensors{at::fake_quantize_per_tensor_affine(in[0], 0.1, 1, -8, 7)};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({3, 2})};
                  }});
}

TEST(FakeQuantizeRules, PerChannel) {
  for (const int64_t axis : {0, 1}) {
    check_rule({.name = "per channel",
                .f =
                    [=](const Tensors& in) {
                      return Tensors{at::fake_quantize_per_channel_affine(
                          in[0], in[1].detach().to(at::kFloat), in[2], axis, -8, 7)};
                    },
                .make =
                    [](int64_t) {
                      return Tensors{randn({3, 3}).to(at::kFloat), positive({3}).div(10),
                                     integers(-2, 3, {3}).to(at::kInt)};
                    },
                .tolerance = 1e-6});
  }
}

}  // namespace
}  // namespace torchlift::testing
