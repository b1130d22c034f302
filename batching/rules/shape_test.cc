#include <ATen/core/Tensor.h>
#include <ATen/ops/_chunk_cat.h>
#include <ATen/ops/block_diag.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/channel_shuffle.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/diag_embed.h>
#include <ATen/ops/flip.h>
#include <ATen/ops/hstack.h>
#include <ATen/ops/meshgrid.h>
#include <ATen/ops/pixel_shuffle.h>
#include <ATen/ops/pixel_unshuffle.h>
#include <ATen/ops/reflection_pad1d.h>
#include <ATen/ops/reflection_pad2d.h>
#include <ATen/ops/reflection_pad3d.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/replication_pad1d.h>
#include <ATen/ops/replication_pad2d.h>
#include <ATen/ops/replication_pad3d.h>
#include <ATen/ops/roll.h>
#include <ATen/ops/rot90.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tile.h>
#include <ATen/ops/tril.h>
#include <ATen/ops/triu.h>
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

struct Unary {
  std::string name;
  std::vector<int64_t> sizes;
  std::function<at::Tensor(const at::Tensor&)> f;
};

void check_all(const std::vector<Unary>& cases) {
  for (const Unary& each : cases) {
    check_rule({.name = each.name,
                .f = [=](In in) { return Tensors{each.f(in[0])}; },
                .make = [=](int64_t) { return Tensors{randn(each.sizes)}; }});
  }
}

using T = const at::Tensor&;

TEST(ShapeRules, OrderAndRepetition) {
  check_all({
      {"flip",
       {3, 4, 2},
       [](T x) {
         return at::flip(x, {0, -1});
       }},
      {"flip 0-d", {}, [](T x) { return at::flip(x, {}); }},
      {"roll",
       {3, 4},
       [](T x) {
         return at::roll(x, {1, -2}, {0, 1});
       }},
      {"roll all", {3, 4}, [](T x) { return at::roll(x, 5); }},
      {"rot90",
       {3, 4, 2},
       [](T x) {
         return at::rot90(x, 1, {0, -1});
       }},
      {"repeat",
       {3, 1},
       [](T x) {
         return x.repeat({2, 1, 4});
       }},
      {"repeat same rank",
       {3, 2},
       [](T x) {
         return x.repeat({2, 3});
       }},
      {"repeat 0-d",
       {},
       [](T x) {
         return x.repeat({2, 3});
       }},
      {"tile", {3, 2}, [](T x) { return at::tile(x, {2}); }},
      {"repeat_interleave", {3, 2}, [](T x) { return at::repeat_interleave(x, 2, 1); }},
      {"meshgrid",
       {3},
       [](T x) {
         return at::meshgrid({x, x * 2}, "ij")[1];
       }},
  });
}

TEST(ShapeRules, Matrices) {
  check_all({
      {"tril", {3, 4}, [](T x) { return at::tril(x, -1); }},
      {"triu", {2, 3, 4}, [](T x) { return at::triu(x, 1); }},
      {"tril_", {3, 4}, [](T x) { return x.clone().tril_(); }},
      {"triu_", {3, 4}, [](T x) { return x.clone().triu_(-1); }},
      {"diag_embed", {3, 4}, [](T x) { return at::diag_embed(x, 1, 0, -1); }},
      {"diag", {4}, [](T x) { return x.diag(); }},
      {"diagflat", {2, 2}, [](T x) { return x.diagflat(); }},
  });
}

TEST(ShapeRules, Pads) {
  check_all({
      {"constant_pad_nd",
       {3, 4},
       [](T x) {
         return at::constant_pad_nd(x, {1, 2}, 5);
       }},
      {"constant_pad_nd all dims",
       {3, 4},
       [](T x) {
         return at::constant_pad_nd(x, {1, -1, 0, 2}, 5);
       }},
      {"reflection_pad1d",
       {2, 4},
       [](T x) {
         return at::reflection_pad1d(x, {2, 1});
       }},
      {"reflection_pad1d images",
       {3, 2, 4},
       [](T x) {
         return at::reflection_pad1d(x, {2, 1});
       }},
      {"reflection_pad2d",
       {2, 4, 3},
       [](T x) {
         return at::reflection_pad2d(x, {2, 1, 1, 0});
       }},
      {"reflection_pad2d images",
       {3, 2, 4, 3},
       [](T x) {
         return at::reflection_pad2d(x, {2, 1, 1, 0});
       }},
      {"reflection_pad3d images",
       {3, 2, 2, 2, 2},
       [](T x) {
         return at::reflection_pad3d(x, {1, 1, 1, 0, 0, 1});
       }},
      {"replication_pad1d",
       {2, 4},
       [](T x) {
         return at::replication_pad1d(x, {2, 1});
       }},
      {"replication_pad2d images",
       {3, 2, 4, 3},
       [](T x) {
         return at::replication_pad2d(x, {2, 1, 1, 0});
       }},
      {"replication_pad3d",
       {2, 2, 2, 2},
       [](T x) {
         return at::replication_pad3d(x, {1, 1, 1, 0, 0, 1});
       }},
  });
}

