#include <ATen/core/Tensor.h>
#include <ATen/ops/_histogramdd_bin_edges.h>
#include <ATen/ops/_histogramdd_from_bin_cts.h>
#include <ATen/ops/_histogramdd_from_bin_tensors.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/histc.h>
#include <ATen/ops/histogram.h>
#include <ATen/ops/linspace.h>
#include <gtest/gtest.h>

#include <optional>
#include <vector>

#include "batching/testing/rule_check.h"

namespace torchlift::testing {
namespace {

// Points at quarters, so that many lie on an edge.
at::Tensor quarters(at::IntArrayRef sizes) { return integers(-6, 7, sizes).to(at::kDouble).div(4); }

TEST(HistogramRules, Histc) {
  for (const auto& make : {quarters, randn}) {
    check_rule({.name = "histc",
                .f =
                    [](const Tensors& in) {
                      return Tensors{at::histc(in[0], 4, -1, 1), at::histc(in[0], 5)};
                    },
                .make =
                    [&](int64_t) {
                      return Tensors{make({3, 7})};
                    },
                .differentiable = false,
                .tolerance = 0});
  }
}

TEST(HistogramRules, HistcOfOnePoint) {
  check_rule({.name = "histc of equal points",
              .f = [](const Tensors& in) { return Tensors{at::histc(in[0], 4)}; },
              .make = [](int64_t) { return Tensors{quarters({1}).expand({3}).clone()}; },
              .differentiable = false,
              .tolerance = 0});
}

TEST(HistogramRules, HistcWhereTheNumberOfBinsIsRounded) {
  check_rule({.name = "histc in bfloat16",
              .f = [](const Tensors& in) { return Tensors{at::histc(in[0], 1000)}; },
              .make = [](int64_t) { return Tensors{quarters({7}).to(at::kBFloat16)}; },
              .differentiable = false,
              .tolerance = 0});
}

TEST(HistogramRules, Histogram) {
  const std::vector<double> bounds{-1, 1};
  for (const bool density : {false, true}) {
    for (const bool weighted : {false, true}) {
      for (const bool ranged : {false, true}) {
        check_rule({.name = "histogram",
                    .f =
                        [&](const Tensors& in) {
                          std::optional<at::ArrayRef<double>> range;
                          std::optional<at::Tensor> weight;
                          if (ranged) range = bounds;
                          if (weighted) weight = in[1];
                          const auto [counts, edges] =
                              at::histogram(in[0], 4, range, weight, density);
                          return Tensors{counts, edges};
                        },
                    .make =
                        [](int64_t) {
                          return Tensors{randn({3, 7}), positive({3, 7})};
                        },
                    .always_batched = {0},
                    .differentiable = false,
                    .tolerance = 1e-12});
      }
    }
  }
}

TEST(HistogramRules, HistogramByEdges) {
  check_rule({.name = "histogram by edges",
              .f =
                  [](const Tensors& in) {
                    const auto [counts, edges] = at::histogram(in[0], in[1].cumsum(0).sub(2));
                    return Tensors{counts, edges};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({9}), positive({5})};
                  },
              .differentiable = false,
              .tolerance = 1e-12});
}

TEST(HistogramRules, Histogramdd) {
  const std::vector<int64_t> bins{2, 3};
  const std::vector<double> bounds{-1, 1, -2, 2};
  for (const bool density : {false, true}) {
    check_rule({.name = "histogramdd",
                .f =
                    [&](const Tensors& in) {
                      const std::vector<at::Tensor> edges = at::_histogramdd_bin_edges(in[0], bins);
                      const auto by_range = at::_histogramdd_from_bin_cts(
                          in[0], bins, at::ArrayRef<double>(bounds), in[1], density);
                      return Tensors{edges[0], edges[1], by_range,
                                     at::_histogramdd_from_bin_tensors(in[0], edges, {}, density)};
                    },
                .make =
                    [](int64_t) {
                      return Tensors{randn({9, 2}), positive({9})};
                    },
                .always_batched = {0},
                .differentiable = false,
                .tolerance = 1e-12});
  }
}

}  // namespace
}  // namespace torchlift::testing
