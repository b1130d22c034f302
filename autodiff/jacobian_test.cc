#include "autodiff/jacobian.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/complex.h>
#include <ATen/ops/diag_embed.h>
#include <ATen/ops/diagonal.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/imag.h>
#include <ATen/ops/index.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/real.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/view_as_complex.h>
#include <ATen/ops/view_as_real.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "autodiff/grad.h"
#include "autodiff/jvp.h"
#include "autodiff/vjp.h"
#include "batching/fallback.h"
#include "batching/vmap.h"
#include "core/error.h"
#include "core/tensor_operators.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using ::testing::HasSubstr;
using Function = std::function<at::Tensor(const at::Tensor&)>;

struct Params {
  at::Tensor w, b;
};
TORCHLIFT_PYTREE(Params, w, b);

at::Tensor randn(at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); }

#define EXPECT_NEAR_TENSOR(a, b, rtol, atol)                                       \
  do {                                                                             \
    const at::Tensor close_a = (a), close_b = (b);                                 \
    ASSERT_EQ(close_a.sizes(), close_b.sizes());                                   \
    EXPECT_TRUE(at::allclose(close_a, close_b, rtol, atol)) << close_a << close_b; \
  } while (false)
#define EXPECT_TIGHT(a, b) EXPECT_NEAR_TENSOR(a, b, 1e-8, 1e-10)

// The Jacobian by central differences: [...output, ...input].
at::Tensor difference(const Function& f, const at::Tensor& x) {
  constexpr double kStep = 1e-6;
  std::vector<at::Tensor> columns;
  const at::Tensor flat = x.reshape({-1});
  for (int64_t i = 0; i < flat.numel(); ++i) {
    at::Tensor step = at::zeros_like(flat);
    step[i] = kStep;
    const at::Tensor high = f((flat + step).view(x.sizes()));
    columns.push_back((high - f((flat - step).view(x.sizes()))) / (2 * kStep));
  }
  std::vector<int64_t> sizes = columns[0].sizes().vec();
  sizes.insert(sizes.end(), x.sizes().begin(), x.sizes().end());
  return at::stack(columns, -1).view(sizes);
}

class JacobianTest : public ::testing::Test {
 protected:
  JacobianTest() : strict_(true) {}
  void TearDown() override {
    EXPECT_TRUE(level_stack().empty());
    EXPECT_FALSE(forward_mode_open());
  }

 private:
  StrictScope strict_;
};

TEST_F(JacobianTest, AgainstDifferences) {
  const at::Tensor x = randn({2, 3}), w = randn({3, 4});
  const Function f = [&](const at::Tensor& a) { return a.mm(w).tanh() * a.sum(); };
  const at::Tensor expected = difference(f, x);
  ASSERT_EQ(expected.sizes(), (std::vector<int64_t>{2, 4, 2, 3}));
  EXPECT_NEAR_TENSOR(jacrev(f)(x), expected, 1e-6, 1e-8);
  EXPECT_NEAR_TENSOR(jacfwd(f)(x), expected, 1e-6, 1e-8);
  EXPECT_NEAR_TENSOR(jacobian(f)(x), expected, 1e-6, 1e-8);
}

TEST_F(JacobianTest, EveryChunkSizeGivesTheSame) {
  const at::Tensor x = randn({5}), w = randn({7, 5});
  const Function f = [&](const at::Tensor& a) { return w.mv(a).sin(); };
  const at::Tensor expected = x.new_zeros({7, 5}) + w * w.mv(x).cos().unsqueeze(1);
  for (const int64_t chunk : {1, 2, 3, 5, 7, 100}) {
    EXPECT_TIGHT(jacrev(f, {.chunk_size = chunk})(x), expected);
    EXPECT_TIGHT(jacfwd(f, {.chunk_size = chunk})(x), expected);
    EXPECT_TIGHT(hessian([&](const at::Tensor& a) { return f(a).sum(); }, {.chunk_size = chunk})(x),
                 hessian([&](const at::Tensor& a) { return f(a).sum(); })(x));
  }
}

