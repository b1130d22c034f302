#include "autodiff/custom_rules.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/bernoulli.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linspace.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <thread>

#include "autodiff/check_grads.h"
#include "autodiff/compositions.h"
#include "autodiff/curvature.h"
#include "autodiff/grad.h"
#include "autodiff/jacobian.h"
#include "autodiff/jvp.h"
#include "autodiff/stop_gradient.h"
#include "autodiff/vjp.h"
#include "batching/control_flow.h"
#include "batching/vmap.h"
#include "core/error.h"
#include "core/tensor_operators.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using at::Tensor;
using ::testing::HasSubstr;
using One = std::tuple<Tensor>;

// --- x * x, with derivatives by a factor: 2 x is the true one ------------------------------------

Fn jvp_square(double factor) {
  return custom_jvp([](const Tensor& x) { return x * x; },
                    [factor](const One& primals, const One& tangents) {
                      const Tensor& x = std::get<0>(primals);
                      return std::pair(x * x, factor * x * std::get<0>(tangents));
                    });
}

Fn vjp_square(double factor) {
  return custom_vjp([](const Tensor& x) { return x * x; },
                    [](const Tensor& x) { return std::pair(x * x, x); },
                    [factor](const Tensor& x, const Tensor& cotangent) {
                      return std::tuple(factor * x * cotangent);
                    });
}

// The same by operators.
Fn plain_square(double factor) {
  return [factor](const Tensor& x) {
    const Tensor y = x * x * (factor / 2);
    return y + stop_gradient(x * x - y);
  };
}

Fn make_function(const Fn& square) {
  return [square](const Tensor& x) { return square(x.sin()) * x + square(square(x)); };
}

// --- compositions --------------------------------------------------------------------------------

struct Case {
  std::string name;
  Fn custom;
  Fn plain;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const double factor : {2.0, 3.0}) {
    const Fn plain = make_function(plain_square(factor));
    const std::string suffix = factor == 2.0 ? " (true)" : " (another derivative)";
    all.push_back({"custom_jvp" + suffix, make_function(jvp_square(factor)), plain});
    all.push_back({"custom_vjp" + suffix, make_function(vjp_square(factor)), plain});
  }
  return all;
}

class CustomRules : public ::testing::Test {
 protected:
  void TearDown() override {
    EXPECT_EQ(current_level(), nullptr);
    EXPECT_TRUE(level_stack().empty());
  }
};

TEST_F(CustomRules, Alone) {
  for (const Case& c : cases()) {
    check(c.name, c.custom, c.plain, points({3}));
    for (const auto& [name, t] : transforms()) {
      check(name + " of " + c.name, t(c.custom), t(c.plain), points({3}));
      check(name + " of a number of " + c.name, t(c.custom), t(c.plain), points({1})[0]);
    }
  }
}

TEST_F(CustomRules, ComposedTwice) {
  for (const Case& c : cases()) {
    for (const auto& [outer, t] : transforms()) {
      for (const auto& [inner, u] : transforms()) {
        check(outer + " of " + inner + " of " + c.name, t(u(c.custom)), t(u(c.plain)),
              points({3, 2}));
      }
    }
  }
}

TEST_F(CustomRules, ComposedThrice) {
  for (const Case& c : cases()) {
    for (const auto& [outer, t] : transforms()) {
      for (const auto& [middle, u] : transforms()) {
        for (const auto& [inner, v] : transforms()) {
          check(outer + " of " + middle + " of " + inner + " of " + c.name, t(u(v(c.custom))),
                t(u(v(c.plain))), points({2, 2}));
        }
      }
    }
  }
}

TEST_F(CustomRules, BatchSizesAndDims) {
  for (const Case& c : cases()) {
    for (const int64_t size : {0, 1, 3}) {
      const Tensor x = points({2, size});
      for (const auto& [name, t] : transforms()) {
        const VmapOptions options{.in_dims = 1, .out_dims = -1};
        check("vmap of " + name + " of " + c.name, vmap(t(c.custom), options),
              vmap(t(c.plain), options), x);
        const auto outside = [&](const Fn& f) -> Fn {
          return t([f, options](const Tensor& y) { return vmap(f, options)(y); });
        };
        // What the others make of no numbers is not this test's.
        if (size == 0 || name == "vmap") continue;
        check(name + " of vmap of " + c.name, outside(c.custom), outside(c.plain), x);
      }
    }
  }
}

