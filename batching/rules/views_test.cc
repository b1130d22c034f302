#include <ATen/core/Tensor.h>
#include <ATen/ops/_reshape_alias.h>
#include <ATen/ops/as_strided.h>
#include <ATen/ops/as_strided_scatter.h>
#include <ATen/ops/complex.h>
#include <ATen/ops/diagonal_copy.h>
#include <ATen/ops/diagonal_scatter.h>
#include <ATen/ops/expand_copy.h>
#include <ATen/ops/imag.h>
#include <ATen/ops/real.h>
#include <ATen/ops/select_scatter.h>
#include <ATen/ops/slice_scatter.h>
#include <ATen/ops/unsafe_split.h>
#include <ATen/ops/view_as_complex.h>
#include <ATen/ops/view_as_real.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "batching/rules/strides.h"
#include "batching/testing/rule_check.h"
#include "batching/vmap.h"
#include "core/level.h"
#include "core/lifted_tensor.h"
#include "core/tensor_operators.h"
#include "core/testing.h"

namespace torchlift::testing {
namespace {

using ::testing::HasSubstr;

struct ViewCase {
  std::string name;
  std::vector<int64_t> sizes;
  std::function<at::Tensor(const at::Tensor&)> view;
};

std::vector<ViewCase> views() {
  using T = const at::Tensor&;
  return {
      {"view",
       {4, 6},
       [](T x) {
         return x.reshape({2, 2, -1});
       }},
      {"view of one example",
       {4, 6},
       [](T x) {
         return x.contiguous().view({2, -1, 6});
       }},
      {"view to 0-d", {1}, [](T x) { return x.view(at::IntArrayRef{}); }},
      {"view from 0-d",
       {},
       [](T x) {
         return x.view({1, -1});
       }},
      {"flatten", {2, 3, 4}, [](T x) { return x.flatten(1); }},
      {"unflatten",
       {2, 12},
       [](T x) {
         return x.unflatten(-1, at::IntArrayRef({3, -1}));
       }},
      {"expand",
       {2, 1},
       [](T x) {
         return x.expand({3, -1, 5});
       }},
      {"expand of 0-d",
       {},
       [](T x) {
         return x.expand({2, 3});
       }},
      {"expand same rank",
       {2, 1},
       [](T x) {
         return x.expand({-1, 4});
       }},
      {"select", {3, 4, 5}, [](T x) { return x.select(-2, -1); }},
      {"select 1-d", {3}, [](T x) { return x.select(0, 1); }},
      {"slice", {3, 7}, [](T x) { return x.slice(-1, 1, -1, 2); }},
      {"narrow", {3, 7}, [](T x) { return x.narrow(0, 1, 2); }},
      {"unsqueeze 0", {3, 7}, [](T x) { return x.unsqueeze(0); }},
      {"unsqueeze 1", {3, 7}, [](T x) { return x.unsqueeze(1); }},
      {"unsqueeze -1", {3, 7}, [](T x) { return x.unsqueeze(-1); }},
      {"unsqueeze 0-d", {}, [](T x) { return x.unsqueeze(-1); }},
      {"squeeze", {1, 3, 1}, [](T x) { return x.squeeze(); }},
      {"squeeze none", {2, 3}, [](T x) { return x.squeeze(); }},
      {"squeeze 0-d", {}, [](T x) { return x.squeeze(0); }},
      {"squeeze dim", {1, 3, 1}, [](T x) { return x.squeeze(-1); }},
      {"squeeze dim of other size", {1, 3, 1}, [](T x) { return x.squeeze(1); }},
      {"squeeze dims",
       {1, 3, 1},
       [](T x) {
         return x.squeeze(at::IntArrayRef({0, 1, -1}));
       }},
      {"t", {3, 4}, [](T x) { return x.t(); }},
      {"t 1-d", {3}, [](T x) { return x.t(); }},
      {"transpose", {3, 4, 5}, [](T x) { return x.transpose(0, -1); }},
      {"transpose 0-d", {}, [](T x) { return x.transpose(0, -1); }},
      {"permute",
       {3, 4, 5},
       [](T x) {
         return x.permute({2, 0, -2});
       }},
      {"movedim", {3, 4, 5}, [](T x) { return x.movedim(0, 2); }},
      {"mT", {2, 3, 4}, [](T x) { return x.mT(); }},
      {"diagonal", {3, 4, 5}, [](T x) { return x.diagonal(1, -1, 0); }},
      {"unfold", {3, 7}, [](T x) { return x.unfold(-1, 3, 2); }},
      {"unfold 0-d", {}, [](T x) { return x.unfold(0, 1, 1); }},
      {"as_strided",
       {4, 6},
       [](T x) {
         return x.contiguous().as_strided({3, 2}, {7, 2}, x.contiguous().storage_offset() + 1);
       }},
      {"alias", {3}, [](T x) { return x.view_as(x); }},
  };
}

RuleCase reading(const ViewCase& v) {
  return {.name = v.name,
          .f = [=](const Tensors& in) { return Tensors{v.view(in[0]) * 2}; },
          .make = [=](int64_t) { return Tensors{randn(v.sizes)}; }};
}

TEST(ViewRules, Reading) {
  for (const ViewCase& v : views()) {
    RuleCase c = reading(v);
    c.second_order = v.name == "select" || v.name == "view" || v.name == "diagonal";
    check_rule(c);
  }
}

// What is written through a view of a copy must be found in the copy; in the gradient too.
TEST(ViewRules, WritingThrough) {
  for (const ViewCase& v : views()) {
    if (v.name.find("expand") == 0) continue;  // one place in memory for several elements
    if (v.name == "unfold" || v.name == "view") continue;  // the same; reshape may copy
    check_rule({.name = "write through " + v.name,
                .f =
                    [=](const Tensors& in) {
                      const at::Tensor base = in[0].clone(at::MemoryFormat::Contiguous);
                      v.view(base).mul_(3);
                      return Tensors{base * in[0], v.view(base)};
                    },
                .make = [=](int64_t) { return Tensors{randn(v.sizes)}; }});
  }
}

TEST(ViewRules, WritingBatchedValuesThrough) {
  check_rule({.name = "several writes",
              .f =
                  [](const Tensors& in) {
                    at::Tensor y = in[0].clone();
                    y.select(0, 0).mul_(2);
                    y.slice(0, 1, 3).fill_(0);
                    y.t().select(0, 1).add_(in[1]);
                    y.select(0, 3).copy_(in[1].slice(0, 0, 3));
                    return Tensors{y};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({4, 3}), randn({4})};
                  },
              .always_batched = {0}});
}

TEST(ViewRules, Splits) {
  struct Split {
    std::string name;
    std::function<Tensors(const at::Tensor&)> f;
  };
  using T = const at::Tensor&;
  const std::vector<Split> splits = {
      {"split", [](T x) { return x.split(2, -1); }},
      {"split_with_sizes",
       [](T x) {
         return x.split_with_sizes({1, 4, 0}, 1);
       }},
      {"split sizes",
       [](T x) {
         return x.split({2, 3}, 1);
       }},
      {"unsafe_split", [](T x) { return at::unsafe_split(x, 2, 1); }},
      {"unbind", [](T x) { return x.unbind(0); }},
      {"unbind last", [](T x) { return x.unbind(-1); }},
      {"chunk", [](T x) { return x.chunk(3, 1); }},
      {"tensor_split", [](T x) { return x.tensor_split(3, 1); }},
      {"tensor_split indices",
       [](T x) {
         return x.tensor_split({1, 4}, 1);
       }},
  };
  for (const Split& s : splits) {
    check_rule({.name = s.name,
                .f = [=](const Tensors& in) { return s.f(in[0]); },
                .make =
                    [](int64_t) {
                      return Tensors{randn({3, 5})};
                    }});
  }
}

TEST(ViewRules, MetadataInPlace) {
  struct InPlace {
    std::string name;
    std::function<void(at::Tensor&)> f;
  };
  const std::vector<InPlace> cases = {
      {"squeeze_", [](at::Tensor& y) { y.squeeze_(); }},
      {"squeeze_ dim", [](at::Tensor& y) { y.squeeze_(0); }},
      {"squeeze_ dims",
       [](at::Tensor& y) {
         y.squeeze_(at::IntArrayRef({0, 2}));
       }},
      {"unsqueeze_", [](at::Tensor& y) { y.unsqueeze_(1); }},
      {"transpose_", [](at::Tensor& y) { y.transpose_(0, -1); }},
      {"as_strided_", [](at::Tensor& y) { y.as_strided_({2}, {1}, 1); }},
      {"resize_ to its size", [](at::Tensor& y) { y.resize_(y.sizes()); }},
      {"resize_ to another shape", [](at::Tensor& y) { y.resize_({3}); }},
      {"resize_ to fewer numbers",
       [](at::Tensor& y) {
         y.resize_({2, 1});
       }},
      {"resize_ to none",
       [](at::Tensor& y) {
         y.resize_({0, 4});
       }},
      {"resize_ to more numbers",
       [](at::Tensor& y) {
         y.resize_({2, 4});
         y.view({8}).narrow(0, 3, 5).fill_(0.5);
       }},
  };
  for (const InPlace& each : cases) {
    check_rule({.name = each.name,
                .f =
                    [=](const Tensors& in) {
                      at::Tensor y = in[0].clone(at::MemoryFormat::Contiguous);
                      if (each.name.find("resize") == 0) y = y.detach();
                      each.f(y);
                      return Tensors{y * 2};
                    },
                .make =
                    [](int64_t) {
                      return Tensors{randn({1, 3, 1})};
                    },
                .differentiable = each.name.find("resize") != 0});
  }
}

// What is left of a tensor shares its memory, as without vmap; more memory moves, which nobody else
// may miss.
TEST(ViewRules, ResizeAndAliases) {
  const at::Tensor xs = randn({3, 4});
  vmap([](const at::Tensor& x) {
    at::Tensor part = x.detach();
    part.resize_({2});
    part.mul_(0);
    return x;
  })(xs);
  EXPECT_EQ(xs.narrow(1, 0, 2).abs().sum().item<double>(), 0);
  EXPECT_NE(xs.narrow(1, 2, 2).abs().min().item<double>(), 0);
  const auto grows = [](const at::Tensor& x) {
    at::Tensor part = x.detach();
    return part.resize_({5});
  };
  EXPECT_THAT(error_of([&] { vmap(grows)(xs); }), ::testing::HasSubstr("x.clone().resize_(size)"));
  const auto held = [](const at::Tensor& x) {
    at::Tensor y = x * 2;
    const at::Tensor view = y.narrow(0, 0, 2);
    y.resize_({5});
    return view;
  };
  EXPECT_THAT(error_of([&] { vmap(held)(xs); }), ::testing::HasSubstr("other tensors share it"));
}

TEST(ViewRules, Scatters) {
  using In = const Tensors&;
  check_rule({.name = "select_scatter",
              .f = [](In in) { return Tensors{at::select_scatter(in[0], in[1], -1, 1)}; },
              .make =
                  [](int64_t) {
                    return Tensors{randn({3, 4}), randn({3})};
                  }});
  check_rule({.name = "slice_scatter",
              .f = [](In in) { return Tensors{at::slice_scatter(in[0], in[1], 1, 0, 4, 2)}; },
              .make =
                  [](int64_t) {
                    return Tensors{randn({3, 4}), randn({3, 2})};
                  }});
  check_rule({.name = "diagonal_scatter",
              .f = [](In in) { return Tensors{at::diagonal_scatter(in[0], in[1])}; },
              .make =
                  [](int64_t) {
                    return Tensors{randn({3, 4}), randn({3})};
                  }});
  check_rule(
      {.name = "as_strided_scatter",
       .f =
           [](In in) {
             return Tensors{at::as_strided_scatter(in[0].contiguous(), in[1], {2, 2}, {5, 1})};
           },
       .make =
           [](int64_t) {
             return Tensors{randn({3, 4}), randn({2, 2})};
           },
       .differentiable = false});
}

TEST(ViewRules, Complex) {
  const auto make = [](int64_t) { return Tensors{randn({3, 2}), randn({3, 2})}; };
  using In = const Tensors&;
  check_rule({.name = "real and imag",
              .f =
                  [](In in) {
                    const at::Tensor z = at::complex(in[0], in[1]);
                    return Tensors{at::real(z) + 2 * at::imag(z),
                                   at::real(z.conj()) * at::imag(z.conj()),
                                   at::view_as_real(z).select(-1, 1) * 2};
                  },
              .make = make});
  check_rule(
      {.name = "view_as_complex",
       .f = [](In in) { return Tensors{at::real(at::view_as_complex(in[0].contiguous()) * 2)}; },
       .make = make,
       .unbatched = {1}});
}

TEST(ViewRules, Copies) {
  check_rule({.name = "copies of views",
              .f =
                  [](const Tensors& in) {
                    return Tensors{at::expand_copy(in[0], {2, 3, 4}), at::diagonal_copy(in[0], 1)};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({3, 4})};
                  }});
}

