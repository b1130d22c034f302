#include "nn_functional/ensemble.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/nn.h>
#include <torch/optim.h>
#include <torch/serialize.h>

#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using ::testing::HasSubstr;

torch::nn::Sequential make_net() {
  torch::nn::Sequential net(torch::nn::Linear(3, 4), torch::nn::BatchNorm1d(4), torch::nn::Tanh(),
                            torch::nn::Linear(4, 2));
  net->to(torch::kDouble);
  return net;
}

at::Tensor loss(const at::Tensor& out, const at::Tensor& y) { return (out - y).square().mean(); }

at::Tensor randn(at::IntArrayRef sizes) { return torch::randn(sizes, torch::kDouble); }

TEST(Ensemble, AgreesWithItsMembers) {
  for (const int64_t members : {1, 3}) {
    std::vector<torch::nn::Sequential> nets;
    for (int64_t i = 0; i < members; ++i) nets.push_back(make_net());
    Ensemble ensemble(nets);
    const at::Tensor x = randn({5, 3}), own = randn({members, 5, 3});
    for (const bool training : {true, false}) {
      ensemble->train(training);
      const at::Tensor shared = ensemble->forward(x), mapped = ensemble->map_members(own);
      ASSERT_EQ(shared.sizes(), (at::IntArrayRef{members, 5, 2}));
      for (int64_t i = 0; i < members; ++i) {
        auto net = make_net();
        load_state(*net, ensemble->member_state(i));
        net->train(training);
        EXPECT_TRUE(torch::allclose(shared[i], net->forward(x)));
        EXPECT_TRUE(torch::allclose(mapped[i], net->forward(own[i])));
      }
    }
  }
}

TEST(Ensemble, StepsOfAllMembersAtOnce) {
  std::vector<torch::nn::Sequential> nets{make_net(), make_net(), make_net()};
  Ensemble ensemble(nets);
  const at::Tensor x = randn({8, 3}), y = randn({8, 2});
  torch::optim::Adam together(ensemble->parameters(), 1e-2);
  std::vector<at::Tensor> losses;
  for (int step = 0; step < 3; ++step)
    losses.push_back(ensemble->train_step(together, &loss, x, y));
  for (size_t i = 0; i < nets.size(); ++i) {
    torch::optim::Adam alone(nets[i]->parameters(), 1e-2);
    for (const at::Tensor& of_step : losses) {
      alone.zero_grad();
      const at::Tensor value = loss(nets[i]->forward(x), y);
      EXPECT_TRUE(torch::allclose(of_step[static_cast<int64_t>(i)], value));
      value.backward();
      alone.step();
    }
    // Running statistics too.
    for (const auto& [name, t] : ensemble->member_state(static_cast<int64_t>(i))) {
      EXPECT_TRUE(torch::allclose(t, extract_state(*nets[i]).at(name), 1e-6, 1e-9)) << name;
    }
  }
}

TEST(Ensemble, SavedAndLoaded) {
  std::vector<torch::nn::Sequential> nets{make_net(), make_net()}, others{make_net(), make_net()};
  Ensemble saved(nets), loaded(others);
  const at::Tensor x = randn({5, 3});
  EXPECT_FALSE(torch::allclose(saved->forward(x), loaded->forward(x)));
  std::stringstream stream;
  torch::save(saved, stream);
  torch::load(loaded, stream);
  saved->eval();
  loaded->eval();
  EXPECT_TRUE(torch::equal(saved->forward(x), loaded->forward(x)));
  EXPECT_EQ(saved->named_parameters().keys()[0], "0.0.weight");
}

