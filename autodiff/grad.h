#ifndef TORCHLIFT_AUTODIFF_GRAD_H_
#define TORCHLIFT_AUTODIFF_GRAD_H_

// File: autodiff/grad.h
//
// grad: turns a function that returns one number into the function that returns its gradient.
//
//   at::Tensor loss(const Params& p, const at::Tensor& x, const at::Tensor& y);   // -> shape []
//
//   Params g = tl::grad(loss)(params, x, y);                   // by argument 0; g has Params'
//   structure auto [gp, gx] = tl::grad<0, 1>(loss)(params, x, y);        // by several: a
//   std::tuple auto [value, g1] = tl::value_and_grad(loss)(params, x, y); auto [g2, value2] =
//   tl::grad_and_value(loss)(params, x, y);   // functorch's order
//
// A gradient has the type and structure of its argument; numbers, strings and undefined tensors in
// it are copied. The gradient of a complex argument is libtorch's (conjugate) one.
//
// A function that returns more than its loss returns std::pair{loss, aux} and says so; aux is any
// tree:
//
//   auto [g, aux] = tl::grad(f, tl::kHasAux)(params, x, y);
//   auto [value_aux, g] = tl::value_and_grad(f, tl::kHasAux)(params, x, y);   // {{value, aux}, g}
//   auto [g, value_aux] = tl::grad_and_value(f, tl::kHasAux)(params, x, y);   // {g, {value, aux}}
//
// value and aux are detached from this differentiation, but not from what is differentiated around
// it: outer gradients, and tensors that require grad. So are the gradients.
//
// no_grad, as torch.func has it: inside the function it hides what is under it from this
// differentiation; around the call it does not, but the results are then not connected to the
// outside.
//
// What is returned is a value: copy it, keep it, call it from several threads, give it to another
// transform.
//
// Throws TransformError, before the function runs, if a differentiated argument has no tensor or an
// integer one; after it, if the result is not a real floating-point tensor of shape [].

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "autodiff/primals.h"
#include "autodiff/reverse.h"
#include "core/tree.h"

namespace torchlift {
namespace autodiff_internal {

enum class GradResult { kGrad, kValueAndGrad, kGradAndValue };

constexpr const char* grad_name(GradResult result) {
  switch (result) {
    case GradResult::kValueAndGrad:
      return "value_and_grad";
    case GradResult::kGradAndValue:
      return "grad_and_value";
    case GradResult::kGrad:
      break;
  }
  return "grad";
}

// Throws unless the loss is one real number.
void check_loss(const char* transform, const at::Tensor& loss);

// The gradients by the scope's primals.
std::vector<at::Tensor> pull_back_loss(const Pullback& pullback, const at::Tensor& loss);

}  // namespace autodiff_internal

// What grad, value_and_grad and grad_and_value return.
template <class F, autodiff_internal::GradResult kResult, bool kAux, size_t... Argnums>
class GradFunction {
 public:
  explicit GradFunction(F f) : f_(std::move(f)) {}

  template <class... Args>
  auto operator()(const Args&... args) const {
    static_assert(
        ((Argnums < sizeof...(Args)) && ...),
        "torchlift::grad: the function is called with fewer arguments than the number of the "
        "one to differentiate (they count from 0).");
    static_assert(
        std::is_invocable_v<const F&, const std::decay_t<const Args&>&...>,
        "torchlift::grad: the function cannot be called with these arguments. They are handed "
        "to it by const reference (take them by value or by const reference), and a lambda "
        "must not be mutable.");
    return call(std::tuple<std::decay_t<const Args&>...>(args...));
  }

 private:
  static constexpr const char* kName = autodiff_internal::grad_name(kResult);

