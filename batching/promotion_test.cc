#include "core/promotion.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/add.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/complex.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/full.h>
#include <ATen/ops/imag.h>
#include <ATen/ops/linspace.h>
#include <ATen/ops/max.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/view_as_real.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <string>
#include <vector>

#include "batching/fallback.h"
#include "batching/vmap.h"
#include "core/tensor_operators.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using ::testing::HasSubstr;

using Function = std::function<at::Tensor(const at::Tensor&)>;

at::Tensor randn(at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); }
at::Tensor zeros(at::IntArrayRef sizes) { return at::zeros(sizes, at::kDouble); }

at::Tensor looped(const Function& f, const at::Tensor& x) {
  std::vector<at::Tensor> rows;
  for (int64_t i = 0; i < x.size(0); ++i) rows.push_back(f(x[i]));
  return at::stack(rows);
}

at::Tensor gradient(const Function& f, const at::Tensor& x) {
  const at::Tensor leaf = x.detach().requires_grad_(true);
  const at::Tensor out = f(leaf.clone());
  const at::Tensor weights = at::arange(out.numel(), at::kDouble).cos().view(out.sizes());
  return torch::autograd::grad({(out * weights).sum()}, {leaf})[0];
}

// f is plain libtorch code, so a loop over the examples tells what is right: in one level, in two
// (the outer, the inner, or both batched), and its gradient inside and outside.
void check(const Function& f, at::IntArrayRef shape) {
  std::vector<int64_t> sizes{3};
  sizes.insert(sizes.end(), shape.begin(), shape.end());
  const at::Tensor x = randn(sizes);
  EXPECT_CLOSE(vmap(f)(x), looped(f, x));
  sizes.insert(sizes.begin(), 2);
  const at::Tensor xx = randn(sizes);
  const Function rows = [&](const at::Tensor& each) { return looped(f, each); };
  EXPECT_CLOSE(vmap(vmap(f))(xx), looped(rows, xx));
  const Function of_gradient = [&](const at::Tensor& each) { return gradient(f, each); };
  EXPECT_CLOSE(vmap(of_gradient)(x), looped(of_gradient, x));
  const Function mapped = [&](const at::Tensor& each) { return at::Tensor(vmap(f)(each)); };
  EXPECT_CLOSE(gradient(mapped, x), gradient(rows, x));
  EXPECT_CLOSE(vmap([&](const at::Tensor& each) { return gradient(mapped, each); })(xx),
               looped([&](const at::Tensor& each) { return gradient(rows, each); }, xx));
}

TEST(Promotion, WriteIntoZeros) {
  check(
      [](const at::Tensor& x) {
        at::Tensor z = zeros({5});
        z[0] = x[0];
        z[3] = x[1] * x[0];
        return z * z + 1;
      },
      {2});
}

TEST(Promotion, EveryFactory) {
  const at::Tensor captured = randn({2, 3});
  const std::vector<std::function<at::Tensor()>> factories{
      [] {
        return zeros({2, 3});
      },
      [] {
        return at::ones({2, 3}, at::kDouble);
      },
      [] {
        return at::full({2, 3}, 4.0, at::kDouble);
      },
      [] { return at::eye(3, at::kDouble).slice(0, 1); },
      [] {
        return at::linspace(0, 1, 6, at::kDouble).view({2, 3});
      },
      [] {
        return at::arange(6, at::kDouble).view({2, 3});
      },
      [] {
        return at::zeros({2, 3}, at::kDouble);
      },
      [&] { return at::ones_like(captured); },
      [&] {
        return captured.new_zeros({2, 3});
      },
      [&] {
        return captured.new_empty({2, 3}).fill_(3);
      },
      [&] { return at::empty_like(captured).fill_(3); },
      [&] { return captured.clone(); },
      [&] { return captured.t().clone().t(); }};
  for (const auto& make : factories) {
    check(
        [&](const at::Tensor& x) {
          at::Tensor z = make();
          z.select(1, 1).mul_(x);
          return z.sin();
        },
        {2});
  }
}

TEST(Promotion, ViewsMadeBeforeTheWrite) {
  check(
      [](const at::Tensor& x) {
        at::Tensor z = zeros({4, 3});
        const at::Tensor row = z[1];
        const at::Tensor columns = z.t().slice(0, 0, 2);
        at::Tensor flat = z.view({12}).slice(0, 2, 7);
        flat.add_(x);
        return at::stack({z.sum(), row.sum(), (columns * columns).sum(), flat.prod()});
      },
      {5});
}

TEST(Promotion, OnlyAViewIsKept) {
  check(
      [](const at::Tensor& x) {
        at::Tensor z = zeros({6}).view({2, 3}).t();
        z[0].copy_(x);
        return z.cos();
      },
      {2});
}

