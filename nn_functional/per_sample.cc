#include "nn_functional/per_sample.h"

#include <ATen/ops/clamp_max.h>
#include <ATen/ops/clamp_min.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/stack.h>

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

at::Tensor check_loss(const at::Tensor& loss) {
  if (loss.numel() != 1) {
    transform_error("per_sample_grad", "the loss of one example must be one number, got shape ",
                    loss.sizes(), ".");
  }
  return loss.reshape({});
}

}  // namespace per_sample_internal

at::Tensor grad_norms(const ModuleState& grads) {
  if (grads.empty()) transform_error("grad_norms", "got no gradients.");
  std::vector<at::Tensor> squares;
  for (const auto& [name, g] : grads) squares.push_back(g.unsqueeze(-1).flatten(1).square().sum(1));
  return at::stack(squares).sum(0).sqrt();
}

ModuleState clip_and_sum(const ModuleState& grads, double max_norm) {
  if (!(max_norm > 0)) {
    transform_error("clip_and_sum", "max_norm must be above 0, got ", max_norm, ".");
  }
  const at::Tensor norms = at::clamp_min(grad_norms(grads), std::numeric_limits<float>::min());
  const at::Tensor factors = at::clamp_max(norms.reciprocal() * max_norm, 1.0);
  ModuleState sums;
  for (const auto& [name, g] : grads) {
    sums.emplace(
        name,
        factors.to(g.scalar_type()).matmul(g.unsqueeze(-1).flatten(1)).reshape(g.sizes().slice(1)));
  }
  return sums;
}

ModuleState dp_gradients(const ModuleState& grads, const DpOptions& options) {
  if (options.noise_multiplier < 0) {
    transform_error("dp_gradients", "noise_multiplier must be at least 0, got ",
                    options.noise_multiplier, ".");
  }
  ModuleState result = clip_and_sum(grads, options.max_norm);
  const auto examples = static_cast<double>(grads.begin()->second.size(0));
  const double divisor = options.expected_batch_size.value_or(std::max(examples, 1.0));
  const double scale = options.noise_multiplier * options.max_norm;
  for (auto& [name, g] : result) {
    g = (g + at::randn(g.sizes(), options.generator, g.options()) * scale) / divisor;
  }
  return result;
}

}  // namespace torchlift
