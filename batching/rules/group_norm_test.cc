#include <ATen/core/Tensor.h>
#include <ATen/ops/_weight_norm.h>
#include <ATen/ops/group_norm.h>
#include <ATen/ops/renorm.h>
#include <ATen/ops/rms_norm.h>
#include <gtest/gtest.h>

#include "batching/testing/rule_check.h"

namespace torchlift::testing {
namespace {

TEST(GroupNormRules, EveryBatchedArgument) {
  for (const std::vector<int64_t>& shape :
       std::vector<std::vector<int64_t>>{{2, 4}, {1, 4, 3}, {2, 4, 2, 3}}) {
    check_rule(
        {.name = "group_norm",
         .f = [](const Tensors& in) { return Tensors{at::group_norm(in[0], 2, in[1], in[2])}; },
         .make =
             [&](int64_t) {
               return Tensors{randn(shape), randn({4}), randn({4})};
             },
         .tolerance = 1e-7});
  }
}

TEST(GroupNormRules, WithoutAffine) {
  check_rule({.name = "group_norm",
              .f = [](const Tensors& in) { return Tensors{at::group_norm(in[0], 2)}; },
              .make =
                  [](int64_t) {
                    return Tensors{randn({2, 4, 3})};
                  },
              .second_order = true,
              .tolerance = 1e-7});
}

TEST(RmsNormRules, EveryBatchedArgument) {
  check_rule({.name = "rms_norm",
              .f = [](const Tensors& in) { return Tensors{at::rms_norm(in[0], {4}, in[1], 1e-5)}; },
              .make =
                  [](int64_t) {
                    return Tensors{randn({2, 4}), randn({4})};
                  }});
}

TEST(RenormRules, BothForms) {
  check_rule({.name = "renorm",
              .f = [](const Tensors& in) { return Tensors{at::renorm(in[0], 2, 1, 1.0)}; },
              .make =
                  [](int64_t) {
                    return Tensors{randn({3, 4})};
                  }});
  check_rule({.name = "renorm_",
              .f =
                  [](const Tensors& in) {
                    at::Tensor x = in[0];
                    return Tensors{x.renorm_(3, 0, 0.5)};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({3, 4, 2})};
                  },
              .always_batched = {0},
              .differentiable = false});
}

TEST(WeightNormRules, FirstAndLastDim) {
  for (const int64_t dim : {0, 2}) {
    check_rule(
        {.name = "weight_norm",
         .f = [=](const Tensors& in) { return Tensors{at::_weight_norm(in[0], in[1], dim)}; },
         .make =
             [=](int64_t) {
               return Tensors{randn({3, 4, 2}), dim == 0 ? randn({3, 1, 1}) : randn({1, 1, 2})};
             },
         .second_order = true});
  }
}

}  // namespace
}  // namespace torchlift::testing
