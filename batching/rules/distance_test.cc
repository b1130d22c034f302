#include <ATen/core/Tensor.h>
#include <ATen/ops/cdist.h>
#include <ATen/ops/pdist.h>
#include <gtest/gtest.h>

#include "batching/testing/rule_check.h"

namespace torchlift::testing {
namespace {

TEST(DistanceRules, Cdist) {
  for (const double p : {1.0, 2.0, 3.0}) {
    for (const std::vector<int64_t>& leading : std::vector<std::vector<int64_t>>{{}, {2}}) {
      std::vector<int64_t> shape = leading;
      shape.insert(shape.end(), {4, 5});
      check_rule({.name = "cdist",
                  .f = [p](const Tensors& in) { return Tensors{at::cdist(in[0], in[1], p)}; },
                  .make =
                      [shape](int64_t) {
                        return Tensors{randn(shape), randn({3, 5})};
                      },
                  .tolerance = 1e-7});
    }
  }
}

TEST(DistanceRules, Pdist) {
  for (const double p : {0.5, 1.0, 2.0, 3.0}) {
    check_rule({.name = "pdist",
                .f = [p](const Tensors& in) { return Tensors{at::pdist(in[0], p)}; },
                .make =
                    [](int64_t) {
                      return Tensors{randn({4, 3})};
                    }});
  }
}

// Rows that are equal have a distance of 0, whose gradient counts as 0.
TEST(DistanceRules, EqualRows) {
  check_rule({.name = "pdist of equal rows",
              .f =
                  [](const Tensors& in) {
                    return Tensors{at::pdist(in[0].expand({3, 4}), 2)};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({1, 4})};
                  }});
}

}  // namespace
}  // namespace torchlift::testing
