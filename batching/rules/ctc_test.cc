#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/ctc_loss.h>
#include <ATen/ops/full.h>
#include <ATen/ops/log_softmax.h>
#include <gtest/gtest.h>

#include "batching/testing/rule_check.h"
#include "core/tensor_operators.h"

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
                      }});
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
                  }});
}

// Each example has its own lengths; those of its targets have one sum, as they lie in one row.
TEST(CtcRules, LengthsAsTensors) {
  for (const bool joined : {false, true}) {
    check_rule({.name = "ctc_loss, lengths as tensors",
                .f =
                    [=](const Tensors& in) {
                      return Tensors{at::ctc_loss(in[0].log_softmax(-1), in[1], in[2], in[3])};
                    },
                .make =
                    [=](int64_t) {
                      const std::vector<int64_t> shape =
                          joined ? std::vector<int64_t>{9} : std::vector<int64_t>{3, 6};
                      const at::Tensor fewer = integers(0, 2, {1});
                      const at::Tensor lengths =
                          at::cat({3 + fewer, 4 - fewer, at::full({1}, 2, at::kLong)});
                      return Tensors{randn({9, 3, 5}), integers(1, 5, shape), integers(7, 10, {3}),
                                     lengths};
                    }});
  }
}

}  // namespace
}  // namespace torchlift::testing
