#include "autodiff/jet_scope.h"

#include <ATen/ops/add.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/ScalarType.h>
#include <c10/util/SmallVector.h>

#include <cmath>
#include <utility>

#include "autodiff/jet_interpreter.h"
#include "autodiff/jet_series.h"
#include "core/lifted_tensor.h"
#include "core/runtime.h"

namespace torchlift {
namespace {

// 1!, 2!, ..., or their reciprocals, as [order, 1, 1...] to multiply derivatives `like` with.
at::Tensor factorials(const at::Tensor& like, bool reciprocal) {
  std::vector<double> factors;
  for (int64_t j = 1; j <= like.size(0); ++j) {
    const double factorial = std::tgamma(static_cast<double>(j) + 1);
    factors.push_back(reciprocal ? 1 / factorial : factorial);
  }
  c10::SmallVector<int64_t, 8> sizes(static_cast<size_t>(like.dim()), 1);
  sizes[0] = like.size(0);
  const auto type = c10::toRealValueType(like.scalar_type());
  return at::tensor(factors, at::TensorOptions().dtype(at::kDouble))
      .to(like.options().dtype(type))
      .view(sizes);
}

// t without its graph in its domain.
at::Tensor without_graph(const at::Tensor& t) {
  if (!t.defined() || !t.requires_grad()) return t;
  const LiftedTensorImpl* impl = as_lifted(t);
  return impl == nullptr ? t.detach() : lift_alias(impl->value(), impl->bdim(), impl->level_ptr());
}

}  // namespace

// NOTE [no_grad and jets]
// no_grad in f means a constant, as it does to forward mode: the interpreter sees it by GradMode.
// A level that overrode GradMode for its outer domains would hide that, so where jet is called
// under no_grad its results are disconnected at the end.
JetScope::JetScope(int64_t order) : JetScope(kNone, order + 1, jet_internal::jet_interpreter()) {}

JetScope::JetScope(Seconds seconds, int64_t directions)
    : JetScope(seconds, 1 + directions + (seconds == kLaplacian ? 1 : directions * directions),
               seconds == kLaplacian ? jet_internal::laplacian_interpreter()
                                     : jet_internal::hessian_interpreter()) {}

JetScope::JetScope(Seconds seconds, int64_t parts, std::shared_ptr<const Interpreter> interpreter)
    : seconds_(seconds), outer_grad_(c10::GradMode::is_enabled()) {
  initialize_runtime();
  check_no_torch_func(interpreter->transform());
  level_scope_.emplace(Level::Options{
      .kind = LevelKind::kInterpreted, .size = parts, .interpreter = std::move(interpreter)});
  grad_guard_.emplace(true);
  mode_.emplace();
}

JetScope::~JetScope() {
  mode_.reset();
  grad_guard_.reset();
}

at::Tensor JetScope::series(const at::Tensor& x, const at::Tensor& derivatives) const {
  check_alive(x);
  check_alive(derivatives);
  const RuleDepthScope on_values(level_scope_->level()->depth());
  const at::Tensor value = outer_grad_ ? x : without_graph(x);
  const at::Tensor rest = outer_grad_ ? derivatives : without_graph(derivatives);
  if (seconds_ != kNone) {
    std::vector<int64_t> sizes = rest.sizes().vec();
    sizes[0] = level_scope_->level()->size() - 1 - rest.size(0);
    const at::Tensor seconds = at::zeros(sizes, rest.options());
    return lift(at::cat({value.unsqueeze(0), rest, seconds}), 0, level_scope_->level());
  }
  const at::Tensor scaled = at::mul(rest, factorials(rest, /*reciprocal=*/true));
  return lift(at::cat({value.unsqueeze(0), scaled}), 0, level_scope_->level());
}

at::Tensor JetScope::constant(const at::Tensor& x) const {
  check_alive(x);
  return lift_alias(outer_grad_ ? x : without_graph(x), std::nullopt, level_scope_->level());
}

JetOutput JetScope::lowered(const at::Tensor& output) const {
  if (!output.defined()) return {};
  check_alive(output);
  const RuleDepthScope on_values(level_scope_->level()->depth());
  Lowered all = lower(output, *level_scope_->level());
  if (!all.bdim) return {std::move(all.value), {}};
  if (seconds_ != kNone) {
    const jet_internal::Terms terms(level_scope_->level());
    const at::Tensor parts = jet_internal::stacked(output, *level_scope_->level());
    at::Tensor seconds = terms.second_parts(parts);
    if (seconds_ == kLaplacian) return {parts.select(0, 0), at::mul(seconds.squeeze(0), 2)};
    seconds = seconds.unflatten(0, {terms.directions(), terms.directions()});
    return {parts.select(0, 0), at::add(seconds, seconds.transpose(0, 1))};
  }
  const at::Tensor rest =
      all.value.narrow(*all.bdim, 1, level_scope_->level()->size() - 1).movedim(*all.bdim, 0);
  return {all.value.select(*all.bdim, 0), at::mul(rest, factorials(rest, /*reciprocal=*/false))};
}

std::vector<JetOutput> JetScope::finish(const std::vector<at::Tensor>& outputs) {
  std::vector<JetOutput> results;
  results.reserve(outputs.size());
  for (const at::Tensor& output : outputs) results.push_back(lowered(output));
  mode_.reset();
  grad_guard_.reset();
  level_scope_.reset();  // What is made from now on is none of the level's.
  if (!outer_grad_) {
    for (JetOutput& result : results) {
      result.primal = without_graph(result.primal);
      result.series = without_graph(result.series);
    }
  }
  return results;
}

}  // namespace torchlift
