#include <ATen/core/Tensor.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/index_add.h>
#include <ATen/ops/index_copy.h>
#include <ATen/ops/index_fill.h>
#include <ATen/ops/index_reduce.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/masked_fill.h>
#include <ATen/ops/masked_scatter.h>
#include <ATen/ops/masked_select.h>
#include <ATen/ops/put.h>
#include <ATen/ops/randperm.h>
#include <ATen/ops/scatter.h>
#include <ATen/ops/scatter_add.h>
#include <ATen/ops/scatter_reduce.h>
#include <ATen/ops/take.h>
#include <ATen/ops/take_along_dim.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "batching/testing/rule_check.h"
#include "core/level.h"
#include "core/lifted_tensor.h"
#include "core/tensor_operators.h"

namespace torchlift::testing {
namespace {

using ::testing::HasSubstr;
using In = const Tensors&;

struct OpCase {
  std::string name;
  std::function<Tensors(In)> f;
  std::function<Tensors()> make;
  bool differentiable = true;
};

void check_all(const std::vector<OpCase>& cases) {
  for (const OpCase& each : cases) {
    check_rule({.name = each.name,
                .f = each.f,
                .make = [=](int64_t) { return each.make(); },
                .differentiable = each.differentiable});
  }
}

// The out-of-place form as an in-place one, on a batched target.
void check_in_place(const std::vector<OpCase>& cases) {
  for (const OpCase& each : cases) {
    check_rule({.name = each.name,
                .f =
                    [=](In in) {
                      Tensors copies = in;
                      copies[0] = in[0].clone();
                      return each.f(copies);
                    },
                .make = [=](int64_t) { return each.make(); },
                .always_batched = {0},
                .differentiable = each.differentiable});
  }
}

// No two of them alike, so that writes do not collide: [2, 4] of [0, 6) along dim 1.
at::Tensor distinct() {
  return at::randperm(6, at::kLong).slice(0, 0, 4).unsqueeze(0).expand({2, 4}).clone();
}

TEST(ScatterRules, Gather) {
  check_all({
      {"gather", [](In in) { return Tensors{at::gather(in[0], -1, in[1])}; },
       [] {
         return Tensors{randn({3, 5}), integers(0, 5, {2, 4})};
       }},
      {"gather 1-d", [](In in) { return Tensors{at::gather(in[0], 0, in[1])}; },
       [] {
         return Tensors{randn({5}), integers(0, 5, {4})};
       }},
      {"gather 0-d", [](In in) { return Tensors{at::gather(in[0], 0, in[1])}; },
       [] {
         return Tensors{randn({}), integers(0, 1, {})};
       }},
      {"gather 0-d index", [](In in) { return Tensors{at::gather(in[0], 0, in[1])}; },
       [] {
         return Tensors{randn({5}), integers(0, 5, {})};
       }},
      {"take_along_dim", [](In in) { return Tensors{at::take_along_dim(in[0], in[1], 1)}; },
       [] {
         return Tensors{randn({3, 5}), integers(0, 5, {1, 4})};
       }},
      {"take", [](In in) { return Tensors{at::take(in[0], in[1])}; },
       [] {
         return Tensors{randn({3, 5}), integers(-15, 15, {2, 2})};
       }},
      {"take 0-d", [](In in) { return Tensors{at::take(in[0], in[1])}; },
       [] {
         return Tensors{randn({5}), integers(0, 5, {})};
       }},
  });
}

TEST(ScatterRules, Scatter) {
  const auto with_src = [] { return Tensors{randn({3, 6}), distinct(), randn({2, 4})}; };
  const auto two = [] { return Tensors{randn({3, 6}), distinct()}; };
  const auto many = [] { return Tensors{randn({3, 6}), integers(0, 6, {2, 5}), randn({2, 5})}; };
  check_all({
      {"scatter", [](In in) { return Tensors{at::scatter(in[0], 1, in[1], in[2])}; }, with_src},
      {"scatter value", [](In in) { return Tensors{at::scatter(in[0], 1, in[1], 2.5)}; }, two},
      {"scatter add", [](In in) { return Tensors{at::scatter(in[0], 1, in[1], in[2], "add")}; },
       many, false},
      {"scatter value multiply",
       [](In in) { return Tensors{at::scatter(in[0], 1, in[1], 3, "multiply")}; }, two, false},
      {"scatter_add", [](In in) { return Tensors{at::scatter_add(in[0], -1, in[1], in[2])}; },
       many},
      {"scatter_add 0-d", [](In in) { return Tensors{at::scatter_add(in[0], 0, in[1], in[2])}; },
       [] {
         return Tensors{randn({}), integers(0, 1, {}), randn({})};
       }},
      {"scatter_reduce sum",
       [](In in) { return Tensors{at::scatter_reduce(in[0], 1, in[1], in[2], "sum")}; }, many},
      {"scatter_reduce mean",
       [](In in) { return Tensors{at::scatter_reduce(in[0], 1, in[1], in[2], "mean", false)}; },
       many},
      {"scatter_reduce amax",
       [](In in) { return Tensors{at::scatter_reduce(in[0], 1, in[1], in[2], "amax")}; }, many},
      {"scatter_reduce prod",
       [](In in) { return Tensors{at::scatter_reduce(in[0], 1, in[1], in[2], "prod")}; }, many},
  });
  check_in_place({
      {"scatter_", [](In in) { return Tensors{at::Tensor(in[0]).scatter_(1, in[1], in[2])}; },
       with_src},
      {"scatter_ value", [](In in) { return Tensors{at::Tensor(in[0]).scatter_(1, in[1], 2)}; },
       two},
      {"scatter_add_",
       [](In in) { return Tensors{at::Tensor(in[0]).scatter_add_(1, in[1], in[2])}; }, many},
      {"scatter_reduce_",
       [](In in) { return Tensors{at::Tensor(in[0]).scatter_reduce_(1, in[1], in[2], "amin")}; },
       many},
      {"scatter_ of 0-d",
       [](In in) { return Tensors{at::Tensor(in[0]).scatter_(0, in[1], in[2])}; },
       [] {
         return Tensors{randn({}), integers(0, 1, {1}), randn({1})};
       }},
  });
}

at::Tensor distinct_vector() { return at::randperm(5, at::kLong).slice(0, 0, 3); }

TEST(ScatterRules, IndexAlongDim) {
  const auto make = [] { return Tensors{randn({4, 5}), distinct_vector(), randn({4, 3})}; };
  const auto many = [] { return Tensors{randn({4, 5}), integers(0, 5, {7}), randn({4, 7})}; };
  const auto two = [] { return Tensors{randn({4, 5}), integers(0, 5, {7})}; };
  check_all({
      {"index_select", [](In in) { return Tensors{at::index_select(in[0], -1, in[1])}; }, two},
      {"index_select dim 0", [](In in) { return Tensors{at::index_select(in[0], 0, in[1])}; },
       [] {
         return Tensors{randn({4, 5, 2}), integers(0, 4, {3})};
       }},
      {"index_select by a 0-d index",
       [](In in) { return Tensors{at::index_select(in[0], 0, in[1])}; },
       [] {
         return Tensors{randn({4, 5}), integers(0, 4, {})};
       }},
      {"index_select of 0-d", [](In in) { return Tensors{at::index_select(in[0], 0, in[1])}; },
       [] {
         return Tensors{randn({}), integers(0, 1, {1})};
       }},
      {"index_add", [](In in) { return Tensors{at::index_add(in[0], 1, in[1], in[2], 2.5)}; },
       many},
      {"index_add of 0-d", [](In in) { return Tensors{at::index_add(in[0], 0, in[1], in[2])}; },
       [] {
         return Tensors{randn({}), integers(0, 1, {1}), randn({})};
       }},
      {"index_copy", [](In in) { return Tensors{at::index_copy(in[0], 1, in[1], in[2])}; }, make},
      {"index_fill", [](In in) { return Tensors{at::index_fill(in[0], 1, in[1], 7)}; }, two},
      {"index_fill negative", [](In in) { return Tensors{at::index_fill(in[0], 0, in[1], 7)}; },
       [] {
         return Tensors{randn({4, 5}), integers(-4, 4, {2})};
       }},
      {"index_fill by a tensor",
       [](In in) { return Tensors{at::index_fill(in[0], 1, in[1], in[2])}; },
       [] {
         return Tensors{randn({4, 5}), distinct_vector(), randn({})};
       }},
      {"index_reduce",
       [](In in) { return Tensors{at::index_reduce(in[0], 1, in[1], in[2], "amax")}; }, many,
       false},
      {"put", [](In in) { return Tensors{at::put(in[0], in[1], in[2], true)}; },
       [] {
         return Tensors{randn({4, 5}), integers(-20, 20, {2, 3}), randn({2, 3})};
       }},
  });
  check_in_place({
      {"index_add_", [](In in) { return Tensors{at::Tensor(in[0]).index_add_(1, in[1], in[2])}; },
       many},
      {"index_copy_", [](In in) { return Tensors{at::Tensor(in[0]).index_copy_(1, in[1], in[2])}; },
       make},
      {"index_fill_", [](In in) { return Tensors{at::Tensor(in[0]).index_fill_(1, in[1], 3)}; },
       two},
      {"index_fill_ by a tensor",
       [](In in) { return Tensors{at::Tensor(in[0]).index_fill_(1, in[1], in[2])}; },
       [] {
         return Tensors{randn({4, 5}), distinct_vector(), randn({})};
       }},
      {"index_reduce_",
       [](In in) { return Tensors{at::Tensor(in[0]).index_reduce_(1, in[1], in[2], "prod")}; },
       many, false},
      {"put_", [](In in) { return Tensors{at::Tensor(in[0]).put_(in[1], in[2], true)}; },
       [] {
         return Tensors{randn({4, 5}), integers(0, 20, {3}), randn({3})};
       }},
  });
}

TEST(ScatterRules, Masked) {
  const auto two = [] { return Tensors{randn({3, 4}), randn({4}).gt(0)}; };
  const auto bigger_mask = [] { return Tensors{randn({4}), randn({3, 4}).gt(0)}; };
  const auto three = [] { return Tensors{randn({3, 4}), randn({3, 4}).gt(0), randn({})}; };
  const auto source = [] { return Tensors{randn({3, 4}), randn({3, 4}).gt(0), randn({13})}; };
  check_all({
      {"masked_fill", [](In in) { return Tensors{at::masked_fill(in[0], in[1], 7)}; }, two},
      {"masked_fill, larger mask", [](In in) { return Tensors{at::masked_fill(in[0], in[1], 7)}; },
       bigger_mask},
      {"masked_fill of 0-d", [](In in) { return Tensors{at::masked_fill(in[0], in[1], 7)}; },
       [] {
         return Tensors{randn({}), randn({}).gt(0)};
       }},
      {"masked_fill by a tensor",
       [](In in) { return Tensors{at::masked_fill(in[0], in[1], in[2])}; }, three},
      {"masked_scatter", [](In in) { return Tensors{at::masked_scatter(in[0], in[1], in[2])}; },
       source},
  });
  check_in_place({
      {"masked_fill_", [](In in) { return Tensors{at::Tensor(in[0]).masked_fill_(in[1], 7)}; },
       two},
      {"masked_fill_ by a tensor",
       [](In in) { return Tensors{at::Tensor(in[0]).masked_fill_(in[1], in[2])}; }, three},
      {"masked_scatter_",
       [](In in) { return Tensors{at::Tensor(in[0]).masked_scatter_(in[1], in[2])}; }, source},
  });
  check_rule({.name = "masked_select",
              .f = [](In in) { return Tensors{at::masked_select(in[0], in[1])}; },
              .make = [=](int64_t) { return two(); },
              .unbatched = {1}});
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

TEST(ScatterRules, Errors) {
  const LevelScope scope({.size = 4});
  const at::Tensor x = lift_alias(at::zeros({4, 3, 6}), 0, scope.level());
  const at::Tensor far = lift_alias(at::zeros({4, 2}, at::kLong) + 6, 0, scope.level());
  EXPECT_THAT(message_of([&] { at::masked_select(x, x.gt(0)); }),
              HasSubstr("torch.where(mask, x, other)"));
  EXPECT_THAT(message_of([&] { at::index_select(x, 1, far); }), HasSubstr("out of bounds"));
  EXPECT_THAT(message_of([&] { at::index_add(x, 1, far, x); }),
              HasSubstr("must have the shape of self"));
  EXPECT_THAT(message_of([&] { at::index_fill(x, 1, far, 0); }), HasSubstr("out of bounds"));
}

TEST(ScatterRules, WriteToUnbatched) {
  at::Tensor plain = at::zeros({6});
  const LevelScope scope({.size = 4});
  const at::Tensor x = lift_alias(at::zeros({4, 6}), 0, scope.level());
  const at::Tensor index = at::zeros({6}, at::kLong);
  EXPECT_THAT(message_of([&] { plain.scatter_(0, index, x); }), HasSubstr("no batch dimension"));
  EXPECT_THAT(message_of([&] { plain.masked_fill_(x.gt(0), 1); }), HasSubstr("no batch dimension"));
}

}  // namespace
}  // namespace torchlift::testing
