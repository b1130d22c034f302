// Forward mode of reductions into places given by an index, of cumulative products and of
// logcumsumexp: libtorch has no formula, or one that holds for one order, without zeros, or for
// numbers of one size only. Products are made of multiplications, so that zeros are nothing
// special.

#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cumprod_ops.h>
#include <ATen/ops/index_reduce_ops.h>
#include <ATen/ops/logcumsumexp.h>
#include <ATen/ops/logcumsumexp_ops.h>
#include <ATen/ops/real.h>
#include <ATen/ops/scatter_reduce_ops.h>
#include <ATen/ops/segment_reduce_ops.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <limits>
#include <optional>
#include <string_view>
#include <vector>

#include "autodiff/forward_kernels.h"
#include "autodiff/forward_pass.h"
#include "core/tensor_operators.h"

namespace torchlift::forward_internal {
namespace {

namespace ops = at::_ops;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Inclusive products along a dim, of twice as many factors in each step (Hillis and Steele, "Data
// parallel algorithms", 1986).
Tensor cumprod(const Tensor& self, int64_t dim, std::optional<at::ScalarType> dtype) {
  Tensor product = dtype ? self.to(*dtype) : self.clone();
  if (self.dim() == 0) return product;
  const int64_t size = self.size(dim);
  for (int64_t reach = 1; reach < size; reach *= 2) {
    const Tensor further = product.narrow(dim, reach, size - reach) *  //
                           product.narrow(dim, 0, size - reach);
    product = at::cat({product.narrow(dim, 0, reach), further}, dim);
  }
  return product;
}

// --- logcumsumexp --------------------------------------------------------------------------------

// Sums with decay along a dim, sum_i = decay_i sum_(i-1) + term_i, by the same steps. The first
// decay is 0.
Tensor decaying_sums(Tensor decay, Tensor term, int64_t dim) {
  const int64_t size = term.size(dim);
  for (int64_t reach = 1; reach < size; reach *= 2) {
    const auto later = [&](const Tensor& t) { return t.narrow(dim, reach, size - reach); };
    const auto earlier = [&](const Tensor& t) { return t.narrow(dim, 0, size - reach); };
    const Tensor sums = later(term) + later(decay) * earlier(term);
    term = at::cat({term.narrow(dim, 0, reach), sums}, dim);
    if (2 * reach >= size) break;  // nobody asks for the decay
    const Tensor decays = later(decay) * earlier(decay);
    decay = at::cat({decay.narrow(dim, 0, reach), decays}, dim);
  }
  return term;
}

// With the result as constants c,
//   y_i = c_i + log(sum over j <= i of exp(x_j - c_i)), where the sum s_i is 1, and
//   s_i = exp(c_(i-1) - c_i) s_(i-1) + exp(x_i - c_i),
// in which no exponent is large. libtorch divides sums of exp(x - max x), which are 0 where x is
// far below its maximum.
Tensor logcumsumexp(const Tensor& self, int64_t dim) {
  if (self.dim() == 0 || self.size(dim) == 0) return self.clone();
  const Tensor x = precise(self);
  const Tensor c = at::logcumsumexp(x.detach(), dim);
  const Tensor infinite =
      (c.is_complex() ? at::real(c) : c).abs() == std::numeric_limits<double>::infinity();
  const Tensor finite_c = c.masked_fill(infinite, 0);
  const int64_t rest = c.size(dim) - 1;
  const auto first = [&](const Tensor& t) { return t.narrow(dim, 0, rest); };
  const auto last = [&](const Tensor& t) { return t.narrow(dim, 1, rest); };
  const Tensor decay = (first(finite_c) - last(finite_c))
                           .exp()
                           .masked_fill(first(infinite).logical_or(last(infinite)), 0);
  const Tensor weight = (x.masked_fill(infinite, 0) - finite_c).exp().masked_fill(infinite, 0);
  const Tensor sums =
      decaying_sums(at::cat({at::zeros_like(c.narrow(dim, 0, 1)), decay}, dim), weight, dim);
  return (c + sums.masked_fill(infinite, 1).log()).to(self.scalar_type());
}

// --- scatter_reduce and index_reduce -------------------------------------------------------------

// What `self` holds before anything is reduced into it: itself, or, at the places that get a value,
// `neutral`.
Tensor start(const Tensor& self, int64_t dim, const Tensor& index, double neutral,
             bool include_self) {
  return include_self ? self : self.scatter(dim, index, neutral);
}

// One multiplication for each index along dim, since those may name the same place.
Tensor scatter_prod(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& src,
                    bool include_self) {
  Tensor result = start(self, dim, index, 1, include_self);
  for (int64_t i = 0; i < index.size(dim); ++i) {
    const Tensor place = index.narrow(dim, i, 1);
    const Tensor factor = src.narrow(dim, i, 1);
    std::vector<int64_t> sizes(place.sizes().begin(), place.sizes().end());
    Tensor part = factor;
    for (int64_t d = 0; d < factor.dim(); ++d) part = part.narrow(d, 0, sizes[d]);
    result = result.scatter(dim, place, result.gather(dim, place) * part);
  }
  return result;
}

// Of 0-d tensors as of ones with one element.
Tensor scatter_prod_of_any_rank(const Tensor& self, int64_t dim, const Tensor& index,
                                const Tensor& src, bool include_self) {
  if (self.dim() > 0 && index.dim() > 0 && src.dim() > 0) {
    return scatter_prod(self, dim, index, src, include_self);
  }
  const auto raised = [](const Tensor& t) { return t.dim() == 0 ? t.unsqueeze(0) : t; };
  const Tensor result = scatter_prod(raised(self), 0, raised(index), raised(src), include_self);
  return self.dim() == 0 ? result.squeeze(0) : result;
}

// libtorch's formula is right but for products.
Tensor scatter_reduce(c10::DispatchKeySet keys, const Tensor& self, int64_t dim,
                      const Tensor& index, const Tensor& src, std::string_view reduce,
                      bool include_self) {
  if (reduce == "prod" && (has_tangent(self) || has_tangent(src)) && above_autograd() &&
      !forward_mode_cut()) {
    return scatter_prod_of_any_rank(self, dim, index, src, include_self);
  }
  return Pass<ops::scatter_reduce_two>::call(keys, self, dim, index, src, reduce, include_self);
}

// A place is named along dim only.
Tensor index_reduce(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& source,
                    std::string_view reduce, bool include_self) {
  if (self.dim() == 0) {
    const Tensor raised = source.dim() == 0 ? source.unsqueeze(0) : source;
    return index_reduce(self.unsqueeze(0), 0, index.reshape({-1}), raised, reduce, include_self)
        .squeeze(0);
  }
  const int64_t axis = dim < 0 ? dim + self.dim() : dim;
  std::vector<int64_t> shape(source.dim(), 1);
  shape[axis] = index.numel();
  const Tensor places = index.to(at::kLong).reshape(shape).expand(source.sizes());
  if (reduce == "prod") return scatter_prod(self, axis, places, source, include_self);
  return ops::scatter_reduce_two::call(self, axis, places, source, reduce, include_self);
}

// --- segment_reduce ------------------------------------------------------------------------------

// ...S, ...: where each of `size` entries along an axis lies in a segment: ...SN
Tensor members(const OptionalTensor& lengths, const OptionalTensor& offsets, int64_t size) {
  const bool by_length = lengths.has_value() && lengths->defined();
  const Tensor ends =
      by_length ? lengths->cumsum(-1) : offsets->narrow(-1, 1, offsets->size(-1) - 1);
  const Tensor starts = by_length ? ends - *lengths : offsets->narrow(-1, 0, offsets->size(-1) - 1);
  const Tensor place = at::arange(size, ends.options());
  return (place >= starts.unsqueeze(-1)) & (place < ends.unsqueeze(-1));
}

Tensor reduce_members(const Tensor& values, const Tensor& inside, int64_t axis,
                      std::string_view reduce, const std::optional<at::Scalar>& initial) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const auto or_else = [&](double neutral) {
    return at::where(inside, values, at::Scalar(neutral));
  };
  if (reduce == "sum" || reduce == "mean") {
    Tensor sum = or_else(0).sum(axis);
    if (initial) sum = sum + *initial;
    if (reduce == "sum") return sum;
    // The mean of nothing is the initial value, or nan.
    const Tensor count = inside.sum(axis).to(values.scalar_type());
    return initial ? sum / count.clamp_min(1) : sum / count;
  }
  if (reduce == "prod") {
    const Tensor product = or_else(1).prod(axis);
    return initial ? product * *initial : product;
  }
  const bool max = reduce == "max";
  const Tensor best = max ? or_else(-kInfinity).amax(axis) : or_else(kInfinity).amin(axis);
  if (!initial) return best;
  return max ? best.clamp_min(*initial) : best.clamp_max(*initial);
}

// ...N..., segments of N -> ...S...
Tensor segment_reduce(const Tensor& data, std::string_view reduce, const OptionalTensor& lengths,
                      const OptionalTensor& /*indices*/, const OptionalTensor& offsets,
                      int64_t axis, bool /*unsafe*/, const std::optional<at::Scalar>& initial) {
  const int64_t dim = axis < 0 ? axis + data.dim() : axis;
  Tensor inside = members(lengths, offsets, data.size(dim));  // ...SN
  for (int64_t i = dim + 1; i < data.dim(); ++i) inside = inside.unsqueeze(-1);
  return reduce_members(data.unsqueeze(dim), inside, dim + 1, reduce, initial);
}

}  // namespace

std::vector<ForwardKernel> scatter_formulas() {
  std::vector<ForwardKernel> kernels;
  kernels.push_back(made<ops::cumprod, &cumprod>());
  kernels.push_back(made<ops::logcumsumexp, &logcumsumexp>());
  kernels.push_back(row<ops::scatter_reduce_two, &scatter_reduce>());
  kernels.push_back(made<ops::index_reduce, &index_reduce>());
  kernels.push_back(made<ops::segment_reduce, &segment_reduce>());
  return kernels;
}

}  // namespace torchlift::forward_internal
