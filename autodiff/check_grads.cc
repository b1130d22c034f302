#include "autodiff/check_grads.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/real.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <string>

#include "autodiff/jvp.h"
#include "autodiff/vjp.h"
#include "core/error.h"
#include "core/tensor_operators.h"

namespace torchlift::check_grads_internal {
namespace {

using at::Tensor;
using Function = std::function<Leaves(const Leaves&)>;

constexpr const char* kTransform = "check_grads";

bool has_derivative(const Tensor& t) {
  return t.defined() && (t.is_floating_point() || t.is_complex());
}

Leaves differentiable(const Leaves& leaves) {
  Leaves found;
  for (const Tensor& t : leaves) {
    if (has_derivative(t)) found.push_back(t);
  }
  return found;
}

struct Tolerances {
  double step;
  double atol;
  double rtol;
};

Tolerances tolerances_for(const Leaves& leaves, const CheckGradsOptions& options) {
  const bool sharp = std::all_of(leaves.begin(), leaves.end(), [](const Tensor& t) {
    return t.scalar_type() == at::kDouble || t.scalar_type() == at::kComplexDouble;
  });
  return {options.step.value_or(sharp ? 1e-6 : 1e-2), options.atol.value_or(sharp ? 1e-6 : 2e-2),
          options.rtol.value_or(sharp ? 1e-5 : 2e-2)};
}

Leaves random_like(const Leaves& leaves, at::Generator& generator) {
  Leaves found;
  for (const Tensor& t : leaves) {
    const Tensor drawn = at::randn(t.sizes(), generator, at::TensorOptions(t.scalar_type()));
    found.push_back(drawn.to(t.device()));
  }
  return found;
}

// x + step * t of each.
Leaves moved(const Leaves& xs, const Leaves& ts, double step) {
  Leaves found;
  for (size_t i = 0; i < xs.size(); ++i) found.push_back(xs[i] + ts[i] * step);
  return found;
}

Tensor inner(const Leaves& a, const Leaves& b) {
  Tensor sum = at::scalar_tensor(0.0, at::kDouble);
  for (size_t i = 0; i < a.size(); ++i) {
    const Tensor product = b[i].is_complex() ? a[i] * b[i].conj() : a[i] * b[i];
    const Tensor total = product.sum();
    sum = sum + (total.is_complex() ? at::real(total) : total).to(at::kCPU, at::kDouble);
  }
  return sum;
}

double largest(const Tensor& t) { return t.numel() == 0 ? 0.0 : t.abs().max().item().toDouble(); }

void compare(const std::string& what, const Tensor& got, const Tensor& wanted,
             const Tolerances& tolerances) {
  const double scale = std::max(largest(wanted), 1.0);
  const double error = largest(got.detach() - wanted);
  const double tolerance = tolerances.atol + tolerances.rtol * scale;
  if (error <= tolerance) return;
  throw GradientMismatch(
      c10::str("[", kTransform, "] the ", what, " differs from finite differences by ", error,
               " (tolerance ", tolerance, "): got ", got.detach(), ", expected ", wanted,
               ". Either the derivative is wrong, or the function is not smooth there."),
      /*backtrace=*/nullptr);
}

class Checker {
 public:
  Checker(Tolerances tolerances, CheckGradsOptions options)
      : tolerances_(tolerances),
        options_(options),
        generator_(at::detail::createCPUGenerator(options.seed)) {}

  void check(const Function& f, const Leaves& xs, int order, const std::string& name) {
    const Leaves tangents = random_like(xs, generator_);
    const Leaves expected = difference(f, xs, tangents);
    if (expected.empty()) {
      transform_error(kTransform,
                      "the function returns no tensor of a floating-point or complex "
                      "dtype, so there is nothing to check.");
    }
    if (options_.modes != CheckModes::kReverse) {
      const Leaves pushed = jvp(f, xs, tangents).second;
      for (size_t i = 0; i < pushed.size(); ++i) {
        compare(c10::str("jvp of output ", i, " of ", name), pushed[i], expected[i], tolerances_);
      }
      if (order > 1) {
        const auto derivative = [&](const Leaves& at) { return jvp(f, at, tangents).second; };
        check(derivative, xs, order - 1, "the jvp of " + name);
      }
    }
    if (options_.modes == CheckModes::kForward) return;
    const Leaves cotangents = random_like(expected, generator_);
    compare("vjp (in an inner product with a tangent) of " + name,
            inner(vjp(f, xs).second(cotangents), tangents), inner(expected, cotangents),
            tolerances_);
    if (order > 1) {
      const auto derivative = [&](const Leaves& at) { return vjp(f, at).second(cotangents); };
      check(derivative, xs, order - 1, "the vjp of " + name);
    }
  }

 private:
  Leaves difference(const Function& f, const Leaves& xs, const Leaves& tangents) const {
    const c10::NoGradGuard no_grad;
    const Leaves high = f(moved(xs, tangents, tolerances_.step));
    const Leaves low = f(moved(xs, tangents, -tolerances_.step));
    Leaves found;
    for (size_t i = 0; i < high.size(); ++i) {
      found.push_back((high[i] - low[i]) / (2 * tolerances_.step));
    }
    return found;
  }

  const Tolerances tolerances_;
  const CheckGradsOptions options_;
  at::Generator generator_;
};

}  // namespace

void check(const Function& f, const Leaves& leaves, const CheckGradsOptions& options) {
  if (options.order < 1) {
    transform_error(kTransform, "order is ", options.order,
                    ", but it is the highest derivative to check. Give 1 or more.");
  }
  Leaves xs;
  for (const Tensor& t : differentiable(leaves)) xs.push_back(t.detach());
  if (xs.empty()) {
    transform_error(
        kTransform,
        "there is no tensor of a floating-point or complex dtype among the arguments, so "
        "there is nothing to check.");
  }
  const auto of_differentiable = [&](const Leaves& given) {
    Leaves all = leaves;
    size_t next = 0;
    for (Tensor& t : all) {
      if (has_derivative(t)) t = given[next++];
    }
    return differentiable(f(all));
  };
  Checker(tolerances_for(xs, options), options)
      .check(of_differentiable, xs, options.order, "the function");
}

}  // namespace torchlift::check_grads_internal