TEST(Promotion, WritesOfSharedValuesBeforeAndAfter) {
  const at::Tensor w = randn({4});
  check(
      [&](const at::Tensor& x) {
        at::Tensor z = zeros({4});
        z.add_(w);
        const at::Tensor view = z.slice(0, 1, 3);
        z.mul_(x);
        z.sub_(w);
        return z + view.sum();
      },
      {4});
}

// A captured tensor that autograd tracks is written into z before z has a batch dim.
TEST(Promotion, GradientOfWhatWasWrittenBefore) {
  const at::Tensor x = randn({3, 2});
  const at::Tensor w = randn({2});
  const auto of = [&](const std::function<at::Tensor(const Function&)>& map) {
    const at::Tensor leaf = w.detach().requires_grad_(true);
    const at::Tensor out = map([&](const at::Tensor& each) {
      at::Tensor z = zeros({4});
      z.slice(0, 0, 2).copy_(leaf * 2);
      z.slice(0, 1, 3).add_(each);
      return z * z;
    });
    return torch::autograd::grad({(out * out).sum()}, {leaf})[0];
  };
  EXPECT_CLOSE(of([&](const Function& f) { return at::Tensor(vmap(f)(x)); }),
               of([&](const Function& f) { return looped(f, x); }));
}

// no_grad() around a write does not make a constant of what z held before.
TEST(Promotion, WriteWithoutGradient) {
  const at::Tensor w = randn({2});
  const auto of = [&](const std::function<at::Tensor(const Function&)>& map) {
    const at::Tensor leaf = w.detach().requires_grad_(true);
    const at::Tensor out = map([&](const at::Tensor& each) {
      at::Tensor z = zeros({3});
      z.slice(0, 0, 2).copy_(leaf * 2);
      {
        const at::NoGradGuard constant;
        z[2] = each[0];
      }
      z[2].mul_(leaf[0]);
      return z * z;
    });
    return torch::autograd::grad({(out * out).sum()}, {leaf})[0];
  };
  const at::Tensor x = randn({3, 2});
  EXPECT_CLOSE(of([&](const Function& f) { return at::Tensor(vmap(f)(x)); }),
               of([&](const Function& f) { return looped(f, x); }));
}

TEST(Promotion, ViewsOfAnotherType) {
  check(
      [](const at::Tensor& x) {
        at::Tensor z = at::zeros({4}, at::kComplexDouble);
        at::Tensor parts = at::view_as_real(z);
        const at::Tensor mirrored = z.conj();
        parts[0].copy_(x);
        z[1] = at::complex(x[1], x[0]);
        return at::view_as_real(z + mirrored * 2).sum(0) + parts[1] + at::imag(mirrored)[1];
      },
      {2});
  const Function bits = [](const at::Tensor& x) {
    at::Tensor z = zeros({4});
    const at::Tensor whole = z.view(at::kLong);
    const at::Tensor halves = z.view(at::kInt);
    z[1] = x[0];
    return at::stack({whole.sum().to(at::kDouble), halves.slice(0, 3).sum().to(at::kDouble)});
  };
  const at::Tensor x = randn({3, 2});
  EXPECT_CLOSE(vmap(bits)(x), looped(bits, x));
}

// Autograd's own record of such a view of such a view cannot be counted.
TEST(Promotion, ViewsOfAnotherTypeOfThose) {
  const auto f = [](const at::Tensor& x) {
    at::Tensor z = at::zeros({4}, at::kComplexDouble);
    at::imag(z.conj())[2].copy_(x[0]);
    return at::view_as_real(z).sum(1) * x[1];
  };
  EXPECT_THAT(error_of([&] { vmap(f)(randn({3, 2})); }), HasSubstr("no batch dim"));
}

TEST(Promotion, EmptyBatchAndNoElements) {
  const auto f = [](const at::Tensor& x) {
    at::Tensor z = zeros({2, 0});
    at::Tensor y = zeros({5});
    z.copy_(x.slice(0, 0, 0).expand({2, 0}));
    y[1] = x[0];
    return y + z.sum();
  };
  EXPECT_CLOSE(vmap(f)(randn({0, 3})), zeros({0, 5}));
  const at::Tensor x = randn({1, 3});
  EXPECT_CLOSE(vmap(f)(x), looped(f, x));
}

TEST(Promotion, IndexPutScatterAndTheLoop) {
  const at::Tensor where = at::arange(2);
  check(
      [&](const at::Tensor& x) {
        at::Tensor z = zeros({4});
        z.index_put_({where}, x);
        z.scatter_add_(0, where + 1, x);
        z.index_add_(0, where + 2, x);
        z.put_(where, x * x, /*accumulate=*/true);
        return z;
      },
      {2});
}