TEST_F(CustomRules, GradCheck) {
  check_grads(jvp_square(2), std::tuple(points({3})), {.order = 3});
  check_grads(vjp_square(2), std::tuple(points({3})), {.order = 3});
  check_grads([](const Tensor& x) { return vmap(vjp_square(2))(x); }, std::tuple(points({3, 2})),
              {.order = 2});
  // A wrong rule is noticed, in each mode.
  for (const Fn& wrong : {jvp_square(2.1), vjp_square(2.1)}) {
    EXPECT_THAT(error_of<GradientMismatch>([&] {
                  check_grads(wrong, std::tuple(points({3})), {.modes = CheckModes::kForward});
                }),
                HasSubstr("jvp of output 0"));
    EXPECT_THAT(error_of<GradientMismatch>([&] {
                  check_grads(wrong, std::tuple(points({3})), {.modes = CheckModes::kReverse});
                }),
                HasSubstr("vjp"));
  }
}

// --- several arguments, trees --------------------------------------------------------------------

struct Params {
  Tensor w;
  std::vector<Tensor> biases;
  double scale = 1;
};
TORCHLIFT_PYTREE(Params, w, biases, scale);

// scale * (w . x) + biases, whose gradient by w and biases is `factor` times the true one, and by x
// the true one; index is an integer tensor.
struct Affine {
  static std::pair<Tensor, Tensor> value(const Params& p, const Tensor& x, const Tensor& index) {
    Tensor y = (p.w * x).sum(0) * p.scale;
    for (const Tensor& b : p.biases) y = y + b;
    return {y, index + 1};
  }
};

auto vjp_affine(double factor) {
  using Residuals = std::tuple<Params, Tensor>;
  return custom_vjp(
      &Affine::value,
      [](const Params& p, const Tensor& x, const Tensor& index) {
        return std::pair(Affine::value(p, x, index), Residuals(p, x));
      },
      [factor](const Residuals& residuals, const std::pair<Tensor, Tensor>& cotangent) {
        const auto& [p, x] = residuals;
        const Tensor& c = cotangent.first;
        Params g = p;
        g.w = factor * c * x * p.scale;
        for (Tensor& b : g.biases) b = factor * c;
        return std::tuple<Params, Tensor, Tensor>(g, c * p.w * p.scale, Tensor());
      });
}

auto jvp_affine(double factor) {
  using Arguments = std::tuple<Params, Tensor, Tensor>;
  return custom_jvp(&Affine::value, [factor](const Arguments& primals, const Arguments& tangents) {
    const auto& [p, x, index] = primals;
    const auto& [dp, dx, none] = tangents;
    Tensor dy = factor * (dp.w * x).sum(0) * p.scale + (p.w * dx).sum(0) * p.scale;
    for (const Tensor& db : dp.biases) dy = dy + factor * db;
    return std::pair(Affine::value(p, x, index), std::pair(dy, Tensor()));
  });
}

auto plain_affine(double factor) {
  return [factor](Params p, const Tensor& x, const Tensor& index) {
    const auto scaled = [&](const Tensor& t) { return t * factor + stop_gradient(t - t * factor); };
    p.w = scaled(p.w);
    for (Tensor& b : p.biases) b = scaled(b);
    return Affine::value(p, x, index);
  };
}

