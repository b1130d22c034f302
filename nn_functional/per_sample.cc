#include "nn_functional/per_sample.h"

#include <ATen/ops/clamp_max.h>
#include <ATen/ops/clamp_min.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/tensor_operators.h"

namespace torchlift {
namespace per_sample_internal {

std::pair<ModuleState, ModuleState> split_state(const StateSlots& slots) {
  ModuleState tracked, rest;
  const std::vector<std::string> names = slots.parameter_names();
  const std::vector<at::Tensor> own = slots.parameters();
  for (size_t i = 0; i < own.size(); ++i) {
    (own[i].requires_grad() ? tracked : rest).emplace(names[i], own[i].detach());
  }
  const std::vector<std::string> buffer_names = slots.buffer_names();
  const std::vector<at::Tensor> buffers = slots.buffers();
  for (size_t i = 0; i < buffers.size(); ++i) rest.emplace(buffer_names[i], buffers[i].detach());
  return {std::move(tracked), std::move(rest)};
}

at::Tensor as_batch(const at::Tensor& t) { return t.unsqueeze(0); }

at::Tensor check_loss(const char* transform, const at::Tensor& loss) {
  if (loss.numel() != 1) {
    transform_error(transform, "the loss of one example must be one number, got shape ",
                    loss.sizes(), ".");
  }
  return loss.reshape({});
}

int64_t example_count(const char* transform, const at::Tensor& inputs) {
  if (inputs.dim() == 0) {
    transform_error(transform,
                    "the inputs must have the examples along dim 0, got a tensor without dims.");
  }
  return inputs.size(0);
}

void check_trainable(const char* transform, const StateSlots& slots, const ModuleState& params) {
  if (!params.empty()) return;
  transform_error(transform, "no parameter of ", slots.module_name(),
                  " requires grad, so there is nothing to differentiate. Call requires_grad_() on "
                  "those that are trained.");
}

void check_options(const DpOptions& options) {
  if (options.max_norm > 0 && options.noise_multiplier >= 0) return;
  transform_error("dp_gradients", "max_norm must be above 0 and noise_multiplier at least 0, got ",
                  options.max_norm, " and ", options.noise_multiplier, ".");
}

at::Tensor clip_factors(const at::Tensor& norms, double max_norm) {
  const at::Tensor positive = at::clamp_min(norms, std::numeric_limits<float>::min());
  return at::clamp_max(positive.reciprocal() * max_norm, 1.0);
}

ModuleState with_noise(ModuleState sum, int64_t examples, const DpOptions& options) {
  const double divisor =
      options.expected_batch_size.value_or(static_cast<double>(std::max<int64_t>(examples, 1)));
  const double scale = options.noise_multiplier * options.max_norm;
  for (auto& [name, g] : sum) {
    g = (g + at::randn(g.sizes(), options.generator, g.options()) * scale) / divisor;
  }
  return sum;
}

ModuleState zeros_like(const ModuleState& state) {
  ModuleState zeros;
  for (const auto& [name, t] : state) zeros.emplace(name, at::zeros_like(t));
  return zeros;
}

void set_grads(const StateSlots& slots, const ModuleState& grads) {
  const std::vector<std::string> names = slots.parameter_names();
  const std::vector<at::Tensor> own = slots.parameters();
  for (size_t i = 0; i < own.size(); ++i) {
    const auto found = grads.find(names[i]);
    if (found != grads.end()) own[i].mutable_grad() = found->second;
  }
}

}  // namespace per_sample_internal

at::Tensor grad_norms(const ModuleState& grads) {
  if (grads.empty()) transform_error("grad_norms", "got no gradients.");
  std::vector<at::Tensor> squares;
  for (const auto& [name, g] : grads) {
    const at::Tensor by_row = g.unsqueeze(-1).flatten(1);
    squares.push_back((by_row.is_complex() ? by_row.abs() : by_row).square().sum(1));
  }
  return at::stack(squares).sum(0).sqrt();
}

ModuleState clip_and_sum(const ModuleState& grads, double max_norm) {
  return clip_and_sum(grads, max_norm, grad_norms(grads));
}

ModuleState clip_and_sum(const ModuleState& grads, double max_norm, const at::Tensor& norms) {
  if (!(max_norm > 0)) {
    transform_error("clip_and_sum", "max_norm must be above 0, got ", max_norm, ".");
  }
  const at::Tensor factors = per_sample_internal::clip_factors(norms, max_norm);
  ModuleState sums;
  for (const auto& [name, g] : grads) {
    if (norms.dim() != 1 || g.dim() == 0 || g.size(0) != norms.size(0)) {
      transform_error("clip_and_sum", "expected one norm for each example of '", name, "', got ",
                      norms.sizes(), " norms for a tensor of shape ", g.sizes(), ".");
    }
    sums.emplace(
        name,
        factors.to(g.scalar_type()).matmul(g.unsqueeze(-1).flatten(1)).reshape(g.sizes().slice(1)));
  }
  return sums;
}

ModuleState dp_gradients(const ModuleState& grads, const DpOptions& options) {
  per_sample_internal::check_options(options);
  ModuleState sum = clip_and_sum(grads, options.max_norm);
  return per_sample_internal::with_noise(std::move(sum), grads.begin()->second.size(0), options);
}

}  // namespace torchlift
