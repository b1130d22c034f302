#include <ATen/core/Tensor.h>
#include <ATen/ops/_batch_norm_no_update.h>
#include <ATen/ops/_batch_norm_with_update.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/instance_norm.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "batching/testing/rule_check.h"
#include "core/level.h"
#include "core/lifted_tensor.h"

namespace torchlift::testing {
namespace {

at::Tensor batch_norm(const at::Tensor& x, const at::Tensor& w, const at::Tensor& b,
                      const at::Tensor& mean, const at::Tensor& var, bool training) {
  return at::batch_norm(x, w, b, mean, var, training, 0.1, 1e-5, false);
}

TEST(BatchNormRules, TrainingWithoutStatistics) {
  for (const std::vector<int64_t>& shape :
       std::vector<std::vector<int64_t>>{{4, 3}, {2, 3, 2, 2}}) {
    check_rule({.name = "training",
                .f =
                    [](const Tensors& in) {
                      return Tensors{batch_norm(in[0], in[1], in[2], {}, {}, true)};
                    },
                .make =
                    [&](int64_t) {
                      return Tensors{randn(shape), randn({3}), randn({3})};
                    },
                .tolerance = 1e-7});
  }
}

TEST(BatchNormRules, WithoutAffine) {
  check_rule({.name = "training, no weight",
              .f =
                  [](const Tensors& in) {
                    return Tensors{batch_norm(in[0], {}, {}, {}, {}, true).square()};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({4, 3})};
                  },
              .tolerance = 1e-7});
}

TEST(BatchNormRules, Evaluation) {
  check_rule(
      {.name = "eval",
       .f =
           [](const Tensors& in) {
             return Tensors{batch_norm(in[0], in[1], in[2], in[3].detach(), in[4].detach(), false)};
           },
       .make =
           [](int64_t) {
             return Tensors{randn({2, 3, 4}), randn({3}), randn({3}), randn({3}), positive({3})};
           },
       .tolerance = 1e-7});
}

TEST(BatchNormRules, TrainingUpdatesBatchedStatistics) {
  check_rule({.name = "running statistics",
              .f =
                  [](const Tensors& in) {
                    const at::Tensor mean = in[1];
                    const at::Tensor var = in[2];
                    const at::Tensor out = batch_norm(in[0], {}, {}, mean, var, true);
                    return Tensors{out, mean, var};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({4, 3}), randn({3}), positive({3})};
                  },
              .always_batched = {1, 2},
              .differentiable = false});
}

// The forms that exported graphs use, with what a backend keeps for the gradient.
TEST(BatchNormRules, WithUpdate) {
  check_rule(
      {.name = "with update",
       .f =
           [](const Tensors& in) {
             at::Tensor mean = in[3].detach().clone(), var = in[4].detach().clone();
             const auto out =
                 at::_batch_norm_with_update(in[0], in[1], in[2], mean, var, 0.1, 1e-5);
             return Tensors{std::get<0>(out), mean, var};
           },
       .make =
           [](int64_t) {
             return Tensors{randn({2, 3, 4}), randn({3}), randn({3}), randn({3}), positive({3})};
           },
       .always_batched = {3, 4},
       .tolerance = 1e-7});
}

TEST(BatchNormRules, WithUpdateFunctional) {
  check_rule({.name = "with update, functional",
              .f =
                  [](const Tensors& in) {
                    const auto out = at::_batch_norm_with_update_functional(
                        in[0], {}, {}, in[1].detach(), in[2].detach(), 0.1, 1e-5);
                    return Tensors{std::get<0>(out), std::get<4>(out), std::get<5>(out)};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({2, 3, 4}), randn({3}), positive({3})};
                  },
              .differentiable = false,
              .tolerance = 1e-7});
}

TEST(BatchNormRules, NoUpdate) {
  check_rule(
      {.name = "no update",
       .f =
           [](const Tensors& in) {
             return Tensors{std::get<0>(at::_batch_norm_no_update(
                 in[0], in[1], in[2], in[3].detach(), in[4].detach(), 0.1, 1e-5))};
           },
       .make =
           [](int64_t) {
             return Tensors{randn({2, 3, 4}), randn({3}), randn({3}), randn({3}), positive({3})};
           },
       .unbatched = {2, 4},
       .differentiable = false,
       .tolerance = 1e-7});
}

TEST(BatchNormRules, SharedStatisticsCannotBeTrained) {
  const at::Tensor value = randn({2, 4, 3});
  const at::Tensor mean = randn({3});
  const at::Tensor variance = positive({3});
  LevelScope scope({.size = 2, .randomness = Randomness::kError});
  const at::Tensor x = lift_alias(value, 0, scope.level());
  try {
    batch_norm(x, {}, {}, mean, variance, true);
    FAIL() << "nothing was thrown";
  } catch (const std::exception& e) {
    EXPECT_THAT(e.what(),
                ::testing::HasSubstr("[vmap] batch_norm: the running mean has no batch dim"));
    EXPECT_THAT(e.what(), ::testing::HasSubstr("eval()"));
    EXPECT_THAT(e.what(), ::testing::HasSubstr("track_running_stats=False"));
  }
}

TEST(InstanceNormRules, WithWeights) {
  check_rule({.name = "instance_norm",
              .f =
                  [](const Tensors& in) {
                    return Tensors{
                        at::instance_norm(in[0], in[1], in[2], {}, {}, true, 0.1, 1e-5, false)};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({2, 3, 5}), randn({3}), randn({3})};
                  },
              .tolerance = 1e-7});
}

}  // namespace
}  // namespace torchlift::testing
