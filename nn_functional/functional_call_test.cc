#include "nn_functional/functional_call.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/nn.h>
#include <torch/torch.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "autodiff/grad.h"
#include "batching/vmap.h"
#include "core/error.h"
#include "core/level.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using ::testing::HasSubstr;

::testing::AssertionResult close(const at::Tensor& got, const at::Tensor& want) {
  if (got.sizes() != want.sizes()) {
    return ::testing::AssertionFailure() << "shapes " << got.sizes() << " and " << want.sizes();
  }
  if (torch::allclose(got, want, 1e-10, 1e-12)) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "differ by " << (got - want).abs().max().item<double>();
}

class FunctionalCall : public ::testing::Test {
 protected:
  void SetUp() override {
    torch::manual_seed(7);
    torch::set_default_dtype(caffe2::TypeMeta::Make<double>());
  }
  void TearDown() override {
    torch::set_default_dtype(caffe2::TypeMeta::Make<float>());
    EXPECT_EQ(SubstitutionScope::current(), nullptr);
    EXPECT_TRUE(level_stack().empty());
  }
};

ModuleState random_state(const torch::nn::Module& module, StateKind kind = StateKind::kParameters) {
  ModuleState state = extract_state(module, kind);
  for (auto& [name, t] : state) {
    t = t.is_floating_point() ? torch::randn_like(t).mul(0.3).detach() : t.clone();
  }
  return state;
}

ModuleState copy_of(const ModuleState& state) {
  ModuleState copy;
  for (const auto& [name, t] : state) copy.emplace(name, t.detach().clone());
  return copy;
}

// The oracle: a module whose own tensors are overwritten, and put back.
template <class Net, class... Args>
auto call_loaded(Net& net, const ModuleState& state, const Args&... args) {
  const ModuleState before = copy_of(extract_state(*net));
  load_state(*net, state, /*strict=*/false);
  auto result = net->forward(args...);
  load_state(*net, before);
  return result;
}

ModuleState stack(const std::vector<ModuleState>& states) {
  ModuleState stacked;
  for (const auto& [name, first] : states[0]) {
    std::vector<at::Tensor> all;
    for (const ModuleState& state : states) all.push_back(state.at(name));
    stacked.emplace(name, torch::stack(all));
  }
  return stacked;
}

// Not Cloneable, with a parameter of its own, a submodule and more than forward().
struct OwnImpl : torch::nn::Module {
  OwnImpl() {
    scale = register_parameter("scale", torch::randn({4}));
    layer = register_module("layer", torch::nn::Linear(3, 4));
    register_module("tail", tail);
  }
  at::Tensor forward(const at::Tensor& x) { return tail->forward(encode(x)); }
  at::Tensor encode(const at::Tensor& x) { return torch::tanh(layer->forward(x)) * scale; }

  at::Tensor scale;
  torch::nn::Linear layer = nullptr;
  torch::nn::Sequential tail{torch::nn::LayerNorm(torch::nn::LayerNormOptions({4})),
                             torch::nn::Linear(4, 2)};
};

// --- values --------------------------------------------------------------------------------------

template <class Net, class... Args>
void check_call(Net net, const Args&... args) {
  const ModuleState state = random_state(*net);
  const at::Tensor want = call_loaded(net, state, args...);
  const ModuleState own = extract_state(*net);
  const ModuleState before = copy_of(own);
  std::vector<uint32_t> versions;
  for (const auto& [name, t] : own) versions.push_back(t._version());
  EXPECT_TRUE(close(functional_call(net, state, args...), want));
  EXPECT_FALSE(close(net->forward(args...), want));
  size_t i = 0;
  for (const auto& [name, t] : extract_state(*net)) {
    EXPECT_TRUE(t.is_same(own.at(name))) << name;
    EXPECT_TRUE(torch::equal(t, before.at(name))) << name;
    EXPECT_EQ(t._version(), versions[i++]) << name;
  }
}