  template <class Tuple>
  auto call(Tuple arguments) const {
    ReverseScope scope;
    autodiff_internal::bind_primals<Argnums...>(kName, scope, arguments);
    auto output = std::apply(f_, std::as_const(arguments));
    using Output = decltype(output);
    if constexpr (kAux) {
      static_assert(autodiff_internal::IsPair<Output>::value,
                    "torchlift::grad: with kHasAux the function must return std::pair{loss, aux}.");
      autodiff_internal::check_loss(kName, output.first);
      std::vector<at::Tensor> outputs = tree_flatten(output);
      const Pullback pullback = scope.finish(outputs);
      auto seen = tree_unflatten(std::move(output), pullback.outputs());
      return result(gradients(pullback, outputs[0], std::move(arguments)), std::move(seen));
    } else {
      static_assert(
          std::is_same_v<Output, at::Tensor>,
          "torchlift::grad: the function must return one tensor, the loss. If it returns more, "
          "let it return std::pair{loss, the rest} and pass kHasAux; for other results use vjp.");
      autodiff_internal::check_loss(kName, output);
      const Pullback pullback = scope.finish({output});
      return result(gradients(pullback, output, std::move(arguments)), pullback.outputs()[0]);
    }
  }

  template <class Tuple>
  static auto gradients(const Pullback& pullback, const at::Tensor& loss, Tuple arguments) {
    return autodiff_internal::place_gradients<Argnums...>(
        std::move(arguments), autodiff_internal::pull_back_loss(pullback, loss));
  }

  // seen: the value, or {value, aux}.
  template <class Gradient, class Seen>
  static auto result(Gradient gradient, Seen seen) {
    using autodiff_internal::GradResult;
    if constexpr (kResult == GradResult::kValueAndGrad) {
      return std::pair(std::move(seen), std::move(gradient));
    } else if constexpr (kResult == GradResult::kGradAndValue) {
      return std::pair(std::move(gradient), std::move(seen));
    } else if constexpr (kAux) {
      return std::pair(std::move(gradient), std::move(seen.second));
    } else {
      return gradient;
    }
  }

  F f_;
};

namespace autodiff_internal {

// grad(f) means grad<0>(f).
template <GradResult kResult, bool kAux, size_t... Argnums, class F>
auto make_grad(F&& f) {
  static_assert(all_different<Argnums...>(), "torchlift::grad: an argument is named twice.");
  if constexpr (sizeof...(Argnums) == 0) {
    return GradFunction<std::decay_t<F>, kResult, kAux, 0>(std::forward<F>(f));
  } else {
    return GradFunction<std::decay_t<F>, kResult, kAux, Argnums...>(std::forward<F>(f));
  }
}

}  // namespace autodiff_internal

// The gradient of f, by its first argument or by those named: grad<0, 2>(f). See the top of this
// file.
template <size_t... Argnums, class F>
auto grad(F&& f) {
  return autodiff_internal::make_grad<autodiff_internal::GradResult::kGrad, false, Argnums...>(
      std::forward<F>(f));
}

// ... of an f that returns std::pair{loss, aux}: {gradient, aux}.
template <size_t... Argnums, class F>
auto grad(F&& f, HasAux) {
  return autodiff_internal::make_grad<autodiff_internal::GradResult::kGrad, true, Argnums...>(
      std::forward<F>(f));
}

// {value, gradient}.
template <size_t... Argnums, class F>
auto value_and_grad(F&& f) {
  return autodiff_internal::make_grad<autodiff_internal::GradResult::kValueAndGrad, false,
                                      Argnums...>(std::forward<F>(f));
}

// {{value, aux}, gradient}.
template <size_t... Argnums, class F>
auto value_and_grad(F&& f, HasAux) {
  return autodiff_internal::make_grad<autodiff_internal::GradResult::kValueAndGrad, true,
                                      Argnums...>(std::forward<F>(f));
}

// {gradient, value}: functorch's order.
template <size_t... Argnums, class F>
auto grad_and_value(F&& f) {
  return autodiff_internal::make_grad<autodiff_internal::GradResult::kGradAndValue, false,
                                      Argnums...>(std::forward<F>(f));
}

// {gradient, {value, aux}}.
template <size_t... Argnums, class F>
auto grad_and_value(F&& f, HasAux) {
  return autodiff_internal::make_grad<autodiff_internal::GradResult::kGradAndValue, true,
                                      Argnums...>(std::forward<F>(f));
}

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_GRAD_H_
