#include "autodiff/check_nan.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/linspace.h>
#include <ATen/ops/log.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/masked_fill.h>
#include <ATen/ops/new_empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <ATen/record_function.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "autodiff/checkpoint.h"
#include "autodiff/curvature.h"
#include "autodiff/custom_rules.h"
#include "autodiff/grad.h"
#include "autodiff/jacobian.h"
#include "autodiff/jvp.h"
#include "batching/control_flow.h"
#include "batching/vmap.h"
#include "core/error.h"
#include "core/tensor_operators.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using at::Tensor;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

Tensor vector(std::vector<double> values) { return at::tensor(values, at::kDouble); }

Tensor ones(std::vector<int64_t> sizes) { return at::ones(sizes, at::kDouble); }

// What check_nan(f)(args...) throws.
template <class F, class... Args>
std::string found(const F& f, const Args&... args) {
  std::string text = error_of<NanFound>([&] { check_nan(f)(args...); });
  EXPECT_FALSE(at::hasThreadLocalCallbacks());
  return text;
}

Tensor log_of(const Tensor& x) { return x.log(); }
Tensor sum_of_log(const Tensor& x) { return x.log().sum(); }

TEST(CheckNan, ReturnsTheResult) {
  const Tensor x = vector({1, 2, 3});
  EXPECT_CLOSE(check_nan(log_of)(x), x.log());
  EXPECT_CLOSE(check_nan(vmap(grad(sum_of_log)))(x), 1 / x);
  EXPECT_CLOSE(vmap(check_nan(log_of))(x), x.log());
  bool ran = false;
  check_nan([&] { ran = true; })();
  EXPECT_TRUE(ran);
  const auto [a, b] = check_nan([](const Tensor& t) { return std::pair(t, t + 1); })(x);
  EXPECT_CLOSE(b, a + 1);
  EXPECT_FALSE(at::hasThreadLocalCallbacks());
}

TEST(CheckNan, TheWholeText) {
  EXPECT_EQ(found(log_of, vector({1, -1, -2})),
            "[check_nan] aten::log returned NaN, and no argument of it has any.\n"
            "  arguments: Double [3]\n"
            "  result: Double [3], 2 of 3 elements, the first at [1]\n"
            "  transforms: none\n"
            "  pass: forward");
}

TEST(CheckNan, TheOperatorThatWasCalled) {
  // log_softmax is made of others, and these of rules.
  const Tensor x = vector({-kInf, -kInf});
  const auto f = [](const Tensor& t) { return at::log_softmax(t, 0); };
  EXPECT_THAT(found(f, x), HasSubstr("aten::log_softmax returned NaN"));
  EXPECT_THAT(found(vmap(f), at::stack({vector({0, 0}), x})),
              AllOf(HasSubstr("aten::log_softmax"), HasSubstr("row 1 of vmap level 1 (size 2)")));
}

// --- where ---------------------------------------------------------------------------------------

TEST(CheckNan, RowsOfVmap) {
  Tensor x = ones({8, 3});
  x[5][1].fill_(-1);
  x[7][0].fill_(-1);
  for (const std::string& text :
       {found(vmap(log_of), x), error_of<NanFound>([&] { vmap(check_nan(log_of))(x); })}) {
    EXPECT_EQ(text,
              "[check_nan] aten::log returned NaN, and no argument of it has any.\n"
              "  arguments: Double [3]\n"
              "  result: Double [3], 1 of 3 elements, the first at [1]\n"
              "  where: row 5 of vmap level 1 (size 8) (also in 7)\n"
              "  transforms: vmap level 1 (size 8)\n"
              "  pass: forward");
  }
  EXPECT_THAT(found(vmap(log_of, {.in_dims = 1}), x.t().contiguous()),
              HasSubstr("row 5 of vmap level 1 (size 8)"));
}