TEST_F(FunctionalCall, Modules) {
  check_call(torch::nn::Linear(3, 2), torch::randn({5, 3}));
  check_call(torch::nn::Bilinear(3, 4, 2), torch::randn({5, 3}), torch::randn({5, 4}));
  check_call(torch::nn::Conv1d(torch::nn::Conv1dOptions(2, 3, 3)), torch::randn({1, 2, 7}));
  check_call(torch::nn::Conv2d(torch::nn::Conv2dOptions(2, 3, 3).padding(1)),
             torch::randn({2, 2, 5, 6}));
  check_call(torch::nn::ConvTranspose2d(torch::nn::ConvTranspose2dOptions(2, 3, 3).stride(2)),
             torch::randn({2, 2, 4, 4}));
  check_call(torch::nn::LayerNorm(torch::nn::LayerNormOptions({3})), torch::randn({5, 3}));
  check_call(torch::nn::GroupNorm(2, 4), torch::randn({2, 4, 3}));
  check_call(torch::nn::PReLU(), torch::randn({5, 3}));
  check_call(torch::nn::Embedding(5, 3), torch::tensor({1, 4, 1}));
  check_call(torch::nn::EmbeddingBag(5, 3), torch::tensor({{1, 4, 1}, {0, 2, 3}}));
  check_call(std::make_shared<OwnImpl>(), torch::randn({5, 3}));
  check_call(
      torch::nn::Sequential(torch::nn::Linear(3, 4), torch::nn::ReLU(), torch::nn::Linear(4, 2)),
      torch::randn({5, 3}));
}

template <class Net, class Input>
void check_recurrent(Net net, const Input& x) {
  const ModuleState state = random_state(*net);
  const auto want = call_loaded(net, state, x);
  const auto got = functional_call(net, state, x);
  EXPECT_TRUE(close(std::get<0>(got), std::get<0>(want)));
}

TEST_F(FunctionalCall, RecurrentModulesAndAttention) {
  const at::Tensor x = torch::randn({4, 2, 3});
  check_recurrent(torch::nn::RNN(torch::nn::RNNOptions(3, 5).num_layers(2)), x);
  check_recurrent(torch::nn::GRU(torch::nn::GRUOptions(3, 5).bidirectional(true)), x);
  check_recurrent(torch::nn::LSTM(torch::nn::LSTMOptions(3, 5).num_layers(2)), x);
  check_recurrent(torch::nn::LSTMCell(3, 5), x[0]);
  torch::nn::MultiheadAttention attention(torch::nn::MultiheadAttentionOptions(6, 2));
  const at::Tensor q = torch::randn({4, 2, 6});
  const ModuleState state = random_state(*attention);
  const auto want = call_loaded(attention, state, q, q, q);
  EXPECT_TRUE(close(std::get<0>(functional_call(attention, state, q, q, q)), std::get<0>(want)));
}

TEST_F(FunctionalCall, KindsOfHandles) {
  const auto net = std::make_shared<OwnImpl>();
  const ModuleState state = random_state(*net);
  const at::Tensor x = torch::randn({5, 3});
  const at::Tensor want = call_loaded(net, state, x);
  EXPECT_TRUE(close(functional_call(*net, state, x), want));
  EXPECT_TRUE(close(functional(net)(state, x), want));
  const at::Tensor code = with_state(net, state, [&] { return net->encode(x); });
  EXPECT_TRUE(close(functional_call(
                        net->tail,
                        [&] {
                          ModuleState tail;
                          for (const auto& [name, t] : state) {
                            if (name.rfind("tail.", 0) == 0) tail.emplace(name.substr(5), t);
                          }
                          return tail;
                        }(),
                        code),
                    want));
}

TEST_F(FunctionalCall, StatesInParts) {
  torch::nn::Linear net(3, 2);
  const at::Tensor x = torch::randn({3}), w = torch::randn({2, 3}), b = torch::randn({2});
  const ModuleState weight{{"weight", w}}, bias{{"bias", b}};
  EXPECT_TRUE(close(functional_call(net, weight, x), w.mv(x) + net->bias));
  EXPECT_TRUE(close(functional_call(net, ModuleState{}, x), net->forward(x)));
  EXPECT_TRUE(close(functional_call(net, std::pair(weight, bias), x), w.mv(x) + b));
  EXPECT_TRUE(close(functional_call(net, std::tie(weight, bias), x), w.mv(x) + b));
}

