// Histograms: histc, histogram, histogramdd. Every example has its own edges, where the data decide
// them, and its own counts.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_histogramdd_bin_edges_ops.h>
#include <ATen/ops/_histogramdd_from_bin_cts_ops.h>
#include <ATen/ops/_histogramdd_from_bin_tensors_ops.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/histc_ops.h>
#include <ATen/ops/histogram_ops.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <optional>
#include <tuple>
#include <vector>

#include "batching/rules/dims.h"
#include "batching/rules/numbers.h"
#include "core/lifted_tensor.h"
#include "core/registry.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;

using OptionalArg = std::optional<BatchedArg>;
using Range = std::optional<at::ArrayRef<double>>;

// --- edges ---------------------------------------------------------------------------------------

// The outermost edges along one dim, [B, 1] each.
struct Outer {
  at::Tensor left, right;
};

// `points` is [B, N]. Where all points are one, the edges are moved apart by `margin`.
Outer outer_of_data(const at::Tensor& points, double margin) {
  if (points.size(1) == 0) {
    const at::Tensor zeros = at::zeros({points.size(0), 1}, points.options());
    return {zeros, zeros.add(1)};
  }
  const at::Tensor left = points.amin(1, /*keepdim=*/true);
  const at::Tensor right = points.amax(1, /*keepdim=*/true);
  check_all(left.isfinite().logical_and(right.isfinite()),
            "[vmap] histogram: the data of some example are not finite, so they give no range. "
            "Give one.");
  const at::Tensor one = left.eq(right);
  return {at::where(one, left.sub(margin), left), at::where(one, right.add(margin), right)};
}

Outer outer_given(const at::Tensor& points, double left, double right, double margin) {
  if (left == right) {
    left -= margin;
    right += margin;
  }
  const at::Tensor zeros = at::zeros({points.size(0), 1}, points.options());
  return {zeros.add(left), zeros.add(right)};
}

// [B, bins + 1], as at::linspace computes them: from the nearer end.
at::Tensor equal_bins(const Outer& outer, int64_t bins) {
  TORCH_CHECK(bins > 0, "[vmap] histogram: expected a positive number of bins, but got ", bins);
  const at::Tensor step = outer.right.sub(outer.left).div(bins);
  const at::Tensor i = at::arange(bins + 1, outer.left.options()).unsqueeze(0);
  return at::where(i.lt((bins + 1) / 2), outer.left.add(step.mul(i)),
                   outer.right.sub(step.mul(i.neg().add(bins))));
}

// --- counting ------------------------------------------------------------------------------------

// Whether a point is between the outermost edges, both included.
at::Tensor inside(const at::Tensor& points, const at::Tensor& left, const at::Tensor& right) {
  return points.ge(left).logical_and(points.le(right));
}

// The bin of every point along one dim, given `edges` [B, K + 1]; the last bin has both its ends.
at::Tensor bin_by_search(const at::Tensor& points, const at::Tensor& edges) {
  return at::searchsorted(edges.contiguous(), points.contiguous(), /*out_int32=*/false,
                          /*right=*/true)
      .sub(1)
      .clamp(0, edges.size(1) - 2);
}

// Adds up `weight` [B, N], or ones, in the bins [B, N] of the points that are `counted`.
at::Tensor count(const at::Tensor& bins, int64_t number, const at::Tensor& counted,
                 const std::optional<at::Tensor>& weight, const at::TensorOptions& options) {
  const at::Tensor ones = weight.has_value() ? *weight : at::ones(bins.sizes(), options);
  const at::Tensor added = at::where(counted, ones, at::zeros({}, options));
  return at::zeros({bins.size(0), number}, options).scatter_add(1, bins, added);
}

// The data of a histogram: points [B, N, D], weights [B, N].
struct Data {
  at::Tensor points;
  std::optional<at::Tensor> weight;

  Data(const Level& level, const BatchedArg& self, const OptionalArg& weights, bool flat) {
    TORCH_CHECK(at::isFloatingType(self.value.scalar_type()),
                "[vmap] histogram: expected floating numbers, but got ", self.value.scalar_type());
    const at::Tensor x = expanded(self, level.size());
    const int64_t size = level.size();
    const int64_t dims = flat ? 1 : x.size(-1);
    const int64_t number = size * dims == 0 ? 0 : x.numel() / (size * dims);
    points = x.reshape({size, number, dims});
    if (!weights.has_value() || !weights->value.defined()) return;
    TORCH_CHECK(weights->value.scalar_type() == self.value.scalar_type(),
                "[vmap] histogram: expected weights of dtype ", self.value.scalar_type(),
                ", but got ", weights->value.scalar_type());
    weight = expanded(*weights, size).reshape({size, number});
  }

  int64_t dims() const { return points.size(2); }
  at::Tensor along(int64_t dim) const { return points.select(2, dim); }
};

