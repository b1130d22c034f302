#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/nll_loss.h>
#include <ATen/ops/nll_loss2d.h>
#include <ATen/ops/nll_loss_nd.h>
#include <ATen/ops/softmax.h>
#include <gtest/gtest.h>

#include "batching/testing/rule_check.h"
#include "core/level.h"
#include "core/lifted_tensor.h"

namespace torchlift::testing {
namespace {

const std::vector<int64_t> kReductions{at::Reduction::None, at::Reduction::Mean,
                                       at::Reduction::Sum};

std::string reduction_name(const char* name, int64_t reduction) {
  return std::string(name) + ", reduction " + std::to_string(reduction);
}

TEST(NllRules, EveryShapeAndReduction) {
  const std::vector<std::pair<std::vector<int64_t>, std::vector<int64_t>>> shapes{
      {{5}, {}}, {{1, 5}, {1}}, {{4, 5}, {4}}, {{2, 5, 3, 2}, {2, 3, 2}}, {{2, 5, 3}, {2, 3}}};
  for (const int64_t reduction : kReductions) {
    for (const auto& [self, target] : shapes) {
      check_rule({.name = reduction_name("nll_loss_nd", reduction),
                  .f =
                      [reduction](const Tensors& in) {
                        return Tensors{at::nll_loss_nd(in[0], in[1], {}, reduction)};
                      },
                  .make =
                      [&self, &target](int64_t) {
                        return Tensors{randn(self), integers(0, 5, target)};
                      }});
    }
  }
}

TEST(NllRules, WeightsAndIgnoredTargets) {
  for (const int64_t reduction : kReductions) {
    for (const auto& [self, target] :
         std::vector<std::pair<std::vector<int64_t>, std::vector<int64_t>>>{
             {{5}, {}}, {{6, 5}, {6}}, {{2, 5, 3, 2}, {2, 3, 2}}}) {
      const bool alone = target.empty();  // no row must be left without any weight: 0 / 0
      check_rule({.name = reduction_name("weighted nll_loss", reduction),
                  .f =
                      [reduction, alone](const Tensors& in) {
                        return Tensors{at::nll_loss_nd(in[0], in[1], in[2].detach(), reduction,
                                                       alone ? -100 : 1)};
                      },
                  .make =
                      [&self, &target](int64_t) {
                        at::Tensor t = integers(0, 5, target);
                        if (t.dim() > 0) t.select(0, 0).fill_(2);
                        return Tensors{randn(self), t, positive({5})};
                      }});
    }
  }
}

TEST(NllRules, AnExampleWithOnlyIgnoredTargetsIsNanAlone) {
  check_rule({.name = "all ignored",
              .f =
                  [](const Tensors& in) {
                    return Tensors{at::nll_loss(in[0], in[1], {}, at::Reduction::Mean, 2)};
                  },
              .make =
                  [](int64_t i) {
                    return Tensors{randn({2, 4}), integers(0, 2, {2}).fill_(i % 2 == 0 ? 2 : 1)};
                  }});
}

TEST(CrossEntropyRules, ClassesWithSmoothing) {
  for (const int64_t reduction : kReductions) {
    for (const double smoothing : {0.0, 0.1}) {
      check_rule({.name = reduction_name("cross_entropy", reduction),
                  .f =
                      [=](const Tensors& in) {
                        return Tensors{at::cross_entropy_loss(in[0], in[1], in[2].detach(),
                                                              reduction, -100, smoothing)};
                      },
                  .make =
                      [](int64_t) {
                        return Tensors{randn({3, 4}), integers(0, 4, {3}), positive({4})};
                      }});
    }
  }
}

TEST(CrossEntropyRules, ClassProbabilities) {
  for (const int64_t reduction : kReductions) {
    check_rule({.name = reduction_name("cross_entropy of probabilities", reduction),
                .f =
                    [=](const Tensors& in) {
                      return Tensors{
                          at::cross_entropy_loss(in[0], in[1].softmax(-1), {}, reduction)};
                    },
                .make =
                    [](int64_t) {
                      return Tensors{randn({3, 4}), randn({3, 4})};
                    }});
  }
}

TEST(CrossEntropyRules, SecondOrder) {
  check_rule({.name = "cross_entropy",
              .f = [](const Tensors& in) { return Tensors{at::cross_entropy_loss(in[0], in[1])}; },
              .make =
                  [](int64_t) {
                    return Tensors{randn({2, 3}), integers(0, 3, {2})};
                  },
              .second_order = true});
}

TEST(NllRules, TargetOutOfRangeThrows) {
  const at::Tensor value = randn({3, 2, 4});
  const at::Tensor shared = integers(7, 8, {2});
  const at::Tensor targets = integers(7, 8, {3, 2});
  const LevelScope scope({.size = 3, .randomness = Randomness::kError});
  const at::Tensor x = lift_alias(value, 0, scope.level());
  const at::Tensor own = lift_alias(targets, 0, scope.level());
  EXPECT_ANY_THROW(at::nll_loss(x, own));
  EXPECT_ANY_THROW(at::nll_loss(x, shared));
}

}  // namespace
}  // namespace torchlift::testing
