#include <ATen/core/Tensor.h>
#include <ATen/ops/isin.h>
#include <ATen/ops/nonzero_static.h>
#include <gtest/gtest.h>

#include "batching/testing/rule_check.h"

namespace torchlift::testing {
namespace {

TEST(SearchRules, Isin) {
  for (const bool invert : {false, true}) {
    for (const std::vector<int64_t>& shape :
         std::vector<std::vector<int64_t>>{{}, {4}, {2, 3}, {0}}) {
      check_rule({.name = "isin",
                  .f =
                      [=](const Tensors& in) {
                        return Tensors{at::isin(in[0], in[1], false, invert),
                                       at::isin(in[0], 3, false, invert),
                                       at::isin(3, in[1], false, invert)};
                      },
                  .make =
                      [=](int64_t) {
                        return Tensors{integers(0, 6, shape), integers(0, 6, {2, 2})};
                      },
                  .always_batched = {static_cast<size_t>(0), static_cast<size_t>(1)},
                  .differentiable = false});
    }
  }
  check_rule({.name = "isin of either",
              .f = [](const Tensors& in) { return Tensors{at::isin(in[0], in[1])}; },
              .make =
                  [](int64_t) {
                    return Tensors{integers(0, 6, {2, 3}), integers(0, 6, {4})};
                  },
              .differentiable = false});
}

TEST(SearchRules, NonzeroStatic) {
  for (const int64_t size : {0, 2, 5, 20}) {
    for (const std::vector<int64_t>& shape :
         std::vector<std::vector<int64_t>>{{}, {6}, {3, 4}, {2, 0}}) {
      check_rule({.name = "nonzero_static",
                  .f = [=](const Tensors& in) { return Tensors{at::nonzero_static(in[0], size)}; },
                  .make = [=](int64_t) { return Tensors{integers(0, 2, shape)}; },
                  .differentiable = false});
    }
  }
}

}  // namespace
}  // namespace torchlift::testing
