#include <ATen/core/Tensor.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <gtest/gtest.h>

#include <cmath>

#include "batching/testing/rule_check.h"
#include "batching/vmap.h"

namespace torchlift {
namespace {

using testing::check_rule;
using testing::integers;
using testing::randn;
using testing::RuleCase;
using testing::Tensors;

// Queries, keys and values with the given leading dims, and a mask if it has a shape.
RuleCase attention(const char* name, std::vector<int64_t> leading, std::vector<int64_t> mask = {},
                   bool causal = false) {
  return {.name = name,
          .f =
              [causal](const Tensors& in) {
                std::optional<at::Tensor> bias;
                if (in.size() == 4) bias = in[3];
                const at::Tensor out =
                    at::scaled_dot_product_attention(in[0], in[1], in[2], bias, 0.0, causal);
                return Tensors{out, out.mul(out)};
              },
          .make =
              [leading, mask](int64_t) {
                const auto shape = [&](int64_t length, int64_t features) {
                  std::vector<int64_t> sizes = leading;
                  sizes.push_back(length);
                  sizes.push_back(features);
                  return sizes;
                };
                Tensors in{randn(shape(5, 4)), randn(shape(3, 4)), randn(shape(3, 4))};
                if (!mask.empty()) in.push_back(randn(mask));
                return in;
              }};
}

TEST(AttentionRules, Fused) {
  check_rule(attention("one sequence", {1, 2}));
  check_rule(attention("several sequences", {3, 2}));
  check_rule(attention("causal", {2, 2}, {}, true));
}

TEST(AttentionRules, Decomposed) { check_rule(attention("no batch of their own", {2})); }

TEST(AttentionRules, Masks) {
  for (const std::vector<int64_t>& mask :
       std::vector<std::vector<int64_t>>{{5, 3}, {2, 1, 5, 3}, {2, 2, 5, 3}, {1, 2, 5, 3}}) {
    RuleCase c = attention("masked", {2, 2}, mask);
    c.f = [](const Tensors& in) {
      // The fused kernel has no gradient for a mask.
      return Tensors{at::scaled_dot_product_attention(in[0], in[1], in[2], in[3].detach())};
    };
    check_rule(c);
  }
}

TEST(AttentionRules, BooleanMask) {
  RuleCase c = attention("boolean mask", {2, 2});
  const auto make = c.make;
  c.make = [make](int64_t i) {
    Tensors in = make(i);
    at::Tensor mask = integers(0, 2, {5, 3}).to(at::kBool);
    mask.select(1, 0).fill_(true);
    in.push_back(mask);
    return in;
  };
  check_rule(c);
}

TEST(AttentionRules, KernelGivesLogsumexpPerExample) {
  check_rule({.name = "flash attention",
              .f =
                  [](const Tensors& in) {
                    const auto [out, logsumexp] =
                        at::_scaled_dot_product_flash_attention_for_cpu(in[0], in[1], in[2]);
                    return Tensors{out, logsumexp};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({2, 2, 5, 4}), randn({2, 2, 3, 4}), randn({2, 2, 3, 4})};
                  },
              .differentiable = false});
}

// The kernel is chosen inside of the vmap, where nobody sees that a gradient is wanted outside.
TEST(AttentionRules, MaskWithAGradientOutside) {
  const at::Tensor q = randn({3, 1, 2, 4, 5}), k = randn({3, 1, 2, 6, 5}),
                   v = randn({3, 1, 2, 6, 5});
  const at::Tensor values = randn({3, 1, 2, 4, 6});
  const auto attend = [](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         const at::Tensor& mask) {
    return at::scaled_dot_product_attention(q, k, v, mask);
  };
  const auto gradient = [&](const auto& f) {
    const at::Tensor mask = values.clone().requires_grad_();
    f(mask).sin().sum().backward();
    return mask.grad();
  };
  const at::Tensor got =
      gradient([&](const at::Tensor& mask) { return vmap(attend)(q, k, v, mask); });
  const at::Tensor expected = gradient([&](const at::Tensor& mask) {
    const at::Tensor scores = q.matmul(k.mT()).div(std::sqrt(5.0)).add(mask);
    return scores.softmax(-1).matmul(v);
  });
  EXPECT_TRUE(at::allclose(got, expected));
}

}  // namespace
}  // namespace torchlift