// [B, K1, K2...] for edges [B, K1 + 1], [B, K2 + 1]...
at::Tensor histogram_of(const Data& data, const std::vector<at::Tensor>& edges, bool density) {
  TORCH_CHECK(static_cast<int64_t>(edges.size()) == data.dims(),
              "[vmap] histogramdd: expected edges for ", data.dims(), " dims, but got ",
              edges.size());
  const at::TensorOptions options = data.points.options();
  c10::SmallVector<int64_t, 4> shape{data.points.size(0)};
  at::Tensor bins, counted;
  int64_t number = 1;
  for (int64_t dim = 0; dim < data.dims(); ++dim) {
    const at::Tensor points = data.along(dim);
    const at::Tensor& edge = edges[dim];
    const int64_t each = edge.size(1) - 1;
    const at::Tensor bin = bin_by_search(points, edge);
    const at::Tensor in = inside(points, edge.narrow(1, 0, 1), edge.narrow(1, each, 1));
    bins = bins.defined() ? bins.mul(each).add(bin) : bin;
    counted = counted.defined() ? counted.logical_and(in) : in;
    number *= each;
    shape.push_back(each);
  }
  at::Tensor histogram = count(bins, number, counted, data.weight, options);
  if (density) histogram = histogram.div(histogram.sum(1, /*keepdim=*/true));
  histogram = histogram.view(shape);
  if (!density) return histogram;
  for (int64_t dim = 0; dim < data.dims(); ++dim) {
    c10::SmallVector<int64_t, 4> sizes(shape.size(), 1);
    sizes[0] = shape[0];
    sizes[dim + 1] = shape[dim + 1];
    histogram = histogram.div(edges[dim].diff().view(sizes));
  }
  return histogram;
}

// Edges of equal bins, by a range for each dim or by the data.
std::vector<at::Tensor> edges_of(const Data& data, at::IntArrayRef bins, const Range& range) {
  TORCH_CHECK(static_cast<int64_t>(bins.size()) == data.dims(),
              "[vmap] histogramdd: expected a number of bins for each of ", data.dims(),
              " dims, but got ", bins.size());
  TORCH_CHECK(!range.has_value() || range->size() == 2 * bins.size(),
              "[vmap] histogram: range should have ", 2 * bins.size(), " elements");
  constexpr double kMargin = 0.5;
  std::vector<at::Tensor> edges;
  for (int64_t dim = 0; dim < data.dims(); ++dim) {
    const at::Tensor points = data.along(dim);
    if (range.has_value()) {
      const double left = (*range)[2 * dim], right = (*range)[2 * dim + 1];
      TORCH_CHECK(left <= right, "[vmap] histogram: min should not exceed max, but got ", left,
                  " and ", right);
      edges.push_back(equal_bins(outer_given(points, left, right, kMargin), bins[dim]));
    } else {
      edges.push_back(equal_bins(outer_of_data(points, kMargin), bins[dim]));
    }
  }
  return edges;
}

// --- the rules -----------------------------------------------------------------------------------

// Bins by dividing, not by edges; points beside the range are left out.
Batched histc_rule(const Level& level, BatchedArg self, int64_t bins, const at::Scalar& min,
                   const at::Scalar& max) {
  TORCH_CHECK(bins > 0, "bins must be > 0");
  const Data data(level, self, std::nullopt, /*flat=*/true);
  const at::Tensor points = data.along(0);
  const double left = min.toDouble(), right = max.toDouble();
  TORCH_CHECK(left <= right, "max must be larger than min");
  const Outer outer = left == right ? outer_of_data(points, /*margin=*/1)
                                    : outer_given(points, left, right, /*margin=*/1);
  const at::Tensor in = inside(points, outer.left, outer.right);
  const at::Tensor place =
      points.sub(outer.left).mul(bins).div(outer.right.sub(outer.left)).nan_to_num(0, 0, 0);
  // Twice: bfloat16 rounds 999 to 1000.
  const at::Tensor bin = place.clamp(0, bins - 1).to(at::kLong).clamp_max(bins - 1);
  return {count(bin, bins, in, std::nullopt, points.options()), 0};
}

std::tuple<Batched, Batched> histogram_by_number(const Level& level, BatchedArg self, int64_t bins,
                                                 Range range, OptionalArg weight, bool density) {
  const Data data(level, self, weight, /*flat=*/true);
  const std::vector<at::Tensor> edges = edges_of(data, bins, range);
  return {Batched{histogram_of(data, edges, density), 0}, Batched{edges[0], 0}};
}

std::tuple<Batched, Batched> histogram_by_edges(const Level& level, BatchedArg self,
                                                BatchedArg bins, OptionalArg weight, bool density) {
  const Data data(level, self, weight, /*flat=*/true);
  const at::Tensor edges = expanded(bins, level.size());
  return {Batched{histogram_of(data, {edges}, density), 0}, Batched{edges.clone(), 0}};
}

std::vector<Batched> histogramdd_edges(const Level& level, BatchedArg self, at::IntArrayRef bins,
                                       Range range, OptionalArg weight, bool /*density*/) {
  std::vector<Batched> results;
  for (const at::Tensor& edges : edges_of(Data(level, self, weight, /*flat=*/false), bins, range)) {
    results.push_back({edges, 0});
  }
  return results;
}

Batched histogramdd_by_numbers(const Level& level, BatchedArg self, at::IntArrayRef bins,
                               Range range, OptionalArg weight, bool density) {
  const Data data(level, self, weight, /*flat=*/false);
  return {histogram_of(data, edges_of(data, bins, range), density), 0};
}

Batched histogramdd_by_edges(const Level& level, BatchedArg self, const std::vector<Batched>& bins,
                             OptionalArg weight, bool density) {
  std::vector<at::Tensor> edges;
  for (const Batched& each : bins) edges.push_back(expanded(as_arg(each), level.size()));
  return {histogram_of(Data(level, self, weight, /*flat=*/false), edges, density), 0};
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::histc, &histc_rule>(),
    rule<ops::histogram_bin_ct, &histogram_by_number>(),
    rule<ops::histogram_bins_tensor, &histogram_by_edges>(),
    rule<ops::_histogramdd_bin_edges, &histogramdd_edges>(),
    rule<ops::_histogramdd_from_bin_cts, &histogramdd_by_numbers>(),
    rule<ops::_histogramdd_from_bin_tensors, &histogramdd_by_edges>(),
};

}  // namespace
}  // namespace torchlift
