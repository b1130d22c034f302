#ifndef TORCHLIFT_NN_FUNCTIONAL_PER_SAMPLE_H_
#define TORCHLIFT_NN_FUNCTIONAL_PER_SAMPLE_H_

// File: nn_functional/per_sample.h
//
// Gradients of single examples, clipping, and the gradients of DP-SGD, for any torch::nn::Module.
//
//   auto grads_of = tl::per_sample_grad(net, [](const at::Tensor& out, const at::Tensor& y) {
//     return torch::nn::functional::cross_entropy(out, y);
//   });
//   tl::ModuleState grads = grads_of(xs, ys);               // grads["0.weight"]: [batch, 8, 3]
//   tl::ModuleState sum = tl::clip_and_sum(grads, /*max_norm=*/1.0);
//
// An example is a batch of one: forward sees xs[i:i+1], the loss sees its output and ys[i:i+1], and
// returns one number. The parameters that require grad are differentiated. Buffers that the module
// writes into (BatchNorm in training mode) are left as they are.

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <utility>

#include "autodiff/grad.h"
#include "batching/vmap.h"
#include "nn_functional/functional_call.h"
#include "nn_functional/module_state.h"

namespace torchlift {

struct PerSampleOptions {
  // Of random operators in the module: each example draws its own numbers.
  Randomness randomness = Randomness::kDifferent;
  // How many examples to do at a time, to bound memory.
  std::optional<int64_t> chunk_size = std::nullopt;
};

namespace per_sample_internal {

// {the parameters that require grad, all other tensors}, detached.
std::pair<ModuleState, ModuleState> split_state(const StateSlots& slots);

// t as a batch of one.
at::Tensor as_batch(const at::Tensor& t);

// The loss as a tensor of shape []; throws TransformError unless it is one number.
at::Tensor check_loss(const at::Tensor& loss);

}  // namespace per_sample_internal

// What per_sample_grad returns: the gradients of (input, targets...), all with the examples along
// dim 0.
template <class Impl, class Loss>
class PerSampleGrad {
 public:
  PerSampleGrad(FunctionalModule<Impl> module, Loss loss, PerSampleOptions options)
      : module_(std::move(module)), loss_(std::move(loss)), options_(options) {}

  template <class... Targets>
  ModuleState operator()(const at::Tensor& inputs, const Targets&... targets) const {
    const auto [params, rest] = per_sample_internal::split_state(module_.slots());
    const auto one = [this](const ModuleState& p, const ModuleState& r, const at::Tensor& x,
                            const Targets&... y) { return loss_of_one(p, r, x, y...); };
    Dims in_dims = in(kNone, kNone, 0, (static_cast<void>(targets), 0)...);
    return vmap(grad(one), {.in_dims = std::move(in_dims),
                            .randomness = options_.randomness,
                            .chunk_size = options_.chunk_size})(params, rest, inputs, targets...);
  }

 private:
  template <class... Targets>
  at::Tensor loss_of_one(const ModuleState& params, const ModuleState& rest, const at::Tensor& x,
                         const Targets&... targets) const {
    using per_sample_internal::as_batch;
    const auto [output, buffers] =
        module_(std::tie(params, rest), ReturnBuffers{.others = BufferMode::kFrozen}, as_batch(x));
    return per_sample_internal::check_loss(loss_(output, as_batch(targets)...));
  }

  FunctionalModule<Impl> module_;
  Loss loss_;
  PerSampleOptions options_;
};

template <class M, class Loss>
auto per_sample_grad(M&& module, Loss loss, PerSampleOptions options = {}) {
  return PerSampleGrad(functional(module), std::move(loss), options);
}

// The norm of each example's gradient over all parameters, [examples].
at::Tensor grad_norms(const ModuleState& grads);

// The sum over the examples of gradients that are scaled down to norm max_norm where they exceed
// it. Throws TransformError unless max_norm > 0.
ModuleState clip_and_sum(const ModuleState& grads, double max_norm);

struct DpOptions {
  double max_norm = 1.0;
  double noise_multiplier = 1.0;
  // What the noisy sum is divided by; the batch size by default. With Poisson sampling, as privacy
  // accounting wants it, give the expected one.
  std::optional<double> expected_batch_size = std::nullopt;
  std::optional<at::Generator> generator = std::nullopt;
};

// The gradient of a step of DP-SGD from per-sample gradients: clipped, summed, with Gaussian noise
// of standard deviation noise_multiplier * max_norm, divided by the batch size. Algorithm 1 of
// Abadi et al. 2016, arXiv:1607.00133. Accounting for the privacy spent is the caller's.
ModuleState dp_gradients(const ModuleState& grads, const DpOptions& options);

}  // namespace torchlift

#endif  // TORCHLIFT_NN_FUNCTIONAL_PER_SAMPLE_H_