TEST(CheckNan, RowsOfNestedVmaps) {
  Tensor x = ones({4, 5, 2});
  x[2][3][1].fill_(-1);
  const auto pairs = [](const Tensor& a) {
    return vmap([&](const Tensor& b) { return (b * a.sum()).log(); })(a);
  };
  EXPECT_THAT(found(vmap(pairs), x),
              AllOf(HasSubstr("aten::log"),
                    HasSubstr("result: Double [2], 1 of 2 elements, the "
                              "first at [1]"),
                    HasSubstr("where: row 2 of vmap level 1 (size 4), row 3 of vmap level 2 "
                              "(size 5)"),
                    HasSubstr("transforms: vmap level 2 (size 5) inside vmap level 1 (size 4)")));
  // The other way around: the dims of the batch are in another order.
  EXPECT_THAT(found(vmap(vmap(log_of), {.in_dims = 1}), x),
              HasSubstr("row 3 of vmap level 1 (size 5), row 2 of vmap level 2 (size 4)"));
}

TEST(CheckNan, RowsOfAChunkCountFromTheFirst) {
  Tensor x = ones({10});
  x[7].fill_(-1);
  EXPECT_THAT(found(vmap(log_of, {.chunk_size = 4}), x),
              HasSubstr("row 7 of vmap level 1 (size 4), whose chunk starts at row 4"));
}

TEST(CheckNan, RowsOfABranchAreThoseOfAllExamples) {
  const Tensor x = vector({1, -1, 2, -2, 3, -3});
  const auto f = [](const Tensor& each) {
    return cond(
        each < 0, [](const Tensor& t) { return (t + 2.5).log(); },
        [](const Tensor& t) { return t; }, each);
  };
  EXPECT_THAT(found(vmap(f), x),
              AllOf(HasSubstr("row 5 of vmap level 1 (size 6)"), Not(HasSubstr("also in"))));
}

TEST(CheckNan, ANanInOneRowHidesNoOther) {
  const Tensor x = vector({1, kNan, -1, 2});
  EXPECT_THAT(found(vmap(log_of), x), AllOf(HasSubstr("row 2 of vmap"), Not(HasSubstr("also"))));
  const auto in_place = [](const Tensor& each) { return each.clone().log_(); };
  EXPECT_THAT(found(vmap(in_place), x), AllOf(HasSubstr("row 2 of vmap"), Not(HasSubstr("also"))));
}

// --- derivatives ---------------------------------------------------------------------------------

// 0/0 in the derivative at 0.
Tensor root_times_zero(const Tensor& x) { return (x.sqrt() * 0).sum(); }

TEST(CheckNan, ReverseMode) {
  const std::string text = found(vmap(grad(root_times_zero)), vector({1, 0, 4}));
  EXPECT_THAT(text, AllOf(HasSubstr("aten::div"), HasSubstr("row 1 of vmap level 1 (size 3)"),
                          HasSubstr("pass: backward, in the formula of SqrtBackward0")));
  // In the function, under the transform that pushes no level.
  EXPECT_THAT(found(vmap(grad(sum_of_log)), vector({1, -1})),
              AllOf(HasSubstr("transforms: reverse mode inside vmap level 1 (size 2)"),
                    HasSubstr("pass: forward")));
  // Forward over reverse, and Taylor mode.
  EXPECT_THAT(found(hessian(root_times_zero), vector({1, 0, 2})),
              AllOf(HasSubstr("aten::sqrt (its derivative in forward mode)"),
                    HasSubstr("transforms: reverse mode inside jacfwd level 1 (size 3)")));
  EXPECT_THAT(found(hessian(root_times_zero), vector({1, 0})),
              AllOf(HasSubstr("aten::sqrt returned NaN"), HasSubstr("hessian level 1")));
  // Only f itself is looked at.
  EXPECT_TRUE(grad(check_nan(root_times_zero))(vector({0})).isnan().item<bool>());
  const Tensor leaf = vector({0}).requires_grad_();
  EXPECT_THAT(found([&] { return torch::autograd::grad({root_times_zero(leaf)}, {leaf})[0]; }),
              HasSubstr("SqrtBackward0"));
}

TEST(CheckNan, WhatAFormulaReplacesIsNone) {
  const auto norm = [](const Tensor& x) { return x.norm(); };
  const Tensor zero = at::zeros({3}, at::kDouble);
  EXPECT_CLOSE(check_nan(grad(norm))(zero), zero);
  EXPECT_CLOSE(check_nan(vmap(grad(norm)))(at::zeros({2, 3}, at::kDouble)),
               at::zeros({2, 3}, at::kDouble));
}

