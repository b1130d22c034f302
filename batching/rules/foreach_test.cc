#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_addcdiv.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/_foreach_max.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <functional>
#include <set>
#include <string>
#include <vector>

#include "batching/testing/call_op.h"
#include "batching/testing/rule_check.h"
#include "core/level.h"
#include "core/lifted_tensor.h"

namespace torchlift::testing {
namespace {

using List = c10::List<at::Tensor>;

// --- every foreach operator that libtorch has, with arguments by its schema ----------------------

std::vector<c10::OperatorHandle> foreach_operators() {
  std::vector<c10::OperatorHandle> found;
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    if (name.name.rfind("aten::_foreach_", 0) != 0) continue;
    if (name.overload_name.find("out") != std::string::npos) continue;
    found.push_back(dispatcher.findSchemaOrThrow(name.name.c_str(), name.overload_name.c_str()));
  }
  return found;
}

// libtorch has no derivative, or a wrong one (where a single tensor serves all elements), to
// compare with.
bool has_derivative(const std::string& name) {
  static const std::set<std::string> without{"aten::_foreach_add.Tensor",
                                             "aten::_foreach_add_.Tensor",
                                             "aten::_foreach_mul.Tensor",
                                             "aten::_foreach_mul_.Tensor",
                                             "aten::_foreach_div.Tensor",
                                             "aten::_foreach_div_.Tensor",
                                             "aten::_foreach_addcdiv.Tensor",
                                             "aten::_foreach_addcdiv_.Tensor",
                                             "aten::_foreach_addcmul.Tensor",
                                             "aten::_foreach_addcmul_.Tensor",
                                             "aten::_foreach_maximum_.Scalar",
                                             "aten::_foreach_maximum_.ScalarList",
                                             "aten::_foreach_minimum_.Scalar",
                                             "aten::_foreach_minimum_.ScalarList",
                                             "aten::_foreach_copy",
                                             "aten::_foreach_copy_",
                                             "aten::_foreach_zero",
                                             "aten::_foreach_powsum.Scalar"};
  return without.count(name) == 0;
}

// The operator as a function of the tensors of all its lists (two in each), one after another, and
// of its tensor arguments.
class Case {
 public:
  explicit Case(const c10::OperatorHandle& op) : op_(op), name_(toString(op.operator_name())) {}

  Tensors make() const {
    Tensors in;
    for (const auto& formal : op_.schema().arguments()) {
      const std::string type = formal.type()->str();
      if (type == "Tensor[]") {
        in.push_back(positive({2, 2}).mul(0.6));
        in.push_back(positive({3, 3}).mul(0.6));
      } else if (type == "Tensor") {
        in.push_back(formal.name() == "scalars" ? positive({2}) : positive({}));
      }
    }
    return in;
  }

  Tensors operator()(const Tensors& in) const {
    std::vector<c10::IValue> args;
    Tensors targets;
    size_t next = 0;
    for (const auto& formal : op_.schema().arguments()) {
      const std::string type = formal.type()->str();
      if (type == "Tensor[]" && formal.alias_info() != nullptr) {
        targets = {in[0].clone(), in[1].clone()};
        args.emplace_back(List({targets[0], targets[1]}));
        next += 2;
      } else if (type == "Tensor[]") {
        args.emplace_back(List({in[next], in[next + 1]}));
        next += 2;
      } else if (type == "Tensor") {
        args.emplace_back(in[next++]);
      } else if (type == "Scalar[]") {
        args.emplace_back(std::vector<at::Scalar>{0.7, 1.3});
      } else if (formal.default_value().has_value()) {
        args.push_back(*formal.default_value());
      } else {
        args.emplace_back(0.7);
      }
    }
    const Tensors results = call_op(name_, args);
    return targets.empty() ? results : targets;
  }

  void check() const {
    const Tensors in = make();
    const bool in_place = op_.schema().arguments()[0].alias_info() != nullptr;
    std::vector<size_t> unbatched;
    if (in.size() > 4)
      unbatched = in.size() == 5 ? std::vector<size_t>{3} : std::vector<size_t>{3, 5};
    check_rule({.name = name_,
                .f = [&](const Tensors& given) { return (*this)(given); },
                .make = [&](int64_t) { return make(); },
                .unbatched = unbatched,
                .always_batched = in_place ? std::vector<size_t>{0, 1} : std::vector<size_t>{},
                .differentiable = has_derivative(name_),
                .tolerance = 1e-8});
  }

