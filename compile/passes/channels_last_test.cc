#include "compile/passes/channels_last.h"

#include <ATen/ATen.h>
#include <c10/util/accumulate.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "autodiff/grad.h"
#include "batching/vmap.h"
#include "compile/executable.h"
#include "compile/passes/optimize.h"
#include "compile/passes/testing.h"
#include "compile/replay.h"
#include "compile/trace.h"

namespace torchlift::compile {
namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;

// Convolutions add in another order.
constexpr double kRounding = 1e-5;

Tensors weights() {
  return {at::randn({16, 1, 3, 3}) * 0.3, at::randn({16}), at::randn({32, 16, 3, 3}) * 0.1,
          at::randn({32}), at::randn({10, 800}) * 0.03};
}

Tensor network(const Tensors& w, const Tensor& x) {
  Tensor h = at::max_pool2d(at::relu(at::conv2d(x, w[0], w[1])), 2);
  h = at::max_pool2d(at::relu(at::conv2d(h, w[2], w[3])), 2);
  return at::linear(h.flatten(1), w[4]);
}

Tensor loss(const Tensors& w, const Tensor& x) {
  return at::log_softmax(network(w, x), 1).square().mean();
}

// The optimized graph of f before and after the pass.
struct Pair {
  Graph before;
  Graph after;
  std::vector<ValueId> chosen;
};

template <class F, class... Args>
Pair relaid(const F& f, const Args&... args) {
  Graph graph = torchlift::trace(f, args...);
  optimize(graph);
  Pair pair{graph, graph, {}};
  pair.chosen = channels_last(pair.after);
  verify(pair.after);
  return pair;
}

bool steps_alike(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

void expect_same_numbers(const Tensors& expected, const Tensors& got) {
  ASSERT_EQ(expected.size(), got.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    const double scale = expected[i].to(at::kDouble).abs().max().item<double>();
    EXPECT_TRUE(at::allclose(expected[i], got[i], kRounding, kRounding * scale)) << i;
    const Tensor dense =
        expected[i].is_non_overlapping_and_dense() ? expected[i] : expected[i].contiguous();
    EXPECT_TRUE(steps_alike(dense, got[i])) << i << dense.strides() << got[i].strides();
  }
}

// Small integers, so that sums of convolutions are exact in any order, and what is largest in a
// window does not depend on how they round.
Tensors integer_inputs(const Graph& graph, const std::vector<int64_t>& symbols = {}) {
  Tensors inputs;
  for (const Tensor& t : random_inputs(graph, symbols)) inputs.push_back(t.round().clamp(-2, 2));
  return inputs;
}

// On inputs that it was not traced with; each value must have the type that the graph says.
void check(const Pair& pair) {
  ASSERT_FALSE(pair.chosen.empty());
  const Tensors inputs = integer_inputs(pair.before);
  const Tensors expected = run_reference(pair.before, inputs);
  expect_same_numbers(expected, run_reference(pair.after, inputs));
  RunPlan plan;
  plan.chosen = pair.chosen;
  expect_same_numbers(expected, Program(pair.after, plan).run(inputs));
  expect_same_numbers(expected, Executable(pair.before).run(inputs));
}

// Of copies, that of the most numbers.
int64_t largest_copy(const Graph& graph) {
  int64_t largest = 0;
  for (const Node& node : graph.nodes) {
    if (node.op != "aten::clone") continue;
    largest = std::max(largest,
                       c10::multiply_integers(graph.type(node.results[0].ids[0]).concrete_sizes()));
  }
  return largest;
}

const auto per_model = [](const auto& f) { return vmap(f, {.in_dims = in(0, kNone)}); };
const auto per_example = [](const auto& f) { return vmap(f, {.in_dims = in(kNone, 0)}); };

Tensors models() {
  Tensors stacked;
  for (const Tensor& w : weights()) stacked.push_back(at::stack({w, w * 0.5, w + 0.1}));
  return stacked;
}

TEST(ChannelsLastTest, AnEnsembleCopiesWeightsAndWhatTheLastLayerReads) {
  const Pair pair = relaid(per_model(network), models(), at::randn({4, 1, 28, 28}));
  check(pair);
  EXPECT_LE(largest_copy(pair.after), 3 * 4 * 800);
}

TEST(ChannelsLastTest, GradientsOfAnEnsembleTakeTheSameWayBack) {
  const Pair pair = relaid(per_model(grad(loss)), models(), at::randn({4, 1, 28, 28}));
  check(pair);
  // Of the weights of the second convolution, and of what the linear layer reads and gives back.
  EXPECT_LE(largest_copy(pair.after), 3 * 32 * 16 * 9);
}

TEST(ChannelsLastTest, OfOneNetworkAndByExample) {
  check(relaid(network, weights(), at::randn({5, 1, 28, 28})));
  check(relaid(grad(loss), weights(), at::randn({5, 1, 28, 28})));
  check(relaid(per_example(grad(loss)), weights(), at::randn({5, 1, 1, 28, 28})));
  check(relaid(per_model(per_example(network)), models(), at::randn({5, 1, 1, 28, 28})));
}

TEST(ChannelsLastTest, WhatStandsInTheWayReadsTheOldLayout) {
  const Tensor w = at::randn({16, 16, 3, 3}) * 0.1;
  const Tensor x = at::randn({2, 16, 24, 24});
  // A residual, views that flatten the image, softmax over it; and the pool's argument is an
  // output.
  const auto f = [](const Tensor& w, const Tensor& x) {
    const Tensor h = at::relu(at::conv2d(x, w, {}, 1, 1));
    const Tensor sum = h + x;
    const Tensor flat = at::softmax(h.view({2, -1}), 1);
    const Tensor rows = h.transpose(2, 3).select(0, 1).slice(1, 1, 7, 2);
    return Tensors{at::max_pool2d(h, 2), sum, flat, h, rows, h.sum(at::IntArrayRef{0, 3})};
  };
  check(relaid(f, w, x));
}

TEST(ChannelsLastTest, NormsPadsAndOtherPoolsKeepTheLayout) {
  const Tensor w = at::randint(-2, 3, {16, 3, 3, 3}, at::kFloat);
  const Tensor mean = at::zeros({16}), var = at::ones({16}), scale = at::ones({16});
  const auto f = [&](const Tensor& w, const Tensor& x) {
    Tensor h = at::conv2d(x, w, {}, 1, 1);
    h = at::batch_norm(h, scale, {}, mean, var, /*training=*/false, 0.1, 0, false);
    h = at::constant_pad_nd(at::max_pool2d(h.relu(), 2), {1, 0, 0, 1});
    h = at::avg_pool2d(at::upsample_nearest2d(h, at::IntArrayRef{28, 28}), 2);
    return at::adaptive_avg_pool2d(h, {2, 7}).square();
  };
  const Tensor x = at::randint(-2, 3, {2, 3, 24, 24}, at::kFloat);
  const Pair pair = relaid(f, w, x);
  check(pair);
  EXPECT_LE(largest_copy(pair.after), 2 * 16 * 2 * 7) << pair.after.str();  // the result
  const auto total = [&](const Tensor& w, const Tensor& x) { return f(w, x).sum(); };
  const Pair gradient = relaid(grad(total), w, x);
  check(gradient);
  EXPECT_LE(largest_copy(gradient.after), x.numel()) << gradient.after.str();
}

TEST(ChannelsLastTest, ImagesThatNoConvolutionMakesAreCopied) {
  for (const auto dtype : {at::kFloat, at::kDouble}) {
    const auto f = [](const Tensor& x) { return at::max_pool2d(x.exp(), {3, 2}, {2, 1}, 1); };
    const Pair pair = relaid(f, at::randn({2, 16, 24, 24}, dtype));
    check(pair);
    EXPECT_EQ(count(pair.after, "aten::clone"), 2);
  }
}

TEST(ChannelsLastTest, LeavesAloneWhatGainsNothing) {
  const auto pool = [](const Tensor& x) { return at::max_pool2d(x, 2); };
  // Few channels, few numbers, another dtype, no pool, and memory that is looked at past strides.
  EXPECT_TRUE(relaid(pool, at::randn({2, 4, 64, 64})).chosen.empty());
  EXPECT_TRUE(relaid(pool, at::randn({1, 8, 8, 8})).chosen.empty());
  EXPECT_TRUE(relaid(pool, at::randn({32, 8, 16, 16})).chosen.empty());
  EXPECT_FALSE(relaid(pool, at::randn({32, 16, 16, 16})).chosen.empty());
  EXPECT_TRUE(relaid(pool, at::randn({2, 16, 24, 24}).to(at::kBFloat16)).chosen.empty());
  EXPECT_TRUE(
      relaid([](const Tensor& x) { return x.relu(); }, at::randn({2, 16, 24, 24})).chosen.empty());
  const auto in_the_way = [&](const Tensor& x, const Tensor& w) {
    const Tensor h = at::conv2d(x, w).view({2, 3, 16, 48, 48});
    Tensor sum = pool(h[0].narrow(0, 1, 1));
    for (int64_t i = 0; i < 3; ++i) sum = sum + h.cumsum(i).mean();
    return sum;
  };
  EXPECT_TRUE(
      relaid(in_the_way, at::randn({2, 3, 50, 50}), at::randn({48, 3, 3, 3})).chosen.empty());
  const auto strided = [&](const Tensor& x) { return pool(x) + x.as_strided({1}, {1}, 0); };
  EXPECT_TRUE(relaid(strided, at::randn({2, 16, 24, 24})).chosen.empty());
}

TEST(ChannelsLastTest, PoolsGiveTheSameBits) {
  const auto pool = [](const Tensor& x) { return at::max_pool2d_with_indices(x, 3, 2, 1); };
  Tensor x = at::randint(3, {2, 16, 24, 24}, at::kFloat);
  x[0][3][5][7].fill_(std::numeric_limits<float>::quiet_NaN());
  const auto got = Executable(torchlift::trace(pool, x)).run({x});
  const auto [values, indices] = pool(x);
  EXPECT_TRUE(identical(got[0], values));
  EXPECT_TRUE(identical(got[1], indices));
}

TEST(ChannelsLastTest, KernelsThatChooseAnotherLayoutAreCorrected) {
  // As if the convolution were computed by a kernel that gives contiguous memory.
  Pair pair = relaid(network, weights(), at::randn({5, 1, 28, 28}));
  int64_t replaced = 0;
  for (Node& node : pair.after.nodes) {
    if (node.op != "aten::convolution") continue;
    for (const Node& clone : pair.after.nodes) {
      if (clone.op == "aten::clone" &&
          clone.results[0].ids[0] == std::get<ValueRef>(node.args[1]).id) {
        node.args[1] = clone.args[0];
        ++replaced;
      }
    }
  }
  ASSERT_GT(replaced, 0) << pair.after.str();
  const Tensors inputs = integer_inputs(pair.before);
  RunPlan plan;
  plan.chosen = pair.chosen;
  expect_same_numbers(run_reference(pair.before, inputs), Program(pair.after, plan).run(inputs));
}

TEST(ChannelsLastTest, DynamicBatches) {
  const Tensors w = weights();
  GraphBuilder b;
  const ValueId x = b.input(at::randn({12, 1, 28, 28}));
  b.dynamic(0, "n");
  const ValueId kernel = b.constant(w[0]);
  const ValueId h = b.call("aten::convolution", {{"input", ref(x)},
                                                 {"weight", ref(kernel)},
                                                 {"bias", {}},
                                                 {"stride", ints({1, 1})},
                                                 {"padding", ints({0, 0})},
                                                 {"dilation", ints({1, 1})},
                                                 {"transposed", number(false)},
                                                 {"output_padding", ints({0, 0})},
                                                 {"groups", number(int64_t{1})}});
  const ValueId relu = b.call("aten::relu", {{"self", ref(h)}});
  const ValueId pooled = b.call_all("aten::max_pool2d_with_indices",
                                    {{"self", ref(relu)}, {"kernel_size", ints({2, 2})}})[0];
  const Graph before = b.finish({pooled});
  Graph after = before;
  const std::vector<ValueId> chosen = channels_last(after);
  EXPECT_FALSE(chosen.empty());
  verify(after);
  for (const int64_t n : {1, 2, 7}) {
    const Tensors inputs = integer_inputs(before, {n});
    expect_same_numbers(run_reference(before, inputs, {n}), run_reference(after, inputs, {n}));
    expect_same_numbers(run_reference(before, inputs, {n}), Executable(before).run(inputs));
  }
}

}  // namespace
}  // namespace torchlift::compile