// Rows are made of 1 kB, columns run the function.
TEST_F(JacobianTest, AMemoryBudgetChoosesTheChunks) {
  const at::Tensor x = randn({128}), w = randn({300, 128});
  const Function f = [&](const at::Tensor& a) { return w.mv(a.sin()).tanh(); };
  const at::Tensor expected = jacrev(f)(x);
  for (const int64_t budget : {40'000, 200'000, 100'000'000}) {
    EXPECT_TIGHT(jacrev(f, {.memory_budget = budget})(x), expected);
    ASSERT_TRUE(memory_report().has_value());
    EXPECT_EQ(memory_report()->examples, 300);
    EXPECT_LE(memory_report()->peak_bytes, budget);
    const int64_t rows = memory_report()->chunk_size;
    EXPECT_TIGHT(jacfwd(f, {.memory_budget = budget})(x), expected);
    EXPECT_EQ(memory_report()->examples, 128);
    EXPECT_LE(memory_report()->peak_bytes, budget);
    EXPECT_EQ(rows > 100, budget > 1'000'000);
  }
  const auto energy = [&](const at::Tensor& a) { return f(a).sum(); };
  EXPECT_TIGHT(hessian(energy, {.memory_budget = 500'000})(x), hessian(energy)(x));
  EXPECT_GT(memory_report()->chunks, 1);
}

TEST_F(JacobianTest, TreesInAndOut) {
  const Params p{randn({3}), randn({})};
  const at::Tensor x = randn({3});
  const auto f = [](const Params& q, const at::Tensor& a) {
    return std::tuple(q.w * a + q.b, std::map<std::string, at::Tensor>{{"sum", (q.w * q.w).sum()}});
  };
  const auto check = [&](const auto& jacobian) {
    const auto& [first, second] = jacobian;
    EXPECT_TIGHT(first.w, at::diag_embed(x));
    EXPECT_TIGHT(first.b, at::ones_like(x));
    EXPECT_TIGHT(second.at("sum").w, p.w * 2);
    EXPECT_TIGHT(second.at("sum").b, at::zeros_like(p.b));
  };
  check(jacrev(f)(p, x));
  check(jacfwd(f)(p, x));
  check(jacobian(f, {.chunk_size = 2})(p, x));
  const auto [jp, jx] = std::get<0>(jacfwd<0, 1>(f)(p, x));
  EXPECT_TIGHT(jp.w, at::diag_embed(x));
  EXPECT_TIGHT(jx, at::diag_embed(p.w));
  EXPECT_TIGHT(std::get<0>(jacrev<1>(f)(p, x)), at::diag_embed(p.w));
}

TEST_F(JacobianTest, Aux) {
  const at::Tensor x = randn({3});
  const auto f = [](const at::Tensor& a) { return std::pair(a.sin(), std::vector{a.cos()}); };
  for (const auto& [j, aux] :
       {jacrev(f, kHasAux)(x), jacfwd(f, kHasAux)(x), jacobian(f, kHasAux)(x)}) {
    EXPECT_TIGHT(j, at::diag_embed(x.cos()));
    EXPECT_TIGHT(aux[0], x.cos());
    EXPECT_FALSE(aux[0].requires_grad());
  }
  const auto [h, aux] =
      hessian([](const at::Tensor& a) { return std::pair(a.sin().sum(), a * 2); }, kHasAux)(x);
  EXPECT_TIGHT(h, at::diag_embed(-x.sin()));
  EXPECT_TIGHT(aux, x * 2);
}

TEST_F(JacobianTest, ScalarsAndEmptyTensors) {
  const at::Tensor x = randn({}), empty = randn({0});
  const Function cube = [](const at::Tensor& a) { return a * a * a; };
  EXPECT_TIGHT(jacrev(cube)(x), x * x * 3);
  EXPECT_TIGHT(jacfwd(cube)(x), x * x * 3);
  EXPECT_TIGHT(hessian(cube)(x), x * 6);
  for (const auto& j : {jacrev(cube)(empty), jacfwd(cube)(empty)}) {
    EXPECT_EQ(j.sizes(), (std::vector<int64_t>{0, 0}));
  }
  const Function total = [](const at::Tensor& a) { return a.sum(); };
  EXPECT_EQ(jacrev(total)(empty).sizes(), (std::vector<int64_t>{0}));
  EXPECT_EQ(jacfwd(total)(empty).sizes(), (std::vector<int64_t>{0}));
}

TEST_F(JacobianTest, OutputsThatDoNotDependOnTheInput) {
  const at::Tensor x = randn({3}), c = randn({2});
  const Function f = [&](const at::Tensor&) { return c; };
  EXPECT_TIGHT(jacrev(f)(x), at::zeros({2, 3}, at::kDouble));
  EXPECT_TIGHT(jacfwd(f)(x), at::zeros({2, 3}, at::kDouble));
  const Function linear = [&](const at::Tensor& a) { return a * 2; };
  EXPECT_TIGHT(jacfwd(jacfwd(linear))(x), at::zeros({3, 3, 3}, at::kDouble));
  EXPECT_TIGHT(hessian(linear)(x), at::zeros({3, 3, 3}, at::kDouble));
}

TEST_F(JacobianTest, WritesIntoAFreshBuffer) {
  const at::Tensor x = randn({3});
  const Function f = [](const at::Tensor& a) {
    at::Tensor z = at::zeros({4}, at::kDouble);
    z.select(0, 1).copy_(a.select(0, 2) * a.select(0, 0));
    return z;
  };
  EXPECT_NEAR_TENSOR(jacfwd(f)(x), difference(f, x), 1e-6, 1e-8);
  EXPECT_NEAR_TENSOR(jacrev(f)(x), difference(f, x), 1e-6, 1e-8);
}

// Into complex buffers of the function, and into those that the gradient of an index is made in.
TEST_F(JacobianTest, WritesIntoAComplexBuffer) {
  const at::Tensor x = randn({4});
  const Function written = [](const at::Tensor& a) {
    at::Tensor z = at::zeros({3}, at::kComplexDouble);
    z.select(0, 1).copy_(at::complex(a, a.sin()).select(0, 2) * a.select(0, 0));
    at::Tensor conjugate = at::zeros({2}, at::kComplexDouble).conj();
    conjugate.copy_(at::complex(a, a.sin()).slice(0, 0, 2));
    return at::cat({at::view_as_real(z).flatten(), at::imag(conjugate)});
  };
  EXPECT_TIGHT(jacfwd(written)(x), jacrev(written)(x));
  const Function indexed = [](const at::Tensor& a) {
    const at::Tensor places = at::arange(2) + 1;
    const at::Tensor z = at::index(at::complex(a, a.sin()), {std::optional<at::Tensor>(places)});
    return z.abs().pow(3).sum();
  };
  EXPECT_TIGHT(jacfwd(grad(indexed))(x), jacrev(grad(indexed))(x));
}

TEST_F(JacobianTest, NonContiguousInputs) {
  const at::Tensor x = randn({4, 3}).t(), y = randn({6}).slice(0, 1, 6, 2);
  const Function f = [](const at::Tensor& a) { return (a * a).transpose(0, -1).sin(); };
  EXPECT_NEAR_TENSOR(jacfwd(f)(x), difference(f, x), 1e-6, 1e-8);
  EXPECT_NEAR_TENSOR(jacrev(f)(x), difference(f, x), 1e-6, 1e-8);
  EXPECT_NEAR_TENSOR(jacfwd(f)(y), difference(f, y), 1e-6, 1e-8);
  EXPECT_NEAR_TENSOR(jacfwd(jacfwd(f))(y), difference(jacrev(f), y), 1e-5, 1e-7);
}

// --- compositions --------------------------------------------------------------------------------

struct OpCase {
  const char* name;
  Function f;
};

std::vector<OpCase> op_cases() {
  const at::Tensor c = randn({2, 2}), row = randn({2}), positive = randn({2, 2}).abs() + 0.5;
  return {
      {"arithmetic", [=](const at::Tensor& x) { return (x * c + row - x / positive) * 2 + x; }},
      {"matmul", [=](const at::Tensor& x) { return x.mm(c).tanh().mm(x) + row.addmm(x, c); }},
      {"views", [=](const at::Tensor& x) { return x.t().reshape({-1}).slice(0, 1).sin(); }},
      {"softmax", [=](const at::Tensor& x) { return (x * x).softmax(1) + x.logsumexp(0); }},
      {"in_place",
       [=](const at::Tensor& x) {
         at::Tensor y = x * x;
         y.mul_(c).add_(x).sin_();
         return y;
       }},
      {"indexing",
       [=](const at::Tensor& x) {
         return at::stack({x.select(0, 1), row * x.select(1, 0)}) * x;
       }},
      {"reductions",
       [=](const at::Tensor& x) { return x.exp().mean(0) * x.var() + (x * x).sum().sqrt(); }},
  };
}

struct Transform {
  const char* name;
  std::function<Function(Function)> apply;
};

std::vector<Transform> transforms() {
  const at::Tensor t = randn({2, 2});
  return {
      {"jacrev", [](Function f) -> Function { return jacrev(f); }},
      {"jacfwd", [](Function f) -> Function { return jacfwd(f); }},
      {"jvp",
       [=](Function f) -> Function {
         return [=](const at::Tensor& x) { return jvp(f, x, t).second; };
       }},
      {"vjp",
       [](Function f) -> Function {
         return [=](const at::Tensor& x) {
           const auto [y, pullback] = vjp(f, x);
           return pullback(y.cos());
         };
       }},
      {"vmap",
       [](Function f) -> Function {
         return [=](const at::Tensor& x) {
           const at::Tensor scales = at::ones({2}, at::kDouble).cumsum(0);
           return vmap([&](const at::Tensor& s) { return f(x * s); })(scales);
         };
       }},
  };
}

// An exception keeps the trace that says where.
void check_jacobians(const Function& f, const at::Tensor& x, double tolerance) {
  try {
    const at::Tensor expected = difference(f, x);
    EXPECT_NEAR_TENSOR(jacfwd(f)(x), expected, tolerance, tolerance / 10);
    EXPECT_NEAR_TENSOR(jacrev(f)(x), expected, tolerance, tolerance / 10);
  } catch (const std::exception& error) {
    ADD_FAILURE() << error.what();
  }
}

TEST_F(JacobianTest, CompositionsOfTwoAndThreeAgainstDifferences) {
  const at::Tensor x = randn({2, 2}) + 0.3;
  const auto all = transforms();
  for (const OpCase& op : op_cases()) {
    for (const Transform& inner : all) {
      const Function once = inner.apply(op.f);
      SCOPED_TRACE(std::string(op.name) + ": " + inner.name);
      check_jacobians(once, x, 1e-4);
      for (const Transform& outer : all) {
        SCOPED_TRACE(outer.name);
        const Function twice = outer.apply(once);
        check_jacobians(twice, x, 1e-3);
      }
    }
  }
}

TEST_F(JacobianTest, ConnectedToTheOutside) {
  const at::Tensor x = randn({3}), w = randn({3}).set_requires_grad(true);
  const auto f = [&](const at::Tensor& a) { return (a * w).sin(); };
  for (const at::Tensor& j : {jacrev(f)(x), jacfwd(f)(x), jacrev(f, {.chunk_size = 2})(x),
                              jacfwd(f, {.chunk_size = 2})(x)}) {
    ASSERT_TRUE(j.requires_grad());
    EXPECT_TIGHT(torch::autograd::grad({j.sum()}, {w})[0], (x * w).cos() - x * w * (x * w).sin());
  }
}

// --- complex numbers -----------------------------------------------------------------------------

at::Tensor complex_randn(at::IntArrayRef sizes) { return at::randn(sizes, at::kComplexDouble); }

// Holomorphic, from [3] to [2, 3].
at::Tensor holomorphic(const at::Tensor& z) {
  return at::stack({(z * z).sin() * z[0], z.exp() / (z + 4)});
}

TEST_F(JacobianTest, HolomorphicIsTheComplexDifferenceQuotient) {
  const at::Tensor z = complex_randn({3});
  const at::Tensor want = difference(holomorphic, z);
  const JacobianOptions options{.holomorphic = true};
  EXPECT_NEAR_TENSOR(jacrev(holomorphic, options)(z), want, 1e-6, 1e-6);
  EXPECT_NEAR_TENSOR(jacfwd(holomorphic, options)(z), want, 1e-6, 1e-6);
  EXPECT_NEAR_TENSOR(jacobian(holomorphic, options)(z), want, 1e-6, 1e-6);
  EXPECT_NEAR_TENSOR(jacrev(holomorphic, {.chunk_size = 4, .holomorphic = true})(z), want, 1e-6,
                     1e-6);
  const auto cube = [](const at::Tensor& a) { return (a * a * a).sum(); };
  EXPECT_TIGHT(hessian(cube, options)(z), at::diag_embed(6 * z));
  const at::Tensor zs = complex_randn({4, 3});
  const at::Tensor each = vmap(jacrev(holomorphic, options))(zs);
  for (int64_t i = 0; i < 4; ++i) EXPECT_TIGHT(each[i], jacfwd(holomorphic, options)(zs[i]));
}

TEST_F(JacobianTest, RealViewsOfAnyFunction) {
  const JacobianOptions options{.real_view = true};
  const auto f = [](const at::Tensor& z) { return z.conj() * z.abs(); };
  const auto on_views = [&](const at::Tensor& x) {
    return at::view_as_real((f(at::view_as_complex(x))).resolve_conj());
  };
  const at::Tensor z = complex_randn({3});
  const at::Tensor want = difference(on_views, at::view_as_real(z));  // [3, 2, 3, 2]
  EXPECT_NEAR_TENSOR(jacrev(f, options)(z), want, 1e-6, 1e-6);
  EXPECT_NEAR_TENSOR(jacfwd(f, options)(z), want, 1e-6, 1e-6);
  EXPECT_NEAR_TENSOR(jacobian(f, options)(z), want, 1e-6, 1e-6);
  const at::Tensor zs = complex_randn({4, 3});
  const at::Tensor each = vmap(jacfwd(f, options))(zs);
  for (int64_t i = 0; i < 4; ++i) EXPECT_TIGHT(each[i], jacrev(f, options)(zs[i]));
  // |z|^2 of complex numbers, and a real argument beside them.
  const auto energy = [](const at::Tensor& a, const at::Tensor& b) {
    return at::real(a * a.conj()).sum() * b;
  };
  const at::Tensor b = at::ones({}, at::kDouble);
  const at::Tensor h = hessian(energy, options)(z, b);  // [3, 2, 3, 2]
  EXPECT_TIGHT(h.reshape({6, 6}), 2 * at::eye(6, at::kDouble));
  const auto [by_z, by_b] = jacrev<0, 1>(energy, options)(z, b);
  EXPECT_TIGHT(by_z, 2 * at::view_as_real(z));
  EXPECT_TIGHT(by_b, at::real(z * z.conj()).sum());
  const auto with_aux = [&](const at::Tensor& a) { return std::pair(f(a), 2 * a); };
  const auto [j, aux] = jacrev(with_aux, kHasAux, options)(z);
  EXPECT_NEAR_TENSOR(j, want, 1e-6, 1e-6);
  EXPECT_TIGHT(aux, 2 * z);
}

// --- errors --------------------------------------------------------------------------------------

TEST_F(JacobianTest, BadInputs) {
  const at::Tensor x = randn({3});
  EXPECT_THAT(error_of([&] { jacrev([](const at::Tensor& a) { return a > 0; })(x); }),
              HasSubstr("[jacrev] output 0 of the function has dtype Bool (shape [3])"));
  EXPECT_THAT(error_of([&] { jacfwd([](const at::Tensor& a) { return a > 0; })(x); }),
              HasSubstr("[jacfwd] output 0 of the function has dtype Bool"));
  EXPECT_THAT(
      error_of([&] { jacfwd([](const at::Tensor& a) { return a; })(at::ones({2}, at::kInt)); }),
      HasSubstr("[jacfwd] argument 0 is a tensor of dtype Int (shape [2])"));
  EXPECT_THAT(
      error_of([&] { jacrev([](const at::Tensor& a) { return a; }, {.chunk_size = 0})(x); }),
      HasSubstr("chunk_size is 0"));
  EXPECT_THAT(
      error_of([&] { jacrev([](const at::Tensor& a) { return a; }, {.memory_budget = 8})(x); }),
      HasSubstr("[jacrev] memory_budget is 8 bytes, but one row takes"));
  EXPECT_THAT(error_of([&] {
                jacfwd([](const at::Tensor& a) { return a; },
                       {.chunk_size = 1, .memory_budget = 8})(x);
              }),
              HasSubstr("[jacfwd] both chunk_size (1) and memory_budget (8)"));
  EXPECT_THAT(error_of([&] {
                jacfwd([](const at::Tensor& a) { return a; })(at::ones({2}, at::kComplexFloat));
              }),
              HasSubstr("[jacfwd] output 0 of the function is complex (ComplexFloat, shape [2])"));
  const auto identity = [](const at::Tensor& a) { return a; };
  EXPECT_THAT(error_of([&] { jacrev(identity, {.holomorphic = true, .real_view = true})(x); }),
              HasSubstr("[jacrev] holomorphic and real_view were both given"));
  EXPECT_THAT(error_of([&] { jacrev(identity, {.holomorphic = true})(x); }),
              HasSubstr("[jacrev] holomorphic: output 0 of the function has dtype Double (shape "
                        "[3]), but what a holomorphic function returns is complex"));
  const auto complex = [](const at::Tensor& a) {
    return at::view_as_complex(at::stack({a, a}, 1));
  };
  EXPECT_THAT(error_of([&] { jacfwd(complex, {.holomorphic = true})(x); }),
              HasSubstr("[jacfwd] holomorphic: input 0 has dtype Double (shape [3])"));
  const at::Tensor z = complex(x);
  EXPECT_THAT(error_of([&] { jacrev([](const at::Tensor& a) { return at::real(a); })(z); }),
              HasSubstr("[jacrev] input 0 is complex (ComplexDouble, shape [3])"));
  EXPECT_THAT(error_of([&] { jacrev([](const at::Tensor&) { return at::Tensor(); })(x); }),
              HasSubstr("output 0 of the function is an undefined tensor"));
}

}  // namespace
}  // namespace torchlift
