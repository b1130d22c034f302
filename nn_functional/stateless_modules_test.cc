// Modules of torch::nn without parameters: vmap, grad and vmap(grad) of each against loops. Those
// with parameters are in modules_test.cc; module_tables_test.py sees to it that no class is in
// neither.

#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/nn.h>

#include <cctype>
#include <functional>
#include <string>
#include <vector>

#include "autodiff/grad.h"
#include "batching/vmap.h"
#include "nn_functional/ensemble.h"

namespace torchlift {
namespace {

namespace nn = torch::nn;

using Inputs = std::vector<at::Tensor>;

constexpr int64_t kExamples = 3;

struct Row {
  std::string name;
  std::function<at::Tensor(const Inputs&)> run;
  std::function<Inputs()> inputs;  // of one example
  bool random = false;
  // How many of the inputs are differentiated, if they are of a floating type.
  size_t differentiated = 2;
};

template <class Holder>
Row row(std::string name, Holder module, std::function<Inputs()> inputs, bool random = false,
        size_t differentiated = 2) {
  return {std::move(name), ensemble_internal::member_of(module).forward, std::move(inputs), random,
          differentiated};
}

// --- inputs --------------------------------------------------------------------------------------

at::Tensor randn(std::vector<int64_t> sizes) { return torch::randn(sizes, torch::kDouble); }

at::Tensor positive(std::vector<int64_t> sizes) {
  return torch::rand(sizes, torch::kDouble) * 0.8 + 0.1;
}

at::Tensor signs(std::vector<int64_t> sizes) {
  return torch::randint(0, 2, sizes).to(torch::kDouble) * 2 - 1;
}

std::function<Inputs()> x(std::vector<int64_t> sizes) {
  return [=] { return Inputs{randn(sizes)}; };
}

std::function<Inputs()> same(std::vector<int64_t> sizes, size_t count) {
  return [=] {
    Inputs inputs;
    for (size_t i = 0; i < count; ++i) inputs.push_back(randn(sizes));
    return inputs;
  };
}

std::function<Inputs()> with(std::vector<int64_t> sizes, std::function<at::Tensor()> target) {
  return [=] { return Inputs{randn(sizes), target()}; };
}

std::function<Inputs()> unpool(std::vector<int64_t> sizes) {
  return [=] {
    const at::Tensor t = randn(sizes);
    const auto pooled = sizes.size() == 3   ? at::max_pool1d_with_indices(t, 2)
                        : sizes.size() == 4 ? at::max_pool2d_with_indices(t, 2)
                                            : at::max_pool3d_with_indices(t, 2);
    return Inputs{std::get<0>(pooled), std::get<1>(pooled)};
  };
}

// --- the table -----------------------------------------------------------------------------------

std::vector<Row> activations() {
  const auto in = x({2, 5});
  return {
      row("CELU", nn::CELU(), in),
      row("ELU", nn::ELU(), in),
      row("GELU", nn::GELU(), in),
      row("GELU", nn::GELU(nn::GELUOptions().approximate("tanh")), in),
      row("GLU", nn::GLU(), x({2, 6})),
      row("Hardshrink", nn::Hardshrink(), in),
      row("Hardtanh", nn::Hardtanh(), in),
      row("Identity", nn::Identity(), in),
      row("LeakyReLU", nn::LeakyReLU(), in),
      row("LogSigmoid", nn::LogSigmoid(), in),
      row("LogSoftmax", nn::LogSoftmax(1), in),
      row("Mish", nn::Mish(), in),
      row(
          "RReLU", nn::RReLU(),
          [] {
            return Inputs{-positive({2, 5})};
          },
          true),
      row("ReLU", nn::ReLU(), in),
      row("ReLU6", nn::ReLU6(), in),
      row("SELU", nn::SELU(), in),
      row("SiLU", nn::SiLU(), in),
      row("Sigmoid", nn::Sigmoid(), in),
      row("Softmax", nn::Softmax(1), in),
      row("Softmax2d", nn::Softmax2d(), x({2, 3, 4, 4})),
      row("Softmin", nn::Softmin(1), in),
      row("Softplus", nn::Softplus(), in),
      row("Softshrink", nn::Softshrink(), in),
      row("Softsign", nn::Softsign(), in),
      row("Tanh", nn::Tanh(), in),
      row("Tanhshrink", nn::Tanhshrink(), in),
      row("Threshold", nn::Threshold(0.1, 2.0), in),
  };
}

std::vector<Row> pads() {
  const auto one = x({2, 2, 5}), two = x({2, 2, 5, 5}), three = x({2, 2, 5, 5, 5});
  return {
      row("ConstantPad1d", nn::ConstantPad1d(nn::ConstantPad1dOptions(2, 1.5)), one),
      row("ConstantPad2d", nn::ConstantPad2d(nn::ConstantPad2dOptions(2, 1.5)), two),
      row("ConstantPad3d", nn::ConstantPad3d(nn::ConstantPad3dOptions(2, 1.5)), three),
      row("ReflectionPad1d", nn::ReflectionPad1d(2), one),
      row("ReflectionPad2d", nn::ReflectionPad2d(2), two),
      row("ReflectionPad3d", nn::ReflectionPad3d(2), three),
      row("ReplicationPad1d", nn::ReplicationPad1d(2), one),
      row("ReplicationPad2d", nn::ReplicationPad2d(2), two),
      row("ReplicationPad3d", nn::ReplicationPad3d(2), three),
      row("ZeroPad1d", nn::ZeroPad1d(2), one),
      row("ZeroPad2d", nn::ZeroPad2d(2), two),
      row("ZeroPad3d", nn::ZeroPad3d(2), three),
  };
}

std::vector<Row> pools() {
  const std::vector<int64_t> s1{2, 2, 6}, s2{2, 2, 6, 6}, s3{2, 2, 6, 6, 6};
  const auto above = [](std::vector<int64_t> sizes) {
    return [=] { return Inputs{positive(sizes)}; };
  };
  return {
      row("AvgPool1d", nn::AvgPool1d(2), x(s1)),
      row("AvgPool2d", nn::AvgPool2d(nn::AvgPool2dOptions(3).stride(2).padding(1)), x(s2)),
      row("AvgPool3d", nn::AvgPool3d(2), x(s3)),
      row("MaxPool1d", nn::MaxPool1d(nn::MaxPool1dOptions(3).stride(1).padding(1)), x(s1)),
      row("MaxPool2d", nn::MaxPool2d(2), x(s2)),
      row("MaxPool3d", nn::MaxPool3d(2), x(s3)),
      row("AdaptiveAvgPool1d", nn::AdaptiveAvgPool1d(2), x(s1)),
      row("AdaptiveAvgPool2d", nn::AdaptiveAvgPool2d(nn::AdaptiveAvgPool2dOptions({2, 3})), x(s2)),
      row("AdaptiveAvgPool3d", nn::AdaptiveAvgPool3d(2), x(s3)),
      row("AdaptiveMaxPool1d", nn::AdaptiveMaxPool1d(2), x(s1)),
      row("AdaptiveMaxPool2d", nn::AdaptiveMaxPool2d(2), x(s2)),
      row("AdaptiveMaxPool3d", nn::AdaptiveMaxPool3d(2), x(s3)),
      row("LPPool1d", nn::LPPool1d(nn::LPPool1dOptions(2, 2)), above(s1)),
      row("LPPool2d", nn::LPPool2d(nn::LPPool2dOptions(2, 2)), above(s2)),
      row("LPPool3d", nn::LPPool3d(nn::LPPool3dOptions(2, 2)), above(s3)),
      row("MaxUnpool1d", nn::MaxUnpool1d(nn::MaxUnpool1dOptions(2)), unpool(s1)),
      row("MaxUnpool2d", nn::MaxUnpool2d(nn::MaxUnpool2dOptions(2)), unpool(s2)),
      row("MaxUnpool3d", nn::MaxUnpool3d(nn::MaxUnpool3dOptions(2)), unpool(s3)),
      row("FractionalMaxPool2d",
          nn::FractionalMaxPool2d(nn::FractionalMaxPool2dOptions(2).output_size(3)),
          x({2, 2, 7, 7}), true),
      row("FractionalMaxPool3d",
          nn::FractionalMaxPool3d(nn::FractionalMaxPool3dOptions(2).output_size(3)),
          x({2, 2, 7, 7, 7}), true),
  };
}

std::vector<Row> losses() {
  const auto classes = [] { return torch::randint(0, 4, {2}); };
  const auto chances = [] { return positive({2, 4}); };
  const auto two = same({2, 4}, 2);
  const auto margins = [] { return torch::tensor({{1, 2, -1, 0}, {3, -1, 0, 1}}); };
  return {
      row("L1Loss", nn::L1Loss(), two),
      row("MSELoss", nn::MSELoss(), two),
      row("SmoothL1Loss", nn::SmoothL1Loss(), two),
      row("HuberLoss", nn::HuberLoss(nn::HuberLossOptions().delta(0.5)), two),
      row("BCELoss", nn::BCELoss(),
          [=] {
            return Inputs{chances(), chances()};
          }),
      row("BCEWithLogitsLoss", nn::BCEWithLogitsLoss(), with({2, 4}, chances)),
      row("CrossEntropyLoss", nn::CrossEntropyLoss(), with({2, 4}, classes)),
      row("CrossEntropyLoss",
          nn::CrossEntropyLoss(nn::CrossEntropyLossOptions().label_smoothing(0.1)),
          with({2, 4}, classes)),
      row("NLLLoss", nn::NLLLoss(), with({2, 4}, classes)),
      row("KLDivLoss", nn::KLDivLoss(nn::KLDivLossOptions(torch::kBatchMean)),
          with({2, 4}, chances)),
      row("PoissonNLLLoss", nn::PoissonNLLLoss(), with({2, 4}, chances)),
      row("HingeEmbeddingLoss", nn::HingeEmbeddingLoss(),
          with({2, 4},
               [] {
                 return signs({2, 4});
               }),
          false, 1),
      row("MarginRankingLoss", nn::MarginRankingLoss(),
          [] {
            return Inputs{randn({3}), randn({3}), signs({3})};
          }),
      row("CosineEmbeddingLoss", nn::CosineEmbeddingLoss(),
          [] {
            return Inputs{randn({2, 4}), randn({2, 4}), signs({2})};
          }),
      row("SoftMarginLoss", nn::SoftMarginLoss(),
          with({2, 4},
               [] {
                 return signs({2, 4});
               }),
          false, 1),
      row("MultiLabelMarginLoss", nn::MultiLabelMarginLoss(), with({2, 4}, margins)),
      row("MultiLabelSoftMarginLoss", nn::MultiLabelSoftMarginLoss(),
          with({2, 4},
               [] {
                 return (signs({2, 4}) + 1) / 2;
               })),
      row("MultiMarginLoss", nn::MultiMarginLoss(), with({2, 4}, classes)),
      row("TripletMarginLoss", nn::TripletMarginLoss(), same({2, 4}, 3), false, 3),
      row("TripletMarginWithDistanceLoss", nn::TripletMarginWithDistanceLoss(), same({2, 4}, 3),
          false, 3),
      row("CTCLoss", nn::CTCLoss(),
          [] {
            return Inputs{randn({6, 2, 4}).log_softmax(2), torch::randint(1, 4, {2, 3}),
                          torch::full({2}, 6), torch::full({2}, 3)};
          }),
      row("CosineSimilarity", nn::CosineSimilarity(), two),
      row("PairwiseDistance", nn::PairwiseDistance(), two),
  };
}

std::vector<Row> others() {
  return {
      row("Dropout", nn::Dropout(), x({2, 5}), true),
      row("Dropout2d", nn::Dropout2d(), x({2, 3, 4, 4}), true),
      row("Dropout3d", nn::Dropout3d(), x({2, 3, 4, 4, 4}), true),
      row("AlphaDropout", nn::AlphaDropout(), x({2, 5}), true),
      row("FeatureAlphaDropout", nn::FeatureAlphaDropout(), x({2, 5}), true),
      row("Flatten", nn::Flatten(), x({2, 3, 4})),
      row("Unflatten", nn::Unflatten(nn::UnflattenOptions(1, {2, 3})), x({2, 6})),
      row("Fold", nn::Fold(nn::FoldOptions({4, 5}, {2, 2})), x({2, 12, 12})),
      row("Unfold", nn::Unfold(nn::UnfoldOptions({2, 3})), x({2, 3, 4, 5})),
      row("PixelShuffle", nn::PixelShuffle(2), x({2, 8, 3, 3})),
      row("PixelUnshuffle", nn::PixelUnshuffle(2), x({2, 2, 4, 4})),
      row("Upsample",
          nn::Upsample(nn::UpsampleOptions()
                           .scale_factor(std::vector<double>{2})
                           .mode(torch::kLinear)
                           .align_corners(false)),
          x({2, 3, 4})),
      row("Upsample",
          nn::Upsample(nn::UpsampleOptions()
                           .scale_factor(std::vector<double>{2, 2})
                           .mode(torch::kBicubic)
                           .align_corners(true)),
          x({2, 3, 4, 4})),
      row("LocalResponseNorm", nn::LocalResponseNorm(2), x({2, 4, 3})),
      row("Functional", nn::Functional([](const at::Tensor& t) { return t.sin(); }), x({2, 5})),
  };
}

std::vector<Row> all_rows() {
  std::vector<Row> rows;
  for (auto& part : {activations(), pads(), pools(), losses(), others()}) {
    rows.insert(rows.end(), part.begin(), part.end());
  }
  return rows;
}

// --- the tests -----------------------------------------------------------------------------------

class StatelessModules : public ::testing::TestWithParam<size_t> {
 protected:
  StatelessModules() : row_(all_rows()[GetParam()]) {
    torch::manual_seed(5);
    for (int64_t i = 0; i < kExamples; ++i) examples_.push_back(row_.inputs());
    for (size_t i = 0; i < examples_[0].size(); ++i) {
      Inputs column;
      for (const Inputs& example : examples_) column.push_back(example[i]);
      stacked_.push_back(torch::stack(column));
    }
  }