TEST(Promotion, OutForms) {
  const Function f = [](const at::Tensor& x) {
    at::Tensor z = zeros({2});
    at::add_out(z, x, x.sin());
    return z;
  };
  const at::Tensor x = randn({3, 2});
  EXPECT_CLOSE(vmap(f)(x), looped(f, x));
}

TEST(Promotion, NestedLevelsBatchedApart) {
  const at::Tensor x = randn({2}), y = randn({3});
  const auto f = [](const at::Tensor& a, const at::Tensor& b) {
    at::Tensor z = zeros({3});
    const at::Tensor last = z.slice(0, 1);
    z[0] = a;
    z[1] = b;
    z[2].add_(a * b);
    return z + last.sum();
  };
  const at::Tensor got = vmap([&](const at::Tensor& a) {
    return at::Tensor(vmap([&](const at::Tensor& b) { return f(a, b); })(y));
  })(x);
  const at::Tensor want = looped(
      [&](const at::Tensor& a) { return looped([&](const at::Tensor& b) { return f(a, b); }, y); },
      x);
  EXPECT_CLOSE(got, want);
}

TEST(Promotion, RandomNumbersInPlace) {
  const VmapOptions options{.randomness = Randomness::kDifferent};
  const at::Tensor draws =
      vmap([](const at::Tensor& x) { return zeros({40}).uniform_() + 0 * x; }, options)(randn({2}));
  EXPECT_FALSE(at::allclose(draws[0], draws[1]));
}

TEST(Promotion, OutFormsOfManyResultsAndShapes) {
  const at::Tensor x = randn({3, 4});
  const StrictScope strict;  // which does not count them as loops
  const Function sorted = [](const at::Tensor& each) {
    at::Tensor values = zeros({4});
    at::Tensor places = at::zeros({4}, at::kLong);
    at::sort_out(values, places, each);
    return values * places;
  };
  EXPECT_CLOSE(vmap(sorted)(x), looped(sorted, x));
  const Function resized = [](const at::Tensor& each) {
    at::Tensor z = zeros({0});
    at::mul_out(z, each, each);
    z[0].add_(each[1]);
    return z;
  };
  EXPECT_CLOSE(vmap(resized)(x), looped(resized, x));
}

// --- what must not be promoted -------------------------------------------------------------------

TEST(Promotion, TensorsFromOutside) {
  const at::Tensor x = randn({3, 5});
  at::Tensor captured = zeros({5});
  at::Tensor tracked = zeros({5}).requires_grad_(true);
  const auto message = HasSubstr("into a tensor of shape [5] that has no batch dimension");
  EXPECT_THAT(error_of([&] { vmap([&](const at::Tensor& a) { return captured.add_(a); })(x); }),
              message);
  EXPECT_THAT(
      error_of([&] { vmap([&](const at::Tensor& a) { return captured.view(5).add_(a); })(x); }),
      message);
  EXPECT_THAT(
      error_of([&] { vmap([&](const at::Tensor& a) { return tracked.detach().add_(a); })(x); }),
      message);
  EXPECT_CLOSE(captured, zeros({5}));
}

TEST(Promotion, OutFormsThatDoNotFit) {
  const at::Tensor x = randn({3, 4});
  at::Tensor captured = zeros({4});
  const auto error = [&](const std::function<at::Tensor()>& make) {
    return error_of([&] {
      vmap([&](const at::Tensor& each) {
        at::Tensor out = make();
        return at::add_out(out, each, each);
      })(x);
    });
  };
  EXPECT_THAT(error([&] { return captured; }), HasSubstr("aten::add writes values that differ"));
  EXPECT_THAT(error([] { return zeros({3}); }),
              HasSubstr("`out` has shape [3], and the result [4]"));
  EXPECT_THAT(error([] { return at::zeros({4}, at::kLong); }), HasSubstr("which has type Long"));
}

// What all examples share may be written there, as without vmap.
TEST(Promotion, SharedValuesIntoTensorsFromOutside) {
  at::Tensor counter = zeros({2});
  const auto f = [&](const at::Tensor& x) {
    counter.add_(at::ones({2}, at::kDouble));
    counter.index_put_({at::arange(1)}, at::full({1}, 5.0, at::kDouble));
    return x + counter;
  };
  const at::Tensor got = vmap(f)(zeros({3, 2}));
  EXPECT_CLOSE(got, at::stack({counter, counter, counter}));
  EXPECT_EQ(counter[0].item<double>(), 5);
  EXPECT_EQ(counter[1].item<double>(), 1);
}

