#include <ATen/core/Tensor.h>
#include <ATen/ops/addbmm.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/addmv.h>
#include <ATen/ops/addr.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bilinear.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/dot.h>
#include <ATen/ops/einsum.h>
#include <ATen/ops/full.h>
#include <ATen/ops/inner.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensordot.h>
#include <ATen/ops/vdot.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "batching/testing/rule_check.h"
#include "core/level.h"
#include "core/lifted_tensor.h"

namespace torchlift {
namespace {

using testing::check_rule;
using ::testing::HasSubstr;
using testing::integers;
using testing::randn;
using testing::RuleCase;
using testing::Tensors;

// A product of tensors of the given shapes, with its square, whose gradient differs from example to
// example.
RuleCase product(std::string name, std::function<at::Tensor(const Tensors&)> f,
                 std::vector<std::vector<int64_t>> shapes, bool second_order = false) {
  return {.name = std::move(name),
          .f =
              [f = std::move(f)](const Tensors& in) {
                const at::Tensor out = f(in);
                return Tensors{out, out.mul(out)};
              },
          .make =
              [shapes = std::move(shapes)](int64_t) {
                Tensors out;
                for (const auto& shape : shapes) out.push_back(randn(shape));
                return out;
              },
          .second_order = second_order};
}

// On integers, kernels round beta and alpha towards zero; addr takes whole ones alone.
RuleCase of_integers(std::string name, std::function<at::Tensor(const Tensors&)> f,
                     std::vector<std::vector<int64_t>> shapes, at::ScalarType dtype = at::kLong) {
  return {.name = std::move(name),
          .f = [f = std::move(f)](const Tensors& in) { return Tensors{f(in)}; },
          .make =
              [shapes = std::move(shapes), dtype](int64_t) {
                Tensors out;
                for (const auto& shape : shapes) out.push_back(integers(0, 5, shape).to(dtype));
                return out;
              },
          .differentiable = false};
}

at::Tensor mm(const Tensors& in) { return at::mm(in[0], in[1]); }
at::Tensor bmm(const Tensors& in) { return at::bmm(in[0], in[1]); }
at::Tensor mv(const Tensors& in) { return at::mv(in[0], in[1]); }
at::Tensor dot(const Tensors& in) { return at::dot(in[0], in[1]); }
at::Tensor matmul(const Tensors& in) { return at::matmul(in[0], in[1]); }
at::Tensor addmm(const Tensors& in) { return at::addmm(in[0], in[1], in[2], 0.5, 2); }
at::Tensor plain_addmm(const Tensors& in) { return at::addmm(in[0], in[1], in[2]); }
at::Tensor baddbmm(const Tensors& in) { return at::baddbmm(in[0], in[1], in[2], 0.5, 2); }
at::Tensor addbmm(const Tensors& in) { return at::addbmm(in[0], in[1], in[2], 0.5, 2); }
at::Tensor addmv(const Tensors& in) { return at::addmv(in[0], in[1], in[2], 0.5, 2); }
at::Tensor addr(const Tensors& in) { return at::addr(in[0], in[1], in[2], 0.5, 2); }

TEST(MatmulRules, Mm) {
  check_rule(product("mm", mm, {{3, 5}, {5, 2}}, true));
  check_rule(product("mm, outer", mm, {{3, 1}, {1, 4}}, true));
  check_rule(product("mm, one row", mm, {{1, 5}, {5, 2}}));
  check_rule(product("mm, one column", mm, {{3, 5}, {5, 1}}));
  check_rule(product("mm, wide result", mm, {{3, 2}, {2, 17}}));
  check_rule(product("mm, tall result", mm, {{17, 2}, {2, 3}}));
  check_rule(product("mm, no terms", mm, {{3, 0}, {0, 2}}));
  check_rule(product("mm, no rows", mm, {{0, 3}, {3, 2}}));
}

TEST(MatmulRules, MmOfTransposes) {
  check_rule(product("mm(a^T, b)", [](const Tensors& in) { return at::mm(in[0].t(), in[1]); },
                     {{5, 3}, {5, 2}}));
  check_rule(product("mm(a, b^T)", [](const Tensors& in) { return at::mm(in[0], in[1].t()); },
                     {{3, 5}, {2, 5}}));
}

TEST(MatmulRules, Integers) {
  check_rule(
      {.name = "mm, int64",
       .f =
           [](const Tensors& in) {
             return Tensors{at::mm(in[0], in[1]), at::dot(in[2], in[2])};
           },
       .make =
           [](int64_t) {
             return Tensors{integers(-5, 5, {3, 4}), integers(-5, 5, {4, 2}), integers(-5, 5, {4})};
           },
       .differentiable = false});
}

TEST(MatmulRules, Bmm) {
  check_rule(product("bmm", bmm, {{4, 3, 5}, {4, 5, 2}}, true));
  check_rule(product("bmm, outer", bmm, {{4, 3, 1}, {4, 1, 2}}));
  check_rule(product("bmm of one", bmm, {{1, 3, 5}, {1, 5, 2}}));
  check_rule(product("bmm of none", bmm, {{0, 3, 5}, {0, 5, 2}}));
}

TEST(MatmulRules, Vectors) {
  check_rule(product("mv", mv, {{3, 5}, {5}}, true));
  check_rule(product("dot", dot, {{5}, {5}}, true));
  check_rule(product("vdot", [](const Tensors& in) { return at::vdot(in[0], in[1]); }, {{5}, {5}}));
  check_rule(
      product("outer", [](const Tensors& in) { return at::outer(in[0], in[1]); }, {{5}, {3}}));
  check_rule(product("inner", [](const Tensors& in) { return at::inner(in[0], in[1]); },
                     {{2, 5}, {3, 5}}));
}

TEST(MatmulRules, VdotOfComplex) {
  check_rule(
      {.name = "vdot, complex",
       .f = [](const Tensors& in) { return Tensors{at::vdot(in[0], in[1])}; },
       .make =
           [](int64_t) {
             return Tensors{at::randn({5}, at::kComplexDouble), at::randn({5}, at::kComplexDouble)};
           },
       .differentiable = false});
}

TEST(MatmulRules, DotOfHalvesIsNotRoundedTermByTerm) {
  LevelScope scope({.size = 2});
  const at::Tensor ones = at::full({2, 4096}, 1.0 / 3, at::kHalf);
  const at::Tensor x = lift(ones, 0, scope.level());
  const at::Tensor got = lower(at::dot(x, x), *scope.level()).value;
  EXPECT_NEAR(got[0].item<double>(), at::dot(ones[0], ones[0]).item<double>(), 0.5);
}

TEST(MatmulRules, Addmm) {
  check_rule(product("addmm", addmm, {{3, 2}, {3, 5}, {5, 2}}, true));
  check_rule(product("addmm, plain", plain_addmm, {{3, 2}, {3, 5}, {5, 2}}));
  check_rule(product("addmm, bias", plain_addmm, {{2}, {3, 5}, {5, 2}}, true));
  check_rule(product("addmm, scaled bias", addmm, {{2}, {3, 5}, {5, 2}}));
  check_rule(product("addmm, row", addmm, {{1, 2}, {3, 5}, {5, 2}}));
  check_rule(product("addmm, column", addmm, {{3, 1}, {3, 5}, {5, 2}}));
  check_rule(product("addmm, one bias", addmm, {{1}, {3, 5}, {5, 2}}));
  check_rule(product("addmm, scalar", addmm, {{}, {3, 5}, {5, 2}}));
  check_rule(product("addmm, outer", addmm, {{2}, {3, 1}, {1, 2}}));
}

TEST(MatmulRules, Addbmm) {
  check_rule(product("baddbmm", baddbmm, {{4, 3, 2}, {4, 3, 5}, {4, 5, 2}}, true));
  check_rule(product("baddbmm, bias", baddbmm, {{2}, {4, 3, 5}, {4, 5, 2}}));
  check_rule(product("baddbmm, matrix", baddbmm, {{3, 2}, {4, 3, 5}, {4, 5, 2}}));
  check_rule(product("addbmm", addbmm, {{3, 2}, {4, 3, 5}, {4, 5, 2}}));
  check_rule(product("addbmm, bias", addbmm, {{2}, {4, 3, 5}, {4, 5, 2}}));
}

TEST(MatmulRules, FactorsOfIntegers) {
  for (const auto& [beta, alpha] : {std::pair(0.6, 1.7), std::pair(2.9, 0.4)}) {
    check_rule(of_integers(
        "addmm", [=](const Tensors& in) { return at::addmm(in[0], in[1], in[2], beta, alpha); },
        {{3, 2}, {3, 4}, {4, 2}}));
    check_rule(of_integers(
        "addmv", [=](const Tensors& in) { return at::addmv(in[0], in[1], in[2], beta, alpha); },
        {{3}, {3, 4}, {4}}));
    check_rule(of_integers(
        "baddbmm", [=](const Tensors& in) { return at::baddbmm(in[0], in[1], in[2], beta, alpha); },
        {{4, 3, 2}, {4, 3, 5}, {4, 5, 2}}));
    check_rule(of_integers(
        "addbmm", [=](const Tensors& in) { return at::addbmm(in[0], in[1], in[2], beta, alpha); },
        {{3, 2}, {4, 3, 5}, {4, 5, 2}}));
  }
  for (const at::ScalarType dtype : {at::kLong, at::kBool}) {
    check_rule(of_integers(
        "addr", [](const Tensors& in) { return at::addr(in[0], in[1], in[2], 2, 3); },
        {{3, 4}, {3}, {4}}, dtype));
  }
  check_rule(of_integers(
      "addr of bools", [](const Tensors& in) { return at::addr(in[0], in[1], in[2], false, true); },
      {{3, 4}, {3}, {4}}, at::kBool));
}

TEST(MatmulRules, AddrOfIntegersTakesWholeFactors) {
  const at::Tensor value = at::ones({2, 3}, at::kLong);
  LevelScope scope({.size = 2, .randomness = Randomness::kError});
  const at::Tensor x = lift_alias(value, 0, scope.level());
  const auto error_of = [&](const at::Scalar& beta) -> std::string {
    try {
      at::addr(at::zeros({3, 3}, at::kLong), x, x, beta);
    } catch (const std::exception& e) {
      return e.what();
    }
    return "nothing was thrown";
  };
  EXPECT_THAT(error_of(0.5), HasSubstr("[vmap] addr: the tensors are of dtype Long, so beta and "
                                       "alpha must be integers, but one of them is 0.5"));
  EXPECT_THAT(error_of(true), HasSubstr("a bool as beta or alpha needs bool tensors"));
}

TEST(MatmulRules, AddmvAndAddr) {
  check_rule(product("addmv", addmv, {{3}, {3, 5}, {5}}));
  check_rule(product("addmv, scalar", addmv, {{}, {3, 5}, {5}}));
  check_rule(product("addr", addr, {{3, 5}, {3}, {5}}));
  check_rule(product("addr, row", addr, {{5}, {3}, {5}}));
}

TEST(MatmulRules, BetaOfZeroDoesNotReadSelf) {
  check_rule(
      {.name = "addmm, beta 0",
       .f =
           [](const Tensors& in) {
             return Tensors{
                 at::addmm(in[0], in[1], in[2], 0, 2),
                 at::addmv(in[0][0], in[1].t(), in[1].t()[0].narrow(0, 0, 1).expand({3}), 0)};
           },
       .make =
           [](int64_t) {
             return Tensors{at::full({3, 5}, NAN, at::kDouble), randn({3, 5}), randn({5, 5})};
           },
       .differentiable = false});
}

RuleCase in_place(std::string name, std::function<void(at::Tensor&, const Tensors&)> f,
                  std::vector<std::vector<int64_t>> shapes) {
  RuleCase c = product(
      std::move(name),
      [f = std::move(f)](const Tensors& in) {
        at::Tensor target = in[0];
        f(target, in);
        return target;
      },
      std::move(shapes));
  c.always_batched = {0};
  return c;
}

TEST(MatmulRules, InPlace) {
  check_rule(in_place("addmm_",
                      [](at::Tensor& t, const Tensors& in) { t.addmm_(in[1], in[2], 0.5, 2); },
                      {{3, 2}, {3, 5}, {5, 2}}));
  check_rule(in_place("addmv_",
                      [](at::Tensor& t, const Tensors& in) { t.addmv_(in[1], in[2], 0.5, 2); },
                      {{3}, {3, 5}, {5}}));
  check_rule(in_place("addr_",
                      [](at::Tensor& t, const Tensors& in) { t.addr_(in[1], in[2], 0.5, 2); },
                      {{3, 5}, {3}, {5}}));
  check_rule(in_place("baddbmm_",
                      [](at::Tensor& t, const Tensors& in) { t.baddbmm_(in[1], in[2], 0.5, 2); },
                      {{4, 3, 2}, {4, 3, 5}, {4, 5, 2}}));
  check_rule(in_place("addbmm_",
                      [](at::Tensor& t, const Tensors& in) { t.addbmm_(in[1], in[2], 0.5, 2); },
                      {{3, 2}, {4, 3, 5}, {4, 5, 2}}));
}

TEST(MatmulRules, Composites) {
  check_rule(product("matmul, 3x2", matmul, {{2, 3, 5}, {5, 2}}));
  check_rule(product("matmul, 2x3", matmul, {{3, 5}, {2, 5, 4}}));
  check_rule(product("matmul, 4x4", matmul, {{2, 1, 3, 5}, {4, 5, 2}}));
  check_rule(product("matmul, 1x2", matmul, {{5}, {5, 2}}));
  check_rule(product("matmul, 1x1", matmul, {{5}, {5}}));
  check_rule(product(
      "linear", [](const Tensors& in) { return at::linear(in[0], in[1], in[2]); },
      {{3, 5}, {2, 5}, {2}}, true));
  check_rule(product("linear, 3-d",
                     [](const Tensors& in) { return at::linear(in[0], in[1], in[2]); },
                     {{2, 3, 5}, {2, 5}, {2}}));
  check_rule(product("linear, vector",
                     [](const Tensors& in) { return at::linear(in[0], in[1], in[2]); },
                     {{5}, {2, 5}, {2}}));
  check_rule(product("einsum",
                     [](const Tensors& in) {
                       return at::einsum("bij,bkj->ik", {in[0], in[1]});
                     },
                     {{2, 3, 5}, {2, 4, 5}}));
  check_rule(product("tensordot",
                     [](const Tensors& in) {
                       return at::tensordot(in[0], in[1], {1, 2}, {1, 0});
                     },
                     {{2, 3, 5}, {5, 3, 4}}));
  check_rule(product("bilinear",
                     [](const Tensors& in) { return at::bilinear(in[0], in[1], in[2], in[3]); },
                     {{2, 3}, {2, 5}, {4, 3, 5}, {4}}));
}

// The shapes that aten::bmm was called with.
std::vector<std::vector<int64_t>>& shapes_of_bmm() {
  static std::vector<std::vector<int64_t>> shapes;
  return shapes;
}

// A batch of products with one column each takes several times as long as one with rows.
TEST(MatmulRules, MatricesTimesVectorsAreRows) {
  // Made outside of the level, where they are none of its tensors.
  const at::Tensor matrices = at::ones({7, 3, 5}), vectors = at::ones({7, 5}), bias = at::ones({3});
  LevelScope scope({.size = 7});
  const at::Tensor a = lift(matrices, 0, scope.level()), v = lift(vectors, 0, scope.level());
  shapes_of_bmm().clear();
  const auto handle = at::addThreadLocalCallback(
      at::RecordFunctionCallback(
          [](const at::RecordFunction& call) -> std::unique_ptr<at::ObserverContext> {
            if (std::string(call.name()) == "aten::bmm") {
              for (const c10::IValue& input : call.inputs()) {
                shapes_of_bmm().push_back(input.toTensor().sizes().vec());
              }
            }
            return nullptr;
          })
          .needsInputs(true)
          .scopes({at::RecordScope::FUNCTION}));
  at::mv(a, v);
  at::linear(v, a, bias);
  at::removeCallback(handle);
  const std::vector<int64_t> rows{7, 1, 5}, transposes{7, 5, 3};
  EXPECT_THAT(shapes_of_bmm(), ::testing::ElementsAre(rows, transposes, rows, transposes));
}

std::string message_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const c10::Error& e) {
    return e.what_without_backtrace();
  }
  return "nothing was thrown";
}