template <class F>
void check_affine(const F& custom) {
  const auto plain = plain_affine(3);
  const Params p{points({3}), {points({2})[1], points({4})[0]}, 0.7};
  const Tensor xs = points({4, 3}) * 2;
  const Tensor index = at::arange(4);
  // Every gradient of p and x, for a function f(p, xs) -> [4].
  const auto derivatives = [&](const auto& f) {
    const auto sum = [&](const Params& q, const Tensor& x) { return f(q, x).sin().sum(); };
    std::vector<Tensor> found = tree_flatten(grad<0, 1>(sum)(p, xs));
    for (const Tensor& t : tree_flatten(hessian([&](const Tensor& w) {
           Params q = p;
           q.w = w;
           return sum(q, xs);
         })(p.w))) {
      found.push_back(t);
    }
    Params dp = p;
    dp.w = p.w.cos();
    found.push_back(jvp(f, std::tuple(p, xs), std::tuple(dp, xs.sin())).second);
    found.push_back(jacrev([&](const Tensor& x) { return f(p, x); })(xs));
    found.push_back(jacfwd([&](const Tensor& x) { return f(p, x); })(xs));
    return found;
  };
  const auto mapped = [&](const auto& g) {
    return [&](const Params& q, const Tensor& x) {
      return vmap(
          [&](const Params& r, const Tensor& row, const Tensor& i) { return g(r, row, i).first; },
          {.in_dims = in(kNone, 0, 0)})(q, x, index);
    };
  };
  const std::vector<Tensor> got = derivatives(mapped(custom));
  const std::vector<Tensor> expected = derivatives(mapped(plain));
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) EXPECT_CLOSE(got[i], expected[i]);
  // Gradients inside, of what all examples share.
  const auto each = [&](const auto& g) {
    return vmap(grad<0, 1>([&](const Params& r, const Tensor& row, const Tensor& i) {
                  return g(r, row, i).first.sin();
                }),
                {.in_dims = in(kNone, 0, 0)})(p, xs, index);
  };
  const std::vector<Tensor> inside = tree_flatten(each(custom));
  const std::vector<Tensor> wanted = tree_flatten(each(plain));
  for (size_t i = 0; i < inside.size(); ++i) EXPECT_CLOSE(inside[i], wanted[i]);
  EXPECT_TRUE(at::equal(custom(p, xs[0], index).second, index + 1));
}

TEST_F(CustomRules, TreesVjp) { check_affine(vjp_affine(3)); }
TEST_F(CustomRules, TreesJvp) { check_affine(jvp_affine(3)); }

// --- what no transform does ----------------------------------------------------------------------

TEST_F(CustomRules, LibtorchBackward) {
  for (const Fn& square : {jvp_square(3), vjp_square(3)}) {
    const Tensor x = points({3}).set_requires_grad(true);
    square(x).sum().backward();
    EXPECT_CLOSE(x.grad(), 3 * x.detach());
    // Twice through one graph, and through a graph of the gradient.
    const Tensor y = square(x).sum();
    const Tensor g = torch::autograd::grad({y}, {x}, {}, /*retain_graph=*/true,
                                           /*create_graph=*/true)[0];
    EXPECT_CLOSE(torch::autograd::grad({g.sum()}, {x})[0], at::full({3}, 3.0, at::kDouble));
    EXPECT_CLOSE(torch::autograd::grad({y}, {x})[0], 3 * x.detach());
    EXPECT_THAT(error_of([&] { torch::autograd::grad({y}, {x}); }), HasSubstr("second time"));
  }
}

TEST_F(CustomRules, LeavesNoCycle) {
  std::weak_ptr<int> alive;
  {
    const auto token = std::make_shared<int>(0);
    alive = token;
    const auto f = custom_vjp([](const Tensor& x) { return x.exp(); },
                              [token](const Tensor& x) {
                                const Tensor y = x.exp();
                                return std::pair(y, y);
                              },
                              [](const Tensor& y, const Tensor& c) { return std::tuple(y * c); });
    const Tensor x = points({3}).set_requires_grad(true);
    Tensor y = f(x);
    EXPECT_TRUE(y.requires_grad());
  }
  EXPECT_TRUE(alive.expired());
}

