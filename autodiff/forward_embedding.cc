// Forward mode of embedding_bag, and of random numbers around a tensor of means.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_embedding_bag_forward_only_ops.h>
#include <ATen/ops/_embedding_bag_ops.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/normal_ops.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <optional>
#include <tuple>
#include <vector>

#include "autodiff/forward_kernels.h"
#include "autodiff/forward_pass.h"
#include "core/tensor_operators.h"

namespace torchlift::forward_internal {
namespace {

namespace ops = at::_ops;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// libtorch's numbers for what becomes of the rows of a bag.
constexpr int64_t kMean = 1, kMax = 2;

// The rows of each bag, weighted and added up: BD. `factor` has one number for each index.
Tensor sum_of_bags(const Tensor& weight, const Tensor& indices, const Tensor& bags, int64_t count,
                   const Tensor& factor) {
  const Tensor rows = weight.index_select(0, indices) * factor.unsqueeze(1);
  return at::zeros({count, weight.size(1)}, weight.options()).index_add(0, bags, rows);
}

using BagResults = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// VD, indices I, offsets B -> BD, and what the operator keeps for its backward.
template <class Op>
BagResults embedding_bag(const Tensor& weight, const Tensor& indices, const Tensor& offsets,
                         bool scale_grad_by_freq, int64_t mode, bool sparse,
                         const OptionalTensor& per_sample_weights, bool include_last_offset,
                         int64_t padding_idx) {
  const bool weighted = per_sample_weights.has_value() && per_sample_weights->defined();
  const OptionalTensor constant_weights =
      weighted ? OptionalTensor(per_sample_weights->detach()) : std::nullopt;
  BagResults results = Op::call(weight.detach(), indices, offsets, scale_grad_by_freq, mode, sparse,
                                constant_weights, include_last_offset, padding_idx);
  const int64_t count = std::get<0>(results).size(0);
  const Tensor starts = offsets.narrow(0, 0, count);
  const Tensor places = at::arange(indices.numel(), starts.options());
  const Tensor bags = at::searchsorted(starts, places, /*out_int32=*/false, /*right=*/true) - 1;
  const Tensor counted = indices.ne(padding_idx).to(weight.scalar_type());
  const Tensor sizes = at::zeros({count}, weight.options()).index_add(0, bags, counted);
  Tensor& output = std::get<0>(results);
  if (mode == kMax) {
    const Tensor chosen = std::get<3>(results).to(at::kLong).clamp_min(0);
    output = weight.gather(0, chosen) * (sizes > 0).to(weight.scalar_type()).unsqueeze(1);
    return results;
  }
  output =
      sum_of_bags(weight, indices, bags, count, weighted ? *per_sample_weights * counted : counted);
  if (mode == kMean) output = output / sizes.clamp_min(1).unsqueeze(1);
  return results;
}

// Random numbers are constants to libtorch, whatever they are spread around.
Tensor normal_mean(const Tensor& mean, double std, std::optional<at::Generator> generator) {
  return ops::normal_Tensor_float::call(mean._fw_primal(/*level=*/0), std, generator);
}

Tensor normal_std(double mean, const Tensor& std, std::optional<at::Generator> generator) {
  return ops::normal_float_Tensor::call(mean, std._fw_primal(/*level=*/0), generator);
}

Tensor normal_both(const Tensor& mean, const Tensor& std, std::optional<at::Generator> generator) {
  return ops::normal_Tensor_Tensor::call(mean._fw_primal(/*level=*/0), std._fw_primal(/*level=*/0),
                                         generator);
}

}  // namespace

std::vector<ForwardKernel> embedding_formulas() {
  using Bag = ops::_embedding_bag;
  using BagForward = ops::_embedding_bag_forward_only;
  std::vector<ForwardKernel> kernels;
  kernels.push_back(made<Bag, &embedding_bag<Bag>>());
  kernels.push_back(made<BagForward, &embedding_bag<BagForward>>());
  kernels.push_back(made<ops::normal_Tensor_float, &normal_mean>());
  kernels.push_back(made<ops::normal_float_Tensor, &normal_std>());
  kernels.push_back(made<ops::normal_Tensor_Tensor, &normal_both>());
  return kernels;
}

}  // namespace torchlift::forward_internal
