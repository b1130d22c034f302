#include "autodiff/linear_solvers.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/linalg_pinv.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/view_as_real.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>

#include "batching/control_flow.h"
#include "core/error.h"
#include "core/tensor_operators.h"

namespace torchlift::linear_solvers_internal {
namespace {

using at::Tensor;

// The distance from 1 to the next number, and the least normal one.
struct Precision {
  double epsilon;
  double tiny;
};

Precision precision_of(at::ScalarType dtype) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "precision_of", [] {
    return Precision{static_cast<double>(std::numeric_limits<scalar_t>::epsilon()),
                     static_cast<double>(std::numeric_limits<scalar_t>::min())};
  });
}

Tensor counter(const Tensor& like) { return at::zeros({}, like.options().dtype(at::kLong)); }

double tolerance(const std::optional<double>& given, at::ScalarType dtype) {
  return given.has_value() ? *given : default_tolerance(dtype);
}

// A matrix whose products are those of a list of tensors.
class Operator {
 public:
  Operator(const Map& product, const Vectors& vectors) : product_(product), vectors_(vectors) {}

  Tensor operator()(const Tensor& x) const {
    const Leaves result = product_(vectors_.split(x));
    vectors_.check("the product", result);
    return vectors_.join(result);
  }

 private:
  const Map& product_;
  const Vectors& vectors_;
};

// One direction more for an orthonormal basis [k, size] of the Krylov space: the column of the
// Hessenberg matrix, and the new vector (zeros if there is none).
std::pair<Tensor, Tensor> arnoldi_step(const Operator& product, const Tensor& basis,
                                       const Precision& precision) {
  Tensor w = product(basis.select(0, basis.size(0) - 1));
  const Tensor scale = w.norm();
  Tensor h = basis.mv(w);
  w = w - basis.t().mv(h);
  const Tensor again = basis.mv(w);  // once more, for the rounding errors of the first time
  w = w - basis.t().mv(again);
  h = h + again;
  Tensor rest = w.norm();
  // What rounding left of nothing is no direction.
  rest = at::where(rest > 10 * precision.epsilon * scale, rest, at::zeros_like(rest));
  const Tensor direction =
      at::where(rest > 0, w / rest.clamp_min(precision.tiny), at::zeros_like(w));
  return {at::cat({h, rest.unsqueeze(0)}), direction};
}

// x, improved by the best vector of the Krylov space of its residual.
Tensor gmres_cycle(const Operator& product, const Tensor& x, const Tensor& residual, int64_t steps,
                   const Precision& precision) {
  const Tensor norm = residual.norm();
  Tensor basis = (residual / norm.clamp_min(precision.tiny)).unsqueeze(0);
  std::vector<Tensor> columns;
  for (int64_t step = 0; step < steps; ++step) {
    const auto [column, direction] = arnoldi_step(product, basis, precision);
    columns.push_back(at::cat({column, at::zeros({steps - 1 - step}, column.options())}));
    basis = at::cat({basis, direction.unsqueeze(0)});
  }
  const Tensor hessenberg = at::stack(columns, 1);  // [steps + 1, steps]
  const Tensor first = at::cat({norm.unsqueeze(0), at::zeros({steps}, norm.options())});
  const Tensor y = at::linalg_pinv(hessenberg).mv(first);
  return x + basis.narrow(0, 0, steps).t().mv(y);
}

}  // namespace

Vectors::Vectors(const char* transform, const Leaves& like) : transform_(transform), like_(like) {
  for (const Tensor& t : like_) {
    if (!t.defined() || !t.is_floating_point()) {
      transform_error(transform, "the unknowns must be real tensors, got ",
                      t.defined() ? toString(t.scalar_type()) : "an undefined one",
                      ". Write complex ones as their real view (at::view_as_real).");
    }
    sizes_.push_back(t.numel());
    size_ += t.numel();
  }
  if (!like_.empty()) dtype_ = like_[0].scalar_type();
}

Tensor Vectors::join(const Leaves& parts) const {
  std::vector<Tensor> flat;
  for (const Tensor& t : parts) flat.push_back(t.reshape({-1}).to(dtype_));
  return at::cat(flat);
}

