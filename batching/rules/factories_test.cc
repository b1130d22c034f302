#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <functional>
#include <vector>

#include "batching/testing/rule_check.h"
#include "core/lifted_tensor.h"

namespace torchlift::testing {
namespace {

using Make = std::function<at::Tensor(const at::Tensor&)>;

const std::vector<Make>& factories() {
  static const auto* all = new std::vector<Make>{
      [](const at::Tensor& x) { return at::zeros_like(x); },
      [](const at::Tensor& x) { return at::ones_like(x, at::kFloat); },
      [](const at::Tensor& x) { return at::full_like(x, 2.5); },
      [](const at::Tensor& x) { return at::empty_like(x).zero_(); },
      [](const at::Tensor& x) {
        return x.new_zeros({2, 3});
      },
      [](const at::Tensor& x) { return x.new_ones({2}, at::kLong); },
      [](const at::Tensor& x) {
        return x.new_full({3, 1}, 7);
      },
      [](const at::Tensor& x) { return x.new_zeros({}); },
      [](const at::Tensor& x) {
        return x.new_empty({0, 3});
      },
      [](const at::Tensor& x) {
        return x.new_empty({2, 2}).fill_(1);
      },
      [](const at::Tensor& x) {
        return x.new_empty_strided({2, 3}, {1, 2}).fill_(1);
      },
      [](const at::Tensor& x) {
        return x.new_empty_strided({2, 3}, {1, 4}).fill_(2);
      },
  };
  return *all;
}

TEST(FactoryRules, Values) {
  for (const Make& make : factories()) {
    for (const std::vector<int64_t>& shape : {std::vector<int64_t>{2, 3}, std::vector<int64_t>{}}) {
      check_rule({.name = "factory",
                  .f = [&](const Tensors& in) { return Tensors{make(in[0])}; },
                  .make = [&](int64_t) { return Tensors{randn(shape)}; },
                  .differentiable = false});
    }
  }
}

TEST(FactoryRules, EveryExampleHasItsOwnMemory) {
  check_rule({.name = "new_zeros, then add_",
              .f =
                  [](const Tensors& in) {
                    return Tensors{in[0].new_zeros({2, 3}).add_(in[0]),
                                   in[0].new_empty_strided({2, 3}, {1, 2}).copy_(in[0]),
                                   at::zeros_like(in[0]).add_(in[0])};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({2, 3})};
                  }});
}

TEST(FactoryRules, StridesAreThoseOfAnExample) {
  LevelScope scope({.size = 4, .randomness = Randomness::kSame});
  const at::Tensor x = lift(randn({4, 3}), 0, scope.level());
  EXPECT_EQ(x.new_empty_strided({2, 3}, {1, 2}).strides(), at::IntArrayRef({1, 2}));
  EXPECT_THROW(x.new_empty_strided({2, 3}, {1}), c10::Error);
}

}  // namespace
}  // namespace torchlift::testing
