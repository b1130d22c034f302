#include "compile/trace.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <string>
#include <tuple>
#include <vector>

#include "autodiff/checkpoint.h"
#include "autodiff/grad.h"
#include "autodiff/jacobian.h"
#include "autodiff/jvp.h"
#include "batching/vmap.h"
#include "compile/graph.h"
#include "compile/replay.h"
#include "core/error.h"
#include "core/testing.h"

namespace torchlift::compile {
namespace {

using at::Tensor;
using ::testing::HasSubstr;

std::vector<std::string> operators(const Graph& graph) {
  std::vector<std::string> names;
  for (const Node& node : graph.nodes) names.push_back(node.op);
  return names;
}

template <class F>
void expect_same(const Graph& graph, const F& f, const Tensor& x) {
  verify(graph);
  const Tensor other = at::rand_like(x) + 0.5;
  const Tensor got = Program(graph).run({other})[0];
  const Tensor expected = f(other.clone());
  EXPECT_EQ(got.sizes(), expected.sizes());
  EXPECT_EQ(got.strides(), expected.strides());
  EXPECT_CLOSE(got, expected);
}

// Traces f on x, and runs the graph on other numbers.
template <class F>
Graph expect_replays(const F& f, const Tensor& x) {
  Graph graph = torchlift::trace(f, x);
  expect_same(graph, f, x);
  return graph;
}

Tensor input() { return at::rand({3, 4}, at::kDouble); }

TEST(TraceTest, WritesDownOperators) {
  const Graph graph =
      expect_replays([](const Tensor& x) { return x.sin().mul(x).sum(0); }, input());
  EXPECT_EQ(graph.str(),
            "def graph(x0: f64[3, 4]):\n"
            "    sin = aten.sin(x0)  # f64[3, 4]\n"
            "    mul = aten.mul.Tensor(sin, x0)  # f64[3, 4]\n"
            "    sum = aten.sum.dim_IntList(mul, [0])  # f64[4]\n"
            "    return sum\n");
}

TEST(TraceTest, NumbersStayNumbers) {
  const Graph graph =
      expect_replays([](const Tensor& x) { return (x + 2.0) * 3 - x / 2; }, input());
  EXPECT_TRUE(graph.constants.empty()) << graph.str();
}

TEST(TraceTest, GradGivesPlainOperators) {
  const Graph graph = expect_replays(grad([](const Tensor& x) { return x.sin().sum(); }), input());
  EXPECT_EQ(operators(graph),
            (std::vector<std::string>{"aten::sin", "aten::sum", "aten::cos", "aten::mul"}))
      << graph.str();
}

TEST(TraceTest, VmapGivesPlainOperators) {
  const auto f = vmap([](const Tensor& row) { return row.dot(row); });
  const Graph graph = expect_replays(f, input());
  for (const Node& node : graph.nodes) EXPECT_NE(node.op, "aten::dot");
}

TEST(TraceTest, EveryTransform) {
  const auto net = [](const Tensor& row) { return (row.tanh().cumsum(0) * row.exp()).sum(); };
  const auto rows = [](const Tensor& row) { return row.tanh().cumsum(0) * row; };
  expect_replays(vmap(grad(net)), input());
  expect_replays(vmap(jacrev(rows)), input());
  expect_replays(vmap(jacfwd(rows)), input());
  expect_replays(vmap(hessian(net)), input());
  expect_replays(grad([&](const Tensor& x) { return vmap(grad(net))(x).pow(2).sum(); }), input());
  expect_replays(
      [&](const Tensor& x) {
        return std::get<1>(jvp(vmap(grad(net)), std::tuple(x), std::tuple(x.cos())));
      },
      input());
}

// The graph has what a checkpoint would compute again once.
TEST(TraceTest, Checkpoints) {
  const Tensor w = at::rand({4, 4}, at::kDouble);
  const auto part = [w](const Tensor& row) { return (row.matmul(w).tanh() * row).sin(); };
  const auto net = [&](const Tensor& row) {
    return checkpoint(part, checkpoint(part, CheckpointPolicy::products(), row)).sum();
  };
  expect_replays(vmap(net), input());
  expect_replays(vmap(grad(net)), input());
  expect_replays(grad([&](const Tensor& x) { return vmap(net)(x).sum(); }), input());
  expect_replays(vmap(hessian(net)), input());
  const Graph graph = torchlift::trace(vmap(grad(net)), input());
  EXPECT_EQ(std::count_if(graph.nodes.begin(), graph.nodes.end(),
                          [](const Node& node) { return node.op == "aten::tanh"; }),
            2);
}

TEST(TraceTest, InPlaceOperatorsAndViews) {
  expect_replays(
      [](const Tensor& x) {
        Tensor y = x * 2;
        y[1].add_(x[0]);
        y.select(1, 0).mul_(3);
        return y + 1;
      },
      input());
  expect_replays(
      [](const Tensor& x) {
        Tensor y = x * 2;
        y.t_();
        y.unsqueeze_(0);
        return y.contiguous();
      },
      input());
}

TEST(TraceTest, WritesIntoWhatTheFunctionMakes) {
  const auto f = [](const Tensor& x) {
    Tensor z = at::zeros({5, 4}, x.options());
    Tensor rows = z.slice(0, 1, 4);
    z[0] = x[0];
    rows.mul_(2).add_(x);
    return z.sum(0) + rows.sum(0);
  };
  expect_replays(f, input());
  expect_replays(vmap([](const Tensor& row) {
                   Tensor z = at::zeros({6}, row.options());
                   z.slice(0, 1, 5) += row;
                   return z;
                 }),
                 input());
}

// What autograd does with a write into a view (CopySlices) writes into memory that it makes.
TEST(TraceTest, DerivativesThroughWritesIntoViews) {
  const auto f = [](const Tensor& row) {
    Tensor z = row.clone();
    z.slice(0, 1, 2).fill_(0.);
    return z.sin().sum();
  };
  const auto weighted = [&](const Tensor& row) { return (grad(f)(row) * row).sum(); };
  expect_replays(vmap(grad(f)), input());
  expect_replays(vmap(grad(weighted)), input());
  expect_replays(vmap(jacrev(grad(f))), input());
  expect_replays(vmap(hessian(f)), input());
  expect_replays(vmap(vmap(grad(weighted))), at::rand({2, 3, 4}, at::kDouble));
}

// A view may have other elements than the memory that is written into: of another type, conjugated,
// negated.
TEST(TraceTest, WritesIntoViewsOfAnotherType) {
  const at::TensorOptions reals(at::kDouble), complexes(at::kComplexDouble);
  struct Case {
    at::TensorOptions options;  // of what is written into, [6, 2]
    std::function<Tensor(const Tensor&)> view;
    bool differentiable = true;
  };
  const std::vector<Case> all = {
      {complexes, [](const Tensor& z) { return z.conj(); }},
      {complexes, [](const Tensor& z) { return z.conj()[1]; }},
      {complexes, [](const Tensor& z) { return at::imag(z)[1]; }},
      {complexes, [](const Tensor& z) { return at::real(z).slice(0, 1); }},
      {complexes, [](const Tensor& z) { return at::view_as_real(z).select(2, 1); }},
      {reals, [](const Tensor& z) { return at::_neg_view(z)[1]; }},
      {reals, [](const Tensor& z) { return at::view_as_complex(z).slice(0, 1, 3); }},
      {reals, [](const Tensor& z) { return z.view(at::kFloat)[1]; }, false},
  };
  for (const Case& each : all) {
    const auto shown = [](const Tensor& z) {
      return z.is_complex() ? at::real(z) + 2 * at::imag(z) : z;
    };
    const auto made = [&](const Tensor& x) {
      Tensor z = at::zeros({6, 2}, each.options) + 1;
      Tensor part = each.view(z);
      part.copy_(x.flatten().slice(0, 0, part.numel()).view(part.sizes()));
      return shown(z);
    };
    expect_replays(made, input());
    expect_replays(vmap(made), at::rand({2, 3, 4}, at::kDouble));
    if (!each.differentiable) continue;
    const auto multiplied = [&](const Tensor& x) {
      const Tensor pairs = x.reshape({6, 2});
      Tensor z = pairs.to(each.options);
      z = z.is_complex() ? z * c10::complex<double>(1, 2) : z * 1.5;
      each.view(z).mul_(1.25);
      return shown(z) * pairs;
    };
    expect_replays(jacfwd(multiplied), input());
    expect_replays(jacrev(multiplied), input());
    expect_replays(hessian([&](const Tensor& x) { return multiplied(x).sum(); }), input());
  }
}

// What the graph read of a tensor before a write are the numbers from before it.
TEST(TraceTest, ConstantsAreWrittenIntoLater) {
  expect_replays(
      [](const Tensor& x) {
        Tensor z = at::zeros({3, 4}, x.options());
        const Tensor before = x * z;
        z.add_(1);
        return before + z;
      },
      input());
  const auto masked = [](const Tensor& row) {
    Tensor mask = at::ones({4}, row.options()), x = row;
    for (int64_t i = 0; i < 4; ++i) {
      mask[i].fill_(0.5 * static_cast<double>(i));
      x = x + x.sin() * mask + x[0] * mask.expand({2, 4})[1];
    }
    return x;
  };
  expect_replays([&](const Tensor& x) { return masked(x[0]); }, input());
  expect_replays(vmap(masked), input());
  expect_replays(vmap(jacfwd(masked)), input());
  expect_replays(
      [](const Tensor& x) {
        Tensor z = at::ones({4, 3}, x.options()) * 2;
        const Tensor before = x.t() * z;
        z.t_();
        return before.t() + x * z;
      },
      input());
  const auto parts = [](const Tensor& row) {
    Tensor z = at::ones({4}, row.options()) + 1;
    const Tensor before = row * z + (row[0] * z.expand({2, 4})).sum(0);
    z.slice(0, 1).mul_(row.slice(0, 1));
    return before + z;
  };
  expect_replays([&](const Tensor& x) { return parts(x[1]); }, input());
  expect_replays(vmap(parts), input());
}

// The tangent of x * 1 is a constant of the trace, and so is that of z's other half.
TEST(TraceTest, TangentsThatAreWrittenInto) {
  const auto copied = [](const Tensor& x) {
    Tensor z = x * 1.0;
    z.slice(0, 0, 2).copy_(z.slice(0, 2, 4).sin());
    return z;
  };
  const auto multiplied = [](const Tensor& x) {
    Tensor z = x * 1.0;
    z.slice(0, 0, 2).mul_(z.slice(0, 2, 4));
    return z;
  };
  const auto product = [](const Tensor& x) {
    Tensor z = x * 1.0;
    z[0].copy_(z[1] * z[2]);
    return z;
  };
  const Tensor row = at::rand({4}, at::kDouble);
  expect_replays(jacfwd(copied), row);
  expect_replays(jacfwd(multiplied), row);
  expect_replays(jacfwd(product), row);
  expect_replays(vmap(jacfwd(copied)), input());
  expect_replays(vmap(jacfwd(product)), input());
}

// A tangent that does not depend on the arguments is read, as a constant of the graph, and written.
TEST(TraceTest, TangentsThatAreReadAndWritten) {
  const auto twice = [](const Tensor& x) {
    Tensor z = x * 1.0;
    const Tensor before = z.sin();
    z.mul_(2);
    return before + z;
  };
  const auto part = [](const Tensor& x) {
    Tensor z = x * 1.0;
    const Tensor before = z.sin();
    z[0].mul_(2);
    z.slice(0, 1, 3).fill_(0.5);
    return before * z;
  };
  for (const auto& f : {std::function<Tensor(const Tensor&)>(twice), {part}}) {
    expect_replays(jacfwd(f), at::rand({4}, at::kDouble));
    expect_replays(vmap(jacfwd(f)), input());
  }
}

TEST(TraceTest, CapturedTensorsAreConstants) {
  const Tensor w = at::rand({4, 2}, at::kDouble);
  const Graph graph = expect_replays([&](const Tensor& x) { return x.matmul(w); }, input());
  ASSERT_EQ(graph.constants.size(), 1U);
  EXPECT_TRUE(graph.constants[0].tensor.is_same(w));
}

// What a kernel does not read, but wants to have, is a constant of the graph all the same.
TEST(TraceTest, ConstantsHoldNumbersThatWereWritten) {
  const Tensor x = at::rand({4, 3}), w = at::rand({3, 5}), y = at::arange(4);
  const auto loss = [](const Tensor& w, const Tensor& x, const Tensor& y) {
    return at::cross_entropy_loss(x.matmul(w), y);
  };
  for (int i = 0; i < 8; ++i) {
    std::vector<Tensor> used;  // memory that the trace may get
    for (int k = 0; k < 64; ++k) used.push_back(at::full({1}, 1234.0F));
    used.clear();
    const Graph graph = torchlift::trace(vmap(grad(loss), {.in_dims = in(kNone, 0, 0)}), w, x, y);
    for (const Constant& constant : graph.constants) {
      EXPECT_FALSE(at::any(constant.tensor == 1234).item().toBool()) << graph.str();
    }
  }
}

TEST(TraceTest, SeveralResultsAndLists) {
  expect_replays(
      [](const Tensor& x) {
        const auto parts = x.unbind(0);
        const auto [values, indices] = parts[0].sort();
        return values + parts[2] + indices;
      },
      input());
}

TEST(TraceTest, InputsAreNotWritten) {
  const Tensor x = input();
  const Tensor before = x.clone();
  torchlift::trace([](Tensor y) { return y.add_(1); }, x);
  EXPECT_TRUE(x.equal(before));
}

TEST(TraceTest, RandomOperatorsAreWrittenDown) {
  const auto f = [](const Tensor& x) {
    const Tensor y = x * at::rand({4}, x.options());
    return y + at::rand_like(x);
  };
  const Graph graph = torchlift::trace(f, input());
  EXPECT_EQ(operators(graph),
            (std::vector<std::string>{"aten::rand", "aten::mul", "aten::rand_like", "aten::add"}));
  const Program program(graph);
  const Tensor x = input();
  EXPECT_FALSE(program.run({x})[0].equal(program.run({x})[0]));
  const Tensor first = program.run({x}, {.seed = 7})[0];
  EXPECT_TRUE(first.equal(program.run({x}, {.seed = 7})[0]));
  at::manual_seed(7);
  EXPECT_TRUE(first.equal(f(x)));
}

TEST(TraceTest, OutputsThatDependOnNothing) {
  const Graph graph =
      torchlift::trace([](const Tensor& x) { return std::tuple(x, at::ones({2}), x); }, input());
  EXPECT_EQ(graph.outputs[0], graph.inputs[0]);
  EXPECT_EQ(graph.outputs[2], graph.inputs[0]);
  EXPECT_TRUE(Program(graph).run({input()})[1].equal(at::ones({2})));
}

TEST(TraceTest, NumbersComputedFromInputsAreErrors) {
  const auto message = [](const std::function<Tensor(const Tensor&)>& f) {
    try {
      torchlift::trace(f, input());
    } catch (const UnsupportedError& error) {
      return std::string(error.what_without_backtrace());
    }
    return std::string("no error");
  };
  EXPECT_THAT(message([](const Tensor& x) { return x.sum().item<double>() > 0 ? x : -x; }),
              HasSubstr("a number was asked for (aten::_local_scalar_dense"));
  EXPECT_THAT(message([](const Tensor& x) { return x.equal(x * 2) ? x : -x; }),
              HasSubstr("a number was asked for (aten::equal"));
  const Tensor outside = at::zeros({3, 4}, at::kDouble).requires_grad_(true);
  EXPECT_THAT(message([&](const Tensor& x) {
                const at::NoGradGuard no_grad;
                return Tensor(outside).add_(x);
              }),
              HasSubstr("comes from outside"));
  // The next trace is as good as ever.
  expect_replays([](const Tensor& x) { return x * 2; }, input());
}

TEST(ReplayTest, ChecksItsInputs) {
  const Program program(torchlift::trace([](const Tensor& x) { return x * 2; }, input()));
  const auto message = [&](const std::vector<Tensor>& inputs) {
    try {
      program.run(inputs);
    } catch (const TransformError& error) {
      return std::string(error.what_without_backtrace());
    }
    return std::string("no error");
  };
  EXPECT_THAT(message({}), HasSubstr("takes 1 tensors, and got 0"));
  EXPECT_THAT(message({at::ones({3, 5}, at::kDouble)}), HasSubstr("traced with f64[3, 4]"));
  EXPECT_THAT(message({at::ones({3, 4})}), HasSubstr("input 0 (x0) is Float[3, 4] on cpu"));
  EXPECT_THAT(message({Tensor()}), HasSubstr("undefined"));
}

TEST(ReplayTest, InputsOfOtherStrides) {
  const auto f = [](const Tensor& x) { return x.as_strided({4}, {2}).clone() + x.view({12})[1]; };
  const Program program(torchlift::trace(f, input()));
  const Tensor x = at::rand({4, 3}, at::kDouble).t();
  EXPECT_CLOSE(program.run({x})[0], f(x.contiguous()));
  EXPECT_THROW(Program(torchlift::trace([](Tensor y) { return y.add_(1); }, input())).run({x}),
               TransformError);
  const auto columns = [](const Tensor& y) { return y.t().view({12}); };
  const Program transposed(torchlift::trace(columns, x));
  EXPECT_CLOSE(transposed.run({x.contiguous()})[0], columns(x));
}

// See NOTE [outputs that are constants] in compile/own_copy.h.
TEST(ReplayTest, OutputsAreNoConstants) {
  const Tensor x = at::rand({3}), captured = at::rand({2, 3});
  const auto f = [&](const Tensor& t) {
    const Tensor ones = at::ones({3});
    return std::vector<Tensor>{ones,
                               ones,
                               captured,
                               captured.t(),
                               captured[1],
                               t * 2,
                               at::ones({1}).expand({4}).reshape({2, 2})};
  };
  const Program program(torchlift::trace(f, x));
  std::vector<Tensor> expected;
  for (const Tensor& each : f(x)) expected.push_back(each.clone());
  for (int i = 0; i < 2; ++i) {
    const std::vector<Tensor> got = program.run({x});
    EXPECT_TRUE(got[0].is_same(got[1])) << "as the function gives them";
    for (size_t k = 0; k < got.size(); ++k) {
      EXPECT_CLOSE(got[k], expected[k]);
      EXPECT_FALSE(got[k].is_alias_of(captured));
    }
    EXPECT_EQ(got[6].strides(), f(x)[6].strides());
    for (const size_t k : {0, 2, 3, 4, 5}) got[k].add_(100);
  }
}

TEST(ReplayTest, StateIsGivenItself) {
  const Tensor state = at::zeros({3});
  const auto f = [&](const Tensor& t) { return state.add_(t); };
  const Program program(torchlift::trace(f, at::ones({3})));
  EXPECT_TRUE(program.run({at::ones({3})})[0].is_alias_of(state));
}

TEST(ReplayTest, CanBeTransformed) {
  const auto f = [](const Tensor& x) { return (x.sin() * x).sum(); };
  const Program program(torchlift::trace(f, at::rand({4}, at::kDouble)));
  const auto replayed = [&](const Tensor& x) { return program.run({x})[0]; };
  const Tensor x = input();
  EXPECT_CLOSE(vmap(grad(replayed))(x), vmap(grad(f))(x));
  const Tensor leaf = x[0].clone().requires_grad_();
  replayed(leaf).backward();
  EXPECT_CLOSE(leaf.grad(), grad(f)(x[0]));
}

}  // namespace
}  // namespace torchlift::compile