 private:
  const c10::OperatorHandle op_;
  const std::string name_;
};

TEST(ForeachRules, EveryOperator) {
  const std::vector<c10::OperatorHandle> operators = foreach_operators();
  EXPECT_GT(operators.size(), 100U);  // torch 2.15 has 148
  for (const c10::OperatorHandle& op : operators) Case(op).check();
}

// --- lists of which some elements are batched ----------------------------------------------------

// Of a tensor of the level: its value, with its batch dim first if it has one.
at::Tensor value_of(const at::Tensor& t, const LevelScope& scope) {
  const Lowered lowered = lower(t, *scope.level());
  return lowered.bdim ? lowered.value.movedim(*lowered.bdim, 0) : lowered.value;
}

TEST(ForeachRules, WhatAllExamplesShareStaysShared) {
  const at::Tensor xs = randn({3, 2}), w = randn({4});
  LevelScope scope({.size = 3});
  const at::Tensor x = lift_alias(xs, 0, scope.level());
  const std::vector<at::Tensor> sums = at::_foreach_add({x, w}, {x, w});
  EXPECT_TRUE(at::equal(value_of(sums[0], scope), xs.add(xs)));
  EXPECT_FALSE(is_lifted(sums[1]));
  EXPECT_TRUE(at::equal(sums[1], w.add(w)));
}

TEST(ForeachRules, InPlacePromotesTheElementsThatNeedIt) {
  const at::Tensor xs = randn({3, 2}), w = randn({4});
  LevelScope scope({.size = 3});
  const at::Tensor x = lift_alias(xs, 0, scope.level());
  const at::Tensor a = at::zeros({2}, xs.options()), b = at::zeros({4}, w.options());
  at::_foreach_copy_({a, b}, {x, w});
  EXPECT_TRUE(at::equal(value_of(a, scope), xs));
  const Lowered shared = lower(b, *scope.level());
  EXPECT_FALSE(shared.bdim.has_value());
  EXPECT_TRUE(at::equal(shared.value, w));
}

TEST(ForeachRules, WritesIntoATensorFromOutsideThrow) {
  const at::Tensor outside = at::zeros({2}), xs = randn({3, 2});
  LevelScope scope({.size = 3});
  const at::Tensor x = lift_alias(xs, 0, scope.level());
  EXPECT_THROW(at::_foreach_add_({outside}, {x}), c10::Error);
}

// The factors of addcdiv, one for each element, may differ from example to example.
TEST(ForeachRules, AFactorIsANumber) {
  const at::Tensor factors = positive({3, 1}), x = randn({2}).to(at::kFloat);
  const at::Tensor y = positive({2}).to(at::kFloat);
  LevelScope scope({.size = 3});
  const at::Tensor factor = lift_alias(factors, 0, scope.level());
  const at::Tensor got = value_of(at::_foreach_addcdiv({x}, {x}, {y}, factor)[0], scope);
  EXPECT_EQ(got.scalar_type(), at::kFloat);  // though the factors are float64
  EXPECT_TRUE(at::allclose(got, x.add(factors.to(at::kFloat).mul(x.div(y))), 1e-5, 1e-6));
}

// --- what libtorch refuses -----------------------------------------------------------------------

void expect_error(const std::function<void()>& f, const std::string& text) {
  try {
    f();
    ADD_FAILURE() << "nothing was thrown; expected: " << text;
  } catch (const c10::Error& error) {
    EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
  }
}

TEST(ForeachRules, ListsHaveToAgree) {
  const at::Tensor xs = randn({3, 2});
  LevelScope scope({.size = 3});
  const at::Tensor x = lift_alias(xs, 0, scope.level());
  expect_error(
      [&] {
        at::_foreach_add({x}, {x, x});
      },
      "Tensor lists must have the same number of tensors, got 1 and 2");
  expect_error(
      [&] {
        at::_foreach_add({x}, std::vector<at::Scalar>{1, 2});
      },
      "Tensor list must have same number of elements as scalar list.");
  expect_error([&] { at::_foreach_addcdiv({x}, {x}, {x}, x); },
               "Expected length of scalars to match input of length 1 but got 2 instead.");
  expect_error([&] { at::_foreach_addcdiv({x}, {x}, {x}, x.sum()); },
               "Expected packed scalar Tensor to be of dimension 1. Got 0 instead.");
  expect_error([&] { at::_foreach_add({x}, x); },
               "scalar tensor expected to be 0 dim but it has 1 dimensions and 2 elements.");
}

}  // namespace
}  // namespace torchlift::testing
