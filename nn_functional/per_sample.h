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
//   at::Tensor norms = tl::per_sample_grad_norms(net, loss)(xs, ys);       // [batch]
//   tl::dp_sgd_step(net, loss, optimizer, {.max_norm = 1.0, .noise_multiplier = 1.1}, xs, ys);
//
// An example is a batch of one: forward sees xs[i:i+1], the loss sees its output and ys[i:i+1], and
// returns one number. The parameters that require grad are differentiated. Buffers that the module
// writes into (BatchNorm in training mode) are left as they are.

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "autodiff/grad.h"
#include "batching/vmap.h"
#include "nn_functional/functional_call.h"
#include "nn_functional/ghost.h"
#include "nn_functional/module_state.h"

namespace torchlift {

struct PerSampleOptions {
  // Of random operators in the module: each example draws its own numbers.
  Randomness randomness = Randomness::kDifferent;
  // How many examples to do at a time, to bound memory.
  std::optional<int64_t> chunk_size = std::nullopt;
  // Instead: how many bytes a chunk of them may take beside the result (batching/vmap.h).
  std::optional<int64_t> memory_budget = std::nullopt;
};

namespace per_sample_internal {

// {the parameters that require grad, all other tensors}, detached.
std::pair<ModuleState, ModuleState> split_state(const StateSlots& slots);

// t as a batch of one.
at::Tensor as_batch(const at::Tensor& t);

// The loss as a tensor of shape []; throws TransformError unless it is one number.
at::Tensor check_loss(const char* transform, const at::Tensor& loss);

// How many examples the inputs hold along dim 0. Throws TransformError where they have no dims.
int64_t example_count(const char* transform, const at::Tensor& inputs);

// Throws TransformError if no parameter of the module requires grad.
void check_trainable(const char* transform, const StateSlots& slots, const ModuleState& params);

// The options of a vmap over examples, of f(params, rest, inputs, targets...).
template <class... Targets>
VmapOptions over_examples(const PerSampleOptions& options, const Targets&... targets) {
  return {.in_dims = in(kNone, kNone, 0, (static_cast<void>(targets), 0)...),
          .randomness = options.randomness,
          .chunk_size = options.chunk_size,
          .memory_budget = options.memory_budget};
}

// The loss of one example as a function of all state, which a std::tie of ModuleStates gives.
template <class Impl, class Loss>
class LossOfOne {
 public:
  LossOfOne(const char* transform, FunctionalModule<Impl> module, Loss loss)
      : transform_(transform), module_(std::move(module)), loss_(std::move(loss)) {}

  template <class States, class... Targets>
  at::Tensor operator()(const States& states, const at::Tensor& x,
                        const Targets&... targets) const {
    const ReturnBuffers frozen{.others = BufferMode::kFrozen};
    const auto output = module_(states, frozen, as_batch(x)).first;
    return check_loss(transform_, loss_(output, as_batch(targets)...));
  }

  const FunctionalModule<Impl>& module() const { return module_; }
  const char* transform() const { return transform_; }

 private:
  const char* transform_;
  FunctionalModule<Impl> module_;
  Loss loss_;
};

}  // namespace per_sample_internal

// What per_sample_grad returns: the gradients of (input, targets...), all with the examples along
// dim 0.
template <class Impl, class Loss>
class PerSampleGrad {
 public:
  PerSampleGrad(FunctionalModule<Impl> module, Loss loss, PerSampleOptions options)
      : loss_("per_sample_grad", std::move(module), std::move(loss)), options_(options) {}

  template <class... Targets>
  ModuleState operator()(const at::Tensor& inputs, const Targets&... targets) const {
    using namespace per_sample_internal;
    const auto [params, rest] = split_state(loss_.module().slots());
    check_trainable("per_sample_grad", loss_.module().slots(), params);
    const auto one = [this](const ModuleState& p, const ModuleState& r, const at::Tensor& x,
                            const Targets&... y) { return loss_(std::tie(p, r), x, y...); };
    return vmap(grad(one), over_examples(options_, targets...))(params, rest, inputs, targets...);
  }

 private:
  per_sample_internal::LossOfOne<Impl, Loss> loss_;
  PerSampleOptions options_;
};

template <class M, class Loss>
auto per_sample_grad(M&& module, Loss loss, PerSampleOptions options = {}) {
  return PerSampleGrad(functional(module), std::move(loss), options);
}

// What per_sample_grad_norms returns: the norms of the gradients of (input, targets...).
template <class Impl, class Loss>
class PerSampleGradNorms {
 public:
  PerSampleGradNorms(FunctionalModule<Impl> module, Loss loss, PerSampleOptions options)
      : loss_("per_sample_grad_norms", std::move(module), std::move(loss)), options_(options) {}

  template <class... Targets>
  at::Tensor operator()(const at::Tensor& inputs, const Targets&... targets) const {
    using namespace per_sample_internal;
    const StateSlots& slots = loss_.module().slots();
    const auto [params, rest] = split_state(slots);
    check_trainable("per_sample_grad_norms", slots, params);
    if (example_count("per_sample_grad_norms", inputs) == 0) {
      return params.begin()->second.new_zeros({0});
    }
    const auto square = [&](const ModuleState& p, const ModuleState& r, const at::Tensor& x,
                            const Targets&... y) {
      return ghost_internal::squared_norm_of_gradient(
                 slots, p,
                 [&](const ModuleState& tracked) { return loss_(std::tie(tracked, r), x, y...); })
          .value;
    };
    const VmapOptions options = over_examples(options_, targets...);
    return vmap(square, options)(params, rest, inputs, targets...).sqrt();
  }