TEST(Ensemble, Architectures) {
  namespace nn = torch::nn;
  const auto small = [] { return nn::Sequential(nn::Linear(3, 2)); };
  const auto deep = [](double p) {
    return nn::Sequential(nn::Linear(3, 4), nn::Dropout(p), nn::Linear(4, 2));
  };
  std::vector<nn::Sequential> nets{deep(0.5), small(), deep(0.5), small(), deep(0.25)};
  for (auto& net : nets) net->eval();
  Ensemble ensemble(nets);
  EXPECT_EQ(ensemble->group_count(), 3);
  const at::Tensor x = torch::randn({5, 3}), own = torch::randn({5, 4, 3});
  const at::Tensor shared = ensemble->forward(x), mapped = ensemble->map_members(own);
  for (int64_t i = 0; i < 5; ++i) {
    auto& net = nets[static_cast<size_t>(i)];
    EXPECT_TRUE(torch::allclose(shared[i], net->forward(x), 1e-5, 1e-6));
    EXPECT_TRUE(torch::allclose(mapped[i], net->forward(own[i]), 1e-5, 1e-6));
  }
  std::vector<nn::AnyModule> mixed{nn::AnyModule(nn::Linear(3, 2)), nn::AnyModule(nn::Linear(3, 1)),
                                   nn::AnyModule(nn::Identity())};
  Ensemble differing(mixed);
  EXPECT_EQ(differing->group_count(), 3);
  const auto outputs = differing->outputs(x);
  EXPECT_TRUE(torch::allclose(outputs[1], mixed[1].forward(x)));
  EXPECT_TRUE(torch::equal(outputs[2], x));
  EXPECT_THAT(error_of<TransformError>([&] { differing->forward(x); }),
              HasSubstr("that of member 1 has shape [5, 1], Float, so they cannot be stacked. Call "
                        "outputs()"));
}

// Two inputs, a member that pretty_print does not show, not Cloneable.
struct ScaledImpl : torch::nn::Module {
  explicit ScaledImpl(double scale) : scale(scale) {
    w = register_parameter("w", torch::randn({3}, torch::kDouble));
  }
  at::Tensor forward(const at::Tensor& a, const at::Tensor& b) { return (a * w + b) * scale; }
  double scale;
  at::Tensor w;
};

TEST(Ensemble, ModulesOfTheUser) {
  std::vector<std::shared_ptr<ScaledImpl>> nets;
  for (const double scale : {1.0, 2.0, 1.0}) nets.push_back(std::make_shared<ScaledImpl>(scale));
  const auto scale_of = [](const torch::nn::Module& m) {
    return std::to_string(m.as<ScaledImpl>()->scale);
  };
  Ensemble ensemble(nets, EnsembleOptions{.signature = scale_of});
  EXPECT_EQ(ensemble->group_count(), 2);
  const at::Tensor a = randn({5, 3}), b = randn({5, 3});
  const at::Tensor got = ensemble->forward({a, b});
  for (int64_t i = 0; i < 3; ++i) {
    EXPECT_TRUE(torch::allclose(got[i], nets[static_cast<size_t>(i)]->forward(a, b)));
  }
  EXPECT_THAT(error_of<TransformError>([&] { ensemble->forward(a); }),
              HasSubstr("forward of Scaled does not take 1 tensors and return one"));
}

TEST(MakeEnsemble, InitialisedTogether) {
  namespace nn = torch::nn;
  const auto make = [] {
    return nn::Sequential(nn::Conv1d(nn::Conv1dOptions(2, 4, 3)), nn::BatchNorm1d(4), nn::PReLU(),
                          nn::Flatten(), nn::Linear(16, 400));
  };
  torch::manual_seed(7);
  Ensemble ensemble = make_ensemble(make, 50, {.init = EnsembleInit::kVmap});
  EXPECT_EQ(ensemble->size(), 50);
  const at::Tensor weight = ensemble->named_parameters()["0.4.weight"].detach();
  EXPECT_TRUE(ensemble->named_parameters()["0.4.weight"].requires_grad());
  ASSERT_EQ(weight.sizes(), (at::IntArrayRef{50, 400, 16}));
  // Uniform in [-1/4, 1/4], as libtorch draws a layer of 16 inputs; no two members alike.
  EXPECT_LE(weight.abs().max().item<double>(), 0.25);
  EXPECT_GT(weight.abs().amax({1, 2}).min().item<double>(), 0.249);
  EXPECT_NEAR(weight.var().item<double>(), 0.25 * 0.25 / 3, 1e-4);
  for (int64_t i = 1; i < 50; ++i) EXPECT_FALSE(torch::equal(weight[0], weight[i]));
  EXPECT_TRUE(
      torch::equal(ensemble->named_parameters()["0.1.weight"].detach(), torch::ones({50, 4})));
  EXPECT_TRUE(torch::equal(ensemble->named_parameters()["0.2.weight"].detach(),
                           torch::full({50, 1}, 0.25)));
  torch::manual_seed(7);
  Ensemble again = make_ensemble(make, 50, {.init = EnsembleInit::kVmap});
  EXPECT_TRUE(torch::equal(again->named_parameters()["0.4.weight"], weight));
  EXPECT_EQ(ensemble->forward(torch::randn({3, 2, 6})).sizes(), (at::IntArrayRef{50, 3, 400}));

  Ensemble called = make_ensemble(make, 3);
  EXPECT_FALSE(
      torch::equal(called->member_state(0).at("4.weight"), called->member_state(1).at("4.weight")));
}

