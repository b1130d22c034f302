#include <ATen/core/Tensor.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_renorm.h>
#include <gtest/gtest.h>

#include "batching/testing/rule_check.h"
#include "core/tensor_operators.h"

namespace torchlift::testing {
namespace {

RuleCase embedding_case(std::vector<int64_t> shape, int64_t padding_idx, bool scale_grad_by_freq) {
  return {.name = "embedding",
          .f =
              [=](const Tensors& in) {
                return Tensors{at::embedding(in[0], in[1], padding_idx, scale_grad_by_freq)};
              },
          .make =
              [=](int64_t) {
                return Tensors{randn({5, 3}), integers(0, 5, shape)};
              }};
}

TEST(EmbeddingRules, EveryShapeOfIndices) {
  check_rule(embedding_case({}, -1, false));
  check_rule(embedding_case({4}, -1, false));
  check_rule(embedding_case({2, 3}, -1, false));
  check_rule(embedding_case({0}, -1, false));
}

TEST(EmbeddingRules, PaddingAndCounts) {
  check_rule(embedding_case({6}, 2, false));
  check_rule(embedding_case({6}, -1, true));
  check_rule(embedding_case({2, 4}, 0, true));
}

TEST(EmbeddingRules, SecondOrder) {
  check_rule({.name = "embedding, squared",
              .f =
                  [](const Tensors& in) {
                    const at::Tensor out = at::embedding(in[0], in[1]);
                    return Tensors{out, out * out};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({5, 3}), integers(0, 5, {4})};
                  },
              .second_order = true});
}

TEST(EmbeddingRules, Renorm) {
  check_rule({.name = "embedding_renorm_",
              .f =
                  [](const Tensors& in) {
                    at::Tensor table = in[0];
                    at::embedding_renorm_(table, in[1], 0.5, 2);
                    return Tensors{table};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({5, 3}), integers(0, 5, {4})};
                  },
              .always_batched = {0},
              .differentiable = false});
}

}  // namespace
}  // namespace torchlift::testing
