// The passes on graphs as they come: of transformed functions, traced.

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <functional>
#include <string>
#include <tuple>
#include <vector>

#include "autodiff/grad.h"
#include "autodiff/jacobian.h"
#include "autodiff/vjp.h"
#include "batching/vmap.h"
#include "compile/partition/partition.h"
#include "compile/passes/fusion_groups.h"
#include "compile/passes/memory_plan.h"
#include "compile/passes/optimize.h"
#include "compile/passes/testing.h"
#include "compile/replay.h"
#include "compile/trace.h"

namespace torchlift::compile {
namespace {

using at::Tensor;

constexpr double kRounding = 1e-12;

Tensor example(at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); }

// Optimizes the traced graph and runs both, on other numbers.
Graph check(const Graph& before, OptimizeReport* report = nullptr) {
  Graph after = before;
  OptimizeOptions options;
  options.verify_each = true;
  options.hoisting.min_saved_elements = 0;
  const OptimizeReport done = optimize(after, options);
  EXPECT_TRUE(done.fixed_point) << done.str();
  EXPECT_LE(after.nodes.size(), before.nodes.size());
  const std::vector<Tensor> inputs = random_inputs(before);
  std::vector<Tensor> eager, ours;
  for (const Tensor& input : inputs) {
    eager.push_back(input.clone());
    ours.push_back(input.clone());
  }
  const auto expected = Program(before).run(eager, {.seed = 3});
  auto got = Program(after).run(ours, {.seed = 3});
  for (const InputUpdate& update : done.functionalized.updates) {
    ours[static_cast<size_t>(update.input)].copy_(got[static_cast<size_t>(update.output)]);
  }
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_TRUE(at::allclose(expected[i], got[i], kRounding, kRounding, true))
        << i << "\n"
        << before.str() << "\n"
        << after.str();
  }
  for (size_t i = 0; i < inputs.size(); ++i) EXPECT_TRUE(identical(eager[i], ours[i]));
  Graph grouped = after;
  fusion_groups(grouped);
  verify(grouped);
  const MemoryPlan plan = memory_plan(after);
  EXPECT_GE(plan.arena_bytes, plan.live_bytes);
  if (report != nullptr) *report = done;
  return after;
}

Tensor mlp_loss(const std::vector<Tensor>& w, const Tensor& x) {
  const Tensor hidden = at::tanh(at::linear(x, w[0], w[1]));
  return at::linear(hidden, w[2], w[3]).square().mean();
}

std::vector<Tensor> mlp_weights() {
  return {example({8, 4}), example({8}), example({3, 8}), example({3})};
}

TEST(TracedTest, Gradients) {
  const auto loss = [](const std::vector<Tensor>& w, const Tensor& x) { return mlp_loss(w, x); };
  check(torchlift::trace(grad(loss), mlp_weights(), example({5, 4})));
}

TEST(TracedTest, PerSampleGradients) {
  const auto loss = [](const std::vector<Tensor>& w, const Tensor& x) { return mlp_loss(w, x); };
  const auto per_sample = vmap(grad(loss), {.in_dims = in(kNone, 0)});
  check(torchlift::trace(per_sample, mlp_weights(), example({16, 4})));
}

TEST(TracedTest, Hessians) {
  const auto f = [](const Tensor& x) { return (x.sin() * x).sum().exp(); };
  check(torchlift::trace(hessian(f), example({4})));
  check(torchlift::trace(vmap(hessian(f)), example({3, 4})));
}

TEST(TracedTest, WhatIsWrittenInPlace) {
  const auto f = [](const Tensor& x) {
    Tensor buffer = at::zeros_like(x);
    buffer.select(0, 1).copy_(x.select(0, 0));
    buffer.t().mul_(2).add_(x.t());
    x.mul_(3);
    return buffer.sum(0).sigmoid_();
  };
  OptimizeReport report;
  check(torchlift::trace(f, example({3, 3})), &report);
  EXPECT_GT(report.functionalized.writes, 4);
}