// In an inner function, what the outer one made is from outside.
TEST(Promotion, TensorsFromTheOuterFunction) {
  const at::Tensor x = randn({2, 3});
  const auto outer = [&](const at::Tensor& row) {
    at::Tensor z = zeros({1});
    return at::Tensor(vmap([&](const at::Tensor& each) { return z.add_(each); })(row));
  };
  EXPECT_THAT(error_of([&] { vmap(outer)(x); }), HasSubstr("has no batch dimension"));
}

TEST(Promotion, ATensorSomebodyElseHolds) {
  const at::Tensor x = randn({3, 5});
  at::Tensor value = zeros({5});
  const LevelScope scope({.size = 3});
  at::Tensor z = lift_alias(value, std::nullopt, scope.level());
  const at::Tensor batched = lift_alias(x, 0, scope.level());
  EXPECT_THAT(error_of([&] { z.add_(batched); }), HasSubstr("has no batch dimension"));
  value.reset();
  z.add_(batched);
  EXPECT_CLOSE(lower(z, *scope.level()).value, x);
}

// --- what outlives a level -----------------------------------------------------------------------

TEST(Settling, WhatAllExamplesShareStaysUsable) {
  at::Tensor mask;
  at::Tensor computed;
  const auto f = [&](const at::Tensor& x) {
    if (!mask.defined()) {
      mask = at::ones({5}, at::kDouble);
      computed = mask.add(2);
    }
    return x * mask + computed;
  };
  const at::Tensor x = randn({3, 5});
  EXPECT_CLOSE(vmap(f)(x), x + 3);
  EXPECT_FALSE(is_lifted(mask));
  EXPECT_CLOSE(mask + computed, at::full({5}, 4.0, at::kDouble));
  EXPECT_CLOSE(vmap(f)(x), x + 3);
  mask.detach().add_(1);
  EXPECT_CLOSE(mask, at::full({5}, 2.0, at::kDouble));
}

TEST(Settling, InTheLevelAround) {
  const at::Tensor x = randn({2, 3, 5});
  at::Tensor made;
  const auto inner = [&](const at::Tensor& each) {
    made = zeros({5});
    return each + made;
  };
  const auto outer = [&](const at::Tensor& rows) {
    const at::Tensor mapped = vmap(inner)(rows);
    made.add_(rows[0]);
    return mapped.sum(0) + made;
  };
  EXPECT_CLOSE(vmap(outer)(x), x.sum(1) + x.select(1, 0));
}

// A view stays a view of its base, in both levels around.
TEST(Settling, Views) {
  const at::Tensor x = randn({2, 3, 4});
  at::Tensor base, view, values;
  const auto f = [&](const at::Tensor& each) {
    base = zeros({2, 4});
    view = base.t().slice(1, 0, 1).squeeze(1);
    values = std::get<0>(at::full({2, 4}, 3.0, at::kDouble).max(1));
    return each + view;
  };
  vmap(vmap(f))(x);
  const at::Tensor w = randn({4}).requires_grad_(true);
  view.mul_(w).add_(w);
  EXPECT_TRUE(base.requires_grad());
  EXPECT_CLOSE(base[0], w);
  EXPECT_CLOSE(torch::autograd::grad({(base * base).sum()}, {w})[0], 2 * w.detach());
  EXPECT_CLOSE(values, at::full({2}, 3.0, at::kDouble));
}

TEST(Settling, LeavesAndOutputs) {
  const at::Tensor x = randn({3, 4});
  const at::Tensor w = randn({4}).requires_grad_(true);
  at::Tensor leaf, aside;
  const auto f = [&](const at::Tensor& each) {
    leaf = at::ones({4}, at::kDouble).requires_grad_(true);
    aside = zeros({4});
    aside.add_(w * w);
    return each * w;
  };
  const at::Tensor out = vmap(f)(x);
  EXPECT_CLOSE(torch::autograd::grad({(aside * leaf).sum() + out.sum()}, {w, leaf})[0],
               2 * w.detach() + x.sum(0));
}

TEST(Settling, BatchedTensorsDoNot) {
  at::Tensor escaped;
  vmap([&](const at::Tensor& x) { return escaped = zeros({5}).add_(x); })(randn({3, 5}));
  EXPECT_THAT(error_of([&] { escaped.sin(); }), HasSubstr("vmap level 1 (size 3)"));
}

TEST(Promotion, DataOfAnUnbatchedTensor) {
  vmap([](const at::Tensor& x) {
    const at::Tensor table = at::full({3}, 7.0, at::kDouble);
    EXPECT_EQ(table.data_ptr<double>()[1], 7);
    EXPECT_EQ(table.sum().item<double>(), 21);
    return x;
  })(randn({3}));
}

}  // namespace
}  // namespace torchlift