TEST(MatmulRules, ErrorsNameWhatTheUserSees) {
  LevelScope scope({.size = 7});
  const at::Tensor a = lift(at::ones({7, 3, 5}), 0, scope.level());
  const at::Tensor b = at::ones({4, 2});
  EXPECT_THAT(message_of([&] { at::mm(a, b); }), HasSubstr("cannot be multiplied (3x5 and 4x2)"));
  EXPECT_THAT(message_of([&] { at::mm(a, at::ones({5})); }),
              HasSubstr("mat2 must have 2 dimensions, but got shape [5]"));
  EXPECT_THAT(message_of([&] {
                at::mm(a, at::ones({5, 2}, at::kDouble));
              }),
              HasSubstr("one dtype"));
  EXPECT_THAT(message_of([&] { at::bmm(a, b); }), HasSubstr("batch1 must have 3 dimensions"));
  EXPECT_THAT(message_of([&] { at::mv(a, at::ones({4})); }), HasSubstr("shape [3, 5]"));
  EXPECT_THAT(
      message_of([&] {
        at::addmm(at::ones({3}), a, at::ones({5, 2}));
      }),
      HasSubstr("self of shape [3] cannot be expanded to the shape of the product, [3, 2]"));
}

}  // namespace
}  // namespace torchlift
