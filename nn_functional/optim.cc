#include "nn_functional/optim.h"

#include <ATen/ops/eq.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "core/error.h"
#include "core/tensor_operators.h"

namespace torchlift::optim {
namespace {

constexpr const char* kOptim = "optim";

void check_range(const char* name, double value, bool good) {
  if (!good) transform_error(kOptim, name, " is out of range: ", value, ".");
}

at::Tensor no_steps(const std::vector<at::Tensor>& params) {
  const auto options = at::TensorOptions().dtype(at::kFloat);
  return at::zeros({}, params.empty() ? options : options.device(params[0].device()));
}

std::vector<at::Tensor> zeros_of(const std::vector<at::Tensor>& params) {
  std::vector<at::Tensor> zeros;
  for (const at::Tensor& p : params) zeros.push_back(at::zeros_like(p));
  return zeros;
}

at::Tensor decayed(const at::Tensor& grad, const at::Tensor& param, double weight_decay) {
  return weight_decay == 0.0 ? grad : grad + param * weight_decay;
}

// 1 - beta^steps
at::Tensor correction(double beta, const at::Tensor& steps) {
  return at::rsub(at::pow(beta, steps), 1.0);
}

}  // namespace

namespace optim_internal {

void check_counts(size_t grads, size_t state, size_t params) {
  if (grads == params && state == params) return;
  transform_error(kOptim, "update got ", grads, " gradients and a state for ", state,
                  " tensors, for ", params,
                  " parameters. Give trees of one structure, and the state of init(params).");
}

State init_sgd(const SgdOptions& options, const Tensors& params) {
  return {no_steps(params), options.momentum == 0.0 ? Tensors() : zeros_of(params), {}};
}

State init_adam(const Tensors& params) {
  for (const at::Tensor& p : params) {
    if (p.is_complex()) transform_error(kOptim, "Adam does not take complex parameters. Use Sgd.");
  }
  return {no_steps(params), zeros_of(params), zeros_of(params)};
}

std::pair<Tensors, State> update(const SgdOptions& options, const Tensors& grads,
                                 const State& state, const Tensors& params) {
  const bool momentum = options.momentum != 0.0;
  check_counts(grads.size(), momentum ? state.first.size() : params.size(), params.size());
  std::pair<Tensors, State> next{{}, {state.step + 1, {}, {}}};
  const at::Tensor first = at::eq(state.step, 0);
  for (size_t i = 0; i < params.size(); ++i) {
    at::Tensor g = decayed(grads[i], params[i], options.weight_decay);
    if (momentum) {
      const at::Tensor m = state.first[i] * options.momentum + g * (1 - options.dampening);
      // The first step takes the gradient itself, as torch::optim::SGD does.
      next.second.first.push_back(at::where(first, g, m));
      const at::Tensor& velocity = next.second.first.back();
      g = options.nesterov ? g + velocity * options.momentum : velocity;
    }
    next.first.push_back(params[i] - g * options.lr);
  }
  return next;
}

std::pair<Tensors, State> update(const AdamOptions& options, const Tensors& grads,
                                 const State& state, const Tensors& params) {
  check_counts(grads.size(), state.first.size(), params.size());
  std::pair<Tensors, State> next{{}, {state.step + 1, {}, {}}};
  for (size_t i = 0; i < params.size(); ++i) {
    at::Tensor p = params[i];
    at::Tensor g = grads[i];
    if (options.decoupled) {
      p = p - p * (options.lr * options.weight_decay);
    } else {
      g = decayed(g, p, options.weight_decay);
    }
    const at::Tensor steps = next.second.step.to(p.scalar_type());
    const at::Tensor mean = state.first[i] * options.beta1 + g * (1 - options.beta1);
    const at::Tensor square = state.second[i] * options.beta2 + g * g * (1 - options.beta2);
    const at::Tensor root = (square / correction(options.beta2, steps)).sqrt() + options.eps;
    next.first.push_back(p - mean / correction(options.beta1, steps) / root * options.lr);
    next.second.first.push_back(mean);
    next.second.second.push_back(square);
  }
  return next;
}

}  // namespace optim_internal

Sgd::Sgd(SgdOptions options) : options_(options) {
  check_range("lr", options.lr, options.lr >= 0);
  check_range("momentum", options.momentum, options.momentum >= 0);
  if (options.nesterov && options.momentum == 0.0) {
    transform_error(kOptim, "Sgd with nesterov needs a momentum above 0.");
  }
}

Adam::Adam(AdamOptions options) : options_(options) {
  check_range("lr", options.lr, options.lr >= 0);
  check_range("beta1", options.beta1, options.beta1 >= 0 && options.beta1 < 1);
  check_range("beta2", options.beta2, options.beta2 >= 0 && options.beta2 < 1);
}

}  // namespace torchlift::optim