TEST_F(CustomRules, NoGradAndStopGradient) {
  for (const Fn& square : {jvp_square(3), vjp_square(3)}) {
    const Tensor x = points({3});
    const auto stopped = [&](const Tensor& y) { return square(stop_gradient(y)) * y; };
    const auto silent = [&](const Tensor& y) {
      Tensor constant;
      {
        const c10::NoGradGuard no_grad;
        constant = square(y);
      }
      return constant * y;
    };
    for (const auto& [name, t] : transforms()) {
      if (name == "vmap") continue;
      const Fn expected = [](const Tensor& y) { return stop_gradient(y * y) * y; };
      check(name + " stopped", t(stopped), t(expected), x);
      check(name + " no_grad", t(silent), t(expected), x);
      const auto mapped = [&](const Fn& f) {
        return t([&](const Tensor& y) { return vmap(f)(y); });
      };
      check(name + " of vmap, no_grad", mapped(silent), mapped(expected), x);
    }
  }
}

// A vmap inside of a gradient under no_grad, and around one.
TEST_F(CustomRules, NoGradOutside) {
  for (const Fn& square : {jvp_square(3), vjp_square(3)}) {
    const Tensor x = points({3}).set_requires_grad(true);
    const c10::NoGradGuard no_grad;
    const Tensor g = vmap(grad([&](const Tensor& y) { return square(y); }))(x);
    EXPECT_FALSE(g.requires_grad());
    EXPECT_CLOSE(g, 3 * x.detach());
    EXPECT_FALSE(vmap(square)(x).requires_grad());
  }
}

TEST_F(CustomRules, RandomNumbersAreDrawnOnce) {
  // A dropout whose mask is a residual, and made again for the second derivative.
  const auto dropout = custom_vjp(
      [](const Tensor& x) { return x * at::bernoulli(at::full({64}, 0.5, at::kDouble)); },
      [](const Tensor& x) {
        const Tensor mask = at::bernoulli(at::full({64}, 0.5, at::kDouble));
        return std::pair(x * mask, mask);
      },
      [](const Tensor& mask, const Tensor& c) { return std::tuple(mask * c); });
  const Tensor x = at::ones({64}, at::kDouble);
  const auto both = [&](const Tensor& y) {
    auto [value, pullback] = vjp(dropout, y);
    return std::pair(value, pullback(at::ones_like(y)));
  };
  const auto [value, gradient] = both(x);
  EXPECT_CLOSE(value, gradient);
  const auto pair = jvp(both, x, x).first;
  EXPECT_CLOSE(pair.first, pair.second);
}

TEST_F(CustomRules, Threads) {
  const Case c = cases()[3];
  const Fn f = transforms().at("grad")(transforms().at("vmap")(c.custom));
  const Tensor x = points({3, 2});
  const Tensor expected = transforms().at("grad")(c.plain)(x);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int round = 0; round < 20; ++round) EXPECT_CLOSE(f(x), expected);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// A backward pass on a thread that has entered no level, as those of CUDA devices.
TEST_F(CustomRules, BackwardOnAnotherThread) {
  for (const Fn& square : {jvp_square(3), vjp_square(3)}) {
    const Tensor x = points({3});
    const Tensor g = vmap([&](const Tensor& row) {
      const Tensor leaf = row.detach().set_requires_grad(true);
      const Tensor y = square(leaf);
      Tensor found;
      std::thread([&] { found = torch::autograd::grad({y}, {leaf})[0]; }).join();
      return found;
    })(x);
    EXPECT_CLOSE(g, 3 * x);
  }
}

TEST_F(CustomRules, Narrowed) {
  for (const Case& c : cases()) {
    const auto branch = [](const Fn& f) -> Fn {
      return [f](const Tensor& x) {
        return vmap([&](const Tensor& row) {
          return cond(
              row.gt(0), [&](const Tensor& y) { return f(y) * row; },
              [&](const Tensor& y) { return f(y * 2); }, row);
        })(x);
      };
    };
    check(c.name, branch(c.custom), branch(c.plain), points({5}));
    for (const char* name : {"grad", "jvp", "jacrev", "hessian"}) {
      const Transform& t = transforms().at(name);
      check(std::string(name) + " of " + c.name, t(branch(c.custom)), t(branch(c.plain)),
            points({5}));
    }
  }
}

// --- errors --------------------------------------------------------------------------------------

