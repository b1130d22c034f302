#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/ctc_loss.h>
#include <ATen/ops/log_softmax.h>
#include <gtest/gtest.h>

#include "batching/testing/rule_check.h"

namespace torchlift::testing {
namespace {

TEST(CtcRules, PaddedAndJoinedTargets) {
  const std::vector<int64_t> inputs{9, 8, 9};
  const std::vector<int64_t> lengths{3, 4, 2};
  for (const int64_t reduction : {at::Reduction::None, at::Reduction::Mean, at::Reduction::Sum}) {
    for (const bool joined : {false, true}) {
      check_rule({.name = joined ? "ctc_loss, targets joined" : "ctc_loss",
                  .f =
                      [=](const Tensors& in) {
                        return Tensors{at::ctc_loss(in[0].log_softmax(-1), in[1], inputs, lengths,
                                                    /*blank=*/0, reduction)};
                      },
                  .make =
                      [=](int64_t) {
                        const std::vector<int64_t> shape =
                            joined ? std::vector<int64_t>{9} : std::vector<int64_t>{3, 4};
                        return Tensors{randn({9, 3, 5}), integers(1, 5, shape)};
                      },
                  .empty_batch = false});
    }
  }
}

TEST(CtcRules, OneSequence) {
  check_rule({.name = "ctc_loss of one sequence",
              .f =
                  [](const Tensors& in) {
                    return Tensors{at::ctc_loss(in[0].log_softmax(-1), in[1], at::IntArrayRef{7},
                                                at::IntArrayRef{3})};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({7, 5}), integers(1, 5, {3})};
                  },
              .empty_batch = false});
}

}  // namespace
}  // namespace torchlift::testing
