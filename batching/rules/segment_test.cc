#include <ATen/core/Tensor.h>
#include <ATen/ops/segment_reduce.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include "batching/testing/rule_check.h"

namespace torchlift::testing {
namespace {

// Three segments of 7 rows, others for every example.
at::Tensor lengths_of(int64_t i) { return at::tensor({1 + i % 3, int64_t{2}, 4 - i % 3}); }

TEST(SegmentRules, Lengths) {
  for (const char* reduce : {"sum", "mean", "max", "prod"}) {
    check_rule(
        {.name = reduce,
         .f = [reduce](
                  const Tensors& in) { return Tensors{at::segment_reduce(in[0], reduce, in[1])}; },
         .make =
             [](int64_t i) {
               return Tensors{randn({7, 2}), lengths_of(i)};
             }});
  }
}

TEST(SegmentRules, Offsets) {
  check_rule({.name = "offsets",
              .f =
                  [](const Tensors& in) {
                    return Tensors{at::segment_reduce(in[0], "sum", {}, {}, in[1])};
                  },
              .make =
                  [](int64_t i) {
                    return Tensors{randn({7, 2}), at::tensor({int64_t{0}, 1 + i % 3, int64_t{7}})};
                  }});
}

}  // namespace
}  // namespace torchlift::testing
