#include <ATen/core/Tensor.h>
#include <ATen/ops/_unsafe_index.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/index.h>
#include <ATen/ops/index_put.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "batching/rules/index_places.h"
#include "batching/testing/rule_check.h"
#include "batching/vmap.h"
#include "core/level.h"
#include "core/lifted_tensor.h"
#include "core/tensor_operators.h"

namespace torchlift::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using In = const Tensors&;
using List = c10::List<std::optional<at::Tensor>>;

// A pattern of x[...]: an entry per dim, the number of the input that indexes it, or 0 for `:`.
struct Pattern {
  std::string name;
  std::vector<size_t> entries;
  std::vector<std::vector<int64_t>> index_sizes;
  std::vector<int64_t> value_sizes;  // of the whole result
};

std::vector<Pattern> patterns() {
  return {
      {"x[i]", {1}, {{6}}, {6, 4, 5}},
      {"x[i] 0-d", {1}, {{}}, {4, 5}},
      {"x[i] 2-d", {1}, {{2, 3}}, {2, 3, 4, 5}},
      {"x[:, i]", {0, 1}, {{6}}, {3, 6, 5}},
      {"x[:, i] 0-d", {0, 1}, {{}}, {3, 5}},
      {"x[:, :, i] 2-d", {0, 0, 1}, {{2, 2}}, {3, 4, 2, 2}},
      {"x[i, j]", {1, 2}, {{6}, {6}}, {6, 5}},
      {"x[i, j] broadcast", {1, 2}, {{2, 1}, {3}}, {2, 3, 5}},
      {"x[:, i, j]", {0, 1, 2}, {{2, 1}, {3}}, {3, 2, 3}},
      {"x[i, :, j]", {1, 0, 2}, {{6}, {6}}, {6, 4}},
      {"x[i, :, j] broadcast", {1, 0, 2}, {{2, 1}, {}}, {2, 1, 4}},
      {"x[i, j, k]", {1, 2, 3}, {{2}, {2}, {}}, {2}},
  };
}

List list_of(const Pattern& p, In in, size_t first) {
  List list;
  for (const size_t entry : p.entries) {
    list.push_back(entry == 0 ? std::nullopt : std::optional<at::Tensor>(in[first + entry - 1]));
  }
  return list;
}

// Valid, some of them negative, for each indexed dim of a [3, 4, 5].
void add_indices(const Pattern& p, Tensors& inputs) {
  const std::vector<int64_t> sizes = {3, 4, 5};
  for (size_t dim = 0; dim < p.entries.size(); ++dim) {
    if (p.entries[dim] == 0) continue;
    inputs.push_back(integers(-sizes[dim], sizes[dim], p.index_sizes[p.entries[dim] - 1]));
  }
}

TEST(IndexingRules, Reading) {
  for (const Pattern& p : patterns()) {
    check_rule({.name = p.name,
                .f = [=](In in) { return Tensors{at::index(in[0], list_of(p, in, 1))}; },
                .make =
                    [=](int64_t) {
                      Tensors inputs{randn({3, 4, 5})};
                      add_indices(p, inputs);
                      return inputs;
                    },
                .second_order = p.name == "x[i, j]"});
  }
}

TEST(IndexingRules, Writing) {
  for (const Pattern& p : patterns()) {
    for (const bool accumulate : {false, true}) {
      // Two writes to one place would leave open which one counts.
      if (!accumulate && p.name.find("0-d") == std::string::npos) continue;
      check_rule({.name = p.name + " = v" + (accumulate ? ", accumulated" : ""),
                  .f =
                      [=](In in) {
                        return Tensors{at::index_put(in[0], list_of(p, in, 2), in[1], accumulate)};
                      },
                  .make =
                      [=](int64_t) {
                        Tensors inputs{randn({3, 4, 5}), randn(p.value_sizes)};
                        add_indices(p, inputs);
                        return inputs;
                      }});
    }
  }
}

TEST(IndexingRules, WritingBroadcastValues) {
  for (const std::vector<int64_t>& sizes :
       std::vector<std::vector<int64_t>>{{}, {4}, {1, 4}, {6, 1}, {1}}) {
    const Pattern p{"x[i, :, j]", {1, 0, 2}, {{6}, {6}}, {}};
    check_rule(
        {.name = "x[i, :, j] = v, v of " + std::to_string(sizes.size()) + " dims",
         .f = [=](In in) { return Tensors{at::index_put(in[0], list_of(p, in, 2), in[1], true)}; },
         .make =
             [=](int64_t) {
               Tensors inputs{randn({3, 4, 5}), randn(sizes)};
               add_indices(p, inputs);
               return inputs;
             }});
  }
}

TEST(IndexingRules, InPlace) {
  for (const Pattern& p : patterns()) {
    check_rule({.name = p.name + " = v in place",
                .f =
                    [=](In in) {
                      at::Tensor y = in[0].clone();
                      y.index_put_(list_of(p, in, 2), in[1], /*accumulate=*/true);
                      y.index_put_(list_of(p, in, 2), at::zeros({}, at::kDouble));
                      return Tensors{y};
                    },
                .make =
                    [=](int64_t) {
                      Tensors inputs{randn({3, 4, 5}), randn(p.value_sizes)};
                      add_indices(p, inputs);
                      return inputs;
                    },
                .always_batched = {0}});
  }
}