TEST_F(FunctionalCall, TiedWeights) {
  struct Tied : torch::nn::Module {
    Tied() {
      w = register_parameter("a", torch::randn({2, 2}));
      register_parameter("b", w);
    }
    at::Tensor forward(const at::Tensor& x) { return w.mv(parameters_["b"].mv(x)); }
    at::Tensor w;
  };
  Tied net;
  const at::Tensor x = torch::randn({2}), w = torch::randn({2, 2}), other = torch::randn({2, 2});
  EXPECT_EQ(extract_state(net).size(), 1U);
  for (const char* name : {"a", "b"}) {
    EXPECT_TRUE(close(functional_call(net, ModuleState{{name, w}}, x), w.mv(w.mv(x))));
  }
  EXPECT_TRUE(close(functional_call(net, ModuleState{{"a", w}, {"b", w}}, x), w.mv(w.mv(x))));
  EXPECT_THAT(error_of<TransformError>([&] {
                functional_call(net, ModuleState{{"a", w}, {"b", other}}, x);
              }),
              HasSubstr("'a' and 'b' are one tensor in Tied, but got different values. Give one"));
}

struct Two : torch::nn::Module {
  Two() {
    a = register_parameter("a", torch::randn({2, 2}));
    b = register_parameter("b", torch::randn({2, 2}));
  }
  // contiguous returns its argument.
  at::Tensor forward(const at::Tensor& x) { return a.contiguous().mm(x) - b.mm(x); }
  at::Tensor a, b;
};

TEST_F(FunctionalCall, ParametersExchanged) {
  Two net;
  const at::Tensor x = torch::randn({2, 2});
  const ModuleState exchanged{{"a", net.b}, {"b", net.a}};
  EXPECT_TRUE(close(functional_call(net, exchanged, x), net.b.mm(x) - net.a.mm(x)));
  EXPECT_TRUE(close(functional_call(net, extract_state(net), x), net.forward(x)));
  const at::Tensor got = functional_call(net, exchanged, x);
  const auto grads = torch::autograd::grad({got.sum()}, {net.a, net.b});
  EXPECT_TRUE(close(grads[0], -grads[1]));
}

TEST_F(FunctionalCall, Nested) {
  Two net;
  const at::Tensor x = torch::randn({2, 2}), a = torch::randn({2, 2}), b = torch::randn({2, 2});
  const at::Tensor got = with_state(net, ModuleState{{"a", a}, {"b", b}}, [&] {
    // The outer b, and twice the outer a in place of a.
    return functional_call(net, ModuleState{{"a", net.a * 2}}, x) +
           functional_call(net, ModuleState{{"a", net.b}}, x);
  });
  EXPECT_TRUE(close(got, 2 * a.mm(x) - b.mm(x) + b.mm(x) - b.mm(x)));
}

TEST_F(FunctionalCall, NothingIsLeftAfterAnException) {
  torch::nn::Linear net(3, 2);
  const at::Tensor x = torch::randn({3}), before = net->forward(x);
  const ModuleState state = random_state(*net);
  EXPECT_THROW(functional_call(net, state, torch::randn({4})), c10::Error);
  EXPECT_EQ(SubstitutionScope::current(), nullptr);
  EXPECT_TRUE(torch::equal(net->forward(x), before));
}

// --- autograd ------------------------------------------------------------------------------------

TEST_F(FunctionalCall, GradientsGoToTheValues) {
  const auto net = std::make_shared<OwnImpl>();
  const at::Tensor x = torch::randn({5, 3});
  ModuleState state = random_state(*net);
  const auto loss = [&](const ModuleState& s) { return functional_call(net, s, x).square().sum(); };
  const ModuleState got = grad(loss)(state);
  load_state(*net, state);
  net->forward(x).square().sum().backward();
  for (const auto& [name, own] : extract_state(*net)) EXPECT_TRUE(close(got.at(name), own.grad()));
}

