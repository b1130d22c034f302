// istft and cov, which look at the numbers of an argument before they go on. Where there are no
// examples, there are no numbers to look at; ones stand in. In a trace the answers of the run are
// assumed (NOTE [assumed answers] in batching/rules/numbers.h).

#include <ATen/core/Tensor.h>
#include <ATen/ops/cov_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/cov_ops.h>
#include <ATen/ops/istft_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/istft_ops.h>
#include <ATen/ops/ones.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "batching/rules/numbers.h"
#include "core/lifted_tensor.h"
#include "core/registry.h"
#include "core/tensor_operators.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

bool is_of_none(const OptionalTensor& t) {
  if (!t.has_value() || !t->defined()) return false;
  for (const LiftedTensorImpl* impl = as_lifted(*t); impl != nullptr;
       impl = as_lifted(impl->value())) {
    if (impl->bdim() && impl->value().size(*impl->bdim()) == 0) return true;
  }
  return false;
}

OptionalTensor checkable(const OptionalTensor& t) {
  return is_of_none(t) ? at::ones(t->sizes(), t->options()) : t;
}

bool is_recorded(const OptionalTensor& t) {
  return t.has_value() && t->defined() && recorded_by(*t) != nullptr;
}

// The result with the batch dims, and in the graph, of an argument that ones stood in for.
Tensor depending_on(const Tensor& result, const OptionalTensor& t) {
  return is_of_none(t) ? result + (t->sum() * 0).to(result.scalar_type()) : result;
}

Tensor istft(const Tensor& self, int64_t n_fft, std::optional<int64_t> hop_length,
             std::optional<int64_t> win_length, const OptionalTensor& window, bool center,
             bool normalized, std::optional<bool> onesided, std::optional<int64_t> length,
             bool return_complex) {
  const AssumedAnswers answers(
      "istft: the windows add up to a number below 1e-11 somewhere, by which it would divide.",
      {false}, AssumedAnswers::Others::kErrors);
  const Tensor result =
      at::compositeimplicitautograd::istft(self, n_fft, hop_length, win_length, checkable(window),
                                           center, normalized, onesided, length, return_complex);
  return depending_on(result, window);
}

Tensor cov(const Tensor& self, int64_t correction, const OptionalTensor& fweights,
           const OptionalTensor& aweights) {
  // Of negative weights, of a sum of zero, and of a normalization that is not above zero, which
  // changes the formula.
  std::vector<bool> expected;
  if (is_recorded(fweights)) expected.push_back(true);
  if (is_recorded(aweights)) expected.push_back(true);
  if (!expected.empty()) expected.push_back(true);
  const AssumedAnswers answers(
      "cov: the weights are of another kind than those that the function was traced with: they are "
      "negative, or their sum is zero, or the degrees of freedom are, or are not, above zero.",
      std::move(expected));
  const Tensor result = at::compositeimplicitautograd::cov(self, correction, checkable(fweights),
                                                           checkable(aweights));
  return depending_on(depending_on(result, fweights), aweights);
}

[[maybe_unused]] const RuleSet kRules{
    composite<ops::istft, &istft>(),
    composite<ops::cov, &cov>(),
};

}  // namespace
}  // namespace torchlift