TEST_F(CustomRules, ClosedOverTensors) {
  const Tensor x = points({3});
  const auto closing = [](const Tensor& w) {
    return custom_jvp([w](const Tensor& y) { return y * w; },
                      [w](const One& primals, const One& tangents) {
                        return std::pair(std::get<0>(primals) * w, std::get<0>(tangents) * w);
                      });
  };
  // A constant is fine; so is one of a vmap inside of it.
  EXPECT_CLOSE(grad([&](const Tensor& y) { return closing(x)(y).sum(); })(x), x);
  EXPECT_CLOSE(vmap(grad([&](const Tensor& y) { return closing(y.detach())(y); }))(x), x);
  // One that is differentiated is not,
  EXPECT_THAT(error_of<TransformError>(
                  [&] { grad([&](const Tensor& y) { return closing(y)(x).sum(); })(x); }),
              HasSubstr("closes over a tensor that is being differentiated"));
  EXPECT_THAT(
      error_of<TransformError>([&] { jvp([&](const Tensor& y) { return closing(y)(x); }, x, x); }),
      HasSubstr("Pass the tensor as an argument"));
  // nor one of a vmap that a gradient outside cannot enter.
  EXPECT_THAT(error_of<UnsupportedError>([&] {
                grad([&](const Tensor& w) {
                  return vmap([&](const Tensor& y) { return closing(y)(w); })(x).sum();
                })(x);
              }),
              HasSubstr("closes over a tensor of a vmap"));
  const auto mixed = [&](const Tensor& w) {
    return vmap([&](const Tensor& y, const Tensor& v) { return closing(y)(v); })(x, w).sum();
  };
  EXPECT_CLOSE(mixed(x), (x * x).sum());
  EXPECT_THAT(error_of<UnsupportedError>([&] { jvp(mixed, x, x); }),
              HasSubstr("closes over a tensor of a vmap"));
  EXPECT_THAT(error_of<UnsupportedError>([&] { grad(mixed)(x); }), HasSubstr("escaped"));
}

TEST_F(CustomRules, WrongRules) {
  const Tensor x = points({3});
  const auto value = [](const Tensor& y) { return y * y; };
  const auto fwd = [](const Tensor& y) { return std::pair(y * y, y); };
  const auto with_bwd = [&](const auto& bwd) {
    return [f = custom_vjp(value, fwd, bwd)](const Tensor& y) { return f(y).sum(); };
  };
  const auto sum = with_bwd([](const Tensor& y, const Tensor& c) { return (y * c).sum(); });
  EXPECT_THAT(
      error_of<TransformError>([&] { grad(sum)(x); }),
      HasSubstr("[custom_vjp] bwd's gradient of argument 0 has shape [], but what it belongs "
                "to has shape [3]"));
  EXPECT_THAT(error_of<TransformError>([&] {
                vmap(grad(sum))(points({4, 3}));
              }),
              HasSubstr("has shape [], but what it belongs to has shape [3]"));
  const auto integers =
      with_bwd([](const Tensor& y, const Tensor&) { return at::ones_like(y).to(at::kLong); });
  EXPECT_THAT(error_of<TransformError>([&] { grad(integers)(x); }), HasSubstr("has dtype Long"));

  const auto push = [](const auto& tangent) {
    return custom_jvp([](const Tensor& y) { return std::vector<Tensor>{y * y}; },
                      [tangent](const One& primals, const One& tangents) {
                        const Tensor y = std::get<0>(primals);
                        return std::pair(std::vector<Tensor>{y * y},
                                         tangent(std::get<0>(tangents)));
                      });
  };
  const auto narrow = push([](const Tensor& t) { return std::vector<Tensor>{t.sum()}; });
  EXPECT_THAT(error_of<TransformError>([&] { jvp(narrow, x, x); }),
              HasSubstr("[custom_jvp] the tangent that the rule returned for output [0] has shape "
                        "[], but what it belongs to has shape [3]"));
  EXPECT_THAT(error_of<TransformError>(
                  [&] { grad([&](const Tensor& y) { return narrow(y)[0].sum(); })(x); }),
              HasSubstr("has shape []"));
  const auto two = push([](const Tensor& t) { return std::vector<Tensor>{t, t}; });
  EXPECT_THAT(error_of<TransformError>([&] { jvp(two, x, x); }),
              HasSubstr("must have the structure of the output, but does not: expected 1 elements, "
                        "got 2"));

  const auto lists =
      custom_vjp([](const std::vector<Tensor>& xs) { return xs[0] * xs[1]; },
                 [](const std::vector<Tensor>& xs) { return std::pair(xs[0] * xs[1], xs); },
                 [](const std::vector<Tensor>& xs, const Tensor& c) {
                   return std::vector<Tensor>{xs[1] * c};
                 });
  EXPECT_THAT(error_of<TransformError>([&] {
                grad([&](const Tensor& y) { return lists(std::vector<Tensor>{y, y}).sum(); })(x);
              }),
              HasSubstr("what bwd returned must have the structure of the arguments"));

  const auto counted =
      custom_vjp([](const Tensor& y, const Tensor& i) { return y * i; },
                 [](const Tensor& y, const Tensor& i) { return std::pair(y * i, i); },
                 [](const Tensor& i, const Tensor& c) { return std::tuple(c * i, c); });
  EXPECT_THAT(
      error_of<TransformError>(
          [&] { grad([&](const Tensor& y) { return counted(y, at::arange(3)).sum(); })(x); }),
      HasSubstr("bwd's gradient of argument 1 is a tensor of shape [3], but what it belongs "
                "to has dtype Long"));
}