TEST(IndexingRules, UnsafeIndex) {
  const Pattern p{"x[:, i]", {0, 1}, {{6}}, {}};
  check_rule({.name = "_unsafe_index",
              .f = [=](In in) { return Tensors{at::_unsafe_index(in[0], list_of(p, in, 1))}; },
              .make =
                  [](int64_t) {
                    return Tensors{randn({3, 4, 5}), integers(0, 4, {6})};
                  }});
}

// --- masks -------------------------------------------------------------------------------------

TEST(IndexingRules, SharedMask) {
  const auto make = [](int64_t) { return Tensors{randn({3, 4, 5}), randn({3, 4}).gt(0)}; };
  const auto mask_of = [](In in) { return List({std::optional<at::Tensor>(in[1])}); };
  check_rule({.name = "x[mask]",
              .f = [=](In in) { return Tensors{at::index(in[0], mask_of(in))}; },
              .make = make,
              .unbatched = {1}});
  check_rule({.name = "x[mask] = 7",
              .f =
                  [=](In in) {
                    at::Tensor y = in[0].clone();
                    y.index_put_(mask_of(in), at::ones({}, at::kDouble) * 7);
                    return Tensors{y};
                  },
              .make = make,
              .unbatched = {1}});
}

TEST(IndexingRules, MaskOfEachExampleFills) {
  check_rule({.name = "x[mask] = v",
              .f =
                  [](In in) {
                    return Tensors{
                        at::index_put(in[0], List({std::optional<at::Tensor>(in[1])}), in[2])};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({3, 4, 5}), randn({3, 4}).gt(0), randn({5})};
                  },
              .always_batched = {1},
              .differentiable = false});
}

// The examples of the inner vmap share the mask that those of the outer one have.
TEST(IndexingRules, MaskOfAnOuterExampleFills) {
  const at::Tensor x = randn({2, 3, 4}), mask = randn({2, 4}).gt(0), value = randn({2, 3});
  for (const bool accumulate : {false, true}) {
    const auto outer = [&](const at::Tensor& rows, const at::Tensor& m, const at::Tensor& values) {
      const List places({std::optional<at::Tensor>(m)});
      return vmap([&](const at::Tensor& row, const at::Tensor& v) {
        return at::index_put(row, places, v, accumulate);
      })(rows, values);
    };
    const at::Tensor filled = value.unsqueeze(-1) + (accumulate ? x : at::zeros_like(x));
    const at::Tensor expected = at::where(mask.unsqueeze(1), filled, x);
    EXPECT_TRUE(at::allclose(vmap(outer)(x, mask, value), expected)) << accumulate;
  }
}

// --- errors ------------------------------------------------------------------------------------

template <class F>
std::string message_of(F f) {
  try {
    f();
  } catch (const c10::Error& e) {
    return e.what_without_backtrace();
  }
  return "no error";
}

TEST(IndexingRules, BatchedMaskIsRefused) {
  const LevelScope scope({.size = 4});
  const at::Tensor x = lift_alias(at::zeros({4, 6}), 0, scope.level());
  const List mask({std::optional<at::Tensor>(x.gt(0))});
  EXPECT_THAT(message_of([&] { at::index(x, mask); }), HasSubstr("torch.where(mask, x, other)"));
  EXPECT_THAT(message_of([&] { at::index_put(x, mask, at::zeros({6})); }),
              HasSubstr("differs between"));
}

TEST(IndexingRules, OutOfRange) {
  const LevelScope scope({.size = 4});
  const at::Tensor x = lift_alias(at::zeros({4, 6}), 0, scope.level());
  const at::Tensor i = lift_alias(at::ones({4, 2}, at::kLong) * 6, 0, scope.level());
  const List list({std::optional<at::Tensor>(i)});
  EXPECT_THAT(message_of([&] { at::index(x, list); }), HasSubstr("out of bounds"));
  EXPECT_THAT(message_of([&] { at::index(x.select(0, 0), list); }), HasSubstr("too many indices"));
}

TEST(IndexingRules, WriteToUnbatched) {
  at::Tensor plain = at::zeros({6});
  const LevelScope scope({.size = 4});
  const at::Tensor x = lift_alias(at::zeros({4, 6}), 0, scope.level());
  const List list({std::optional<at::Tensor>(at::ones({1}, at::kLong))});
  EXPECT_THAT(message_of([&] { plain.index_put_(list, x.select(0, 0)); }),
              HasSubstr("no batch dimension"));
}

// --- arithmetic --------------------------------------------------------------------------------

TEST(Places, NeighboursStayAndOthersComeFirst) {
  const Places neighbours = places_of({false, true, true}, 4, 2);
  EXPECT_TRUE(neighbours.adjacent);
  EXPECT_EQ(neighbours.leading, 1);
  EXPECT_EQ(neighbours.result_rank(), 4);
  const Places apart = places_of({true, false, true}, 3, 1);
  EXPECT_FALSE(apart.adjacent);
  EXPECT_EQ(apart.leading, 0);
}

TEST(Places, Orders) {
  const Places places =
      places_of({false, false, true}, 4, 1);  // [B, i, l, m, r] -> [B, l, m, i, r]
  EXPECT_THAT(order_behind_leading(places), ElementsAre(0, 2, 3, 1, 4));
  EXPECT_THAT(order_in_front_of_leading(places), ElementsAre(0, 3, 1, 2, 4));
}

}  // namespace
}  // namespace torchlift::testing