TEST(ViewRules, ViewsShareMemory) {
  const LevelScope scope({.size = 4});
  const at::Tensor value = at::zeros({4, 2, 3});
  const at::Tensor x = lift_alias(value, 0, scope.level());
  x.select(0, 1).fill_(7);
  x.t().slice(0, 0, 1).add_(1);
  EXPECT_TRUE(value.select(1, 1).slice(-1, 1).eq(7).all().item<bool>());
  EXPECT_TRUE(value.select(2, 0).select(1, 0).eq(1).all().item<bool>());
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

TEST(ViewRules, Errors) {
  const LevelScope scope({.size = 4});
  const at::Tensor x = lift_alias(at::zeros({4, 6}), 0, scope.level());
  const at::Tensor scalar = x.select(0, 0);
  const at::Tensor interleaved = lift_alias(at::zeros({6, 4}), 1, scope.level());
  EXPECT_THAT(message_of([&] { scalar.select(0, 0); }), HasSubstr("0-dim tensor"));
  EXPECT_THAT(message_of([&] { x.view({5}); }),
              HasSubstr("shape '[5]' is invalid for input of size 6"));
  EXPECT_THAT(message_of([&] {
                x.expand({-1, 6});
              }),
              HasSubstr("leading, non-existing dimension 0"));
  EXPECT_THAT(message_of([&] { x.permute({0, 1}); }), HasSubstr("has 1 dimensions"));
  EXPECT_THAT(message_of([&] { x.as_strided({3}, {1}, 5); }),
              HasSubstr("memory of other examples"));
  EXPECT_THAT(message_of([&] { interleaved.as_strided({3}, {1}, 0); }),
              HasSubstr("Call .contiguous() first"));
  EXPECT_THAT(message_of([&] { x.resize_({2, 4}); }), HasSubstr("resize_() cannot change"));
  EXPECT_THAT(message_of([&] { x.clone().set_(at::zeros({3})); }), HasSubstr("set_() cannot give"));
}

TEST(ViewRules, WriteToUnbatched) {
  at::Tensor plain = at::zeros({3, 6});
  const LevelScope scope({.size = 4});
  const at::Tensor x = lift_alias(at::zeros({4, 6}), 0, scope.level());
  EXPECT_THAT(message_of([&] { plain.select(0, 0).copy_(x); }), HasSubstr("no batch dimension"));
  EXPECT_THAT(message_of([&] { plain.select(1, 0).fill_(x.select(0, 0)); }),
              HasSubstr("no batch dimension"));
}

// Strides of examples 24 apart, each [4, 6].
TEST(Strides, Reachable) {
  const Strided example{{4, 6}, {6, 1}, 0};
  EXPECT_TRUE(reachable(example, {{24}, {1}, 0}, 24));
  EXPECT_FALSE(reachable(example, {{24}, {1}, 1}, 24));
  // [5, 5] with room for others in between: its diagonals, but not from row to row.
  const Strided spread{{5, 5}, {12, 120}, 0};
  EXPECT_TRUE(reachable(spread, {{5}, {132}, 0}, 2));
  EXPECT_TRUE(reachable(spread, {{4}, {132}, 12}, 2));
  EXPECT_TRUE(reachable(spread, {{2, 3}, {12, 132}, 0}, 2));
  EXPECT_FALSE(reachable(spread, {{5}, {132}, 12}, 2));
  EXPECT_FALSE(reachable(spread, {{2, 5}, {12, 132}, 0}, 2));
  EXPECT_FALSE(reachable(spread, {{5}, {134}, 0}, 2));
  EXPECT_FALSE(reachable(spread, {{6}, {12}, 0}, 2));
  EXPECT_TRUE(reachable(example, {{0}, {1}, 100}, 24));
  // Interleaved: only boxes of the example are safe.
  const Strided apart{{4, 6}, {18, 3}, 0};
  EXPECT_TRUE(reachable(apart, {{2, 3}, {18, 6}, 21}, 1));
  EXPECT_TRUE(reachable(apart, {{6, 4}, {3, 18}, 0}, 1));
  EXPECT_TRUE(reachable(apart, {{7}, {3}, 0}, 1));    // runs over the end of a row
  EXPECT_TRUE(reachable(apart, {{4}, {21}, 0}, 1));   // a diagonal
  EXPECT_FALSE(reachable(apart, {{25}, {3}, 0}, 1));  // past the end
  EXPECT_FALSE(reachable(apart, {{24}, {3}, 3}, 1));
  const Strided rows{{4, 5}, {18, 3}, 0};  // with a gap after each row
  EXPECT_FALSE(reachable(rows, {{7}, {3}, 0}, 1));
  EXPECT_FALSE(reachable(apart, {{2}, {1}, 0}, 1));
  // Rows that lie end to end, of which others lie between: [2, 5] of every third.
  const Strided blocks{{4, 2, 5}, {30, 5, 1}, 0};
  EXPECT_TRUE(reachable(blocks, {{4, 4}, {30, 1}, 3}, 10));
  EXPECT_FALSE(reachable(blocks, {{4, 8}, {30, 1}, 3}, 10));
}

}  // namespace
}  // namespace torchlift::testing
