#include "autodiff/jet_series.h"

#include <ATen/ops/add.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/div.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/neg.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <functional>
#include <initializer_list>
#include <utility>

#include "autodiff/jet_interpreter.h"
#include "core/lifted_tensor.h"

namespace torchlift::jet_internal {

bool is_series(const at::Tensor& t, const Level& level) {
  const LiftedTensorImpl* impl = t.defined() ? as_lifted(t) : nullptr;
  return impl != nullptr && &impl->level() == &level && impl->bdim().has_value();
}

at::Tensor stacked(const at::Tensor& t, const Level& level) {
  const Lowered lowered = lower(t, level);
  return *lowered.bdim == 0 ? lowered.value : lowered.value.movedim(*lowered.bdim, 0);
}

at::Tensor to_series(at::Tensor coefficients, const LevelPtr& level) {
  return lift(std::move(coefficients), 0, level);
}

at::Tensor primal(const at::Tensor& t, const LevelPtr& level) {
  if (!is_series(t, *level)) return t;
  const Lowered lowered = lower(t, *level);
  return lift(lowered.value.select(*lowered.bdim, 0), std::nullopt, level);
}

at::Tensor untracked(const at::Tensor& t, const LevelPtr& level) {
  const LiftedTensorImpl* impl = t.defined() ? as_lifted(t) : nullptr;
  if (impl == nullptr || &impl->level() != level.get()) return t;
  Lowered lowered = lower(t, *level);
  return lift(std::move(lowered.value), lowered.bdim, level);
}

at::Tensor spread_value(const at::Tensor& value, int64_t size) {
  const RuleDepthScope nobodys(
      1);  // The zeros are part of the value, and none of a user's tensors.
  c10::SmallVector<int64_t, 8> sizes{size - 1};
  sizes.append(value.sizes().begin(), value.sizes().end());
  return at::cat({value.unsqueeze(0), at::zeros(sizes, value.options())});
}

at::Tensor with_rank(const at::Tensor& t, int64_t rank) {
  if (t.dim() > rank) return t;
  c10::SmallVector<int64_t, 8> sizes(static_cast<size_t>(rank + 1), 1);
  sizes[0] = t.size(0);
  std::copy(t.sizes().begin() + 1, t.sizes().end(), sizes.end() - (t.dim() - 1));
  return t.reshape(sizes);
}

SeriesKind series_kind(const Level& level) {
  if (level.interpreter() == laplacian_interpreter().get()) return SeriesKind::kSummed;
  if (level.interpreter() == hessian_interpreter().get()) return SeriesKind::kPaired;
  return SeriesKind::kTaylor;
}

int64_t Terms::directions() const {
  if (kind == SeriesKind::kSummed) return level->size() - 2;
  int64_t count = 0;  // The size is 1 + D + D^2.
  while (1 + count + count * count < level->size()) ++count;
  return count;
}

at::Tensor Terms::first_parts(const at::Tensor& parts) const {
  return parts.slice(0, 1, directions() + 1);  // narrow does more
}

at::Tensor Terms::second_parts(const at::Tensor& parts) const {
  return parts.slice(0, directions() + 1);
}

at::Tensor Terms::cross(const at::Tensor& a, const at::Tensor& b) const {
  if (kind == SeriesKind::kSummed) return at::mul(a, b).sum(0, /*keepdim=*/true);
  return at::mul(a.unsqueeze(1), b.unsqueeze(0)).flatten(0, 1);
}

Coefficients Terms::of(const at::Tensor& t, int64_t rank) const {
  if (!is_series(t, *level)) return {lower(t, *level).value};
  const at::Tensor all = stacked(t, *level);
  if (!many_directions()) return all.unbind(0);
  return {all.select(0, 0), with_rank(first_parts(all), rank), with_rank(second_parts(all), rank)};
}

at::Tensor Terms::value(const at::Tensor& t) const {
  const Lowered lowered = lower(t, *level);
  return lowered.bdim ? lowered.value.select(*lowered.bdim, 0) : lowered.value;
}

at::Tensor Terms::series(const Coefficients& coefficients) const {
  Coefficients all = coefficients;
  all.resize(static_cast<size_t>(size()));
  for (at::Tensor& each : all) {
    if (!each.defined()) each = at::zeros_like(all[0]);
  }
  if (!many_directions()) return to_series(at::stack(all), level);
  const auto repeated = [&](const at::Tensor& t, int64_t count) {
    c10::SmallVector<int64_t, 8> sizes{count};
    sizes.append(all[0].sizes().begin(), all[0].sizes().end());
    return t.expand(sizes);
  };
  return to_series(
      at::cat({all[0].unsqueeze(0), repeated(all[1], directions()), repeated(all[2], seconds())}),
      level);
}

Terms terms_of(std::initializer_list<std::reference_wrapper<const at::Tensor>> tensors) {
  LiftedTensorImpl* found = nullptr;
  for (const at::Tensor& t : tensors) {
    LiftedTensorImpl* impl = t.defined() ? as_lifted(t) : nullptr;
    if (impl == nullptr || !impl->bdim()) continue;
    if (found == nullptr || impl->level().depth() > found->level().depth()) found = impl;
  }
  TORCH_INTERNAL_ASSERT(found != nullptr, "jet: a rule was called without a series");
  return Terms(found->level_ptr());
}

namespace {

const at::Tensor& term(const Coefficients& c, int64_t k) {
  static const auto* none = new at::Tensor();
  return k >= 0 && k < static_cast<int64_t>(c.size()) ? c[k] : *none;
}

}  // namespace

at::Tensor Terms::plus_product(const at::Tensor& sum, const Coefficients& a, int64_t i,
                               const Coefficients& b, int64_t j, double factor) const {
  const at::Tensor &left = term(a, i), &right = term(b, j);
  if (!left.defined() || !right.defined() || factor == 0) return sum;
  const bool crosses = many_directions() && i == 1 && j == 1;
  if (sum.defined() && !crosses) return at::addcmul(sum, left, right, factor);
  const at::Tensor product = crosses ? cross(left, right) : at::mul(left, right);
  if (sum.defined()) return at::add(sum, product, factor);
  return factor == 1 ? product : at::mul(product, factor);
}

at::Tensor Terms::convolve(const Coefficients& a, const Coefficients& b, int64_t k, int64_t first,
                           int64_t last) const {
  at::Tensor sum;
  for (int64_t j = first; j <= last; ++j) sum = plus_product(sum, a, j, b, k - j, 1);
  return sum;
}

Coefficients Terms::divide(const Coefficients& a, const Coefficients& b) const {
  Coefficients quotient;
  for (int64_t k = 0; k < size(); ++k) {
    const at::Tensor known = convolve(b, quotient, k, 1, k);
    at::Tensor rest = term(a, k);
    if (known.defined()) rest = rest.defined() ? at::sub(rest, known) : at::neg(known);
    quotient.push_back(rest.defined() ? at::div(rest, b[0]) : at::Tensor());
  }
  return quotient;
}

at::Tensor Terms::integrated_term(const Coefficients& g, const Coefficients& x, int64_t k) const {
  at::Tensor sum;
  for (int64_t j = 1; j <= k; ++j) {
    sum = plus_product(sum, x, j, g, k - j, static_cast<double>(j) / static_cast<double>(k));
  }
  return sum;
}

Coefficients Terms::integrate(const at::Tensor& y_0, const Coefficients& g, const Coefficients& x,
                              int64_t count) const {
  Coefficients y{y_0};
  for (int64_t k = 1; k < count; ++k) y.push_back(integrated_term(g, x, k));
  return y;
}

at::Tensor Terms::plus_constant(const at::Tensor& series, const at::Tensor& constant) const {
  const at::Tensor all = stacked(series, *level);
  const at::Tensor value = lower(constant, *level).value;
  if (is_lifted(value)) {  // It may differ from example to example where the series does not.
    const at::Tensor first = at::add(all.narrow(0, 0, 1), value);
    return to_series(at::cat({first, all.narrow(0, 1, all.size(0) - 1)}), level);
  }
  all.select(0, 0).add_(value);
  return to_series(all, level);
}

namespace {

// The parts [parts, ...] that a function of each element has by its slope alone.
at::Tensor by_slope(const at::Tensor& parts, const at::Tensor& value, const at::Tensor& slope) {
  at::Tensor result = at::mul(parts, slope);  // of the value, too: one pass
  result.select(0, 0).copy_(value);
  return result;
}

}  // namespace

at::Tensor Terms::pointwise(const at::Tensor& x, const at::Tensor& value, const at::Tensor& slope,
                            const at::Tensor& curvature) const {
  const at::Tensor parts = stacked(x, *level), slopes = first_parts(parts);
  at::Tensor result = by_slope(parts, value, slope);
  second_parts(result).addcmul_(curvature, cross(slopes, slopes), /*value=*/0.5);
  return to_series(std::move(result), level);
}

at::Tensor Terms::pointwise(const at::Tensor& x, const at::Tensor& value, const at::Tensor& slope,
                            double curvature) const {
  const at::Tensor parts = stacked(x, *level), slopes = first_parts(parts);
  at::Tensor result = by_slope(parts, value, slope);
  if (curvature != 0) second_parts(result).add_(cross(slopes, slopes), curvature / 2);
  return to_series(std::move(result), level);
}

}  // namespace torchlift::jet_internal
