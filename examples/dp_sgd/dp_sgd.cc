// Differentially private training in C++ (DP-SGD: Abadi et al. 2016, arXiv:1607.00133), of an
// ordinary torch::nn module: vmap(grad(loss)) gives the gradient of every digit, which is cut to
// length 1 before the sum, and the sum gets noise. See dp_sgd.py, which writes the digits to a
// file, runs this, and draws.
//
//   dp_sgd DIGITS STEPS NOISE...

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/rand.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <tuple>

#include "examples/per_sample_gradients/tensor_file.h"
#include "torchlift/torchlift.h"

namespace tl = torchlift;

namespace {

constexpr double kMaxNorm = 1.0, kRate = 0.1, kLr = 0.5;  // kRate: the share of digits in a batch

torch::nn::Sequential make_net() {
  return torch::nn::Sequential(torch::nn::Linear(64, 32), torch::nn::Tanh(),
                               torch::nn::Linear(32, 10));
}

struct Digits {
  at::Tensor images, labels;  // [count, 64], [count]

  Digits(const digits::NamedTensors& file, const std::string& part)
      : images(file.at(part + "_images").flatten(1)), labels(file.at(part + "_labels")) {}
};

template <class Net>
double accuracy(const Net& net, const tl::ModuleState& params, const Digits& digits) {
  const at::Tensor right = net(params, digits.images).argmax(-1).eq(digits.labels);
  return right.to(at::kDouble).mean().template item<double>();
}

// The accuracy on the test digits after training with this noise.
double train(const Digits& data, const Digits& test, double noise, int steps) {
  torch::nn::Sequential module = make_net();
  const auto net = tl::functional(module);
  tl::ModuleState params = tl::extract_state(*module);
  for (auto& [name, p] : params) p = p.detach();

  const auto loss = [&](const tl::ModuleState& p, const at::Tensor& image,
                        const at::Tensor& label) {
    return at::cross_entropy_loss(net(p, image), label);
  };
  const auto per_sample = tl::vmap(tl::grad(loss), {.in_dims = tl::in(tl::kNone, 0, 0)});
  const tl::optim::Sgd sgd({.lr = kLr});
  tl::optim::State state = sgd.init(params);
  const double expected = kRate * static_cast<double>(data.images.size(0));
  for (int i = 0; i < steps; ++i) {
    // Each digit is in the batch by a coin of its own, as the accounting wants it.
    const at::Tensor batch = (at::rand({data.images.size(0)}) < kRate).nonzero().squeeze(1);
    const tl::ModuleState gradients =
        per_sample(params, data.images.index_select(0, batch), data.labels.index_select(0, batch));
    const tl::ModuleState noisy = tl::dp_gradients(
        gradients,
        {.max_norm = kMaxNorm, .noise_multiplier = noise, .expected_batch_size = expected});
    std::tie(params, state) = sgd.update(noisy, state, params);
  }
  return accuracy(net, params, test);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: %s DIGITS STEPS NOISE...\n", argv[0]);
    return 2;
  }
  at::set_num_threads(1);
  try {
    const digits::NamedTensors file = digits::load_tensors(argv[1]);
    const Digits data(file, "train"), test(file, "test");
    std::printf("%8s %10s\n", "noise", "accuracy");
    for (int i = 3; i < argc; ++i) {
      at::manual_seed(0);
      const double noise = std::atof(argv[i]);
      std::printf("%8g %10.4f\n", noise, train(data, test, noise, std::atoi(argv[2])));
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", argv[0], error.what());
    return 1;
  }
  return 0;
}