// Forces: a derivative inside of forward.
struct Energy : torch::nn::Module {
  Energy() { register_module("net", net); }
  at::Tensor forward(const at::Tensor& x) {
    const at::Tensor r = x.detach().requires_grad_();
    const at::Tensor energy = net->forward(r).sum();
    return torch::autograd::grad({energy}, {r}, {}, std::nullopt, /*create_graph=*/true)[0];
  }
  torch::nn::Sequential net{torch::nn::Linear(3, 4), torch::nn::Tanh(), torch::nn::Linear(4, 1)};
};

TEST_F(FunctionalCall, DerivativesInsideOfForward) {
  auto net = std::make_shared<Energy>();
  const at::Tensor x = torch::randn({5, 3});
  ModuleState state = random_state(*net);
  const at::Tensor want = call_loaded(net, state, x).detach();
  EXPECT_TRUE(close(functional_call(net, state, x).detach(), want));
  const auto loss = [&](const ModuleState& s) { return functional_call(net, s, x).square().sum(); };
  const ModuleState got = grad(loss)(state);
  load_state(*net, state);
  net->forward(x).square().sum().backward();
  for (const auto& [name, own] : extract_state(*net)) {
    // The energy's own bias has no force.
    const at::Tensor want_grad = own.grad().defined() ? own.grad() : torch::zeros_like(own);
    EXPECT_TRUE(close(got.at(name), want_grad)) << name;
  }
}

TEST_F(FunctionalCall, BackwardPassOfAnotherCallIsNotSubstituted) {
  torch::nn::Linear net(3, 2);
  const at::Tensor x = torch::randn({3}).requires_grad_();
  const at::Tensor y = net->forward(x).sum();
  const at::Tensor g =
      with_state(net, random_state(*net), [&] { return torch::autograd::grad({y}, {x})[0]; });
  EXPECT_TRUE(close(g, net->weight.sum(0)));
}

// --- vmap ----------------------------------------------------------------------------------------

TEST_F(FunctionalCall, Ensemble) {
  const auto net = std::make_shared<OwnImpl>();
  const at::Tensor x = torch::randn({5, 3});
  for (const int64_t size : {1, 3}) {
    std::vector<ModuleState> members;
    std::vector<at::Tensor> want;
    for (int64_t i = 0; i < size; ++i) {
      members.push_back(random_state(*net));
      want.push_back(call_loaded(net, members.back(), x));
    }
    const auto run = vmap(functional(net), {.in_dims = in(0, kNone)});
    EXPECT_TRUE(close(run(stack(members), x), torch::stack(want)));
  }
}

TEST_F(FunctionalCall, EnsemblesOfLstms) {
  torch::nn::LSTM net(torch::nn::LSTMOptions(3, 4));
  const at::Tensor x = torch::randn({5, 2, 3});
  std::vector<ModuleState> members{random_state(*net), random_state(*net)};
  const auto f = [&](const ModuleState& s, const at::Tensor& v) {
    return std::get<0>(functional_call(net, s, v));
  };
  const at::Tensor got = vmap(f, {.in_dims = in(0, kNone)})(stack(members), x);
  for (int64_t i = 0; i < 2; ++i) {
    EXPECT_TRUE(close(got[i], std::get<0>(call_loaded(net, members[i], x))));
  }
}

TEST_F(FunctionalCall, PerSampleGradients) {
  const auto net = std::make_shared<OwnImpl>();
  const at::Tensor xs = torch::randn({4, 3});
  const auto loss = [&](const ModuleState& s, const at::Tensor& x) {
    return functional_call(net, s, x.unsqueeze(0)).square().sum();
  };
  const ModuleState state = random_state(*net);
  const ModuleState got = vmap(grad(loss), {.in_dims = in(kNone, 0)})(state, xs);
  for (int64_t i = 0; i < 4; ++i) {
    for (const auto& [name, g] : grad(loss)(state, xs[i])) EXPECT_TRUE(close(got.at(name)[i], g));
  }
  // For an ensemble: nested twice.
  const std::vector<ModuleState> members{state, random_state(*net)};
  const auto nested = vmap(vmap(grad(loss), {.in_dims = in(kNone, 0)}), {.in_dims = in(0, kNone)});
  const ModuleState both = nested(stack(members), xs);
  for (const auto& [name, g] : both) EXPECT_TRUE(close(g[0], got.at(name)));
}

