// An ensemble of digit classifiers in C++, trained as one module: one vmap for the forward pass of
// all members, one backward pass. Where the members disagree, the answer is uncertain (deep
// ensembles: Lakshminarayanan et al. 2017, arXiv:1612.01474). See ensemble.py, which writes the
// digits to a file, runs this, and draws.
//
//   ensemble DIGITS MEMBERS EPOCHS

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/rand_like.h>
#include <ATen/ops/randperm.h>
#include <ATen/ops/softmax.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/dropout.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/adam.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>

#include "examples/per_sample_gradients/tensor_file.h"
#include "nn_functional/ensemble.h"
#include "torchlift/torchlift.h"

namespace tl = torchlift;

namespace {

constexpr int64_t kBatch = 64;
constexpr double kLr = 3e-3;

torch::nn::Sequential make_net() {
  return torch::nn::Sequential(torch::nn::Linear(64, 64), torch::nn::ReLU(),
                               torch::nn::Dropout(0.2), torch::nn::Linear(64, 10));
}

struct Digits {
  at::Tensor images, labels;  // [count, 64], [count]

  Digits(const digits::NamedTensors& file, const std::string& part)
      : images(file.at(part + "_images").flatten(1)), labels(file.at(part + "_labels")) {}
};

void train(tl::Ensemble& ensemble, const Digits& data, int epochs) {
  torch::optim::Adam optimizer(ensemble->parameters(), kLr);
  const auto loss = [](const at::Tensor& output, const at::Tensor& labels) {
    return at::cross_entropy_loss(output, labels);
  };
  for (int epoch = 0; epoch < epochs; ++epoch) {
    for (const at::Tensor& batch : at::randperm(data.images.size(0), at::kLong).split(kBatch)) {
      ensemble->train_step(optimizer, loss, data.images.index_select(0, batch),
                           data.labels.index_select(0, batch));
    }
  }
}

at::Tensor entropy(const at::Tensor& p) { return -(p * p.clamp_min(1e-12).log()).sum(-1); }

struct Prediction {
  at::Tensor each;          // [members, images, 10], probabilities
  at::Tensor mean;          // [images, 10]
  at::Tensor disagreement;  // [images], the entropy of the mean less the mean entropy

  Prediction(tl::Ensemble& ensemble, const at::Tensor& images)
      : each(ensemble->forward(images).softmax(-1)),
        mean(each.mean(0)),
        disagreement(entropy(mean) - entropy(each).mean(0)) {}
};

double mean_of(const at::Tensor& t) { return t.to(at::kDouble).mean().item<double>(); }

void report(tl::Ensemble& ensemble, const Digits& test) {
  const at::NoGradGuard no_grad;
  ensemble->eval();
  const Prediction found(ensemble, test.images);
  const at::Tensor right = found.mean.argmax(-1).eq(test.labels);
  const at::Tensor of_noise = Prediction(ensemble, at::rand_like(test.images)).disagreement;
  std::printf("accuracy_of_members %.4f\n", mean_of(found.each.argmax(-1).eq(test.labels)));
  std::printf("accuracy %.4f\n", mean_of(right));
  std::printf("right %.4f\n", mean_of(found.disagreement.masked_select(right)));
  std::printf("wrong %.4f\n", mean_of(found.disagreement.masked_select(right.logical_not())));
  std::printf("noise %.4f\n", mean_of(of_noise));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s DIGITS MEMBERS EPOCHS\n", argv[0]);
    return 2;
  }
  at::set_num_threads(1);
  at::manual_seed(0);
  try {
    const digits::NamedTensors file = digits::load_tensors(argv[1]);
    tl::Ensemble ensemble =
        tl::make_ensemble(make_net, std::atoi(argv[2]), {.init = tl::EnsembleInit::kVmap});
    train(ensemble, Digits(file, "train"), std::atoi(argv[3]));
    report(ensemble, Digits(file, "test"));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", argv[0], error.what());
    return 1;
  }
  return 0;
}
