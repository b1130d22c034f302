#ifndef TORCHLIFT_NN_FUNCTIONAL_META_H_
#define TORCHLIFT_NN_FUNCTIONAL_META_H_

// File: nn_functional/meta.h
//
// Learning to learn: the inner loop of MAML as a pure function, with first-order and implicit
// gradients.
//
//   at::Tensor loss(const Params& p, const at::Tensor& x, const at::Tensor& y);      // of a task
//
//   Params adapted = tl::adapt(&loss, {.steps = 5, .lr = 0.1})(params, x, y);
//
//   // loss(adapted on the support set, query...): differentiate it, map it over tasks.
//   auto meta = tl::maml(&loss, {.steps = 5, .lr = 0.1});
//   auto over_tasks = [&](const Params& p) {
//     return tl::vmap(meta, {.in_dims = tl::in(tl::kNone, 0, 0)})(p, std::tuple(xs, ys),
//                                                                std::tuple(qxs, qys)).mean();
//   };
//   Params g = tl::grad(over_tasks)(params);
//
//   // The same without differentiating through the steps, one task:
//   auto [g, value] = tl::implicit_maml_grad(&loss, {.steps = 50, .lr = 0.1})(params, support,
//                                                                            query);
//
// Params is any tree (core/tree.h). Support and query sets are std::tuples of what the loss takes
// after them. Finn et al. 2017, arXiv:1703.03400; Rajeswaran et al. 2019, arXiv:1909.04630.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>

#include "autodiff/grad.h"
#include "autodiff/vjp.h"
#include "core/tree.h"
#include "nn_functional/optim.h"

namespace torchlift {

struct AdaptOptions {
  int64_t steps = 1;
  // Of gradient descent; not looked at where an optimizer is given.
  double lr = 0.01;
  // The gradients of the steps count as constants when the result is differentiated (FOMAML).
  bool first_order = false;
};

struct ImplicitMamlOptions {
  int64_t steps = 10;
  double lr = 0.01;
  // The inner loop descends on loss + regularization / 2 |p - params|^2.
  double regularization = 1.0;
  // Of conjugate gradients.
  int64_t cg_steps = 10;
};

namespace meta_internal {

using Leaves = std::vector<at::Tensor>;

// Throws TransformError for a negative number of steps.
void check_steps(const char* transform, int64_t steps);
// Throws TransformError unless it is above 0.
void check_regularization(double regularization);

// sum_i |a_i - b_i|^2
at::Tensor squared_distance(const Leaves& a, const Leaves& b);

// a + b / divisor
Leaves add_scaled(const Leaves& a, const Leaves& b, double divisor);

// Approximately solves apply(x) = rhs for a symmetric positive definite apply, from x = 0. Without
// a branch on values, so that it can be mapped over; once converged it stays where it is.
Leaves conjugate_gradients(const std::function<Leaves(const Leaves&)>& apply, const Leaves& rhs,
                           int64_t steps);

template <class Params>
Params detached(Params params) {
  return tree_map(std::move(params),
                  [](const at::Tensor& t) { return t.defined() ? t.detach() : t; });
}

}  // namespace meta_internal

// A function of (params, batch...) that returns params after some steps of the optimizer (optim.h)
// on loss(params, batch...). Pure: differentiate it by params, map it over tasks.
template <class Loss, class Optimizer>
auto adapt(Loss loss, Optimizer optimizer, AdaptOptions options) {
  meta_internal::check_steps("adapt", options.steps);
  return [loss = std::move(loss), optimizer = std::move(optimizer),
          options]<class Params, class... Batch>(const Params& params, const Batch&... batch) {
    Params current = params;
    optim::State state = optimizer.init(params);
    for (int64_t step = 0; step < options.steps; ++step) {
      Params grads = grad(loss)(current, batch...);
      if (options.first_order) grads = meta_internal::detached(std::move(grads));
      std::tie(current, state) = optimizer.update(grads, state, current);
    }
    return current;
  };
}

template <class Loss>
auto adapt(Loss loss, AdaptOptions options) {
  return adapt(std::move(loss), optim::Sgd({.lr = options.lr}), options);
}

// A function of (params, support, query): loss(adapted, query...), where adapted are the params
// after some steps on the support set.
template <class Loss, class Optimizer>
auto maml(Loss loss, Optimizer optimizer, AdaptOptions options) {
  return [loss, inner = adapt(loss, std::move(optimizer),
                              options)]<class Params, class Support, class Query>(
             const Params& params, const Support& support, const Query& query) {
    const Params adapted =
        std::apply([&](const auto&... batch) { return inner(params, batch...); }, support);
    return std::apply([&](const auto&... batch) { return loss(adapted, batch...); }, query);
  };
}

template <class Loss>
auto maml(Loss loss, AdaptOptions options) {
  return maml(std::move(loss), optim::Sgd({.lr = options.lr}), options);
}

// A function of (params, support, query) that returns {the meta-gradient by params, the meta-loss}
// of one task: (I + H / regularization)^-1 g, with the Hessian H of the loss on the support set and
// the gradient g of the loss on the query set, both at the adapted parameters. Exact in so far as
// the inner loop has converged. Not a function to differentiate: it is the gradient. It can be
// mapped over tasks.
template <class Loss>
auto implicit_maml_grad(Loss loss, ImplicitMamlOptions options = {}) {
  meta_internal::check_steps("implicit_maml_grad", options.steps);
  meta_internal::check_steps("implicit_maml_grad", options.cg_steps);
  meta_internal::check_regularization(options.regularization);
  return [loss = std::move(loss), options]<class Params, class Support, class Query>(
             const Params& params, const Support& support, const Query& query) {
    const auto on = [&loss](const auto& set) {
      return [&](const Params& p) {
        return std::apply([&](const auto&... batch) { return loss(p, batch...); }, set);
      };
    };
    const auto anchor = tree_flatten(params);
    const auto regularized = [&](const Params& p) {
      const at::Tensor far = meta_internal::squared_distance(tree_flatten(p), anchor);
      return on(support)(p).add(far, 0.5 * options.regularization);
    };
    const Params adapted = meta_internal::detached(
        adapt(regularized,
              AdaptOptions{.steps = options.steps, .lr = options.lr, .first_order = true})(params));
    auto query_loss = value_and_grad(on(query))(adapted);
    // The Hessian is symmetric: its product with v is the vjp of the gradient.
    const auto slope = vjp(grad(on(support)), adapted);
    const auto apply = [&](const meta_internal::Leaves& v) {
      const Params product = slope.second(tree_unflatten(adapted, v));
      return meta_internal::add_scaled(v, tree_flatten(product), options.regularization);
    };
    const auto solution = meta_internal::conjugate_gradients(apply, tree_flatten(query_loss.second),
                                                             options.cg_steps);
    return std::pair(tree_unflatten(params, solution), std::move(query_loss.first));
  };
}

}  // namespace torchlift

#endif  // TORCHLIFT_NN_FUNCTIONAL_META_H_