TEST_F(CustomRules, WritesIntoArguments) {
  const auto f = custom_vjp([](const Tensor& x) { return x.clone(); },
                            [](Tensor x) { return std::pair(x.mul_(2), x); },
                            [](const Tensor&, const Tensor& c) { return std::tuple(c); });
  EXPECT_THAT(error_of<UnsupportedError>(
                  [&] { grad([&](const Tensor& y) { return f(y * 1).sum(); })(points({3})); }),
              HasSubstr("writes into one of its arguments"));
  // The arguments themselves may be written into later only if no gradient is asked for.
  const Tensor x = points({3}).set_requires_grad(true);
  Tensor y = x * 1;
  const Tensor z = vjp_square(2)(y);
  y.mul_(2);
  EXPECT_THAT(error_of([&] { z.sum().backward(); }), HasSubstr("modified by an inplace operation"));
}

TEST_F(CustomRules, ExceptionsLeaveNoLevel) {
  const auto throwing = custom_jvp([](const Tensor& x) { return x; },
                                   [](const One&, const One&) -> std::pair<Tensor, Tensor> {
                                     throw std::runtime_error("rule");
                                   });
  const Tensor x = points({3, 2});
  for (const auto& [outer, t] : transforms()) {
    for (const auto& [inner, u] : transforms()) {
      if (outer == "vmap" && inner == "vmap") continue;
      EXPECT_THROW(t(u(throwing))(x), std::exception) << outer << " of " << inner;
      EXPECT_TRUE(level_stack().empty());
      EXPECT_TRUE(c10::GradMode::is_enabled());
    }
  }
}

TEST_F(CustomRules, ResultsAreTensorsOfTheirOwn) {
  const auto identity = custom_vjp([](const Tensor& x) { return x; },
                                   [](const Tensor& x) { return std::pair(x, std::tuple<>()); },
                                   [](std::tuple<>, const Tensor& c) { return std::tuple(3 * c); });
  const Tensor x = points({3});
  EXPECT_CLOSE(grad([&](const Tensor& y) { return identity(y).sum(); })(x),
               at::full({3}, 3.0, at::kDouble));
  EXPECT_CLOSE(grad([&](const Tensor& y) { return identity(y).mul_(2).sum(); })(x),
               at::full({3}, 6.0, at::kDouble));
  EXPECT_CLOSE(jvp([&](const Tensor& y) { return identity(y).mul_(2); }, x, x).second, 6 * x);
  EXPECT_CLOSE(x, points({3}));
}

}  // namespace
}  // namespace torchlift
