#ifndef TORCHLIFT_AUTODIFF_CHECK_GRADS_H_
#define TORCHLIFT_AUTODIFF_CHECK_GRADS_H_

// File: autodiff/check_grads.h
//
// check_grads: compares the derivatives of a function with finite differences, for tests.
//
//   tl::check_grads(f, std::tuple(params, x), {.order = 2});     // throws GradientMismatch
//
// It goes along random directions, so that it costs a few runs of f whatever the number of entries:
// jvp along a random tangent is compared with a central difference; vjp of a random cotangent with
// the same difference, by an inner product (so that vjp is checked to be the transpose of jvp). The
// derivative of order n is checked as the first derivative of that of order n - 1.
//
// Arguments and result are trees (core/tree.h) of tensors; f is to be smooth there, and pure.
// Integer tensors are constants. float64 makes for a sharp test.
//
// Throws GradientMismatch, which names the derivative and tells the two values; TransformError if
// there is nothing to check. As jax.test_util.check_grads.

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <tuple>
#include <vector>

#include "core/tree.h"

namespace torchlift {

// Derivatives that differ from finite differences.
class GradientMismatch : public c10::Error {
  using Error::Error;
};

enum class CheckModes : uint8_t { kForward, kReverse, kBoth };

struct CheckGradsOptions {
  int order = 1;
  CheckModes modes = CheckModes::kBoth;
  // The step and the tolerances, which count from the largest entry, if that is over 1; by dtype if
  // left out.
  std::optional<double> step = std::nullopt;
  std::optional<double> atol = std::nullopt;
  std::optional<double> rtol = std::nullopt;
  uint64_t seed = 0;  // of the directions
};

namespace check_grads_internal {

using Leaves = std::vector<at::Tensor>;

void check(const std::function<Leaves(const Leaves&)>& f, const Leaves& leaves,
           const CheckGradsOptions& options);

}  // namespace check_grads_internal

// See the top of this file.
template <class F, class... Args>
void check_grads(const F& f, const std::tuple<Args...>& arguments, CheckGradsOptions options = {}) {
  check_grads_internal::check(
      [&](const check_grads_internal::Leaves& leaves) {
        return tree_flatten(std::apply(f, tree_unflatten(arguments, leaves)));
      },
      tree_flatten(arguments), options);
}

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_CHECK_GRADS_H_