TEST(CheckNan, ForwardMode) {
  const auto along_zero = [](const Tensor& x) {
    return jvp(&root_times_zero, x, at::zeros_like(x));
  };
  const std::string text =
      found([&](const Tensor& x) { return along_zero(x).second; }, vector({0}));
  EXPECT_THAT(text, AllOf(HasSubstr("aten::sqrt (its derivative in forward mode) returned NaN"),
                          HasSubstr("transforms: forward mode")));
  const auto tangent = [&](const Tensor& x) { return along_zero(x).second; };
  EXPECT_THAT(found(vmap(tangent), vector({1, 0})),
              AllOf(HasSubstr("row 1 of vmap level 1 (size 2)"),
                    HasSubstr("transforms: forward mode inside vmap level 1 (size 2)")));
  // A jvp inside another pushes a level.
  const auto twice = [&](const Tensor& x) {
    return jvp([](const Tensor& y) { return jvp(&sum_of_log, y, y).second; }, x, x).second;
  };
  EXPECT_THAT(found(twice, vector({-1})), HasSubstr("transforms: jvp level 1 inside forward mode"));
  EXPECT_THAT(found(jacfwd([](const Tensor& x) {
                      return x.sqrt() * vector({1, 0});
                    }),
                    vector({1, 0})),
              HasSubstr("direction 0 of jacfwd level 1 (size 2)"));
}

TEST(CheckNan, RulesAndCheckpoints) {
  const auto bad_rule = custom_vjp(
      [](const Tensor& x) { return x * 2; }, [](const Tensor& x) { return std::pair(x * 2, x); },
      [](const Tensor& x, const Tensor& g) { return std::tuple(g * (x - 5).log()); });
  const auto loss = [&](const Tensor& x) { return bad_rule(x).sum(); };
  EXPECT_THAT(found(vmap(grad(loss)), vector({9, 1})),
              AllOf(HasSubstr("aten::log"), HasSubstr("row 1 of vmap level 1 (size 2)"),
                    HasSubstr("formula of CustomRuleBackward")));
  const auto kept = [](const Tensor& x) { return checkpoint(&root_times_zero, x); };
  EXPECT_THAT(found(grad(kept), vector({0})), HasSubstr("SqrtBackward0"));
}

// --- what is no finding --------------------------------------------------------------------------

TEST(CheckNan, NansOfTheUser) {
  const Tensor x = vector({1, 2});
  const auto constants = [](const Tensor& t) {
    const Tensor filled = at::full_like(t, kNan) + at::scalar_tensor(kNan, at::kDouble);
    const Tensor masked = at::masked_fill(t, t > 1, kNan);
    return filled + masked + t * kNan + at::where(t > 1, t, kNan) + t.clone().fill_(kNan);
  };
  EXPECT_TRUE(check_nan(constants)(x).isnan().all().item<bool>());
  EXPECT_TRUE(check_nan(vmap(constants))(x).isnan().all().item<bool>());
  EXPECT_TRUE(check_nan(log_of)(vector({kNan, -1})).isnan().all().item<bool>());
}

TEST(CheckNan, MemoryThatIsNotInitialized) {
  const auto dirty = [](const Tensor& x) {
    const Tensor a = at::empty({3}, at::kDouble).fill_(kNan);
    const Tensor b = a.as_strided({3}, {1});  // memory as empty may find it
    return b + x.new_empty({3}).copy_(x) + at::empty({3}, at::kDouble).zero_();
  };
  check_nan(dirty)(ones({3}));
  check_nan(vmap(dirty))(ones({2, 3}));
  // What out= had before is no argument.
  Tensor out = at::full({3}, kNan, at::kDouble);
  EXPECT_THAT(found([&](const Tensor& x) { return at::log_out(out, x); }, -ones({3})),
              HasSubstr("aten::log returned NaN"));
  // But what it has now is no argument either.
  Tensor same = -ones({3});
  EXPECT_THAT(found([&](const Tensor& x) { return at::log_out(same, x); }, same),
              HasSubstr("aten::log returned NaN"));
}

