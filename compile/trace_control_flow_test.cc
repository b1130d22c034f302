// Branches and loops in traces: the graph is run on inputs that go other ways than those it was
// traced with, and compared with the function itself.

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "autodiff/grad.h"
#include "autodiff/jacobian.h"
#include "autodiff/jvp.h"
#include "batching/control_flow.h"
#include "batching/vmap.h"
#include "compile/graph.h"
#include "compile/passes/optimize.h"
#include "compile/replay.h"
#include "compile/trace.h"
#include "core/error.h"
#include "core/testing.h"

namespace torchlift::compile {
namespace {

using at::Tensor;
using ::testing::HasSubstr;
using Inputs = std::vector<Tensor>;

int64_t count(const Graph& graph, const std::string& op) {
  int64_t found = 0;
  for (const Node& node : graph.nodes) {
    found += node.op == op ? 1 : 0;
    for (const auto& inner : node.subgraphs) found += count(*inner, op);
  }
  return found;
}

// The graph of f, traced on the first inputs, gives what f gives on all of them; so does the
// optimized one.
template <class F>
Graph expect_replays(const F& f, const Inputs& inputs) {
  const Graph graph = torchlift::trace(f, inputs.front());
  verify(graph);
  Graph optimized = graph;
  optimize(optimized);
  verify(optimized);
  for (const Tensor& x : inputs) {
    const Tensor expected = f(x.clone());
    for (const Graph& each : {graph, optimized}) {
      const Tensor got = Program(each).run({x})[0];
      EXPECT_EQ(got.sizes(), expected.sizes()) << each.str();
      EXPECT_TRUE(at::allclose(got, expected, 1e-9, 1e-12, /*equal_nan=*/true))
          << each.str() << "\nof " << x << "\ngives " << got << "\nexpected " << expected;
    }
  }
  return graph;
}

Inputs both_signs(at::IntArrayRef sizes) {
  const Tensor x = at::rand(sizes, at::kDouble) + 0.1;
  return {x, -x, at::randn(sizes, at::kDouble)};
}

template <class F>
std::string error_of(const F& f, const Tensor& x) {
  try {
    static_cast<void>(torchlift::trace(f, x));
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

Tensor sum_is_positive(const Tensor& x) { return x.sum().gt(0); }

TEST(TraceCond, IsANodeWithTwoGraphs) {
  const Tensor w = at::ones({3}, at::kDouble);
  const auto f = [&](const Tensor& x) {
    return cond(
        sum_is_positive(x), [&](const Tensor& y) { return y * w; },
        [](const Tensor& y) { return y.exp().sub(1); }, x);
  };
  const Graph graph = expect_replays(f, both_signs({3}));
  EXPECT_EQ(count(graph, kCondOp), 1) << graph.str();
  EXPECT_EQ(count(graph, "aten::exp"), 1) << graph.str();
  EXPECT_EQ(graph.nodes.back().op, kCondOp) << "the branches' operators are inside\n"
                                            << graph.str();
}

TEST(TraceCond, ResultsThatAreOperandsConstantsOrTheSame) {
  const Tensor w = at::arange(3, at::kDouble);
  const auto f = [&](const Tensor& x) {
    const auto [a, b, c] = cond(
        sum_is_positive(x), [&](const Tensor& y) { return std::tuple(y, w, y); },
        [](const Tensor& y) {
          const Tensor t = y.t();
          return std::tuple(t, t, y * 2);
        },
        x);
    return a + 10 * b + 100 * c;
  };
  expect_replays(f, both_signs({3}));
}

TEST(TraceCond, OutputsThatAreConstantsAreCopied) {
  const Tensor w = at::rand({3}, at::kDouble), x = at::rand({3}, at::kDouble), before = w.clone();
  const auto f = [&](const Tensor& t) {
    return cond(
        sum_is_positive(t), [&](const Tensor&) { return w; }, [](const Tensor& y) { return y * 2; },
        t);
  };
  const Program program(torchlift::trace(f, x));
  for (int i = 0; i < 2; ++i) {
    const Tensor got = program.run({x})[0];
    EXPECT_CLOSE(got, before);
    got.add_(100);
  }
}

TEST(TraceCond, WhatIsClosedOverIsAnOperand) {
  const auto f = [](const Tensor& x) {
    const Tensor y = x.sin(), z = x.cos();
    const auto inner = [&](const Tensor& t) {
      return cond(
          t.prod().gt(0), [&] { return y * t; }, [&] { return z - y; });
    };
    return cond(
        sum_is_positive(x), [&] { return inner(x) + z; }, [&] { return inner(y).mul(3); });
  };
  const Graph graph = expect_replays(f, both_signs({3}));
  EXPECT_EQ(count(graph, kCondOp), 3) << graph.str();
}

TEST(TraceCond, InPlaceOnWhatABranchMakes) {
  const auto f = [](const Tensor& x) {
    return cond(
        sum_is_positive(x),
        [&] {
          Tensor y = x * 2;
          y.select(0, 0).fill_(7);
          Tensor z = at::zeros({3}, at::kDouble);
          z.select(0, 1).copy_(x.sum());
          return y + z;
        },
        [&] { return x.clone().neg_(); });
  };
  expect_replays(f, both_signs({3}));
}

TEST(TraceCond, WritesToWhatIsOutsideAreRefused) {
  const auto f = [](const Tensor& x) {
    const Tensor y = x * 2;
    return cond(
        sum_is_positive(x), [&] { return y.select(0, 0).add_(1).expand({3}); }, [&] { return y; });
  };
  EXPECT_THAT(error_of(f, at::ones({3})), HasSubstr("from outside of it"));
}

TEST(TraceCond, UnderVmapWithOneCondition) {
  const auto f = [](const Tensor& x) {
    const Tensor on = sum_is_positive(x);
    const Tensor w = at::arange(4, at::kDouble);
    return vmap([&](const Tensor& row) {
      return cond(
          on, [&] { return row * row; }, [&] { return w + 0; });
    })(x);
  };
  const Graph graph = expect_replays(f, both_signs({3, 4}));
  EXPECT_EQ(count(graph, kCondOp), 1) << graph.str();
}

TEST(TraceCond, UnderVmapWithBatchDimsOfBothBranches) {
  const auto f = [](const Tensor& x) {
    const Tensor on = sum_is_positive(x);
    const auto row = [&](const Tensor& a) {
      return vmap([&](const Tensor& b) {
        return cond(
            on, [&] { return a.sin(); }, [&] { return b.mul(2); });
      })(x);
    };
    return vmap(row, {.in_dims = 1})(x.mm(x.t()));
  };
  expect_replays(f, both_signs({3, 3}));
}

TEST(TraceCond, ByExample) {
  const auto root = [](const Tensor& t) {
    return cond(
        t.gt(0), [](const Tensor& u) { return u.sqrt(); }, [](const Tensor& u) { return u * 0; },
        t);
  };
  const Inputs inputs = {at::randn({5}, at::kDouble), at::randn({5}, at::kDouble),
                         at::zeros({5}, at::kDouble)};
  EXPECT_EQ(count(expect_replays(vmap(root), inputs), kCondOp), 0);
  expect_replays(vmap(grad(root)), inputs);  // no NaN from sqrt at 0
  expect_replays(grad([&](const Tensor& x) { return vmap(root)(x).sum(); }), inputs);
}

TEST(TraceCond, Derivatives) {
  const Tensor w = at::rand({3}, at::kDouble);
  const auto f = [&](const Tensor& x) {
    return cond(
               sum_is_positive(x), [&](const Tensor& y) { return (y * w).sin(); },
               [](const Tensor& y) { return y * y * y; }, x)
        .sum();
  };
  expect_replays(grad(f), both_signs({3}));
  expect_replays(hessian(f), both_signs({3}));
  expect_replays([&](const Tensor& x) { return jvp(f, std::tuple(x), std::tuple(x.cos())).second; },
                 both_signs({3}));
  // Where nothing is differentiated, it is a node.
  const auto scaled = [&](const Tensor& x) {
    return grad([](const Tensor& y) { return y.sin().sum(); })(x) * f(x);
  };
  EXPECT_EQ(count(expect_replays(scaled, both_signs({3})), kCondOp), 1);
}

TEST(TraceCond, RandomNumbersAreDrawnByTheBranchThatRuns) {
  const auto f = [](const Tensor& x) {
    return cond(
        sum_is_positive(x), [&] { return at::rand_like(x); }, [&] { return x; });
  };
  const Program program(torchlift::trace(f, at::ones({3}, at::kDouble)));
  const Tensor a = program.run({at::ones({3}, at::kDouble)}, {.seed = 1})[0];
  EXPECT_TRUE(at::equal(a, program.run({at::ones({3}, at::kDouble)}, {.seed = 1})[0]));
  const Tensor off = at::full({3}, -1, at::kDouble);
  EXPECT_TRUE(at::equal(program.run({off})[0], off));
}

// --- loops ---------------------------------------------------------------------------------------

// Newton's method for the square root of a.
Tensor newton(const Tensor& a) {
  return while_loop([&](const Tensor& x) { return (x * x - a).abs().gt(1e-9); },
                    [&](const Tensor& x) { return 0.5 * (x + a / x); }, at::ones_like(a));
}

TEST(TraceWhile, RunsAsOftenAsTheInputsAsk) {
  const Inputs inputs = {at::scalar_tensor(4, at::kDouble), at::scalar_tensor(1e6, at::kDouble),
                         at::scalar_tensor(1, at::kDouble)};
  const Graph graph = expect_replays(newton, inputs);
  EXPECT_EQ(count(graph, kWhileOp), 1) << graph.str();
}

TEST(TraceWhile, ByExample) {
  const Inputs inputs = {at::tensor({4.0, 9.0}), at::tensor({1e6, 1.0}), at::tensor({1.0, 1.0})};
  EXPECT_EQ(count(expect_replays(vmap(newton), inputs), kWhileOp), 1);
  const auto nested = vmap([](const Tensor& row) { return vmap(newton)(row); });
  expect_replays(nested, {at::tensor({4.0, 9.0, 1.0, 1e3}).view({2, 2}),
                          at::tensor({1.0, 1.0, 2.0, 1.0}).view({2, 2})});
}

TEST(TraceWhile, CarriesTreesAndWidensThem) {
  // The count starts without a batch dim, and gets one from the condition.
  const auto steps = [](const Tensor& n) {
    const auto [last, count] =
        while_loop([](const std::pair<Tensor, Tensor>& c) { return c.first.gt(1); },
                   [](const std::pair<Tensor, Tensor>& c) {
                     const Tensor half = cond(
                         c.first.remainder(2).eq(0), [&] { return c.first.floor_divide(2); },
                         [&] { return 3 * c.first + 1; });
                     return std::pair(half, c.second + 1);
                   },
                   std::pair(n, at::zeros({}, at::kLong)));
    return last + 1000 * count;
  };
  const auto number = [](int64_t n) { return at::scalar_tensor(n, at::kLong); };
  const Graph graph = expect_replays(steps, {number(3), number(27), number(1)});
  EXPECT_EQ(count(graph, kCondOp), 1) << graph.str();
  expect_replays(vmap(steps), {at::arange(1, 8), at::full({7}, 27, at::kLong)});
}

TEST(TraceWhile, InForiLoopsWithTensorBounds) {
  const auto power = [](const Tensor& n) {
    return fori_loop(
        at::zeros({}, at::kLong), n, [](const Tensor& i, const Tensor& y) { return y * (i + 2); },
        at::ones({2}, at::kLong));
  };
  const auto number = [](int64_t n) { return at::scalar_tensor(n, at::kLong); };
  expect_replays(power, {number(3), number(0), number(7)});
}

// What it starts with, read in the condition and in the body too: itself, a view of it, and a
// value that shares its memory.
TEST(TraceWhile, ReadsWhatItStartsWith) {
  const Inputs inputs = {at::tensor({4.0, 9.0}), at::tensor({1e6, 1.0}), at::tensor({1.0, 1.0})};
  const auto root_of = [](const Tensor& a, const Tensor& start) {
    return while_loop([&](const Tensor& x) { return (x * x - a).abs().max().gt(1e-9); },
                      [&](const Tensor& x) { return (x + a / x) / 2; }, start);
  };
  const auto of_itself = [&](const Tensor& a) { return root_of(a, a); };
  expect_replays(of_itself, inputs);
  expect_replays([&](const Tensor& a) { return root_of(a.view({2}), a.view({2})); }, inputs);
  expect_replays([&](const Tensor& a) { return root_of(a.detach(), a); }, inputs);
  expect_replays([&](const Tensor& a) { return of_itself(a * 2); }, inputs);
  expect_replays(vmap(of_itself), {at::stack(inputs)});
  // Several that start alike.
  const auto pair = [](const Tensor& a) {
    const auto [x, unchanged] = while_loop(
        [](const std::pair<Tensor, Tensor>& c) {
          return (c.first * c.first - c.second).abs().max().gt(1e-9);
        },
        [](const std::pair<Tensor, Tensor>& c) {
          return std::pair((c.first + c.second / c.first) / 2, c.second * 1);
        },
        std::pair(a, a));
    return x + 10 * unchanged;
  };
  expect_replays(pair, inputs);
}

// The result of no step shares the memory of what the loop starts with; what reads one or the
// other afterwards, by other tensors of it, does not confuse them.
TEST(TraceWhile, OfNoStepIsAnotherValue) {
  const auto f = [](const Tensor& a) {
    const Tensor last = while_loop([](const Tensor& x) { return x.sum().lt(10); },
                                   [](const Tensor& x) { return x * 2; }, a);
    return last.detach() - a.detach() * 3;
  };
  expect_replays(f, {at::tensor({40.0, 9.0}), at::tensor({1.0, 2.0})});
}

TEST(TraceWhile, DerivativesAroundAndInside) {
  const Inputs inputs = {at::scalar_tensor(2, at::kDouble), at::scalar_tensor(50, at::kDouble)};
  // Inside of the body.
  const auto descend = [](const Tensor& a) {
    const auto loss = [&](const Tensor& x) { return (x * x - a).square(); };
    return while_loop([&](const Tensor& x) { return loss(x).gt(1e-8); },
                      [&](const Tensor& x) { return x - 0.002 * grad(loss)(x); }, a * 0 + 1);
  };
  expect_replays(descend, inputs);
  EXPECT_THAT(error_of(grad(newton), inputs[0]), HasSubstr("fixed_point or custom_root"));
}

// --- scan ----------------------------------------------------------------------------------------

// A recurrence with a weight that is closed over; gives the last state and all of them.
Tensor recurrence(const Tensor& xs, bool reverse) {
  const Tensor w = xs.sum(0).mean();
  const auto step = [&](const Tensor& h, const Tensor& x) {
    const Tensor next = (h * w + x).tanh();
    return std::pair(next, next.mul(2));
  };
  const Tensor start = at::zeros_like(xs.select(0, 0));
  const auto [last, all] = scan(step, start, xs, {.reverse = reverse});
  return all + last;
}

TEST(TraceScan, IsANodeOfAnyLength) {
  for (const bool reverse : {false, true}) {
    const auto f = [=](const Tensor& xs) { return recurrence(xs, reverse); };
    const Graph graph = expect_replays(f, both_signs({5, 3}));
    EXPECT_EQ(count(graph, kScanOp), 1) << graph.str();
    EXPECT_EQ(count(graph, "aten::tanh"), 1) << graph.str();
  }
}

TEST(TraceScan, UnderVmap) {
  for (const int64_t dim : {0, 1, 2}) {
    const auto f = [=](const Tensor& xs) {
      return vmap([](const Tensor& x) { return recurrence(x, true); }, {.in_dims = dim})(xs);
    };
    EXPECT_EQ(count(expect_replays(f, both_signs({4, 5, 3})), kScanOp), 1);
  }
  // What is carried gets its batch dim from the rows, the results have none.
  const auto sums = [](const Tensor& xs) {
    return vmap([&](const Tensor& x) {
      const auto [total, steps] = scan(
          [](const std::pair<Tensor, Tensor>& c, const Tensor& row) {
            const Tensor i = c.second + 1;
            return std::pair(std::pair(c.first + row.sum(), i), i);
          },
          std::pair(at::zeros({}, at::kDouble), at::zeros({}, at::kDouble)), x);
      return total.first + steps;
    })(xs);
  };
  expect_replays(sums, both_signs({4, 5, 3}));
}

// What it starts with, and its first row, read in the step too.
TEST(TraceScan, ReadsWhatItIsGiven) {
  const auto from_itself = [](const Tensor& a) {
    return scan([&](const Tensor& h, const Tensor& x) { return std::pair((h + a / h) / 2 + x, h); },
                a, at::stack({a * 0, a * 0, a}))
        .second;
  };
  expect_replays(from_itself, both_signs({3}));
  const auto first_row = [](const Tensor& xs) {
    const Tensor first = xs.select(0, 0);
    return scan([&](const Tensor& h,
                    const Tensor& x) { return std::pair(h + x * first, x - first.detach()); },
                first, xs)
        .second;
  };
  expect_replays(first_row, both_signs({4, 3}));
  expect_replays(vmap(first_row), both_signs({2, 4, 3}));
}

TEST(TraceScan, IsUnrolledWhereItIsDifferentiated) {
  const auto loss = [](const Tensor& xs) { return recurrence(xs, false).sum(); };
  EXPECT_EQ(count(expect_replays(grad(loss), both_signs({5, 3})), kScanOp), 0);
  const auto pushed = [&](const Tensor& xs) { return jvp(loss, xs, xs.cos()).second; };
  expect_replays(pushed, both_signs({5, 3}));
  // A gradient inside of a step is none around it.
  const auto inside = [](const Tensor& xs) {
    const auto step = [](const Tensor& h, const Tensor& x) {
      const Tensor g = grad([&](const Tensor& y) { return (y * x).sin().sum(); })(h);
      return std::pair(h + g, g);
    };
    return scan(step, at::ones_like(xs.select(0, 0)), xs).second;
  };
  EXPECT_EQ(count(expect_replays(inside, both_signs({5, 3})), kScanOp), 1);
}

TEST(TraceScan, WithBranchesInIt) {
  const auto f = [](const Tensor& xs) {
    const auto step = [](const Tensor& h, const Tensor& x) {
      const Tensor next = cond(
          x.sum().gt(0), [&] { return h + x; }, [&] { return h * 2; });
      return std::pair(next, next.sum());
    };
    return scan(step, at::ones_like(xs.select(0, 0)), xs).second;
  };
  expect_replays(f, both_signs({5, 3}));
}

}  // namespace
}  // namespace torchlift::compile
