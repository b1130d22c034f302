// Modules of torch::nn with parameters: an ensemble of each, its gradients, and the gradients of
// single examples, against loops that overwrite the module's own parameters. Those without
// parameters are in stateless_modules_test.cc.

#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/nn.h>

#include <algorithm>
#include <functional>
#include <string>
#include <tuple>
#include <vector>

#include "autodiff/grad.h"
#include "batching/vmap.h"
#include "nn_functional/functional_call.h"

namespace torchlift {
namespace {

constexpr int64_t kMembers = 3, kExamples = 2;

// The call of a module with any state, and with its own.
struct Case {
  std::string name;
  std::shared_ptr<torch::nn::Module> module;
  std::function<at::Tensor(const ModuleState&, const at::Tensor&)> run;
  std::function<at::Tensor(const at::Tensor&)> run_own;
  std::function<at::Tensor()> input;
};

at::Tensor first_of(const at::Tensor& t) { return t; }

template <class... T>
at::Tensor first_of(const std::tuple<at::Tensor, T...>& results) {
  return std::get<0>(results);
}

// copies: how often the input is given (query, key and value of attention).
template <int kCopies = 1, class Holder>
Case make_case(std::string name, Holder holder, std::function<at::Tensor()> input) {
  auto module = holder.ptr();
  module->to(torch::kDouble);
  const auto call = [](auto&& f, const at::Tensor& x) {
    if constexpr (kCopies == 3) {
      return first_of(f(x, x, x));
    } else if constexpr (kCopies == 2) {
      return first_of(f(x, x));
    } else {
      return first_of(f(x));
    }
  };
  const auto f = functional(holder);
  return {std::move(name), module,
          [=](const ModuleState& s, const at::Tensor& x) {
            return call([&](const auto&... in) { return f(s, in...); }, x);
          },
          [=](const at::Tensor& x) {
            return call([&](const auto&... in) { return module->forward(in...); }, x);
          },
          std::move(input)};
}

std::function<at::Tensor()> normal(std::vector<int64_t> sizes) {
  return [=] { return torch::randn(sizes, torch::kDouble); };
}

std::function<at::Tensor()> indices(std::vector<int64_t> sizes) {
  return [=] { return torch::randint(0, 5, sizes); };
}

std::vector<Case> all_cases() {
  namespace nn = torch::nn;
  return {
      make_case("Linear", nn::Linear(3, 4), normal({5, 3})),
      make_case<2>("Bilinear", nn::Bilinear(3, 3, 2), normal({5, 3})),
      make_case("Conv1d", nn::Conv1d(nn::Conv1dOptions(2, 4, 3).groups(2)), normal({2, 2, 6})),
      make_case("Conv2d", nn::Conv2d(nn::Conv2dOptions(2, 3, 3).padding(1)), normal({2, 2, 5, 4})),
      make_case("Conv3d", nn::Conv3d(nn::Conv3dOptions(2, 3, 2)), normal({1, 2, 3, 4, 3})),
      make_case("ConvTranspose1d", nn::ConvTranspose1d(nn::ConvTranspose1dOptions(2, 3, 3)),
                normal({2, 2, 4})),
      make_case("ConvTranspose2d",
                nn::ConvTranspose2d(nn::ConvTranspose2dOptions(2, 3, 2).stride(2)),
                normal({2, 2, 3, 3})),
      make_case("ConvTranspose3d", nn::ConvTranspose3d(nn::ConvTranspose3dOptions(2, 1, 2)),
                normal({1, 2, 2, 3, 2})),
      make_case("LayerNorm", nn::LayerNorm(nn::LayerNormOptions({3, 4})), normal({2, 3, 4})),
      make_case("GroupNorm", nn::GroupNorm(2, 4), normal({2, 4, 3})),
      make_case("InstanceNorm1d", nn::InstanceNorm1d(nn::InstanceNorm1dOptions(3).affine(true)),
                normal({2, 3, 5})),
      make_case("InstanceNorm2d", nn::InstanceNorm2d(nn::InstanceNorm2dOptions(3).affine(true)),
                normal({2, 3, 4, 4})),
      make_case("BatchNorm1d",
                nn::BatchNorm1d(nn::BatchNorm1dOptions(3).track_running_stats(false)),
                normal({5, 3})),
      make_case("BatchNorm2d",
                nn::BatchNorm2d(nn::BatchNorm2dOptions(3).track_running_stats(false)),
                normal({2, 3, 4, 4})),
      make_case("InstanceNorm3d", nn::InstanceNorm3d(nn::InstanceNorm3dOptions(3).affine(true)),
                normal({2, 3, 2, 2, 3})),
      make_case("BatchNorm3d",
                nn::BatchNorm3d(nn::BatchNorm3dOptions(3).track_running_stats(false)),
                normal({2, 3, 2, 2, 3})),
      make_case("PReLU", nn::PReLU(nn::PReLUOptions().num_parameters(3)), normal({2, 3, 4})),
      make_case("Embedding", nn::Embedding(5, 3), indices({2, 4})),
      make_case("EmbeddingBag", nn::EmbeddingBag(5, 3), indices({2, 4})),
      make_case("RNN", nn::RNN(nn::RNNOptions(3, 4).num_layers(2)), normal({5, 2, 3})),
      make_case("GRU", nn::GRU(nn::GRUOptions(3, 4).bidirectional(true)), normal({5, 2, 3})),
      make_case("LSTM", nn::LSTM(nn::LSTMOptions(3, 4).batch_first(true)), normal({2, 5, 3})),
      make_case("LSTM with projection", nn::LSTM(nn::LSTMOptions(3, 4).proj_size(2)),
                normal({5, 2, 3})),
      make_case("RNNCell", nn::RNNCell(3, 4), normal({2, 3})),
      make_case("GRUCell", nn::GRUCell(3, 4), normal({2, 3})),
      make_case("LSTMCell", nn::LSTMCell(3, 4), normal({2, 3})),
      make_case<3>("MultiheadAttention", nn::MultiheadAttention(4, 2), normal({5, 2, 4})),
      make_case("TransformerEncoderLayer",
                nn::TransformerEncoderLayer(
                    nn::TransformerEncoderLayerOptions(4, 2).dim_feedforward(6).dropout(0.0)),
                normal({5, 2, 4})),
      make_case<2>("TransformerDecoderLayer",
                   nn::TransformerDecoderLayer(
                       nn::TransformerDecoderLayerOptions(4, 2).dim_feedforward(6).dropout(0.0)),
                   normal({5, 2, 4})),
      make_case("TransformerEncoder",
                nn::TransformerEncoder(nn::TransformerEncoderOptions(
                    nn::TransformerEncoderLayerOptions(4, 2).dim_feedforward(6).dropout(0.0), 2)),
                normal({5, 2, 4})),
      make_case<2>(
          "TransformerDecoder",
          nn::TransformerDecoder(nn::TransformerDecoderOptions(
              nn::TransformerDecoderLayerOptions(4, 2).dim_feedforward(6).dropout(0.0), 2)),
          normal({5, 2, 4})),
      make_case<2>("Transformer",
                   nn::Transformer(nn::TransformerOptions(4, 2)
                                       .num_encoder_layers(1)
                                       .num_decoder_layers(1)
                                       .dim_feedforward(6)
                                       .dropout(0.0)),
                   normal({5, 2, 4})),
  };
}

class Modules : public ::testing::TestWithParam<size_t> {
 protected:
  Modules() : c(all_cases()[GetParam()]), own(extract_state(*c.module)) {
    torch::manual_seed(3);
    for (int64_t i = 0; i < kMembers; ++i) {
      ModuleState& state = members.emplace_back();
      for (const auto& [name, t] : own) state.emplace(name, torch::randn_like(t).detach());
    }
    for (const auto& [name, t] : own) {
      std::vector<at::Tensor> all;
      for (const ModuleState& state : members) all.push_back(state.at(name));
      stacked.emplace(name, torch::stack(all));
    }
  }

