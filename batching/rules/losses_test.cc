#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/binary_cross_entropy.h>
#include <ATen/ops/binary_cross_entropy_with_logits.h>
#include <ATen/ops/cosine_embedding_loss.h>
#include <ATen/ops/cosine_similarity.h>
#include <ATen/ops/dist.h>
#include <ATen/ops/hinge_embedding_loss.h>
#include <ATen/ops/huber_loss.h>
#include <ATen/ops/kl_div.h>
#include <ATen/ops/l1_loss.h>
#include <ATen/ops/mse_loss.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/smooth_l1_loss.h>
#include <ATen/ops/soft_margin_loss.h>
#include <gtest/gtest.h>

#include "batching/testing/rule_check.h"
#include "core/tensor_operators.h"

namespace torchlift::testing {
namespace {

using Loss = std::function<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t)>;

void check_loss(const char* name, const Loss& f, bool second_order = false,
                const std::vector<std::vector<int64_t>>& shapes = {{}, {3}, {2, 3}}) {
  for (const int64_t reduction : {at::Reduction::None, at::Reduction::Mean, at::Reduction::Sum}) {
    for (const auto& shape : shapes) {
      check_rule({.name = std::string(name) + ", reduction " + std::to_string(reduction),
                  .f = [&](const Tensors& in) { return Tensors{f(in[0], in[1], reduction)}; },
                  .make =
                      [&](int64_t) {
                        return Tensors{randn(shape), randn(shape)};
                      },
                  .second_order = second_order});
    }
  }
}

TEST(LossRules, Regression) {
  check_loss(
      "mse", [](auto& x, auto& y, auto r) { return at::mse_loss(x, y, r); }, true);
  check_loss("l1", [](auto& x, auto& y, auto r) { return at::l1_loss(x, y, r); });
  check_loss("smooth l1",
             [](auto& x, auto& y, auto r) { return at::smooth_l1_loss(x, y, r, 0.7); });
  check_loss("huber", [](auto& x, auto& y, auto r) { return at::huber_loss(x, y, r, 0.7); });
}

TEST(LossRules, Classification) {
  check_loss("soft margin", [](auto& x, auto& y, auto r) {
    return at::soft_margin_loss(x, y.detach().sign(), r);
  });
  check_loss("hinge embedding",
             [](auto& x, auto& y, auto r) { return at::hinge_embedding_loss(x, y.sign(), 1., r); });
  check_loss("kl_div", [](auto& x, auto& y, auto r) { return at::kl_div(x, y, r, true); });
  check_loss("binary cross entropy", [](auto& x, auto& y, auto r) {
    return at::binary_cross_entropy(x.sigmoid(), y.sigmoid(), {}, r);
  });
  check_loss("with logits", [](auto& x, auto& y, auto r) {
    return at::binary_cross_entropy_with_logits(x, y.sigmoid(), {}, {}, r);
  });
}

TEST(LossRules, WeightedBinaryCrossEntropy) {
  for (const int64_t reduction : {at::Reduction::None, at::Reduction::Mean}) {
    check_rule({.name = "weighted",
                .f =
                    [=](const Tensors& in) {
                      const at::Tensor p = in[0].sigmoid();
                      return Tensors{at::binary_cross_entropy(p, in[1], in[2].detach(), reduction),
                                     at::binary_cross_entropy_with_logits(
                                         in[0], in[1], in[2].detach(), in[2].detach(), reduction)};
                    },
                .make =
                    [](int64_t) {
                      return Tensors{randn({2, 3}), randn({2, 3}).sigmoid(), positive({2, 3})};
                    }});
  }
}

TEST(LossRules, OperandsOfDifferentShapes) {
  check_rule({.name = "mse of [2, 3] and [3]",
              .f =
                  [](const Tensors& in) {
                    return Tensors{at::mse_loss(in[0], in[1], at::Reduction::Sum)};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({2, 3}), randn({3})};
                  }});
}

TEST(LossRules, CosineEmbedding) {
  check_rule({.name = "cosine embedding",
              .f =
                  [](const Tensors& in) {
                    return Tensors{at::cosine_embedding_loss(in[0], in[1], in[2].sign(), 0.1)};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({3, 4}), randn({3, 4}), randn({3})};
                  }});
}

// Also where one argument is of the level and the other is not, and a norm is below eps.
TEST(LossRules, CosineSimilarity) {
  for (const double eps : {1e-8, 2.0}) {
    check_rule({.name = "cosine similarity",
                .f =
                    [eps](const Tensors& in) {
                      return Tensors{at::cosine_similarity(in[0], in[1], 1, eps)};
                    },
                .make =
                    [](int64_t) {
                      return Tensors{randn({3, 4}), randn({3, 4})};
                    }});
  }
}

TEST(LossRules, Dist) {
  check_rule({.name = "dist",
              .f = [](const Tensors& in) { return Tensors{at::dist(in[0], in[1], 3)}; },
              .make =
                  [](int64_t) {
                    return Tensors{randn({2, 3}), randn({2, 3})};
                  }});
}

}  // namespace
}  // namespace torchlift::testing
