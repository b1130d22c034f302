#include "nn_functional/ghost.h"

#include <ATen/autocast_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/nn.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "autodiff/checkpoint.h"
#include "autodiff/grad.h"
#include "autodiff/jvp.h"
#include "batching/control_flow.h"
#include "batching/vmap.h"
#include "core/error.h"
#include "core/memory_meter.h"
#include "core/testing.h"
#include "nn_functional/per_sample.h"

namespace torchlift {
namespace {

namespace nn = torch::nn;
using ::testing::HasSubstr;
using Names = std::vector<std::string>;

at::Tensor randn(at::IntArrayRef sizes) { return torch::randn(sizes, torch::kDouble); }

at::Tensor targets(int64_t size) { return torch::rand({size}, torch::kDouble) + 0.5; }

at::Tensor loss(const at::Tensor& out, const at::Tensor& y) {
  const at::Tensor weights = torch::linspace(0.5, 1.5, out.numel(), torch::kDouble);
  return (out.reshape(-1) * weights).sin().sum() * y.sum();
}

// The names of the parameters whose gradients are not made for these examples, or without vmap for
// the first.
template <class Net>
Names covered(Net net, const at::Tensor& xs, const at::Tensor& ys, bool mapped) {
  const auto module = functional(net);
  const auto state = per_sample_internal::split_state(module.slots());
  Names names;
  const auto square = [&](const at::Tensor& x, const at::Tensor& y) {
    const ReturnBuffers frozen{.others = BufferMode::kFrozen};
    const auto of_one = [&](const ModuleState& tracked) {
      return loss(module(std::tie(tracked, state.second), frozen, x.unsqueeze(0)).first, y);
    };
    auto found = ghost_internal::squared_norm_of_gradient(module.slots(), state.first, of_one);
    names = std::move(found.covered);
    return found.value;
  };
  if (mapped) {
    vmap(square)(xs, ys);
  } else {
    square(xs[0], ys[0]);
  }
  std::sort(names.begin(), names.end());
  return names;
}

// Compares the norms with those of gradients that are made, and returns the names of those that
// were not.
template <class Net>
Names check_norms(Net net, const at::Tensor& xs, const at::Tensor& ys) {
  net->to(torch::kDouble);
  for (const int64_t size : {static_cast<int64_t>(0), static_cast<int64_t>(1), xs.size(0)}) {
    const at::Tensor x = xs.slice(0, 0, size), y = ys.slice(0, 0, size);
    const at::Tensor got = per_sample_grad_norms(net, &loss)(x, y);
    EXPECT_EQ(got.sizes(), at::IntArrayRef{size});
    EXPECT_FALSE(got.requires_grad());
    if (size == 0) continue;
    const at::Tensor want = grad_norms(per_sample_grad(net, &loss)(x, y));
    EXPECT_GT(want.min().template item<double>(), 0);
    EXPECT_TRUE(torch::allclose(got, want, 1e-9, 1e-12)) << got << want;
    EXPECT_TRUE(torch::allclose(per_sample_grad_norms(net, &loss, {.chunk_size = 2})(x, y), want));
    EXPECT_TRUE(torch::allclose(
        per_sample_grad_norms(net, &loss, {.memory_budget = int64_t{1} << 22})(x, y), want));
  }
  return covered(net, xs, ys, /*mapped=*/true);
}

const Names kBoth{"bias", "weight"};
const Names kWeight{"weight"};
const Names kNothing{};

// --- kinds of layers -----------------------------------------------------------------------------

TEST(GhostNorms, LinearAndItsPositions) {
  EXPECT_EQ(check_norms(nn::Linear(3, 4), randn({5, 3}), targets(5)), kBoth);
  const auto no_bias = nn::LinearOptions(3, 4).bias(false);
  EXPECT_EQ(check_norms(nn::Linear(no_bias), randn({5, 3}), targets(5)), kWeight);
  EXPECT_EQ(check_norms(nn::Linear(no_bias), randn({5, 2, 3}), targets(5)), kWeight);
  // torch::nn adds the bias by an operator of its own where there are positions.
  EXPECT_EQ(check_norms(nn::Linear(3, 4), randn({5, 2, 3}), targets(5)), kWeight);
  EXPECT_EQ(check_norms(nn::Linear(30, 40), randn({3, 2, 5, 30}), targets(3)), kWeight);
}

// 2 * positions^2 against the numbers in a weight.
TEST(GhostNorms, GradientsSmallerThanTwoMatricesOfPositionsAreMade) {
  const auto linear = [] { return nn::Linear(nn::LinearOptions(8, 16).bias(false)); };
  EXPECT_EQ(check_norms(linear(), randn({3, 8, 8}), targets(3)), kWeight);
  EXPECT_EQ(check_norms(linear(), randn({3, 9, 8}), targets(3)), kNothing);
  const auto conv = [] { return nn::Conv2d(8, 16, 3); };
  EXPECT_EQ(check_norms(conv(), randn({3, 8, 6, 8}), targets(3)), kBoth);     // 24: 1152 <= 1152
  EXPECT_EQ(check_norms(conv(), randn({3, 8, 7, 7}), targets(3)), kNothing);  // 25
  const auto grouped = [] { return nn::Conv2d(nn::Conv2dOptions(8, 16, 3).groups(2)); };
  EXPECT_EQ(check_norms(grouped(), randn({3, 8, 5, 6}), targets(3)), kBoth);      // 12: 576 <= 576
  EXPECT_EQ(check_norms(grouped(), randn({3, 8, 3, 15}), targets(3)), kNothing);  // 13
  const auto table = [] { return nn::Embedding(10, 4); };
  EXPECT_EQ(check_norms(table(), torch::randint(0, 10, {3, 4}), targets(3)), kWeight);
  EXPECT_EQ(check_norms(table(), torch::randint(0, 10, {3, 5}), targets(3)), kNothing);
}

TEST(GhostNorms, Convolutions) {
  EXPECT_EQ(check_norms(nn::Conv1d(nn::Conv1dOptions(16, 24, 3).groups(2).stride(2).padding(1)),
                        randn({4, 16, 9}), targets(4)),
            kBoth);
  EXPECT_EQ(
      check_norms(nn::Conv2d(nn::Conv2dOptions(24, 32, {3, 2}).dilation({1, 2}).padding({2, 1})),
                  randn({4, 24, 4, 4}), targets(4)),
      kBoth);
  EXPECT_EQ(check_norms(nn::Conv2d(nn::Conv2dOptions(8, 8, 4).padding(torch::kSame)),
                        randn({4, 8, 4, 4}), targets(4)),
            kBoth);
  EXPECT_EQ(
      check_norms(nn::Conv2d(nn::Conv2dOptions(8, 8, 3).padding(1).padding_mode(torch::kCircular)),
                  randn({4, 8, 4, 4}), targets(4)),
      kBoth);
  EXPECT_EQ(check_norms(nn::Conv3d(nn::Conv3dOptions(8, 8, 2).bias(false)), randn({3, 8, 2, 3, 2}),
                        targets(3)),
            kWeight);
  EXPECT_EQ(check_norms(nn::ConvTranspose1d(nn::ConvTranspose1dOptions(2, 3, 3)), randn({3, 2, 4}),
                        targets(3)),
            kNothing);
}

TEST(GhostNorms, Embeddings) {
  const at::Tensor ids = torch::tensor({{1, 4, 4}, {0, 2, 2}, {3, 3, 3}});
  EXPECT_EQ(check_norms(nn::Embedding(nn::EmbeddingOptions(12, 3).padding_idx(4)), ids, targets(3)),
            kWeight);
  EXPECT_EQ(check_norms(nn::Embedding(12, 3), ids, targets(3)), kWeight);
}

TEST(GhostNorms, ParametersOfNormLayersAreMade) {
  EXPECT_EQ(
      check_norms(nn::LayerNorm(nn::LayerNormOptions({3, 4})), randn({4, 2, 3, 4}), targets(4)),
      kNothing);
  EXPECT_EQ(check_norms(nn::GroupNorm(2, 4), randn({4, 4, 3}), targets(4)), kNothing);
}

TEST(GhostNorms, NetworkInTraining) {
  nn::Sequential net(nn::Conv2d(nn::Conv2dOptions(8, 16, 3).stride(2)), nn::BatchNorm2d(16),
                     nn::Flatten(), nn::Linear(64, 6), nn::Tanh(), nn::Linear(6, 3));
  const at::Tensor xs = randn({4, 8, 5, 5});
  const Names names{"0.bias", "0.weight", "3.bias", "3.weight", "5.bias", "5.weight"};
  EXPECT_EQ(check_norms(net, xs, targets(4)), names);
  EXPECT_EQ(net->named_buffers()["1.num_batches_tracked"].item<int64_t>(), 0);
  // In the middle, at the end and at the start.
  for (const std::string frozen : {"3.weight", "3.bias", "5.weight", "0.weight"}) {
    net->named_parameters()[frozen].set_requires_grad(false);
    Names rest = names;
    // The bias beside a frozen weight is made.
    const bool both = frozen.ends_with("weight");
    std::erase_if(rest, [&](const std::string& name) {
      return name == frozen || (both && name == frozen.substr(0, 2) + "bias");
    });
    EXPECT_EQ(check_norms(net, xs, targets(4)), rest);
    net->named_parameters()[frozen].set_requires_grad(true);
  }
}

TEST(GhostNorms, RandomNumbersAreThoseOfPerSampleGrad) {
  nn::Sequential drops(nn::Linear(3, 9), nn::Dropout(0.5));
  const auto sum = [](const at::Tensor& out) { return out.square().sum(); };
  const at::Tensor x = torch::randn({4, 3});
  const PerSampleOptions same{.randomness = Randomness::kSame};
  torch::manual_seed(3);
  const at::Tensor got = per_sample_grad_norms(drops, sum, same)(x);
  torch::manual_seed(3);
  EXPECT_TRUE(torch::allclose(got, grad_norms(per_sample_grad(drops, sum, same)(x))));
}

// --- ways to use a weight ------------------------------------------------------------------------

// Does with its parameters what a test says. Not Cloneable.
struct OwnImpl : nn::Module {
  using Forward = std::function<at::Tensor(const OwnImpl& own, const at::Tensor& x)>;

