#include "compile/dynamic.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "autodiff/grad.h"
#include "autodiff/jacobian.h"
#include "batching/vmap.h"
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
