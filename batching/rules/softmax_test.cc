#include <ATen/core/Tensor.h>
#include <ATen/ops/_masked_softmax.h>
#include <ATen/ops/_safe_softmax.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/softmax.h>
#include <gtest/gtest.h>

#include "batching/testing/rule_check.h"

namespace torchlift::testing {
namespace {

void check_softmax(const char* name, const std::function<at::Tensor(const at::Tensor&)>& f,
                   const std::vector<std::vector<int64_t>>& shapes, bool second_order = false) {
  for (const auto& shape : shapes) {
    check_rule({.name = name,
                .f = [&](const Tensors& in) { return Tensors{f(in[0])}; },
                .make = [&](int64_t) { return Tensors{randn(shape)}; },
                .second_order = second_order});
  }
}

TEST(SoftmaxRules, AnyDim) {
  check_softmax("softmax -1", [](const at::Tensor& x) { return x.softmax(-1); },
                {{}, {4}, {2, 3}, {2, 3, 4}});
  check_softmax("softmax 0", [](const at::Tensor& x) { return x.softmax(0); }, {{}, {2, 3}});
  check_softmax("log_softmax -1", [](const at::Tensor& x) { return x.log_softmax(-1); },
                {{}, {4}, {2, 3}});
  check_softmax("log_softmax 0", [](const at::Tensor& x) { return x.log_softmax(0); }, {{2, 3}});
  check_softmax("safe softmax", [](const at::Tensor& x) { return at::_safe_softmax(x, -1); },
                {{2, 3}});
}

TEST(SoftmaxRules, SecondOrder) {
  check_softmax(
      "softmax", [](const at::Tensor& x) { return x.softmax(-1); }, {{2, 3}}, true);
  check_softmax(
      "log_softmax", [](const at::Tensor& x) { return x.log_softmax(0); }, {{3}}, true);
}

TEST(SoftmaxRules, MaskedWithEachLayoutOfTheMask) {
  const auto run = [](std::vector<int64_t> mask_shape, int64_t type) {
    check_rule({.name = "masked softmax, mask type " + std::to_string(type),
                .f =
                    [type](const Tensors& in) {
                      return Tensors{at::_masked_softmax(in[0], in[1].to(at::kBool), 3, type)};
                    },
                .make =
                    [mask_shape](int64_t) {
                      return Tensors{randn({2, 2, 3, 3}), integers(0, 2, mask_shape)};
                    },
                .differentiable = type == 2});
  };
  run({3, 3}, 0);
  run({2, 3}, 1);
  run({2, 2, 3, 3}, 2);
}

}  // namespace
}  // namespace torchlift::testing