  explicit OwnImpl(Forward f) : run(std::move(f)) {
    w = register_parameter("w", torch::randn({4, 4}));
    v = register_parameter("v", torch::randn({4, 4}));
    b = register_parameter("b", torch::randn({4}));
    frozen = register_parameter("frozen", torch::randn({4}), /*requires_grad=*/false);
  }
  at::Tensor forward(const at::Tensor& x) {
    ++calls;
    return run(*this, x);
  }

  Forward run;
  int calls = 0;
  at::Tensor w, v, b, frozen;
};

// {the names covered} of a module that does this with one row.
Names check_way(const OwnImpl::Forward& forward) {
  return check_norms(std::make_shared<OwnImpl>(forward), randn({5, 4}), targets(5));
}

TEST(GhostNorms, OperatorsOfTheUser) {
  EXPECT_EQ(check_way([](const OwnImpl& own, const at::Tensor& x) {
              return (torch::tanh(x.matmul(own.w)) + own.b).mm(own.v) + own.frozen;
            }),
            (Names{"v", "w"}));
  EXPECT_EQ(check_way([](const OwnImpl& own, const at::Tensor& x) {
              return torch::linear(torch::linear(x, own.w, own.b).relu_(), own.v).mul_(2);
            }),
            (Names{"b", "v", "w"}));
  EXPECT_EQ(check_way([](const OwnImpl& own, const at::Tensor& x) {
              const at::Tensor row = x.squeeze(0).matmul(own.w.t());
              return torch::addmm(own.b, row.unsqueeze(0), own.v);
            }),
            (Names{"b", "v", "w"}));
  // A frozen weight; its bias.
  EXPECT_EQ(check_way([](const OwnImpl& own, const at::Tensor& x) {
              return torch::addmm(own.b, x.matmul(own.v), own.frozen.diag()) + own.w.sum();
            }),
            Names{"v"});
  // A parameter as the input of another.
  EXPECT_EQ(check_way([](const OwnImpl& own, const at::Tensor& x) {
              return own.w.narrow(0, 0, 1).mm(own.v) + own.frozen.matmul(own.v.t()) + x;
            }),
            kNothing);
  EXPECT_EQ(check_way([](const OwnImpl& own, const at::Tensor& x) {
              return x.matmul(own.w.unsqueeze(0).squeeze(0)) * own.b.matmul(own.v);
            }),
            Names{"v"});
}

TEST(GhostNorms, WeightsThatAreUsedTwice) {
  EXPECT_EQ(check_way([](const OwnImpl& own, const at::Tensor& x) {
              return torch::tanh(x.matmul(own.w)).matmul(own.w).matmul(own.v);
            }),
            Names{"v"});
  EXPECT_EQ(check_way([](const OwnImpl& own, const at::Tensor& x) {
              return x.matmul(own.w.t()) + x.sin().matmul(own.w);
            }),
            kNothing);
  // One transpose: the graph takes the weight once.
  EXPECT_EQ(check_way([](const OwnImpl& own, const at::Tensor& x) {
              const at::Tensor t = own.w.t();
              return torch::addmm(own.b, torch::tanh(x.matmul(t)), t);
            }),
            Names{"b"});
  EXPECT_EQ(check_way([](const OwnImpl& own, const at::Tensor& x) {
              const at::Tensor t = own.w.t();
              return x.matmul(t) * t.sum();
            }),
            kNothing);
  EXPECT_EQ(check_way([](const OwnImpl& own, const at::Tensor& x) {
              return torch::addmm(own.b, x, own.w) * own.b;
            }),
            Names{"w"});
  EXPECT_EQ(check_way([](const OwnImpl& own, const at::Tensor& x) {
              return torch::addmm(own.w.narrow(0, 0, 1), x, own.w);
            }),
            kNothing);
}

TEST(GhostNorms, CallsThatLeadNowhere) {
  EXPECT_EQ(check_way([](const OwnImpl& own, const at::Tensor& x) {
              x.matmul(own.w);
              return x.sin().matmul(own.w);
            }),
            Names{"w"});
  EXPECT_EQ(check_way([](const OwnImpl& own, const at::Tensor& x) {
              return x.matmul(own.w).detach() + x * own.w.sum();
            }),
            kNothing);
  // The weight is a constant of the one call, and used in the other.
  EXPECT_EQ(check_way([](const OwnImpl& own, const at::Tensor& x) {
              at::Tensor t;
              {
                const torch::NoGradGuard no_grad;
                t = own.w.t();
              }
              return torch::tanh(x * own.w.sum()).matmul(t);
            }),
            kNothing);
  EXPECT_EQ(check_way([](const OwnImpl& own, const at::Tensor& x) {
              const torch::NoGradGuard no_grad;
              const at::Tensor h = x.matmul(own.w);
              const torch::AutoGradMode grad(true);
              return h.matmul(own.v) * own.w.sum();
            }),
            Names{"v"});
}

// The graph that an example leaves is the same without vmap.
TEST(GhostNorms, WithoutVmap) {
  nn::Sequential net(nn::Conv2d(16, 16, 3), nn::ReLU(), nn::Flatten(), nn::Linear(64, 6));
  net->to(torch::kDouble);
  const at::Tensor xs = randn({4, 16, 4, 4}), ys = targets(4);
  EXPECT_EQ(covered(net, xs, ys, /*mapped=*/false), covered(net, xs, ys, /*mapped=*/true));
  // A view of a leaf that is made under no_grad is a leaf, and says that it requires grad.
  const auto own = std::make_shared<OwnImpl>([](const OwnImpl& self, const at::Tensor& x) {
    at::Tensor t;
    {
      const torch::NoGradGuard no_grad;
      t = self.w.t();
    }
    return torch::tanh(x * self.w.sum()).matmul(t);
  });
  own->to(torch::kDouble);
  EXPECT_EQ(covered(own, randn({4, 1, 4}), ys, /*mapped=*/false), kNothing);
}

TEST(GhostNorms, ParametersThatNothingDependsOn) {
  const auto own = std::make_shared<OwnImpl>(
      [](const OwnImpl& /*own*/, const at::Tensor& x) { return x.sin(); });
  own->to(torch::kDouble);
  const at::Tensor none = per_sample_grad_norms(own, &loss)(randn({5, 4}), targets(5));
  EXPECT_TRUE(torch::equal(none, torch::zeros({5}, torch::kDouble)));
}

TEST(GhostNorms, ViewsAndInPlaceWrites) {
  EXPECT_EQ(check_way([](const OwnImpl& own, const at::Tensor& x) {
              at::Tensor h = x.matmul(own.w);
              h.narrow(1, 1, 2).mul_(h.narrow(1, 0, 2) * 1);
              h.add_(own.b);
              return h.matmul(own.v);
            }),
            (Names{"v", "w"}));
  EXPECT_EQ(check_way([](const OwnImpl& own, const at::Tensor& x) {
              at::Tensor h = torch::cat({x, x}) * 0;
              h[0].copy_(x.matmul(own.w).squeeze(0));
              h[1].add_(own.b);
              return h;
            }),
            Names{"w"});
}

TEST(GhostNorms, GradientsInTheForwardPass) {
  const auto energy = [](const OwnImpl& own, const at::Tensor& x) {
    return grad([&](const at::Tensor& v) { return v.matmul(own.w).pow(3).sum(); })(x);
  };
  EXPECT_EQ(check_way(energy), kNothing);
  EXPECT_EQ(check_way([&](const OwnImpl& own, const at::Tensor& x) {
              return energy(own, torch::tanh(x.matmul(own.v)));
            }),
            Names{"v"});
  // The graph takes the weight once, for a transpose, and that twice.
  EXPECT_EQ(check_way([](const OwnImpl& own, const at::Tensor& x) {
              return grad([&](const at::Tensor& v) {
                return torch::addmm(own.b, v, own.w.t()).pow(3).sum();
              })(x);
            }),
            Names{"b"});
  // The call's input is differentiated by somebody else alone.
  EXPECT_EQ(check_way([](const OwnImpl& own, const at::Tensor& x) {
              const auto f = [&](const at::Tensor& v) {
                return std::pair(v.sin().sum(), v.matmul(own.w));
              };
              const auto [g, h] = grad(f, kHasAux)(x);
              return g * h;
            }),
            Names{"w"});
  // The gradient of a linear function takes the weight once, and not in the call that was seen.
  EXPECT_EQ(check_way([](const OwnImpl& own, const at::Tensor& x) {
              return grad([&](const at::Tensor& v) { return v.matmul(own.w).sum(); })(x) + x;
            }),
            kNothing);
  EXPECT_EQ(check_way([](const OwnImpl& own, const at::Tensor& x) {
              const auto f = [&](const at::Tensor& v) { return v.matmul(own.w).sin(); };
              return jvp(f, std::tuple(x), std::tuple(x.cos())).second;
            }),
            kNothing);
}

// Calls in an inner vmap, for some of the examples, or in a checkpoint are autograd's.
TEST(GhostNorms, TransformsInTheForwardPass) {
  EXPECT_EQ(check_way([](const OwnImpl& own, const at::Tensor& x) {
              const auto row = [&](const at::Tensor& r) { return r.matmul(own.w); };
              return vmap(row)(torch::cat({x, x.sin()}).unsqueeze(1)).squeeze(1).matmul(own.v);
            }),
            Names{"v"});
  EXPECT_EQ(check_way([](const OwnImpl& own, const at::Tensor& x) {
              const auto one = [&](const at::Tensor& h) { return torch::tanh(h.matmul(own.w)); };
              const auto other = [&](const at::Tensor& h) { return h.matmul(own.v.t()); };
              return torch::addmm(own.b, cond(x.sum() > 0, one, other, x), own.v);
            }),
            Names{"b"});
  EXPECT_EQ(check_way([](const OwnImpl& own, const at::Tensor& x) {
              const auto f = [](const at::Tensor& h, const at::Tensor& w, const at::Tensor& v) {
                return h.matmul(w).matmul(v).tanh();
              };
              return torch::addmm(own.b, checkpoint(f, x, own.w * 1, own.v * 1), own.frozen.diag());
            }),
            kNothing);
}

// Calls a module with values that it computes of its parameters.
struct OuterImpl : nn::Module {
  using State = std::function<ModuleState(const OwnImpl& inner)>;

