#include "compile/dynamic.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "autodiff/grad.h"
#include "autodiff/jacobian.h"
#include "batching/control_flow.h"
#include "batching/vmap.h"
#include "compile/executable.h"
#include "compile/replay.h"
#include "compile/trace.h"
#include "core/error.h"
#include "core/testing.h"

namespace torchlift::compile {
namespace {

using at::Tensor;
using ::testing::HasSubstr;
using Tensors = std::vector<Tensor>;
using Function = std::function<Tensor(const Tensors&)>;

const std::vector<DynamicDim> kBatch = {{.name = "n", .places = {{0, 0}}}};

TraceFunction traced(const Function& f) {
  return [f](const Tensors& inputs) { return torchlift::trace(f, inputs); };
}

void expect_right(const Graph& graph, const Function& f, const std::vector<int64_t>& sizes) {
  const Program program(graph);
  for (const int64_t n : sizes) {
    const Tensor x = at::rand({n, 3}, at::kDouble);
    EXPECT_CLOSE(program.run({x})[0], f({x}));
  }
}

// One graph from rows of 4, and runs of it on others.
Graph expect_any_size(const Function& f, const std::vector<int64_t>& sizes = {1, 2, 4, 7}) {
  Graph graph = trace_dynamic(traced(f), {at::rand({4, 3}, at::kDouble)}, kBatch);
  expect_right(graph, f, sizes);
  return graph;
}

TEST(DynamicTest, SizesBecomeExpressions) {
  const Graph graph = expect_any_size([](const Tensors& in) { return in[0].sin().view({-1}); });
  EXPECT_THAT(graph.str(), HasSubstr("def graph(x0_0: f64[n, 3]):"));
  EXPECT_THAT(graph.str(), HasSubstr("# f64[3*n]"));
}

TEST(DynamicTest, TransformsTakeAnySize) {
  const auto row_loss = [](const Tensor& row) { return (row.tanh() * row.exp()).sum(); };
  expect_any_size([&](const Tensors& in) { return vmap(grad(row_loss))(in[0]); });
  expect_any_size([&](const Tensors& in) { return vmap(hessian(row_loss))(in[0]); });
  expect_any_size([&](const Tensors& in) {
    return grad([&](const Tensor& x) { return vmap(row_loss)(x).mean(); })(in[0]);
  });
}

TEST(DynamicTest, DivisorsBecomeRatios) {
  expect_any_size([](const Tensors& in) {
    return grad([](const Tensor& x) { return x.pow(2).mean(); })(in[0]);
  });
  expect_any_size([](const Tensors& in) { return in[0] / static_cast<double>(in[0].size(0)); });
  expect_any_size(
      [](const Tensors& in) { return grad([](const Tensor& x) { return x.var(0).sum(); })(in[0]); },
      {2, 4, 7});
}

TEST(DynamicTest, TensorsOfItsOwn) {
  expect_any_size([](const Tensors& in) {
    Tensor z = at::zeros({in[0].size(0) + 1, 3}, in[0].options());
    z.slice(0, 1) += in[0];
    return z * at::arange(in[0].size(0) + 1, at::kLong).unsqueeze(1);
  });
}

TEST(DynamicTest, ProductsOfSizes) {
  const Function f = [](const Tensors& in) { return in[0].unsqueeze(1).mul(in[1]).reshape({-1}); };
  const Graph graph =
      trace_dynamic(traced(f), {at::rand({4, 3}), at::rand({5, 3})},
                    {{.name = "n", .places = {{0, 0}}}, {.name = "m", .places = {{1, 0}}}});
  EXPECT_THAT(graph.str(), HasSubstr("# f32[3*n*m]"));
  const Tensors inputs = {at::rand({2, 3}), at::rand({9, 3})};
  EXPECT_CLOSE(Program(graph).run(inputs)[0], f(inputs));
}

TEST(DynamicTest, ASizeThatSpecialisesNamesTheOperator) {
  const auto message = [](const Function& f) {
    try {
      trace_dynamic(traced(f), {at::rand({4, 3})}, kBatch);
    } catch (const UnsupportedError& error) {
      return std::string(error.what_without_backtrace());
    }
    return std::string("no error");
  };
  EXPECT_THAT(
      message([](const Tensors& in) { return in[0].size(0) > 5 ? in[0].sin() : in[0].cos(); }),
      HasSubstr("operator 0 is aten::cos for n = 4, and aten::sin for n = 8"));
  EXPECT_THAT(message([](const Tensors& in) {
                Tensor sum = in[0][0];
                for (int64_t i = 1; i < in[0].size(0); ++i) sum = sum + in[0][i];
                return sum;
              }),
              HasSubstr("does not do the same at all sizes of n: it runs"));
}

TEST(DynamicTest, SizesThatItIsNotRightForAreRefused) {
  const Function f = [](const Tensors& in) { return in[0].size(0) == 1 ? in[0] * 2 : in[0].exp(); };
  const Program program(trace_dynamic(traced(f), {at::rand({4, 3})}, kBatch));
  EXPECT_THROW(program.run({at::rand({1, 3})}), TransformError);
  program.run({at::rand({2, 3})});
}

// As expect_any_size, and with all passes; the graph has a node of that name.
void expect_any_size_of(const char* node, const Function& f, std::vector<int64_t> sizes) {
  const Graph graph = expect_any_size(f, sizes);
  EXPECT_THAT(graph.str(), HasSubstr(node));
  const Executable executable(graph);
  for (const int64_t n : sizes) {
    for (const Tensor& x : {at::rand({n, 3}, at::kDouble), -at::rand({n, 3}, at::kDouble)}) {
      EXPECT_CLOSE(executable.run({x})[0], f({x}));
    }
  }
}

TEST(DynamicTest, BranchesHaveTheSizesOfTheirOperands) {
  const auto is_positive = [](const Tensor& x) { return x.sum().gt(0); };
  expect_any_size_of("cond",
                     [&](const Tensors& in) {
                       return cond(
                           is_positive(in[0]), [](const Tensor& x) { return x.view({-1}).sin(); },
                           [](const Tensor& x) { return x.t().reshape({-1}) / x.size(0); }, in[0]);
                     },
                     {2, 3, 5});
  // The size is no dim of what the branches read, and so is that of an input passed for it.
  expect_any_size_of(
      "cond",
      [&](const Tensors& in) {
        const Tensor total = in[0].sum();
        const int64_t n = in[0].size(0);
        const auto spread = [n](const Tensor& t) { return at::full({n}, 2.0, t.options()) * t; };
        return cond(
            total.gt(0), spread,
            [&](const Tensor& t) {
              return cond(
                  t.lt(-3), spread, [n](const Tensor& u) { return u.expand({n}) / n; }, t);
            },
            total);
      },
      {2, 3, 5});
}

TEST(DynamicTest, LoopsTakeAnySize) {
  expect_any_size_of("while_loop",
                     [](const Tensors& in) {
                       const Tensor a = in[0].abs() + 1;
                       return while_loop(
                           [&](const Tensor& x) { return (x * x - a).abs().max().gt(1e-9); },
                           [&](const Tensor& x) { return (x + a / x) / 2; }, at::ones_like(a));
                     },
                     {1, 2, 5});
  // By example, each as long as it takes.
  expect_any_size_of("while_loop",
                     [](const Tensors& in) {
                       return vmap([](const Tensor& row) {
                         return while_loop([](const Tensor& x) { return x.abs().sum().gt(0.1); },
                                           [](const Tensor& x) { return x / 2; }, row);
                       })(in[0]);
                     },
                     {2, 5});
}

TEST(DynamicTest, ScansOfAnyLength) {
  const Function sums = [](const Tensors& in) {
    const auto step = [](const Tensor& sum, const Tensor& row) {
      return std::pair(sum + row, sum * row);
    };
    const auto [last, all] = scan(step, at::zeros({3}, at::kDouble), in[0]);
    return all + last;
  };
  expect_any_size_of("scan", sums, {2, 5});
  // Along the other dim, with rows of any size.
  expect_any_size_of("scan",
                     [&](const Tensors& in) {
                       return sums({in[0].t().expand({3, -1}).t()});
                     },
                     {2, 5});
}

TEST(DynamicTest, WhatSpecialisesInABranchIsNamed) {
  const Function f = [](const Tensors& in) {
    return cond(
        in[0].sum().gt(0), [](const Tensor& x) { return x.size(0) > 5 ? x.sin() : x.cos(); },
        [](const Tensor& x) { return x + 1; }, in[0]);
  };
  try {
    trace_dynamic(traced(f), {at::rand({4, 3})}, kBatch);
    FAIL() << "no error";
  } catch (const UnsupportedError& error) {
    EXPECT_THAT(error.what_without_backtrace(), HasSubstr("aten::cos for n = 4, and aten::sin"));
  }
}

TEST(DynamicTest, ChecksItsDims) {
  const auto f = traced([](const Tensors& in) { return in[0]; });
  EXPECT_THROW(trace_dynamic(f, {at::rand({4})}, {{.name = "n", .places = {{0, 1}}}}),
               TransformError);
  EXPECT_THROW(
      trace_dynamic(f, {at::rand({4}), at::rand({5})}, {{.name = "n", .places = {{0, 0}, {1, 0}}}}),
      TransformError);
}

}  // namespace
}  // namespace torchlift::compile