TEST(MakeEnsemble, LayersWithInitialValuesOfTheirOwn) {
  namespace nn = torch::nn;
  const auto differ = [](const auto& make, const std::string& name) {
    Ensemble ensemble = make_ensemble(make, 2, {.init = EnsembleInit::kVmap});
    const at::Tensor t = ensemble->named_parameters()["0." + name];
    return !torch::equal(t[0], t[1]);
  };
  EXPECT_TRUE(
      differ([] { return nn::Embedding(nn::EmbeddingOptions(5, 3).padding_idx(1)); }, "weight"));
  Ensemble padded =
      make_ensemble([] { return nn::Embedding(nn::EmbeddingOptions(5, 3).padding_idx(1)); }, 2,
                    {.init = EnsembleInit::kVmap});
  EXPECT_EQ(padded->named_parameters()["0.weight"].select(1, 1).abs().sum().item<double>(), 0);
  EXPECT_TRUE(differ([] { return nn::Bilinear(3, 3, 2); }, "bias"));
  const auto layer = [] {
    return nn::TransformerEncoderLayer(nn::TransformerEncoderLayerOptions(4, 2));
  };
  EXPECT_TRUE(differ(layer, "self_attn.in_proj_weight"));
  EXPECT_TRUE(differ(layer, "linear1.weight"));
  EXPECT_FALSE(differ(layer, "self_attn.in_proj_bias"));  // zeros
}

TEST(MakeEnsemble, DropoutOfItsOwn) {
  namespace nn = torch::nn;
  Ensemble ensemble = make_ensemble([] { return nn::Dropout(0.5); }, 4);
  const at::Tensor out = ensemble->forward(torch::ones({100}));
  EXPECT_FALSE(torch::equal(out[0], out[1]));
  Ensemble same =
      make_ensemble([] { return nn::Dropout(0.5); }, 4, {.randomness = Randomness::kSame});
  const at::Tensor alike = same->forward(torch::ones({100}));
  EXPECT_TRUE(torch::equal(alike[0], alike[1]));
}

TEST(Ensemble, Moved) {
  std::vector<torch::nn::Linear> nets{torch::nn::Linear(3, 2), torch::nn::Linear(3, 2)};
  Ensemble ensemble(nets);
  ensemble->to(torch::kDouble);
  EXPECT_EQ(ensemble->forward(randn({5, 3})).scalar_type(), torch::kDouble);
}

TEST(Ensemble, Errors) {
  EXPECT_THAT(error_of<TransformError>([] { Ensemble(std::vector<torch::nn::Linear>()); }),
              HasSubstr("[Ensemble] expected at least one member, got none"));
  std::vector<torch::nn::Linear> nets{torch::nn::Linear(3, 2), torch::nn::Linear(3, 2)};
  Ensemble ensemble(nets);
  EXPECT_THAT(error_of<TransformError>([&] {
                ensemble->map_members(torch::ones({3, 3}));
              }),
              HasSubstr("a first dim of 2 members, got shape [3, 3]"));
  EXPECT_THAT(error_of<TransformError>([&] { ensemble->member_state(2); }),
              HasSubstr("there is no member 2; there are 2"));
  EXPECT_THAT(error_of<TransformError>([&] {
                ensemble->losses([](const at::Tensor& out) { return out; }, torch::ones({4, 3}));
              }),
              HasSubstr("the loss of a member must be one number, got shape [4, 2]"));
  nets[1]->eval();
  EXPECT_THAT(error_of<TransformError>([&] { Ensemble mixed(nets); }),
              HasSubstr("all members in training mode or all in eval mode"));
  EXPECT_THAT(error_of<TransformError>([&] {
                make_ensemble([] { return std::make_shared<ScaledImpl>(1.0); }, 2,
                              {.init = EnsembleInit::kVmap});
              }),
              HasSubstr("(Scaled) has parameters of its own and is no class of torch::nn"));
  EXPECT_THAT(error_of<TransformError>([&] { make_ensemble([] { return make_net(); }, 0); }),
              HasSubstr("must be at least 1, got 0"));
}

}  // namespace
}  // namespace torchlift