 private:
  per_sample_internal::LossOfOne<Impl, Loss> loss_;
  PerSampleOptions options_;
};

// The norm of each example's gradient, [examples]. For linear layers, convolutions and embeddings
// it comes from the layer's input and the gradient of its output, without the gradient of its
// weight
// ("ghost norms": nn_functional/ghost.h), where that takes less memory. Parameters that are used
// otherwise, or more than once, have their gradients made, one chunk of examples at a time.
template <class M, class Loss>
auto per_sample_grad_norms(M&& module, Loss loss, PerSampleOptions options = {}) {
  return PerSampleGradNorms(functional(module), std::move(loss), options);
}

// The norm of each example's gradient over all parameters, [examples].
at::Tensor grad_norms(const ModuleState& grads);

// The sum over the examples of gradients that are scaled down to norm max_norm where they exceed
// it. Throws TransformError unless max_norm > 0.
ModuleState clip_and_sum(const ModuleState& grads, double max_norm);
// ... of gradients whose norms [examples] are known.
ModuleState clip_and_sum(const ModuleState& grads, double max_norm, const at::Tensor& norms);

struct DpOptions {
  double max_norm = 1.0;
  double noise_multiplier = 1.0;
  // What the noisy sum is divided by; the batch size by default. With Poisson sampling, as privacy
  // accounting wants it, give the expected one.
  std::optional<double> expected_batch_size = std::nullopt;
  std::optional<at::Generator> generator = std::nullopt;
  // Of dp_gradients of a module. With ghost, the norms come from per_sample_grad_norms, and a
  // second backward pass of the weighted losses gives the sum, so that no gradient of one example
  // is ever made; the module must then draw no random numbers, since the passes would differ.
  bool ghost = true;
  std::optional<int64_t> chunk_size = std::nullopt;
  std::optional<int64_t> memory_budget = std::nullopt;
};

// The gradient of a step of DP-SGD from per-sample gradients: clipped, summed, with Gaussian noise
// of standard deviation noise_multiplier * max_norm, divided by the batch size. Algorithm 1 of
// Abadi et al. 2016, arXiv:1607.00133. Accounting for the privacy spent is the caller's.
ModuleState dp_gradients(const ModuleState& grads, const DpOptions& options);

namespace per_sample_internal {

// Throws TransformError unless max_norm > 0 and noise_multiplier >= 0.
void check_options(const DpOptions& options);
// min(1, max_norm / norm); 1 for a gradient of zero.
at::Tensor clip_factors(const at::Tensor& norms, double max_norm);
// A sum of clipped gradients with noise, divided.
ModuleState with_noise(ModuleState sum, int64_t examples, const DpOptions& options);
ModuleState zeros_like(const ModuleState& state);
// Puts the gradients into the parameters of these names.
void set_grads(const StateSlots& slots, const ModuleState& grads);

}  // namespace per_sample_internal

// A function of (inputs, targets...) that returns the gradient of a step of DP-SGD, as above.
template <class M, class Loss>
auto dp_gradients(M&& module, Loss loss, DpOptions options) {
  using namespace per_sample_internal;
  check_options(options);
  const auto f = functional(module);
  const PerSampleOptions each{.randomness = Randomness::kError,
                              .chunk_size = options.chunk_size,
                              .memory_budget = options.memory_budget};
  PerSampleOptions drawing = each;
  drawing.randomness = Randomness::kDifferent;
  return [options, norms_of = PerSampleGradNorms(f, loss, each),
          grads_of = PerSampleGrad(f, loss, drawing),
          loss_of = LossOfOne("dp_gradients", f, loss)]<class... Targets>(
             const at::Tensor& inputs, const Targets&... targets) {
    const int64_t examples = example_count("dp_gradients", inputs);
    const auto [params, rest] = split_state(loss_of.module().slots());
    check_trainable("dp_gradients", loss_of.module().slots(), params);
    if (examples == 0) return with_noise(zeros_like(params), 0, options);
    if (!options.ghost) {
      return with_noise(clip_and_sum(grads_of(inputs, targets...), options.max_norm), examples,
                        options);
    }
    const at::Tensor factors = clip_factors(norms_of(inputs, targets...), options.max_norm);
    const ModuleState& others = rest;
    const auto one = [&](const ModuleState& p, const ModuleState& r, const at::Tensor& x,
                         const Targets&... y) { return loss_of(std::tie(p, r), x, y...); };
    const auto weighted = [&](const ModuleState& p) {
      const VmapOptions all{.in_dims = in(kNone, kNone, 0, (static_cast<void>(targets), 0)...)};
      return vmap(one, all)(p, others, inputs, targets...).mul(factors).sum();
    };
    return with_noise(grad(weighted)(params), examples, options);
  };
}

// One step of DP-SGD: dp_gradients, put into the parameters' grad(), and optimizer.step().
template <class M, class Loss, class Optimizer, class... Targets>
void dp_sgd_step(M&& module, Loss loss, Optimizer& optimizer, DpOptions options,
                 const at::Tensor& inputs, const Targets&... targets) {
  const ModuleState grads = dp_gradients(module, std::move(loss), options)(inputs, targets...);
  per_sample_internal::set_grads(functional(module).slots(), grads);
  optimizer.step();
}

}  // namespace torchlift

#endif  // TORCHLIFT_NN_FUNCTIONAL_PER_SAMPLE_H_