  // The oracle: the module itself, overwritten.
  at::Tensor run_loaded(const ModuleState& state, const at::Tensor& x) {
    load_state(*c.module, state);
    return c.run_own(x);
  }

  static at::Tensor loss(const at::Tensor& out) {
    const at::Tensor weights = torch::linspace(0.5, 1.5, out.numel(), torch::kDouble);
    return (out.reshape(-1) * weights).sum();
  }

  ModuleState grads_loaded(const ModuleState& state, const at::Tensor& x) {
    const at::Tensor value = loss(run_loaded(state, x));
    ModuleState grads;
    for (const auto& [name, t] : own) {
      const at::Tensor g = torch::autograd::grad({value}, {t}, {}, /*retain_graph=*/true,
                                                 /*create_graph=*/false, /*allow_unused=*/true)[0];
      grads.emplace(name, g.defined() ? g : torch::zeros_like(t));
    }
    return grads;
  }

  static void expect_close(const at::Tensor& got, const at::Tensor& want, const std::string& name) {
    ASSERT_EQ(got.sizes(), want.sizes()) << name;
    EXPECT_TRUE(torch::allclose(got, want, 1e-7, 1e-9)) << name;
  }

  Case c;
  ModuleState own, stacked;
  std::vector<ModuleState> members;
};

TEST_P(Modules, Ensemble) {
  const at::Tensor x = c.input();
  const at::Tensor got = vmap(c.run, {.in_dims = in(0, kNone)})(stacked, x).detach();
  for (int64_t i = 0; i < kMembers; ++i) {
    expect_close(got[i], run_loaded(members[i], x).detach(), c.name);
  }
}

TEST_P(Modules, GradientsOfAnEnsembleAndOfSingleExamples) {
  std::vector<at::Tensor> inputs;
  for (int64_t i = 0; i < kExamples; ++i) inputs.push_back(c.input());
  const auto f = [&](const ModuleState& s, const at::Tensor& x) { return loss(c.run(s, x)); };
  const auto per_sample = vmap(grad(f), {.in_dims = in(kNone, 0)});
  const ModuleState got =
      vmap(per_sample, {.in_dims = in(0, kNone)})(stacked, torch::stack(inputs));
  for (int64_t i = 0; i < kMembers; ++i) {
    const ModuleState single = per_sample(members[i], torch::stack(inputs));
    for (int64_t j = 0; j < kExamples; ++j) {
      for (const auto& [name, want] : grads_loaded(members[i], inputs[j])) {
        expect_close(single.at(name)[j], want, name);
        expect_close(got.at(name)[i][j], want, name);
      }
    }
  }
}

std::string name_of(const ::testing::TestParamInfo<size_t>& info) {
  std::string name = all_cases()[info.param].name;
  std::replace(name.begin(), name.end(), ' ', '_');
  return name;
}

INSTANTIATE_TEST_SUITE_P(TorchNN, Modules, ::testing::Range(size_t{0}, all_cases().size()),
                         name_of);

}  // namespace
}  // namespace torchlift
