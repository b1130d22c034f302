#include <ATen/core/Tensor.h>
#include <ATen/ops/embedding_bag.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/tensor.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <tuple>

#include "batching/testing/rule_check.h"
#include "core/level.h"
#include "core/lifted_tensor.h"

namespace torchlift::testing {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kSum = 0, kMean = 1, kMax = 2;

// Bags of other sizes for every example, one of them empty.
at::Tensor offsets_of(int64_t i) {
  return at::tensor({int64_t{0}, 1 + i % 3, 1 + i % 3, int64_t{5}});
}

Tensors inputs(int64_t i) { return {randn({6, 3}), integers(0, 6, {7}), offsets_of(i)}; }

TEST(EmbeddingBagRules, Modes) {
  for (const int64_t mode : {kSum, kMean, kMax}) {
    for (const int64_t padding : {-1, 2}) {
      check_rule({.name = "mode " + std::to_string(mode) + " padding " + std::to_string(padding),
                  .f =
                      [=](const Tensors& in) {
                        const std::optional<int64_t> pad =
                            padding < 0 ? std::nullopt : std::optional(padding);
                        return Tensors{std::get<0>(at::embedding_bag(in[0], in[1], in[2], false,
                                                                     mode, false, {}, false, pad))};
                      },
                  .make = inputs});
    }
  }
}

TEST(EmbeddingBagRules, LastOffset) {
  for (const int64_t mode : {kSum, kMean, kMax}) {
    check_rule({.name = "include_last_offset, mode " + std::to_string(mode),
                .f =
                    [=](const Tensors& in) {
                      return Tensors{std::get<0>(
                          at::embedding_bag(in[0], in[1], in[2], false, mode, false, {}, true))};
                    },
                .make =
                    [](int64_t i) {
                      return Tensors{randn({6, 3}), integers(0, 6, {7}),
                                     at::tensor({int64_t{0}, 1 + i % 3, int64_t{7}})};
                    }});
  }
}

TEST(EmbeddingBagRules, FactorsAndFrequency) {
  check_rule({.name = "per_sample_weights",
              .f =
                  [](const Tensors& in) {
                    return Tensors{std::get<0>(
                        at::embedding_bag(in[0], in[1], in[2], false, kSum, false, in[3]))};
                  },
              .make =
                  [](int64_t i) {
                    Tensors in = inputs(i);
                    in.push_back(randn({7}));
                    return in;
                  }});
  check_rule({.name = "scale_grad_by_freq",
              .f =
                  [](const Tensors& in) {
                    return Tensors{
                        std::get<0>(at::embedding_bag(in[0], in[1], in[2], true, kSum, false))};
                  },
              .make = inputs,
              .unbatched = {0}});
}

TEST(EmbeddingBagRules, AnIndexOutOfItsTableIsNotLookedUpInTheNext) {
  const LevelScope scope({.size = 2});
  const at::Tensor tables = lift_alias(at::ones({2, 3, 4}), 0, scope.level());
  const at::Tensor index = at::tensor({int64_t{0}, int64_t{4}}), offsets = at::tensor({int64_t{0}});
  try {
    at::embedding_bag(tables, index, offsets);
    ADD_FAILURE() << "nothing was thrown";
  } catch (const std::exception& error) {
    EXPECT_THAT(error.what(), HasSubstr("out of the range of its table"));
  }
}

}  // namespace
}  // namespace torchlift::testing
