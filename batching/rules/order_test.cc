#include <ATen/core/Tensor.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/argmin.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/bucketize.h>
#include <ATen/ops/kthvalue.h>
#include <ATen/ops/max.h>
#include <ATen/ops/median.h>
#include <ATen/ops/min.h>
#include <ATen/ops/mode.h>
#include <ATen/ops/nanmedian.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/topk.h>
#include <gtest/gtest.h>

#include "batching/testing/rule_check.h"

namespace torchlift::testing {
namespace {

using Function = std::function<Tensors(const at::Tensor&)>;

template <class T>
Tensors pair(const T& result) {
  return {std::get<0>(result), std::get<1>(result)};
}

void check_shapes(const char* name, const Function& f,
                  const std::vector<std::vector<int64_t>>& shapes, bool differentiable = true) {
  for (const auto& shape : shapes) {
    check_rule({.name = name,
                .f = [&](const Tensors& in) { return f(in[0]); },
                .make = [&](int64_t) { return Tensors{randn(shape)}; },
                .differentiable = differentiable});
  }
}

const std::vector<std::vector<int64_t>> kShapes{{}, {4}, {3, 2}, {2, 3, 2}};

TEST(OrderRules, ValuesAndIndicesAlongADim) {
  check_shapes(
      "max -1", [](const at::Tensor& x) { return pair(at::max(x, -1)); }, kShapes);
  check_shapes(
      "min 0", [](const at::Tensor& x) { return pair(at::min(x, 0, true)); }, kShapes);
  check_shapes(
      "median", [](const at::Tensor& x) { return pair(at::median(x, -1)); }, kShapes);
  check_shapes(
      "nanmedian", [](const at::Tensor& x) { return pair(at::nanmedian(x, 0, true)); }, kShapes);
  check_shapes(
      "mode", [](const at::Tensor& x) { return pair(at::mode(x, -1)); }, kShapes);
  check_shapes(
      "kthvalue", [](const at::Tensor& x) { return pair(at::kthvalue(x, 1, -1)); }, kShapes);
  check_shapes("kthvalue 2", [](const at::Tensor& x) { return pair(at::kthvalue(x, 2, 0, true)); },
               {{3}, {3, 2}});
}

TEST(OrderRules, OfTheWholeExample) {
  check_shapes(
      "argmax",
      [](const at::Tensor& x) {
        return Tensors{at::argmax(x), at::argmax(x, {}, true), at::argmin(x, -1),
                       at::argmin(x, 0, true)};
      },
      kShapes, false);
  check_shapes(
      "median",
      [](const at::Tensor& x) {
        return Tensors{at::median(x), at::nanmedian(x)};
      },
      kShapes);
  check_shapes(
      "aminmax", [](const at::Tensor& x) { return pair(at::aminmax(x)); }, kShapes);
  check_shapes(
      "aminmax 0", [](const at::Tensor& x) { return pair(at::aminmax(x, 0, true)); }, kShapes);
}

TEST(OrderRules, Sort) {
  check_shapes(
      "sort", [](const at::Tensor& x) { return pair(at::sort(x, -1, true)); }, kShapes);
  check_shapes(
      "stable sort",
      [](const at::Tensor& x) { return pair(at::sort(x, std::optional<bool>(true), 0, false)); },
      kShapes);
  check_shapes(
      "argsort", [](const at::Tensor& x) { return Tensors{at::argsort(x, int64_t{0})}; }, kShapes,
      false);
  check_shapes(
      "topk", [](const at::Tensor& x) { return pair(at::topk(x, 1, -1)); }, kShapes);
  check_shapes("topk 2", [](const at::Tensor& x) { return pair(at::topk(x, 2, 0, false)); },
               {{3}, {3, 2}});
}

RuleCase search_case(std::vector<int64_t> sequence, std::vector<int64_t> values) {
  return {.name = "searchsorted",
          .f =
              [](const Tensors& in) {
                return Tensors{at::searchsorted(in[0], in[1]),
                               at::searchsorted(in[0], in[1], true, true)};
              },
          .make =
              [=](int64_t) {
                return Tensors{std::get<0>(randn(sequence).sort(-1)), randn(values)};
              },
          .differentiable = false};
}

TEST(OrderRules, SearchSorted) {
  check_rule(search_case({5}, {}));
  check_rule(search_case({5}, {3}));
  check_rule(search_case({5}, {2, 3}));
  check_rule(search_case({2, 5}, {2, 3}));
  check_rule({.name = "scalars and buckets",
              .f =
                  [](const Tensors& in) {
                    return Tensors{at::searchsorted(in[0], 0.25), at::bucketize(in[1], in[0]),
                                   at::bucketize(at::Scalar(1), in[0], true)};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{std::get<0>(randn({4}).sort(-1)), randn({2, 3})};
                  },
              .differentiable = false});
}

TEST(OrderRules, SearchWithASorter) {
  check_rule({.name = "sorter",
              .f =
                  [](const Tensors& in) {
                    return Tensors{at::searchsorted(in[0], in[1], false, false, {},
                                                    std::get<1>(at::sort(in[0])))};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({4}), randn({3})};
                  },
              .differentiable = false});
}

}  // namespace
}  // namespace torchlift::testing