TEST_F(FunctionalCall, RandomOperatorsSeeTheValue) {
  struct Noisy : torch::nn::Module {
    Noisy() { p = register_parameter("p", torch::zeros({2})); }
    at::Tensor forward() { return torch::bernoulli(p); }
    at::Tensor p;
  };
  Noisy net;
  const ModuleState ones{{"p", torch::ones({3, 2})}};
  const auto draw = [&](const ModuleState& s) { return functional_call(net, s); };
  const at::Tensor got = vmap(draw, {.randomness = Randomness::kDifferent})(ones);
  EXPECT_TRUE(close(got, torch::ones({3, 2})));
  const ModuleState one{{"p", torch::ones({2})}};
  const auto shared = vmap([&](const at::Tensor& x) { return functional_call(net, one) + x; },
                           {.randomness = Randomness::kDifferent});
  EXPECT_TRUE(close(shared(torch::zeros({3})), torch::ones({3, 2})));
}

// --- buffers -------------------------------------------------------------------------------------

TEST_F(FunctionalCall, BuffersAreWrittenInTheState) {
  torch::nn::BatchNorm1d net(3);
  ModuleState state = copy_of(extract_state(*net));
  const ModuleState before = copy_of(state);
  functional_call(net, state, torch::randn({8, 3}) + 5);
  EXPECT_EQ(state.at("num_batches_tracked").item<int64_t>(), 1);
  EXPECT_FALSE(close(state.at("running_mean"), before.at("running_mean")));
  EXPECT_TRUE(close(net->running_mean, before.at("running_mean")));
}

TEST_F(FunctionalCall, ReturnsBuffers) {
  torch::nn::BatchNorm1d net(3);
  const ModuleState state = copy_of(extract_state(*net));
  const ModuleState before = copy_of(state);
  const at::Tensor xs = torch::randn({4, 8, 3}) + 5;
  const auto [y, buffers] = functional_call(net, state, ReturnBuffers{}, xs[0]);
  EXPECT_EQ(buffers.size(), 3U);
  for (const auto& [name, t] : state) EXPECT_TRUE(torch::equal(t, before.at(name))) << name;
  EXPECT_TRUE(close(buffers.at("running_mean"), 0.1 * xs[0].mean(0)));

  const auto run = [&](const ReturnBuffers& wanted) {
    const auto f = [&](const at::Tensor& x) { return functional_call(net, state, wanted, x); };
    return vmap(f)(xs);
  };
  const auto rows = run({});
  const auto shared = run({.others = BufferMode::kShared});
  const auto mixed = run({.modes = {{"running_var", BufferMode::kFrozen}}});
  for (int64_t i = 0; i < 4; ++i) {
    ModuleState one = copy_of(state);
    const at::Tensor want = functional_call(net, one, xs[i]);
    EXPECT_TRUE(close(rows.first[i], want));
    for (const char* name : {"running_mean", "running_var"}) {
      EXPECT_TRUE(close(rows.second.at(name)[i], one.at(name))) << name;
    }
    EXPECT_EQ(rows.second.at("num_batches_tracked")[i].item<int64_t>(), 1);
    EXPECT_TRUE(close(mixed.second.at("running_var")[i], before.at("running_var")));
    EXPECT_TRUE(close(shared.second.at("running_var")[i], rows.second.at("running_var").mean(0)));
  }
  EXPECT_EQ(shared.second.at("num_batches_tracked")[0].item<int64_t>(), 1);
}

