#ifndef TORCHLIFT_NN_FUNCTIONAL_LINEARIZED_H_
#define TORCHLIFT_NN_FUNCTIONAL_LINEARIZED_H_

// File: nn_functional/linearized.h
//
// What training looks like near some parameters: the empirical neural tangent kernel, and the
// diagonals of the Fisher and the generalised Gauss-Newton matrix.
//
//   auto f = [&](const tl::ModuleState& p, const at::Tensor& x) {
//     return tl::functional_call(net, p, x);                            // of one example
//   };
//   at::Tensor k = tl::empirical_ntk(f, params, x1, x2);                // [N1, N2, K, K]
//   at::Tensor t = tl::empirical_ntk(f, params, x1, {.compute = tl::NtkKind::kTrace});  // [N1, N1]
//
//   tl::ModuleState d = tl::fisher_diagonal(loss)(params, xs, ys);      // loss(params, x, y)
//   tl::ModuleState g = tl::ggn_diagonal(f, out_loss)(params, xs, ys);  // out_loss(output, y)
//
// Params is any tree (core/tree.h). Jacot et al. 2018, arXiv:1806.07572; Novak et al. 2022,
// arXiv:2206.08720; Kunstner et al. 2019, arXiv:1905.12558; Schraudolph 2002.
//
// Throws TransformError for a batch without examples (of the diagonals, which are means).

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "autodiff/grad.h"
#include "autodiff/vjp.h"
#include "batching/vmap.h"
#include "core/tree.h"

namespace torchlift {

enum class NtkKind : uint8_t {
  kFull,      // [N1, N2, K, K] for K outputs
  kDiagonal,  // of the last two dims: [N1, N2, K]
  kTrace,     // of the last two dims: [N1, N2]
};

struct NtkOptions {
  NtkKind compute = NtkKind::kFull;
  // How many Jacobians to make at a time.
  std::optional<int64_t> chunk_size = std::nullopt;
};

struct DiagonalOptions {
  // Of random operators in the function.
  Randomness randomness = Randomness::kError;
  // How many examples to do at a time.
  std::optional<int64_t> chunk_size = std::nullopt;
};

namespace linearized_internal {

using Leaves = std::vector<at::Tensor>;

// The identity of n = output.numel() rows, with the output's dtype and device.
at::Tensor basis_of(const at::Tensor& output);

// [K, P] for each leaf of rows [K, ...].
Leaves flat_rows(const Leaves& rows, int64_t outputs);

// d f(params, x) / d params, a tensor [outputs, parameters] for each leaf.
template <class F, class Params>
Leaves jacobian_rows(const F& f, const Params& params, const at::Tensor& x) {
  const auto run = vjp([&](const Params& p) { return f(p, x); }, params);
  const at::Tensor& output = run.first;
  const auto row = [&](const at::Tensor& v) { return run.second(v.reshape(output.sizes())); };
  return flat_rows(tree_flatten(vmap(row)(basis_of(output))), output.numel());
}

// The sum over the parameters of the products of Jacobians [N, K, P].
at::Tensor contract(const Leaves& first, const Leaves& second, NtkKind kind);

// The Hessian [K, K] of loss(y) at the output y.
template <class Loss>
at::Tensor output_hessian(const Loss& loss, const at::Tensor& output) {
  const auto slope = vjp(grad(loss), output);
  const auto row = [&](const at::Tensor& v) { return slope.second(v.reshape(output.sizes())); };
  const int64_t outputs = output.numel();
  return vmap(row)(basis_of(output)).reshape({outputs, outputs});
}

// diag(J^T H J) for each leaf's J [K, P].
Leaves diagonals(const Leaves& jacobian, const at::Tensor& hessian);

// Means over dim 0, with the shapes of `like`. Throws TransformError if that dim has size 0.
Leaves means(const char* transform, const Leaves& rows, const Leaves& like);

}  // namespace linearized_internal

// The kernel J(x1) J(x2)^T of f(params, example) -> outputs; examples along dim 0. The Jacobians
// are contracted for one parameter after the other, and only what is asked for.
template <class F, class Params>
at::Tensor empirical_ntk(const F& f, const Params& params, const at::Tensor& x1,
                         const at::Tensor& x2, NtkOptions options = {}) {
  const auto rows = [&f](const Params& p, const at::Tensor& x) {
    return linearized_internal::jacobian_rows(f, p, x);
  };
  const auto jacobians = vmap(rows, {.in_dims = in(kNone, 0), .chunk_size = options.chunk_size});
  const auto first = jacobians(params, x1);
  const auto second = x2.is_same(x1) ? first : jacobians(params, x2);
  return linearized_internal::contract(first, second, options.compute);
}

template <class F, class Params>
at::Tensor empirical_ntk(const F& f, const Params& params, const at::Tensor& x,
                         NtkOptions options = {}) {
  return empirical_ntk(f, params, x, x, options);
}

// A function of (params, examples...) that returns the mean over the examples of the squared
// gradient of loss(params, example...), by parameter. With the negative log-likelihood of the
// observed targets as loss that is the diagonal of the empirical Fisher matrix; of targets drawn
// from the model, an estimate of the Fisher matrix itself.
template <class Loss>
auto fisher_diagonal(Loss loss, DiagonalOptions options = {}) {
  return [loss = std::move(loss), options]<class Params, class... Batch>(const Params& params,
                                                                         const Batch&... batch) {
    Dims in_dims = in(kNone, (static_cast<void>(batch), 0)...);
    const Params grads = vmap(grad(loss), {.in_dims = std::move(in_dims),
                                           .randomness = options.randomness,
                                           .chunk_size = options.chunk_size})(params, batch...);
    const Params squares = tree_map(grads, [](const at::Tensor& g) { return g.square(); });
    return tree_unflatten(
        params,
        linearized_internal::means("fisher_diagonal", tree_flatten(squares), tree_flatten(params)));
  };
}

// A function of (params, examples, targets...) that returns the mean over the examples of
// diag(J^T H J), with the Jacobian J of f(params, example) and the Hessian H of loss(output,
// target...) by the output.
template <class F, class Loss>
auto ggn_diagonal(F f, Loss loss, DiagonalOptions options = {}) {
  return [f = std::move(f), loss = std::move(loss), options]<class Params, class... Targets>(
             const Params& params, const at::Tensor& inputs, const Targets&... targets) {
    namespace internal = linearized_internal;
    const auto one = [&](const Params& p, const at::Tensor& x, const Targets&... y) {
      const auto of_output = [&](const at::Tensor& out) { return loss(out, y...); };
      return internal::diagonals(internal::jacobian_rows(f, p, x),
                                 internal::output_hessian(of_output, f(p, x)));
    };
    Dims in_dims = in(kNone, 0, (static_cast<void>(targets), 0)...);
    const auto rows = vmap(one, {.in_dims = std::move(in_dims),
                                 .randomness = options.randomness,
                                 .chunk_size = options.chunk_size})(params, inputs, targets...);
    return tree_unflatten(params, internal::means("ggn_diagonal", rows, tree_flatten(params)));
  };
}

}  // namespace torchlift

#endif  // TORCHLIFT_NN_FUNCTIONAL_LINEARIZED_H_