TEST(ShapeRules, Shuffles) {
  check_all({
      {"pixel_shuffle", {2, 4, 3, 2}, [](T x) { return at::pixel_shuffle(x, 2); }},
      {"pixel_unshuffle", {2, 4, 2}, [](T x) { return at::pixel_unshuffle(x, 2); }},
  });
  check_rule({.name = "channel_shuffle",
              .f = [](In in) { return Tensors{at::channel_shuffle(in[0], 2)}; },
              .make =
                  [](int64_t) {
                    return Tensors{randn({3, 4, 2, 2})};
                  },
              .differentiable = false});
}

TEST(ShapeRules, Joining) {
  const auto pair = [](int64_t) { return Tensors{randn({3, 4}), randn({3, 4})}; };
  check_rule({.name = "cat",
              .f =
                  [](In in) {
                    return Tensors{at::cat({in[0], in[1], in[0]}, -1)};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({3, 4}), randn({3, 2})};
                  },
              .second_order = true});
  check_rule({.name = "cat with an empty one of another rank",
              .f =
                  [](In in) {
                    return Tensors{at::cat({in[0], in[1]}, 1)};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({3, 4}), randn({0})};
                  },
              .differentiable = false});
  check_rule({.name = "cat promotes",
              .f =
                  [](In in) {
                    return Tensors{at::cat({in[0], in[1]})};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({3}), integers(0, 9, {2})};
                  }});
  for (const int64_t dim : {0, 1, -1}) {
    check_rule({.name = "stack at " + std::to_string(dim),
                .f =
                    [=](In in) {
                      return Tensors{at::stack({in[0], in[1]}, dim)};
                    },
                .make = pair});
  }
  check_rule({.name = "stack of 0-d",
              .f =
                  [](In in) {
                    return Tensors{at::stack({in[0], in[1]})};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({}), randn({})};
                  }});
  check_rule({.name = "hstack", .f = [](In in) { return Tensors{at::hstack(in)}; }, .make = pair});
  for (const int64_t dim : {0, 1}) {  // 5 and 3 rows or columns, of which 2 chunks are padded
    check_rule({.name = "_chunk_cat",
                .f =
                    [=](In in) {
                      return Tensors{at::_chunk_cat({in[0], in[1]}, dim, 2)};
                    },
                .make =
                    [=](int64_t) {
                      return dim == 0 ? Tensors{randn({5, 2}), randn({3})}
                                      : Tensors{randn({2, 5, 2}), randn({2, 3})};
                    },
                .differentiable = false});
  }
  check_rule({.name = "block_diag",
              .f =
                  [](In in) {
                    return Tensors{at::block_diag({in[0], in[1], in[2]})};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({2, 3}), randn({2}), randn({})};
                  }});
}

template <class F>
std::string message_of(F f) {
  try {
    f();
  } catch (const c10::Error& e) {
    return e.what_without_backtrace();
  }
  return "no error";
}

TEST(ShapeRules, Errors) {
  const LevelScope scope({.size = 4});
  const at::Tensor x = lift_alias(at::zeros({4, 6}), 0, scope.level());
  const at::Tensor scalar = x.select(0, 0);
  EXPECT_THAT(message_of([&] { at::tril(x); }), HasSubstr("at least 2 dimensions"));
  EXPECT_THAT(message_of([&] { at::cat({scalar, scalar}); }), HasSubstr("zero-dimensional tensor"));
  EXPECT_THAT(message_of([&] {
                at::constant_pad_nd(x, {1, 1, 1, 1});
              }),
              HasSubstr("Length of pad"));
  EXPECT_THAT(message_of([&] { at::reflection_pad2d(x, {1, 1, 1, 1}); }), HasSubstr("but got 1D"));
  EXPECT_THAT(message_of([&] { at::pixel_shuffle(x, 2); }), HasSubstr("at least 3 dimensions"));
}

}  // namespace
}  // namespace torchlift::testing