TEST(TracedTest, RandomNumbers) {
  const auto f = [](const Tensor& x) {
    return at::dropout(x, 0.5, true) * at::rand_like(x) + at::dropout(x, 0.5, true);
  };
  check(torchlift::trace(f, example({6})));
}

// --- a transformer block -------------------------------------------------------------------------

Tensor norm(const Tensor& x, const Tensor& scale, const Tensor& shift) {
  return at::layer_norm(x, {x.size(-1)}, scale, shift);
}

Tensor block(const std::vector<Tensor>& w, const Tensor& x) {
  const int64_t batch = x.size(0), length = x.size(1), width = x.size(2), heads = 4;
  const auto split = [&](const Tensor& t) {
    return t.view({batch, length, heads, width / heads}).transpose(1, 2);
  };
  const Tensor n = norm(x, w[0], w[1]);
  const auto qkv = at::linear(n, w[2], w[3]).chunk(3, -1);
  const Tensor scores =
      at::matmul(split(qkv[0]), split(qkv[1]).transpose(-1, -2)) / std::sqrt(width / heads);
  const Tensor mixed = at::matmul(at::softmax(scores, -1), split(qkv[2]));
  const Tensor joined = mixed.transpose(1, 2).reshape({batch, length, width});
  const Tensor y = x + at::linear(joined, w[4], w[5]);
  const Tensor hidden = at::gelu(at::linear(norm(y, w[6], w[7]), w[8], w[9]));
  return y + at::linear(hidden, w[10], w[11]);
}

std::vector<Tensor> block_weights(int64_t d) {
  return {example({d}),        example({d}),     example({3 * d, d}), example({3 * d}),
          example({d, d}),     example({d}),     example({d}),        example({d}),
          example({4 * d, d}), example({4 * d}), example({d, 4 * d}), example({d})};
}

// Attention matrices are saved either way, and are small where sequences are no longer than tokens
// are wide.
TEST(TracedTest, PartitionsOfATransformerBlock) {
  const int64_t width = 64;
  const auto joint_function = [](const std::vector<Tensor>& w, const Tensor& x,
                                 const Tensor& cotangent) {
    auto [y, pullback] = vjp(block, w, x);
    auto [gw, gx] = pullback(cotangent);
    return std::tuple(y, gw, gx);
  };
  const auto weights = block_weights(width);
  Graph joint =
      torchlift::trace(joint_function, weights, example({4, 32, width}), example({4, 32, width}));
  joint = check(joint);
  const PartitionOptions options{.primals = weights.size() + 1, .outputs = 1};
  const Partition all = default_partition(joint, options);
  const Partition least = min_cut_partition(joint, options);
  std::printf(
      "saved: %lld bytes (%lld of them no primals) by default, %lld (%lld) by the minimum "
      "cut, which computes %lld nodes again\n",
      static_cast<long long>(all.saved_bytes), static_cast<long long>(all.saved_activation_bytes),
      static_cast<long long>(least.saved_bytes),
      static_cast<long long>(least.saved_activation_bytes),
      static_cast<long long>(least.recomputed_nodes));
  EXPECT_LE(static_cast<double>(least.saved_activation_bytes),
            0.7 * static_cast<double>(all.saved_activation_bytes));

  const std::vector<Tensor> inputs = random_inputs(joint);
  const auto expected = Program(joint).run(inputs);
  for (const Partition* parts : {&all, &least}) {
    const auto primals = static_cast<std::ptrdiff_t>(options.primals);
    const auto forward = Program(parts->forward).run({inputs.data(), options.primals});
    std::vector<Tensor> backward(forward.begin() + 1, forward.end());
    backward.insert(backward.end(), inputs.begin() + primals, inputs.end());
    const auto gradients = Program(parts->backward).run(backward);
    EXPECT_TRUE(identical(forward[0], expected[0]));
    ASSERT_EQ(gradients.size() + 1, expected.size());
    for (size_t i = 0; i < gradients.size(); ++i) {
      EXPECT_TRUE(identical(gradients[i], expected[i + 1])) << i;
    }
  }
}

}  // namespace
}  // namespace torchlift::compile
