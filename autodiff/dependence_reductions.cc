// Operators along dims: sums, softmax, cumulative sums, sorting.

#include <ATen/ops/cumsum.h>

#include <numeric>

#include "autodiff/dependence_rules.h"

namespace torchlift {
namespace {

using at::Tensor;

std::vector<int64_t> all_dims(int64_t rank) {
  std::vector<int64_t> dims(rank);
  std::iota(dims.begin(), dims.end(), 0);
  return dims;
}

// The dims that an operator works along: all if it names none.
std::vector<int64_t> dims_of(const DependenceCall& call, int64_t rank) {
  const c10::IValue* dim = call.find("dim");
  if (dim == nullptr) return all_dims(rank);
  if (dim->isInt()) return {dim->toInt()};
  const std::vector<int64_t> dims = dim->toIntVector();
  return dims.empty() ? all_dims(rank) : dims;
}

// The tensor that is reduced.
Tensor reduced_tensor(const DependenceCall& call) {
  const Tensor self = call.tensor("self");
  return self.defined() ? self : call.tensor("input");
}

// Any along dims, as the results of a reduction are: with or without dims of size 1.
Tensor reduced(const DependenceCall& call, const Tensor& like, size_t /*result*/) {
  const Tensor self = reduced_tensor(call);
  const Tensor mask = call.mask(self);
  if (!mask.defined()) return {};
  const Tensor any = any_along(mask, dims_of(call, self.dim()));
  std::vector<int64_t> sizes{call.inputs()};
  sizes.insert(sizes.end(), like.sizes().begin(), like.sizes().end());
  return any.reshape(sizes);
}

// The same along dim 0 or -1 where no dim is named, as for kthvalue and mode.
Tensor reduced_last(const DependenceCall& call, const Tensor& like, size_t /*result*/) {
  const Tensor self = reduced_tensor(call);
  const Tensor any = any_along(call.mask(self), {call.integer("dim", -1)});
  std::vector<int64_t> sizes{call.inputs()};
  sizes.insert(sizes.end(), like.sizes().begin(), like.sizes().end());
  return any.reshape(sizes);
}

// Each element, on all along the dims in any argument.
Tensor along(const DependenceCall& call, const Tensor& like, size_t /*result*/) {
  Tensor all;
  for (const Tensor& t : call.tensors()) {
    const Tensor mask = align(call.mask(t), like.dim());
    if (mask.defined()) all = either(all, any_along(mask, dims_of(call, like.dim())));
  }
  return all;
}

// ... of which there is one, the last by default.
Tensor along_last(const DependenceCall& call, const Tensor& like, size_t /*result*/) {
  Tensor all;
  for (const Tensor& t : call.tensors()) {
    all = either(all, any_along(align(call.mask(t), like.dim()), {call.integer("dim", -1)}));
  }
  return all;
}

// Each element, on those before it and itself.
Tensor cumulative(const DependenceCall& call, const Tensor& like, size_t /*result*/) {
  const Tensor mask = call.mask("self");
  if (!mask.defined() || like.dim() == 0) return mask;
  int64_t dim = call.integer("dim", -1);
  if (dim < 0) dim += like.dim();
  return at::cumsum(mask, dim + 1, at::kInt).ne(0);
}

// One number, or with reduction="none" one for each element.
Tensor loss(const DependenceCall& call, const Tensor& like, size_t result) {
  const bool each = call.integer("reduction", 1) == 0;
  return each ? any_of_all(call, like, result) : dense(call, like, result);
}

}  // namespace

const DependenceRows& reduction_dependence() {
  using Kind = DependenceKind;
  static const auto* rows = [] {
    auto* all = new DependenceRows{
        {"cumsum", Kind::kRule, &cumulative},
        {"cumprod", Kind::kRule, &cumulative},
        {"_logcumsumexp", Kind::kRule, &cumulative},
        {"logcumsumexp", Kind::kRule, &cumulative},
        {"cummax", Kind::kRule, &cumulative},
        {"cummin", Kind::kRule, &cumulative},
        {"dist", Kind::kRule, &dense},
        {"max.other", Kind::kRule, &any_of_all},
        {"min.other", Kind::kRule, &any_of_all},
    };
    for (const char* name : {"sum",
                             "nansum",
                             "mean",
                             "nanmean",
                             "prod",
                             "amax",
                             "amin",
                             "max",
                             "min",
                             "aminmax",
                             "logsumexp",
                             "var",
                             "std",
                             "var_mean",
                             "std_mean",
                             "norm",
                             "linalg_vector_norm",
                             "median",
                             "nanmedian",
                             "_aminmax"}) {
      all->push_back({name, Kind::kRule, &reduced});
    }
    for (const char* name : {"kthvalue", "mode"}) {
      all->push_back({name, Kind::kRule, &reduced_last});
    }
    for (const char* name :
         {"_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data",
          "_safe_softmax", "_fft_c2c", "_fft_r2c", "_fft_c2r"}) {
      all->push_back({name, Kind::kRule, &along});
    }
    for (const char* name : {"sort", "topk"}) all->push_back({name, Kind::kRule, &along_last});
    for (const char* name : {"mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy",
                             "soft_margin_loss", "binary_cross_entropy_with_logits"}) {
      all->push_back({name, Kind::kRule, &loss});
    }
    return all;
  }();
  return *rows;
}

}  // namespace torchlift
