#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/multi_margin_loss.h>
#include <ATen/ops/multilabel_margin_loss.h>
#include <gtest/gtest.h>

#include "batching/testing/rule_check.h"

namespace torchlift::testing {
namespace {

const std::vector<int64_t> kReductions{at::Reduction::None, at::Reduction::Mean,
                                       at::Reduction::Sum};

TEST(MarginLossRules, OneClass) {
  for (const int64_t reduction : kReductions) {
    for (const std::vector<int64_t>& rows : std::vector<std::vector<int64_t>>{{}, {4}}) {
      std::vector<int64_t> shape = rows;
      shape.push_back(5);
      check_rule({.name = "multi_margin_loss",
                  .f =
                      [=](const Tensors& in) {
                        return Tensors{
                            at::multi_margin_loss(in[0], in[1], 1, 1, in[2].detach(), reduction)};
                      },
                  .make =
                      [=](int64_t) {
                        return Tensors{randn(shape), integers(0, 5, rows), positive({5})};
                      }});
    }
  }
}

// An example that is a number is a row of one class.
TEST(MarginLossRules, OneNumber) {
  for (const int64_t reduction : kReductions) {
    check_rule({.name = "multi_margin_loss of a number",
                .f =
                    [=](const Tensors& in) {
                      return Tensors{at::multi_margin_loss(in[0], in[1], 1, 1, {}, reduction)};
                    },
                .make =
                    [](int64_t) {
                      return Tensors{randn({}), integers(0, 1, {})};
                    }});
  }
}

TEST(MarginLossRules, SeveralLabels) {
  for (const int64_t reduction : kReductions) {
    for (const std::vector<int64_t>& shape : std::vector<std::vector<int64_t>>{{}, {5}, {4, 5}}) {
      check_rule({.name = "multilabel_margin_loss",
                  .f =
                      [=](const Tensors& in) {
                        return Tensors{at::multilabel_margin_loss(in[0], in[1], reduction)};
                      },
                  .make =
                      [=](int64_t) {
                        const int64_t classes = shape.empty() ? 1 : shape.back();
                        return Tensors{randn(shape), integers(-1, classes, shape)};
                      }});
    }
  }
}

}  // namespace
}  // namespace torchlift::testing