  explicit OuterImpl(State s) : state(std::move(s)) {
    inner = register_module("inner",
                            std::make_shared<OwnImpl>([](const OwnImpl& own, const at::Tensor& x) {
                              return x.matmul(own.w).matmul(own.v);
                            }));
  }
  at::Tensor forward(const at::Tensor& x) { return functional_call(inner, state(*inner), x); }

  State state;
  std::shared_ptr<OwnImpl> inner;
};

TEST(GhostNorms, FunctionalCallsInTheForwardPass) {
  const auto check = [](const OuterImpl::State& state) {
    return check_norms(std::make_shared<OuterImpl>(state), randn({5, 4}), targets(5));
  };
  EXPECT_EQ(check([](const OwnImpl& own) {
              return ModuleState{{"w", own.w * own.b}};
            }),
            Names{"inner.v"});
  EXPECT_EQ(check([](const OwnImpl& own) {
              return ModuleState{{"w", own.v * 1}, {"v", own.w.t()}};
            }),
            kNothing);
}

TEST(GhostNorms, Autocast) {
  const auto own = std::make_shared<OwnImpl>([](const OwnImpl& self, const at::Tensor& x) {
    // One cast, used twice.
    return torch::tanh(x.matmul(self.w)).matmul(self.w).matmul(self.v).to(torch::kDouble);
  });
  const at::Tensor xs = torch::randn({5, 4}), ys = targets(5);
  at::autocast::set_autocast_enabled(at::kCPU, true);
  at::autocast::increment_nesting();
  const at::Tensor got = per_sample_grad_norms(own, &loss)(xs, ys);
  const at::Tensor want = grad_norms(per_sample_grad(own, &loss)(xs, ys));
  const Names names = covered(own, xs, ys, /*mapped=*/true);
  at::autocast::clear_cache();
  at::autocast::decrement_nesting();
  at::autocast::set_autocast_enabled(at::kCPU, false);
  EXPECT_TRUE(torch::allclose(got, want, 0.05)) << got << want;
  EXPECT_EQ(names, Names{"v"});
}

TEST(GhostNorms, ComplexWeights) {
  nn::Linear net(nn::LinearOptions(3, 2));
  net->to(torch::kComplexDouble);
  const auto real = [](const at::Tensor& out) { return torch::view_as_real(out).sin().sum(); };
  const at::Tensor xs = torch::randn({4, 3}, torch::kComplexDouble);
  const at::Tensor got = per_sample_grad_norms(net, real)(xs);
  at::Tensor want = torch::zeros({4}, torch::kDouble);
  for (const auto& [name, g] : per_sample_grad(net, real)(xs)) {
    want += g.flatten(1).abs().square().sum(1);
  }
  EXPECT_CLOSE(got, want.sqrt());
  EXPECT_CLOSE(grad_norms(per_sample_grad(net, real)(xs)), want.sqrt());
}

// --- one run -------------------------------------------------------------------------------------

TEST(GhostNorms, TheModuleRunsOnceAndMayDoAnotherThingInTheNextCall) {
  const auto own = std::make_shared<OwnImpl>([](const OwnImpl& self, const at::Tensor& x) {
    return self.calls % 2 == 1 ? x.matmul(self.w) : x.matmul(self.w).matmul(self.w.t());
  });
  own->to(torch::kDouble);
  const auto norms = per_sample_grad_norms(own, &loss);
  const at::Tensor xs = randn({5, 4}), ys = targets(5);
  for (const int before : {0, 1}) {
    own->calls = before;
    const at::Tensor got = norms(xs, ys);
    EXPECT_EQ(own->calls, before + 1);
    own->calls = before;
    EXPECT_CLOSE(got, grad_norms(per_sample_grad(own, &loss)(xs, ys)));
  }
}

// Of the gradients by the outputs of the layers, one is kept at a time.
TEST(GhostNorms, MemoryIsThatOfTheForwardPass) {
  constexpr int64_t kLayers = 30, kWide = 64, kExamples = 128;
  nn::Sequential net;
  for (int64_t i = 0; i < kLayers; ++i) net->push_back(nn::Linear(kWide, kWide));
  const auto sum = [](const at::Tensor& out) { return out.square().sum(); };
  const at::Tensor xs = torch::randn({kExamples, kWide});
  const auto norms = per_sample_grad_norms(net, sum);
  norms(xs);
  const MemoryMeter meter(at::kCPU);
  norms(xs);
  constexpr int64_t kOutput = kExamples * kWide * static_cast<int64_t>(sizeof(float));
  EXPECT_GT(meter.peak(), kLayers * kOutput);
  EXPECT_LT(meter.peak(), (kLayers + 6) * kOutput);
  EXPECT_LT(meter.current(), kOutput);
}

TEST(GhostNorms, NothingStaysBehind) {
  const auto shared = std::make_shared<OwnImpl>(
      [](const OwnImpl& own, const at::Tensor& x) { return x.matmul(own.w).tanh().matmul(own.v); });
  shared->to(torch::kDouble);
  const at::Tensor xs = randn({5, 4});
  const auto uses = [&] { return std::pair(xs.use_count(), xs.storage().use_count()); };
  const auto before = uses();
  per_sample_grad_norms(shared, &loss)(xs, targets(5));
  EXPECT_EQ(uses(), before);
}

// --- inside of transforms ------------------------------------------------------------------------

nn::Sequential small_net() {
  nn::Sequential net(nn::Conv1d(6, 8, 2), nn::Tanh(), nn::Flatten(), nn::Linear(16, 5),
                     nn::LayerNorm(nn::LayerNormOptions({5})), nn::Linear(5, 3));
  net->to(torch::kDouble);
  return net;
}

TEST(GhostNorms, NestedVmap) {
  const nn::Sequential net = small_net();
  const at::Tensor xs = randn({2, 4, 6, 3}), ys = torch::rand({2, 4}, torch::kDouble);
  const auto norms = per_sample_grad_norms(net, &loss);
  const at::Tensor got = vmap(norms)(xs, ys);
  EXPECT_CLOSE(got, torch::stack({norms(xs[0], ys[0]), norms(xs[1], ys[1])}));
  // Models of an ensemble.
  const auto of_model = [&](const ModuleState& state) {
    return with_state(net, state, [&] { return per_sample_grad_norms(net, &loss)(xs[0], ys[0]); });
  };
  ModuleState stacked;
  for (const auto& [name, t] : extract_state(*net)) {
    stacked.emplace(name, torch::stack({t.detach(), t.detach() * 0.5}));
  }
  const at::Tensor both = vmap(of_model)(stacked);
  EXPECT_CLOSE(both[0], norms(xs[0], ys[0]));
  const torch::NoGradGuard no_grad;
  for (at::Tensor& p : net->parameters()) p.mul_(0.5);
  EXPECT_CLOSE(both[1], norms(xs[0], ys[0]));
}

TEST(GhostNorms, TheirDerivatives) {
  const nn::Sequential net = small_net();
  const at::Tensor xs = randn({4, 6, 3}), ys = targets(4), weights = randn({4});
  const auto ghost = [&](const at::Tensor& x) {
    return (per_sample_grad_norms(net, &loss)(x, ys) * weights).sum();
  };
  const auto made = [&](const at::Tensor& x) {
    return (grad_norms(per_sample_grad(net, &loss)(x, ys)) * weights).sum();
  };
  EXPECT_CLOSE(grad(ghost)(xs), grad(made)(xs));
  const at::Tensor tangent = randn({4, 6, 3});
  EXPECT_CLOSE(jvp(ghost, std::tuple(xs), std::tuple(tangent)).second,
               jvp(made, std::tuple(xs), std::tuple(tangent)).second);
  const at::Tensor leaf = xs.clone().requires_grad_();
  EXPECT_CLOSE(torch::autograd::grad({ghost(leaf)}, {leaf})[0], grad(made)(xs));
  const auto second = [&](const auto& f) {
    return grad([&](const at::Tensor& x) { return grad(f)(x).square().sum(); })(xs);
  };
  EXPECT_CLOSE(second(ghost), second(made));
}

// --- errors --------------------------------------------------------------------------------------

TEST(GhostNorms, Errors) {
  // As autograd says of the gradient.
  const auto own = std::make_shared<OwnImpl>([](const OwnImpl& self, const at::Tensor& x) {
    at::Tensor h = x * 1;
    const at::Tensor y = h.matmul(self.w);
    h.add_(1);
    return y;
  });
  own->to(torch::kDouble);
  const at::Tensor xs = randn({5, 4}), ys = targets(5);
  for (const auto& f :
       std::vector<std::function<void()>>{[&] { per_sample_grad_norms(own, &loss)(xs, ys); },
                                          [&] { per_sample_grad(own, &loss)(xs, ys); }}) {
    EXPECT_THAT(error_of(f), HasSubstr("modified by an inplace operation"));
  }
  nn::Linear net(3, 2);
  const auto norms = [&](const auto& f) { per_sample_grad_norms(net, f)(torch::ones({4, 3})); };
  EXPECT_THAT(error_of<TransformError>([&] { norms([](const at::Tensor& out) { return out; }); }),
              HasSubstr("[per_sample_grad_norms] the loss of one example must be one number"));
  EXPECT_THAT(error_of<TransformError>(
                  [&] { norms([](const at::Tensor& out) { return out.sum().to(at::kLong); }); }),
              HasSubstr("[per_sample_grad_norms] the function must return a real floating-point"));
  // The next call is as any other.
  EXPECT_EQ(check_norms(net, randn({4, 3}), targets(4)), kBoth);
}

}  // namespace
}  // namespace torchlift