  static VmapOptions options() { return {.randomness = Randomness::kSame}; }

  static at::Tensor loss(const at::Tensor& out) {
    const at::Tensor weights = torch::linspace(0.5, 1.5, out.numel(), torch::kDouble);
    return (out.reshape(-1) * weights).sum();
  }

  // {the inputs to differentiate, the others}
  std::pair<Inputs, Inputs> split(const Inputs& inputs) const {
    std::pair<Inputs, Inputs> parts;
    for (const at::Tensor& t : inputs) {
      const bool chosen =
          parts.second.empty() && parts.first.size() < row_.differentiated && t.is_floating_point();
      (chosen ? parts.first : parts.second).push_back(t);
    }
    return parts;
  }

  at::Tensor loss_of(const Inputs& tracked, const Inputs& rest) const {
    Inputs all = tracked;
    all.insert(all.end(), rest.begin(), rest.end());
    return loss(row_.run(all));
  }

  static void expect_close(const at::Tensor& got, const at::Tensor& want) {
    ASSERT_EQ(got.sizes(), want.sizes());
    EXPECT_TRUE(torch::allclose(got, want, 1e-8, 1e-10)) << got << want;
  }

  Row row_;
  std::vector<Inputs> examples_;
  Inputs stacked_;
};

TEST_P(StatelessModules, Vmap) {
  torch::manual_seed(9);
  const at::Tensor got = vmap(row_.run, options())(stacked_);
  for (int64_t i = 0; i < kExamples; ++i) {
    torch::manual_seed(9);
    expect_close(got[i], row_.run(examples_[static_cast<size_t>(i)]));
  }
}

TEST_P(StatelessModules, GradAndVmapOfGrad) {
  const auto f = [this](const Inputs& tracked, const Inputs& rest) {
    return loss_of(tracked, rest);
  };
  const auto columns = split(stacked_);
  torch::manual_seed(9);
  const Inputs mapped = vmap(grad(f), options())(columns.first, columns.second);
  for (int64_t i = 0; i < kExamples; ++i) {
    const auto [tracked, rest] = split(examples_[static_cast<size_t>(i)]);
    torch::manual_seed(9);
    const Inputs single = grad(f)(tracked, rest);
    Inputs leaves;
    for (const at::Tensor& t : tracked) leaves.push_back(t.clone().requires_grad_());
    torch::manual_seed(9);
    const Inputs want = torch::autograd::grad({loss_of(leaves, rest)}, leaves);
    for (size_t j = 0; j < want.size(); ++j) {
      expect_close(single[j], want[j]);
      expect_close(mapped[j][i], want[j]);
    }
  }
}

std::string label(const ::testing::TestParamInfo<size_t>& info) {
  return all_rows()[info.param].name + std::to_string(info.param);
}

INSTANTIATE_TEST_SUITE_P(TorchNN, StatelessModules, ::testing::Range(size_t{0}, all_rows().size()),
                         label);

}  // namespace
}  // namespace torchlift