Leaves Vectors::split(const Tensor& vector) const {
  Leaves parts;
  int64_t start = 0;
  for (size_t i = 0; i < like_.size(); ++i) {
    parts.push_back(
        vector.narrow(0, start, sizes_[i]).reshape(like_[i].sizes()).to(like_[i].scalar_type()));
    start += sizes_[i];
  }
  return parts;
}

void Vectors::check(const char* who, const Leaves& parts) const {
  for (size_t i = 0; i < like_.size(); ++i) {
    if (parts[i].defined() && parts[i].sizes() == like_[i].sizes()) continue;
    if (!parts[i].defined()) {
      transform_error(transform_, who, " is an undefined tensor where the unknown has shape ",
                      like_[i].sizes(), ". Return zeros there.");
    }
    transform_error(transform_, who, " has shape ", parts[i].sizes(),
                    " where the unknown has shape ", like_[i].sizes(),
                    ": the shapes must be the same.");
  }
}

double default_tolerance(at::ScalarType dtype) {
  return std::pow(precision_of(dtype).epsilon, 0.75);
}

Tensor known(const Tensor& converged, const Tensor& x) {
  return at::where(converged, x, at::full_like(x, std::numeric_limits<double>::quiet_NaN()));
}

Leaves gmres(const Map& product, const Leaves& b, const GmresOptions& options) {
  const Vectors vectors("gmres", b);
  if (vectors.size() == 0) return b;
  const Operator matrix(product, vectors);
  const Tensor goal = vectors.join(b);
  const int64_t steps = std::min(options.restart, vectors.size());
  const Precision precision = precision_of(vectors.dtype());
  const Tensor limit = tolerance(options.tol, vectors.dtype()) * goal.norm();

  using Carry = std::tuple<Tensor, Tensor, Tensor>;  // x, residual, restarts
  const auto unsolved = [&](const Carry& carry) {
    const auto& [x, residual, count] = carry;
    return (residual.norm() > limit).logical_and(count < options.max_restarts);
  };
  const auto improve = [&](const Carry& carry) {
    const auto& [x, residual, count] = carry;
    const Tensor better = gmres_cycle(matrix, x, residual, steps, precision);
    return Carry(better, goal - matrix(better), count + 1);
  };
  const auto [x, residual, count] =
      while_loop(unsolved, improve, Carry(at::zeros_like(goal), goal, counter(goal)));
  return vectors.split(known(residual.norm() <= limit, x));
}

Leaves cg(const Map& product, const Leaves& b, const CgOptions& options) {
  const Vectors vectors("cg", b);
  if (vectors.size() == 0) return b;
  const Operator matrix(product, vectors);
  const Tensor goal = vectors.join(b);
  const int64_t most = options.max_steps.value_or(10 * vectors.size());
  const Tensor limit = tolerance(options.tol, vectors.dtype()) * goal.norm();

  using Carry = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // x, residual, direction, steps
  const auto unsolved = [&](const Carry& carry) {
    return (std::get<1>(carry).norm() > limit).logical_and(std::get<3>(carry) < most);
  };
  const auto improve = [&](const Carry& carry) {
    const auto& [x, residual, direction, count] = carry;
    const Tensor pushed = matrix(direction);
    const Tensor square = residual.dot(residual);
    const Tensor step = square / direction.dot(pushed);
    const Tensor left = residual - step * pushed;
    return Carry(x + step * direction, left, left + left.dot(left) / square * direction, count + 1);
  };
  const auto found =
      while_loop(unsolved, improve, Carry(at::zeros_like(goal), goal, goal, counter(goal)));
  const Tensor& x = std::get<0>(found);
  const Tensor residual = goal - matrix(x);  // and not what rounding made of the recurrence
  return vectors.split(known(residual.norm() <= 10 * limit, x));
}

void throw_structure(const char* transform, const std::string& mismatch) {
  transform_error(transform, "the product must have the structure of b, but does not: ", mismatch,
                  ".");
}

}  // namespace torchlift::linear_solvers_internal
