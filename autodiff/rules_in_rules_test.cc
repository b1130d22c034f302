// Custom derivatives whose rules call functions with rules of their own (autodiff/custom_rules.h).

#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <utility>

#include "autodiff/compositions.h"
#include "autodiff/custom_rules.h"
#include "autodiff/jvp.h"
#include "autodiff/vjp.h"
#include "core/level.h"
#include "core/tensor_operators.h"

namespace torchlift {
namespace {

using at::Tensor;
using Both = std::pair<Tensor, Tensor>;
using Product = Tensor (*)(const Tensor&, const Tensor&);

// a * b by rules made of operators.
Tensor product_by_bwd(const Tensor& a, const Tensor& b) {
  return custom_vjp([](const Tensor& x, const Tensor& y) { return x * y; },
                    [](const Tensor& x, const Tensor& y) { return std::pair(x * y, Both(x, y)); },
                    [](const Both& both, const Tensor& g) {
                      return std::tuple(g * both.second, both.first * g);
                    })(a, b);
}

Tensor product_by_jvp(const Tensor& a, const Tensor& b) {
  using Two = std::tuple<Tensor, Tensor>;
  return custom_jvp([](const Tensor& x, const Tensor& y) { return x * y; },
                    [](const Two& primals, const Two& tangents) {
                      const auto& [x, y] = primals;
                      const auto& [s, t] = tangents;
                      return std::pair(x * y, s * y + x * t);
                    })(a, b);
}

// a * b, whose bwd calls one of these with the cotangent.
template <Product kProduct>
Tensor outer_product(const Tensor& a, const Tensor& b) {
  return custom_vjp(
      [](const Tensor& x, const Tensor& y) { return x * y; },
      [](const Tensor& x, const Tensor& y) { return std::pair(kProduct(x, y), Both(x, y)); },
      [](const Both& both, const Tensor& g) {
        return std::tuple(kProduct(g, both.second), kProduct(both.first, g));
      })(a, b);
}

// The same by a vjp or a jvp of one of them, as implicit functions do it.
template <Product kProduct>
Tensor product_by_vjp(const Tensor& a, const Tensor& b) {
  return custom_vjp([](const Tensor& x, const Tensor& y) { return x * y; },
                    [](const Tensor& x, const Tensor& y) { return std::pair(x * y, Both(x, y)); },
                    [](const Both& both, const Tensor& g) {
                      return vjp(kProduct, both.first, both.second).second(g);
                    })(a, b);
}

template <Product kProduct>
Tensor product_by_push(const Tensor& a, const Tensor& b) {
  return custom_vjp([](const Tensor& x, const Tensor& y) { return x * y; },
                    [](const Tensor& x, const Tensor& y) { return std::pair(x * y, Both(x, y)); },
                    [](const Both& both, const Tensor& g) {
                      const auto& [x, y] = both;
                      const auto by_first = [&](const Tensor& t) { return kProduct(t, y); };
                      const auto by_second = [&](const Tensor& t) { return kProduct(x, t); };
                      return std::tuple(jvp(by_first, x, g).second, jvp(by_second, y, g).second);
                    })(a, b);
}

const std::map<std::string, Product>& products() {
  static const auto* all = new std::map<std::string, Product>{
      {"bwd calls bwd", &outer_product<&product_by_bwd>},
      {"bwd calls jvp", &outer_product<&product_by_jvp>},
      {"bwd calls bwd calls bwd", &outer_product<&outer_product<&product_by_bwd>>},
      {"bwd is a vjp of bwd", &product_by_vjp<&product_by_bwd>},
      {"bwd is a vjp of jvp", &product_by_vjp<&product_by_jvp>},
      {"bwd is a jvp of bwd", &product_by_push<&product_by_bwd>},
      {"bwd is a jvp of jvp", &product_by_push<&product_by_jvp>},
  };
  return *all;
}

Fn cube_by(const std::function<Tensor(const Tensor&, const Tensor&)>& product) {
  return [product](const Tensor& x) { return product(x.sin(), product(x, x)); };
}

const Fn& plain() {
  static const auto* f = new Fn(cube_by([](const Tensor& a, const Tensor& b) { return a * b; }));
  return *f;
}

class RulesInRules : public ::testing::TestWithParam<std::string> {
 protected:
  void TearDown() override { EXPECT_TRUE(level_stack().empty()); }
};

TEST_P(RulesInRules, JvpInJvp) {
  const Fn f = cube_by(products().at(GetParam()));
  const Transform& t = transforms().at("jvp");
  check(GetParam(), t(t(f)), t(t(plain())), points({3}));
  check(GetParam(), t(t(t(f))), t(t(t(plain()))), points({3}));
}

TEST_P(RulesInRules, ComposedTwice) {
  const Fn f = cube_by(products().at(GetParam()));
  for (const auto& [outer, t] : transforms()) {
    check(outer + " of " + GetParam(), t(f), t(plain()), points({3}));
    for (const auto& [inner, u] : transforms()) {
      check(outer + " of " + inner + " of " + GetParam(), t(u(f)), t(u(plain())), points({2, 2}));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Products, RulesInRules,
                         ::testing::Values("bwd calls bwd", "bwd calls jvp",
                                           "bwd calls bwd calls bwd", "bwd is a vjp of bwd",
                                           "bwd is a vjp of jvp", "bwd is a jvp of bwd",
                                           "bwd is a jvp of jvp"));

}  // namespace
}  // namespace torchlift
