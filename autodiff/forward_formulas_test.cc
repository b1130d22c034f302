// Formulas of forward mode that libtorch lacks or has wrong: each against finite differences, by
// itself, under and over jvp, grad and vmap.

#include <ATen/core/Tensor.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/cdist.h>
#include <ATen/ops/cholesky_inverse.h>
#include <ATen/ops/ctc_loss.h>
#include <ATen/ops/cumprod.h>
#include <ATen/ops/embedding_bag.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/glu.h>
#include <ATen/ops/grid_sampler.h>
#include <ATen/ops/index_reduce.h>
#include <ATen/ops/instance_norm.h>
#include <ATen/ops/linalg_householder_product.h>
#include <ATen/ops/logcumsumexp.h>
#include <ATen/ops/multi_margin_loss.h>
#include <ATen/ops/multilabel_margin_loss.h>
#include <ATen/ops/normal.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ormqr.h>
#include <ATen/ops/pdist.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/randn_like.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/scatter_reduce.h>
#include <ATen/ops/segment_reduce.h>
#include <ATen/ops/soft_margin_loss.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/triangular_solve.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cctype>
#include <exception>
#include <functional>
#include <limits>
#include <ostream>
#include <string>
#include <tuple>
#include <vector>

#include "autodiff/grad.h"
#include "autodiff/jvp.h"
#include "batching/vmap.h"
#include "core/tensor_operators.h"

