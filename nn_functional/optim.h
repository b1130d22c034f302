#ifndef TORCHLIFT_NN_FUNCTIONAL_OPTIM_H_
#define TORCHLIFT_NN_FUNCTIONAL_OPTIM_H_

// File: nn_functional/optim.h
//
// Optimizers as pure functions over trees of parameters (core/tree.h): they can be differentiated
// through and mapped over.
//
//   const tl::optim::Adam adam({.lr = 1e-3});
//   auto state = adam.init(params);
//   std::tie(params, state) = adam.update(tl::grad(loss)(params, x, y), state, params);
//
// Formulas: those of torch::optim::SGD, Adam and AdamW.

#include <ATen/core/Tensor.h>

#include <utility>
#include <vector>

#include "core/tree.h"

namespace torchlift::optim {

// What an optimizer remembers: the number of steps, and one or two averages for each parameter.
struct State {
  at::Tensor step;
  std::vector<at::Tensor> first, second;
};
TORCHLIFT_PYTREE(State, step, first, second);

struct SgdOptions {
  double lr;
  double momentum = 0.0;
  double dampening = 0.0;
  double weight_decay = 0.0;
  bool nesterov = false;
};

struct AdamOptions {
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0.0;
  // Weight decay apart from the gradient (Loshchilov and Hutter, 2019): AdamW.
  bool decoupled = false;
};

namespace optim_internal {

using Tensors = std::vector<at::Tensor>;

// Throws TransformError unless the lists have one length.
void check_counts(size_t grads, size_t state, size_t params);
State init_sgd(const SgdOptions& options, const Tensors& params);
State init_adam(const Tensors& params);
std::pair<Tensors, State> update(const SgdOptions& options, const Tensors& grads,
                                 const State& state, const Tensors& params);
std::pair<Tensors, State> update(const AdamOptions& options, const Tensors& grads,
                                 const State& state, const Tensors& params);

template <class Options, class Params>
std::pair<Params, State> update_tree(const Options& options, const Params& grads,
                                     const State& state, const Params& params) {
  auto [leaves, next] = update(options, tree_flatten(grads), state, tree_flatten(params));
  return {tree_unflatten(params, leaves), std::move(next)};
}

}  // namespace optim_internal

// Stochastic gradient descent with momentum.
class Sgd {
 public:
  // Throws TransformError for a negative lr or momentum, or nesterov without momentum.
  explicit Sgd(SgdOptions options);

  template <class Params>
  State init(const Params& params) const {
    return optim_internal::init_sgd(options_, tree_flatten(params));
  }
  // {new parameters, new state}
  template <class Params>
  std::pair<Params, State> update(const Params& grads, const State& state,
                                  const Params& params) const {
    return optim_internal::update_tree(options_, grads, state, params);
  }

 private:
  SgdOptions options_;
};

// Adam (Kingma and Ba, 2015).
class Adam {
 public:
  // Throws TransformError for a negative lr or a beta outside of [0, 1).
  explicit Adam(AdamOptions options = {});

  template <class Params>
  State init(const Params& params) const {
    return optim_internal::init_adam(tree_flatten(params));
  }
  template <class Params>
  std::pair<Params, State> update(const Params& grads, const State& state,
                                  const Params& params) const {
    return optim_internal::update_tree(options_, grads, state, params);
  }

 private:
  AdamOptions options_;
};

// Adam with decoupled weight decay, 1e-2 by default.
inline Adam adamw(AdamOptions options = {.weight_decay = 1e-2}) {
  options.decoupled = true;
  return Adam(options);
}

}  // namespace torchlift::optim

#endif  // TORCHLIFT_NN_FUNCTIONAL_OPTIM_H_