TEST(CheckNan, WritesInPlace) {
  EXPECT_THAT(found([](const Tensor& x) { return x.clone().log_(); }, -ones({2})),
              HasSubstr("aten::log_ returned NaN"));
  const auto promoted = [](const Tensor& x) {
    const Tensor z = at::zeros({2}, at::kDouble);
    z[0] = x;
    return z.log();
  };
  EXPECT_THAT(found(vmap(promoted), vector({1, -1})), HasSubstr("row 1 of vmap level 1 (size 2)"));
}

// --- options, errors, nesting, threads -----------------------------------------------------------

TEST(CheckNan, Infinities) {
  const Tensor zero = vector({1, 0});
  check_nan(log_of)(zero);
  const std::string text =
      error_of<NanFound>([&] { check_nan(vmap(log_of), {.inf = true})(zero); });
  EXPECT_THAT(text, AllOf(HasSubstr("aten::log returned NaN or infinity"), HasSubstr("row 1 of")));
  const auto masked = [](const Tensor& x) {
    return at::log_softmax(at::masked_fill(x, x > 0.5, -kInf), 0).exp();
  };
  check_nan(masked, {.inf = true})(zero);
  EXPECT_THAT(error_of<NanFound>([&] {
                check_nan([](const Tensor& x) { return x.to(at::kHalf); },
                          {.inf = true})(vector({1e6}));
              }),
              HasSubstr("aten::to"));
}

TEST(CheckNan, TheFirstOfSeveral) {
  const auto f = [](const Tensor& x) {
    const Tensor y = x.log();
    return (y + (x - 5).sqrt()).acos();
  };
  EXPECT_THAT(found(f, -ones({2})), HasSubstr("aten::log"));
}

TEST(CheckNan, ErrorsOfTheFunction) {
  const auto fails = [](const Tensor& x) -> Tensor {
    throw std::runtime_error("unrelated" + std::to_string(x.dim()));
  };
  EXPECT_THROW(check_nan(fails)(ones({1})), std::runtime_error);
  EXPECT_FALSE(at::hasThreadLocalCallbacks());
  const auto later = [&](const Tensor& x) { return fails(x.log()); };
  EXPECT_THAT(found(later, -ones({1})),
              AllOf(HasSubstr("aten::log"), HasSubstr("then the function threw: unrelated1")));
  check_nan(log_of)(ones({1}));
}

TEST(CheckNan, Nested) {
  const auto inner = check_nan(log_of);
  EXPECT_THAT(found([&](const Tensor& x) { return inner(x); }, -ones({1})), HasSubstr("aten::log"));
  int caught = 0;
  const auto goes_on = [&](const Tensor& x) {
    try {
      return inner(x);
    } catch (const NanFound&) {
      ++caught;
      return x;
    }
  };
  EXPECT_CLOSE(check_nan(goes_on)(-ones({1})), -ones({1}));
  EXPECT_EQ(caught, 1);
  // The outer one goes on afterwards.
  EXPECT_THAT(found([&](const Tensor& x) { return goes_on(x).sqrt(); }, -ones({1})),
              HasSubstr("aten::sqrt"));
  EXPECT_THAT(found(check_nan(vmap(check_nan(vmap(log_of)))), -ones({2, 3})),
              HasSubstr("row 0 of vmap level 1 (size 2) (also in 1), row 0 of vmap level 2 "
                        "(size 3) (also in 1, 2)"));
}

TEST(CheckNan, Threads) {
  std::vector<std::string> texts(4);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&texts, i] {
      Tensor x = ones({4});
      for (int k = 0; k < 20; ++k) check_nan(vmap(grad(sum_of_log)))(x);
      x[i].fill_(-1);
      try {
        check_nan(vmap(grad(sum_of_log)))(x);
      } catch (const NanFound& error) {
        texts[i] = error.what_without_backtrace();
      }
    });
  }
  // Nobody looks here.
  EXPECT_TRUE((-ones({1})).log().isnan().item<bool>());
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < 4; ++i) {
    EXPECT_THAT(texts[i], HasSubstr("row " + std::to_string(i) + " of vmap level 1 (size 4)"));
  }
}

}  // namespace
}  // namespace torchlift