namespace torchlift {
namespace {

using at::Tensor;
using Function = std::function<Tensor(const Tensor&)>;

// What is asked of a formula besides its value: libtorch's gradient of ctc_loss has no derivative.
enum class Order { kOnce, kAny };

struct Case {
  std::string name;
  Function f;
  Tensor x;
  Order order = Order::kAny;
};

std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

Tensor randn(at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); }
Tensor integers(const std::vector<int64_t>& values) { return at::tensor(values, at::kLong); }

Tensor difference(const Function& f, const Tensor& x, const Tensor& t) {
  constexpr double kStep = 1e-6;
  return (f(x + t * kStep) - f(x - t * kStep)) / (2 * kStep);
}

std::vector<Case> distance_cases() {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  std::vector<Case> cases;
  const Tensor other = randn({2, 3, 2});
  for (const double p : {1.0, 1.5, 2.0, 3.0, kInfinity}) {
    const std::string name = std::to_string(p);
    cases.push_back({"cdist " + name, [=](const Tensor& x) { return at::cdist(x, other, p); },
                     randn({2, 4, 2})});
    cases.push_back({"cdist of itself " + name,
                     [=](const Tensor& x) { return at::cdist(x * 2, x, p).triu(1); },
                     randn({4, 2})});
    cases.push_back(
        {"pdist " + name, [=](const Tensor& x) { return at::pdist(x, p); }, randn({4, 2})});
  }
  return cases;
}

std::vector<Case> loss_cases() {
  const Tensor signs = randn({4, 3}).sgn(), weight = randn({3}).abs();
  const Tensor classes = integers({0, 2, 1, 2});
  const Tensor labels = integers({0, 2, -1, 1, -1, -1, 2, 1, 0, -1, 1, 0}).reshape({4, 3});
  const Tensor words = integers({1, 2, 1, 3, 3, 1}).reshape({2, 3});
  return {
      {"soft_margin_loss", [=](const Tensor& x) { return at::soft_margin_loss(x, signs); },
       randn({4, 3})},
      {"multi_margin_loss", [=](const Tensor& x) { return at::multi_margin_loss(x, classes); },
       randn({4, 3}), Order::kOnce},
      {"multi_margin_loss weighted",
       [=](const Tensor& x) { return at::multi_margin_loss(x, classes, 2, 0.7, weight, 0); },
       randn({4, 3}), Order::kOnce},
      {"multilabel_margin_loss",
       [=](const Tensor& x) { return at::multilabel_margin_loss(x, labels, 2); }, randn({4, 3}),
       Order::kOnce},
      {"ctc_loss",
       [=](const Tensor& x) {
         return at::ctc_loss(x.log_softmax(-1), words, std::vector<int64_t>{6, 5},
                             std::vector<int64_t>{3, 2}, 0, 0);
       },
       randn({6, 2, 4}), Order::kOnce},
      {"glu", [](const Tensor& x) { return at::glu(x, 0); }, randn({4, 3})},
  };
}

// A square matrix that is far from singular.
Tensor well(const Tensor& x) { return x * 0.3 + at::eye(x.size(-1), x.options()) * 2; }

std::vector<Case> linalg_cases() {
  const Tensor right = randn({2, 4, 2}), left = randn({2, 2, 4}), tau = randn({2, 3}) * 0.5;
  const Tensor columns = randn({2, 4, 3});
  std::vector<Case> cases = {
      {"householder_product",
       [=](const Tensor& x) { return at::linalg_householder_product(x, tau); }, columns},
      {"householder_product by tau",
       [=](const Tensor& t) { return at::linalg_householder_product(columns, t); }, tau},
  };
  for (const bool flag : {false, true}) {
    const std::string name = flag ? " (true)" : " (false)";
    cases.push_back({"cholesky_inverse" + name,
                     [=](const Tensor& x) {
                       return at::cholesky_inverse(flag ? well(x).triu() : well(x).tril(), flag);
                     },
                     randn({3, 3})});
    cases.push_back({"triangular_solve" + name,
                     [=](const Tensor& x) {
                       return std::get<0>(at::triangular_solve(right, well(x), true, flag));
                     },
                     randn({2, 4, 4})});
    cases.push_back({"triangular_solve, lower" + name,
                     [=](const Tensor& x) {
                       return std::get<0>(at::triangular_solve(x, well(right.mT().matmul(right)),
                                                               false, flag, true));
                     },
                     randn({2, 2, 3})});
    cases.push_back({"ormqr from the left" + name,
                     [=](const Tensor& x) { return at::ormqr(x, tau, right, true, flag); },
                     columns});
    cases.push_back({"ormqr from the right" + name,
                     [=](const Tensor& x) { return at::ormqr(columns, tau, x, false, flag); },
                     left});
  }
  return cases;
}

std::vector<Case> scatter_cases() {
  const Tensor self = randn({3, 4}), index = integers({2, 0, 2});
  const Tensor places = integers({0, 1, 0, 0, 2, 1, 0, 1}).reshape({2, 4});
  const Tensor lengths = integers({2, 0, 3}), offsets = integers({0, 2, 2, 5});
  // Zeros, which libtorch's formulas divide by.
  Tensor zeros = randn({3, 4});
  zeros.select(0, 1).zero_();
  zeros.select(1, 2).zero_();
  std::vector<Case> cases = {
      {"cumprod", [](const Tensor& x) { return at::cumprod(x, 0); }, zeros},
      {"cumprod of five", [](const Tensor& x) { return at::cumprod(x, -1); }, randn({5})},
      {"logcumsumexp", [](const Tensor& x) { return at::logcumsumexp(x, 0); }, zeros},
      {"logcumsumexp of numbers far apart", [](const Tensor& x) { return at::logcumsumexp(x, -1); },
       randn({7}) + at::tensor({-800.0, -3.0, 0.0, -500.0, 2.0, 900.0, 899.0})},
      {"scatter_reduce prod into self",
       [=](const Tensor& x) {
         return at::scatter_reduce(x, 0, places, self.narrow(0, 0, 2), "prod");
       },
       zeros},
      {"scatter_reduce prod",
       [=](const Tensor& x) {
         return at::scatter_reduce(self, 0, places, x.narrow(0, 0, 2), "prod", false);
       },
       zeros},
  };
  for (const char* reduce : {"prod", "mean", "amin", "amax"}) {
    for (const bool include_self : {false, true}) {
      const std::string name = std::string("index_reduce ") + reduce;
      cases.push_back({name + " into self",
                       [=](const Tensor& x) {
                         return at::index_reduce(x, 0, index, self, reduce, include_self);
                       },
                       randn({3, 4})});
      cases.push_back({name,
                       [=](const Tensor& x) {
                         return at::index_reduce(self, -2, index, x, reduce, include_self);
                       },
                       randn({3, 4})});
    }
  }
  for (const char* reduce : {"sum", "mean", "prod", "min", "max"}) {
    const std::string name = std::string("segment_reduce ") + reduce;
    cases.push_back({name + " by length",
                     [=](const Tensor& x) {
                       return at::segment_reduce(x, reduce, lengths, {}, {}, 0, false, 0.5);
                     },
                     randn({5, 2}), Order::kOnce});
    cases.push_back({name + " by offset",
                     [=](const Tensor& x) {
                       return at::segment_reduce(x, reduce, {}, {}, offsets, 0, false, -0.2);
                     },
                     randn({5, 2}), Order::kOnce});
  }
  return cases;
}

std::vector<Case> sampling_cases() {
  const Tensor image = randn({2, 2, 4, 3}), volume = randn({1, 2, 3, 2, 4});
  // Inside, outside, and far outside.
  const Tensor grid = randn({2, 3, 2, 2}) * 1.2, grid3 = randn({1, 2, 2, 2, 3}) * 1.2;
  std::vector<Case> cases;
  for (int64_t mode = 0; mode < 3; ++mode) {
    for (int64_t padding = 0; padding < 3; ++padding) {
      for (const bool corners : {false, true}) {
        const std::string name = "grid_sampler " + std::to_string(mode) + std::to_string(padding) +
                                 (corners ? " corners" : "");
        cases.push_back(
            {name,
             [=](const Tensor& x) { return at::grid_sampler(x, grid, mode, padding, corners); },
             image});
        cases.push_back(
            {name + " by grid",
             [=](const Tensor& g) { return at::grid_sampler(image, g, mode, padding, corners); },
             grid});
        if (mode == 2) continue;
        cases.push_back(
            {name + " 3d",
             [=](const Tensor& g) { return at::grid_sampler(volume, g, mode, padding, corners); },
             grid3});
      }
    }
  }
  return cases;
}

std::vector<Case> module_cases() {
  const Tensor q = randn({2, 1, 3, 4}), k = randn({2, 1, 5, 4}), mask = randn({3, 5});
  const Tensor table = randn({6, 3}), words = integers({1, 2, 2, 4, 5, 0, 1});
  const Tensor bags = integers({0, 2, 2, 5}), factors = randn({7});
  std::vector<Case> cases = {
      {"attention", [=](const Tensor& x) { return at::scaled_dot_product_attention(x, k, k * 2); },
       q},
      {"attention by keys",
       [=](const Tensor& x) { return at::scaled_dot_product_attention(q, x, x.sin(), mask); }, k},
      {"attention, causal",
       [=](const Tensor& x) {
         return at::scaled_dot_product_attention(x, x + 1, x, {}, 0, true, 0.3);
       },
       q},
      {"embedding_bag by factors",
       [=](const Tensor& x) {
         return std::get<0>(at::embedding_bag(table, words, bags, false, 0, false, x));
       },
       factors},
      {"instance_norm",
       [](const Tensor& x) { return at::instance_norm(x, {}, {}, {}, {}, true, 0.1, 1e-3, false); },
       randn({2, 3, 4})},
      {"batch_norm with statistics",
       [](const Tensor& x) {
         const Tensor mean = at::zeros({3}, at::kDouble), variance = at::ones({3}, at::kDouble);
         return at::batch_norm(x, {}, {}, mean, variance, true, 0.1, 1e-3, false);
       },
       randn({4, 3})},
  };
  for (int64_t mode = 0; mode < 3; ++mode) {
    cases.push_back({"embedding_bag " + std::to_string(mode),
                     [=](const Tensor& x) {
                       return std::get<0>(
                           at::embedding_bag(x, words, bags, false, mode, false, {}, false, 5));
                     },
                     table});
  }
  return cases;
}

// --- compositions --------------------------------------------------------------------------------

struct Transform {
  const char* name;
  std::function<Function(const Case&, Function)> apply;
};

std::vector<Transform> transforms() {
  return {
      {"jvp",
       [](const Case& c, Function f) -> Function {
         const Tensor t = at::randn_like(c.x);
         return [=](const Tensor& x) { return jvp(f, x, t).second; };
       }},
      {"grad",
       [](const Case& /*c*/, Function f) -> Function {
         return grad([=](const Tensor& x) { return f(x).sin().sum(); });
       }},
      {"vmap",
       [](const Case& /*c*/, Function f) -> Function {
         return [=](const Tensor& x) {
           return vmap([&](const Tensor& s) { return f(x * s); })(
               at::arange(1, 3, at::kDouble) * 0.5 + 0.3);
         };
       }},
  };
}

void check_tangent(const Case& c, const Function& f, double tolerance) {
  const Tensor t = at::randn_like(c.x);
  try {
    const Tensor got = jvp(f, c.x, t).second, expected = difference(f, c.x, t);
    EXPECT_TRUE(at::allclose(got, expected, tolerance, tolerance)) << got << expected;
  } catch (const std::exception& error) {
    ADD_FAILURE() << error.what();
  }
}

void check(const Case& c) {
  SCOPED_TRACE(c.name);
  const auto [value, tangent] = jvp(c.f, c.x, at::randn_like(c.x));
  EXPECT_TRUE(at::allclose(value, c.f(c.x))) << value;
  check_tangent(c, c.f, 1e-5);
  for (const Transform& inner : transforms()) {
    if (c.order == Order::kOnce && std::string(inner.name) != "vmap") continue;
    // Statistics that all examples share.
    if (c.name == "batch_norm with statistics" && std::string(inner.name) == "vmap") continue;
    SCOPED_TRACE(inner.name);
    check_tangent(c, inner.apply(c, c.f), 1e-4);
  }
}

class ForwardFormulas : public ::testing::TestWithParam<Case> {};

TEST_P(ForwardFormulas, AgainstDifferences) { check(GetParam()); }

std::string name_of(const ::testing::TestParamInfo<Case>& info) {
  std::string name;
  for (const char c : info.param.name) name += std::isalnum(c) != 0 ? c : '_';
  return name + "_" + std::to_string(info.index);
}

using ::testing::ValuesIn;
INSTANTIATE_TEST_SUITE_P(Distances, ForwardFormulas, ValuesIn(distance_cases()), name_of);
INSTANTIATE_TEST_SUITE_P(Losses, ForwardFormulas, ValuesIn(loss_cases()), name_of);
INSTANTIATE_TEST_SUITE_P(Linalg, ForwardFormulas, ValuesIn(linalg_cases()), name_of);
INSTANTIATE_TEST_SUITE_P(Scatter, ForwardFormulas, ValuesIn(scatter_cases()), name_of);
INSTANTIATE_TEST_SUITE_P(Sampling, ForwardFormulas, ValuesIn(sampling_cases()), name_of);
INSTANTIATE_TEST_SUITE_P(Modules, ForwardFormulas, ValuesIn(module_cases()), name_of);

// A distance of zero has the gradient zero, as in libtorch's reverse mode.
TEST(ForwardFormula, DistanceOfZero) {
  const Tensor x = at::ones({2, 3}, at::kDouble);
  for (const double p : {1.5, 2.0, 3.0}) {
    const Tensor tangent = jvp([&](const Tensor& y) { return at::pdist(y, p); }, x, x).second;
    EXPECT_EQ(tangent.item<double>(), 0) << p;
  }
}

TEST(ForwardFormula, RandomNumbersAreConstants) {
  const Tensor mean = at::zeros({3, 1}, at::kDouble), std = at::ones({1, 4}, at::kDouble);
  const Tensor tangent =
      jvp([&](const Tensor& m) { return at::normal(m, std); }, mean, mean + 1).second;
  EXPECT_EQ(tangent.sizes(), at::IntArrayRef({3, 4}));
  EXPECT_EQ(tangent.abs().sum().item<double>(), 0);
}

}  // namespace
}  // namespace torchlift
