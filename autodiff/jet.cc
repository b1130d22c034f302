#include "autodiff/jet.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "core/error.h"

namespace torchlift::autodiff_internal {
namespace {

std::string named(const Path& path) { return "the series of " + path.str(); }

}  // namespace

void throw_series_structure(const std::string& mismatch) {
  transform_error("jet",
                  "the series must have the structure of the primals, but do not: ", mismatch,
                  ". Give one tensor of derivatives for each tensor of the primals; an undefined "
                  "one means that the primal is constant.");
}

void throw_no_series() {
  transform_error("jet",
                  "there is no series, so the order is not known. Give the derivatives of at least "
                  "one primal, as a tensor of shape [order, ...the primal's shape].");
}

void SeriesChecker::check(const Path& path, const at::Tensor& primal, const at::Tensor& series) {
  if (!primal.defined()) {
    transform_error("jet", named(path), " has shape ", series.sizes(),
                    ", but the primal is an undefined tensor. Leave the series undefined too.");
  }
  if (series.dim() != primal.dim() + 1 || series.sizes().slice(1) != primal.sizes()) {
    transform_error("jet", named(path), " has shape ", series.sizes(),
                    ", but the primal has shape ", primal.sizes(),
                    ". Stack the derivatives of order 1, 2, ..., K in a new first dim: [K, "
                    "...the primal's shape].");
  }
  if (series.scalar_type() != primal.scalar_type()) {
    transform_error("jet", named(path), " has dtype ", series.scalar_type(),
                    ", but the primal has dtype ", primal.scalar_type(),
                    ". Convert it, as in series.to(primal.scalar_type()).");
  }
  if (series.device() != primal.device()) {
    transform_error("jet", named(path), " is on ", series.device(), ", but the primal is on ",
                    primal.device(), ". Move it, as in series.to(primal.device()).");
  }
  if (order.has_value() && *order != series.size(0)) {
    transform_error("jet", named(path), " has ", series.size(0), " derivatives, but ", where,
                    " has ", *order,
                    ". All series must have the same order: pad the shorter one with zeros.");
  }
  if (!order.has_value()) {
    order = series.size(0);
    where = named(path);
  }
}

JetResult finish_jet(JetScope& scope, int64_t order, const std::vector<at::Tensor>& outputs,
                     size_t count) {
  JetResult result;
  bool any = false;
  for (JetOutput& output : scope.finish(outputs)) {
    result.primals.push_back(std::move(output.primal));
    if (result.series.size() == count) continue;
    const at::Tensor& value = result.primals.back();
    any = any || value.defined();
    if (value.defined() && !output.series.defined()) {
      const c10::NoGradGuard no_grad;
      std::vector<int64_t> sizes = value.sizes().vec();
      sizes.insert(sizes.begin(), order);
      output.series = at::zeros(sizes, value.options());
    }
    result.series.push_back(std::move(output.series));
  }
  if (!any) {
    transform_error("jet",
                    "the function returned no tensor, so there is nothing to expand. Return a "
                    "tensor, or a tree with at least one.");
  }
  return result;
}

}  // namespace torchlift::autodiff_internal
