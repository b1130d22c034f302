#include "batching/rules/linear_cross_entropy.h"

#include <ATen/core/Reduction.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>

#include "core/registry.h"

namespace torchlift {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

OptionalTensor to(const OptionalTensor& t, at::ScalarType dtype) {
  return t.has_value() && t->defined() ? OptionalTensor(t->to(dtype)) : t;
}

// The logits are of the dtype that the options accumulate in: float for half precision on CPU.
Tensor cross_entropy(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                     const OptionalTensor& linear_bias, const OptionalTensor& weight,
                     int64_t reduction, const c10::SymInt& ignore_index, double label_smoothing,
                     at::ScalarType accumulated) {
  const at::ScalarType dtype = c10::promoteTypes(input.scalar_type(), accumulated);
  const Tensor logits =
      at::linear(input.to(dtype), linear_weight.to(dtype), to(linear_bias, dtype));
  const bool classes = !target.is_floating_point();
  return at::cross_entropy_loss(logits, classes ? target : target.to(dtype), to(weight, dtype),
                                reduction, ignore_index.expect_int(), label_smoothing)
      .to(input.scalar_type());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> LinearCrossEntropy::decomposed(
    const Tensor& input, const Tensor& linear_weight, const Tensor& target,
    const OptionalTensor& linear_bias, const OptionalTensor& weight, std::string_view reduction,
    c10::SymInt ignore_index, double label_smoothing, c10::SymInt /*batch_chunk_size*/,
    std::string_view /*acc_policy*/, at::ScalarType acc_dtype, bool /*allow_retain_graph*/,
    bool /*compute_input_grad*/, bool /*compute_linear_weight_grad*/,
    bool /*compute_linear_bias_grad*/) {
  TORCH_CHECK(reduction == "mean" || reduction == "sum",
              "linear_cross_entropy: expected reduction \"mean\" or \"sum\", got \"", reduction,
              "\"");
  const int64_t how = reduction == "mean" ? at::Reduction::Mean : at::Reduction::Sum;
  const Tensor none = at::empty({0}, input.options());
  return {cross_entropy(input, linear_weight, target, linear_bias, weight, how, ignore_index,
                        label_smoothing, acc_dtype),
          none, none, none};
}

Tensor LinearCrossEntropyRows::decomposed(const Tensor& input, const Tensor& linear_weight,
                                          const Tensor& target, const OptionalTensor& linear_bias,
                                          const OptionalTensor& weight, c10::SymInt ignore_index,
                                          c10::SymInt /*batch_chunk_size*/,
                                          std::string_view /*acc_policy*/,
                                          at::ScalarType acc_dtype) {
  return cross_entropy(input, linear_weight, target, linear_bias, weight, at::Reduction::None,
                       ignore_index, /*label_smoothing=*/0, acc_dtype);
}

namespace {

[[maybe_unused]] const RuleSet kRules{
    composite<LinearCrossEntropy, &LinearCrossEntropy::decomposed>(),
    composite<LinearCrossEntropyRows, &LinearCrossEntropyRows::decomposed>(),
};

}  // namespace
}  // namespace torchlift
