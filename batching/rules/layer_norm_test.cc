#include <ATen/core/Tensor.h>
#include <ATen/ops/alias.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/native_layer_norm.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "batching/testing/rule_check.h"

namespace torchlift::testing {
namespace {

RuleCase layer_norm_case(std::vector<int64_t> input, std::vector<int64_t> shape) {
  return {
      .name = "layer_norm",
      .f = [shape](
               const Tensors& in) { return Tensors{at::layer_norm(in[0], shape, in[1], in[2])}; },
      .make =
          [input, shape](int64_t) {
            return Tensors{randn(input), randn(shape), randn(shape)};
          }};
}

TEST(LayerNormRules, EveryBatchedArgument) {
  check_rule(layer_norm_case({5}, {5}));
  check_rule(layer_norm_case({1, 5}, {5}));
  check_rule(layer_norm_case({2, 3, 4}, {4}));
  check_rule(layer_norm_case({2, 3, 4}, {3, 4}));
}

TEST(LayerNormRules, WithoutWeights) {
  check_rule({.name = "layer_norm alone",
              .f = [](const Tensors& in) { return Tensors{at::layer_norm(in[0], {4})}; },
              .make =
                  [](int64_t) {
                    return Tensors{randn({2, 4})};
                  }});
}

TEST(LayerNormRules, WeightOnly) {
  check_rule({.name = "layer_norm without bias",
              .f = [](const Tensors& in) { return Tensors{at::layer_norm(in[0], {4}, in[1])}; },
              .make =
                  [](int64_t) {
                    return Tensors{randn({2, 4}), randn({4})};
                  }});
}

// The harness's second derivatives start from cotangents that are not batched; libtorch's formula
// for the second derivative writes into them. Those of a user's gradient are batched, as here.
Tensors squared_gradients(const Tensors& in) {
  const c10::AutoGradMode enable(true);
  Tensors primals;
  for (const at::Tensor& t : in) {
    primals.push_back(t.requires_grad() ? t : at::alias(t).requires_grad_(true));
  }
  const at::Tensor out = at::layer_norm(primals[0], {4}, primals[1], primals[2]).square().sum();
  Tensors grads = torch::autograd::grad({out}, primals, {}, true, /*create_graph=*/true);
  for (at::Tensor& g : grads) g = g.square();
  return grads;
}

TEST(LayerNormRules, SecondOrder) {
  check_rule({.name = "second derivative of layer_norm",
              .f = squared_gradients,
              .make =
                  [](int64_t) {
                    return Tensors{randn({2, 4}), randn({4}), randn({4})};
                  },
              .always_batched = {0, 1, 2}});
}

TEST(LayerNormRules, Statistics) {
  check_rule({.name = "native_layer_norm",
              .f =
                  [](const Tensors& in) {
                    auto [out, mean, rstd] = at::native_layer_norm(in[0], {4}, in[1], in[2], 1e-5);
                    return Tensors{out, mean, rstd};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({2, 4}), randn({4}), randn({4})};
                  },
              .differentiable = false});
}

}  // namespace
}  // namespace torchlift::testing