TEST_F(FunctionalCall, ReturnsBuffersOfGradients) {
  torch::nn::Sequential net(torch::nn::Linear(3, 3), torch::nn::BatchNorm1d(3));
  const ModuleState params = random_state(*net), buffers = extract_state(*net, StateKind::kBuffers);
  const at::Tensor xs = torch::randn({4, 8, 3});
  const auto loss = [&](const ModuleState& p, const at::Tensor& x) {
    auto [y, out] = functional_call(net, std::tie(p, buffers), ReturnBuffers{}, x);
    return std::pair(y.pow(3).sum(), out);
  };
  const auto [grads, out] = vmap(grad(loss, kHasAux), {.in_dims = in(kNone, 0)})(params, xs);
  for (int64_t i = 0; i < 4; ++i) {
    const auto [g, b] = grad(loss, kHasAux)(params, xs[i]);
    for (const auto& [name, t] : g) EXPECT_TRUE(close(grads.at(name)[i], t)) << name;
    for (const auto& [name, t] : b) EXPECT_TRUE(close(out.at(name)[i], t)) << name;
  }
  EXPECT_EQ(buffers.at("1.num_batches_tracked").item<int64_t>(), 0);
}

// --- errors --------------------------------------------------------------------------------------

TEST_F(FunctionalCall, Errors) {
  torch::nn::Linear net(3, 2);
  const at::Tensor x = torch::randn({3}), b = torch::randn({2});
  const auto call = [&](const ModuleState& s) {
    return error_of<TransformError>([&] { functional_call(net, s, x); });
  };
  EXPECT_THAT(call({{"wieght", x}}),
              HasSubstr("[functional_call] Linear has no parameter or buffer "
                        "'wieght'. It has 'bias', 'weight'."));
  EXPECT_THAT(call({{"bias", x}}), HasSubstr("'bias' of Linear is a tensor of shape [2], Double on "
                                             "cpu; got one of shape [3], Double on cpu"));
  EXPECT_THAT(call({{"bias", b.to(torch::kFloat)}}),
              HasSubstr("got one of shape [2], Float on cpu"));
  EXPECT_THAT(call({{"bias", at::Tensor()}}), HasSubstr("got an undefined one"));
  const ModuleState bias{{"bias", b}};
  EXPECT_THAT(error_of<TransformError>([&] { functional_call(net, std::tie(bias, bias), x); }),
              HasSubstr("'bias' is in more than one of the states"));
  EXPECT_THAT(error_of<TransformError>([&] { functional(net, {.strict = true})(bias, x); }),
              HasSubstr("must name every parameter and buffer of Linear; it lacks 'weight'"));
  EXPECT_THAT(
      error_of<TransformError>([&] {
        functional_call(net, bias, ReturnBuffers{.modes = {{"bn", BufferMode::kShared}}}, x);
      }),
      HasSubstr("ReturnBuffers names 'bn', but Linear has no buffer of that name"));
  EXPECT_THAT(error_of<TransformError>([&] { load_state(*net, bias); }), HasSubstr("[load_state]"));
  // Stacked state that was not mapped over.
  EXPECT_THAT(call({{"bias", torch::stack({b, b})}}), HasSubstr("map over it with vmap"));
}

// --- threads -------------------------------------------------------------------------------------

TEST_F(FunctionalCall, OneModuleInSeveralThreads) {
  const auto net = std::make_shared<OwnImpl>();
  const at::Tensor x = torch::randn({5, 3});
  const auto f = functional(net);
  constexpr int kThreads = 4;
  std::vector<ModuleState> states;
  std::vector<at::Tensor> want;
  for (int i = 0; i < kThreads; ++i) {
    states.push_back(random_state(*net));
    want.push_back(call_loaded(net, states.back(), x));
  }
  const at::Tensor own = net->forward(x);
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      torch::set_num_threads(1);
      for (int round = 0; round < 30; ++round) {
        if (!torch::equal(f(states[i], x), want[i])) ++wrong;
        // The module itself, directly.
        if (!torch::equal(net->forward(x), own)) ++wrong;
        const auto loss = [&](const ModuleState& s) { return f(s, x).sum(); };
        grad(loss)(states[i]);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace torchlift
