// Functions whose results come from to_sparse, traced: see compile/trace_sparse.h.

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "autodiff/grad.h"
#include "autodiff/jacobian.h"
#include "batching/control_flow.h"
#include "batching/vmap.h"
#include "compile/dynamic.h"
#include "compile/executable.h"
#include "compile/graph.h"
#include "compile/passes/channels_last.h"
#include "compile/passes/memory_plan.h"
#include "compile/replay.h"
#include "compile/save.h"
#include "compile/trace.h"
#include "core/error.h"

namespace torchlift::compile {
namespace {

using at::Tensor;
using ::testing::HasSubstr;

// Zeros are in other places in each of them, and one is negative.
Tensor traced_with() { return at::tensor({0.0, 2.0, -3.0, 0.0, 0.0, 0.0, 4.0, 1.0}).view({2, 4}); }
Tensor run_with() { return at::tensor({1.0, 0.0, -0.0, 5.0, 2.0, 0.0, -1.0, 0.0}).view({2, 4}); }

void expect_same(const Tensor& got, const Tensor& expected, const std::string& way) {
  ASSERT_EQ(got.layout(), expected.layout()) << way;
  if (expected.layout() == at::kStrided) {
    EXPECT_TRUE(got.equal(expected)) << way << ":\n" << got << "\n" << expected;
    return;
  }
  EXPECT_TRUE(got.is_coalesced()) << way;
  ASSERT_EQ(got.sizes(), expected.sizes()) << way;
  EXPECT_TRUE(got.indices().equal(expected.indices())) << way;
  EXPECT_TRUE(got.values().equal(expected.values())) << way;
}

// On other numbers: traced, optimized, by shapes alone, and from a file.
template <class F>
Graph expect_replays(const F& f, const Tensor& first = traced_with(),
                     const Tensor& other = run_with()) {
  const Tensor expected = f(other.clone());
  const Graph graph = torchlift::trace(f, first);
  verify(graph);
  expect_same(Program(graph).run({other})[0], expected, "traced:\n" + graph.str());
  expect_same(Executable(graph).run({other})[0], expected, "optimized");
  const Graph by_shapes = torchlift::trace(f, at::empty_like(first, at::kMeta));
  expect_same(Program(by_shapes).run({other})[0], expected, "by shapes");
  expect_same(Executable(by_shapes).run({other})[0], expected, "by shapes, optimized");
  const std::string file = ::testing::TempDir() + "trace_sparse.tlc";
  torchlift::save(f, file, first);
  expect_same(torchlift::load(file).run({other})[0], expected, "loaded");
  return graph;
}

std::string error_of(const std::function<Tensor(const Tensor&)>& f) {
  try {
    torchlift::trace(f, traced_with());
  } catch (const UnsupportedError& error) {
    return error.what();
  }
  return "";
}

TEST(TraceSparseTest, TheLastNodeMakesIt) {
  const Graph graph =
      torchlift::trace([](const Tensor& x) { return x.sin().to_sparse(1); }, traced_with());
  EXPECT_EQ(graph.str(),
            "def graph(x0: f64[2, 4]):\n"
            "    sin = aten.sin(x0)  # f64[2, 4]\n"
            "    clone = aten.clone(sin)  # f64[2, 4]\n"
            "    to_sparse = aten._to_sparse.sparse_dim(clone, 1)  # f64[2, 4] Sparse\n"
            "    return to_sparse\n");
}

TEST(TraceSparseTest, Results) {
  expect_replays([](const Tensor& x) { return x.to_sparse(); });
  expect_replays([](const Tensor& x) { return (x * 2).to_sparse(1); });
  expect_replays([](const Tensor& x) { return x.to_sparse(at::kSparse, {}, /*dense_dim=*/1); });
  expect_replays([](const Tensor& x) { return x.to_sparse(1).to_sparse().coalesce().detach(); });
  expect_replays([](const Tensor& x) { return x[0][1].to_sparse(); });
  expect_replays([](const Tensor& x) { return x.gt(0).to_sparse(); });
  expect_replays([](const Tensor& x) { return x.slice(0, 0, 0).to_sparse(); });
}

TEST(TraceSparseTest, ACopyOfWhatIsWrittenInto) {
  expect_replays([](const Tensor& x) {
    const Tensor y = x * 2;
    const Tensor sparse = y.to_sparse();
    y.add_(1);
    return sparse;
  });
}

TEST(TraceSparseTest, OneTensorReturnedTwice) {
  const auto f = [](const Tensor& x) {
    const Tensor y = x.to_sparse();
    return std::vector<Tensor>{y, y.to_dense(), y};
  };
  const Graph graph = torchlift::trace(f, traced_with());
  EXPECT_EQ(graph.outputs[0], graph.outputs[2]);
  const std::vector<Tensor> outputs = Executable(graph).run({run_with()});
  expect_same(outputs[0], run_with().to_sparse(), "first");
  expect_same(outputs[1], run_with(), "second");
}

// Zeros that it leaves out are positive.
TEST(TraceSparseTest, DenseAgain) {
  const auto inverse = [](const Tensor& x) { return 1 / x.to_sparse().to_dense(); };
  expect_replays(inverse);
  expect_replays([](const Tensor& x) { return 1 / x.to_sparse(1).to_dense(); });
  expect_replays([](const Tensor& x) {
    return 1 / x.to_sparse().to_dense(std::nullopt, /*masked_grad=*/false);
  });
  EXPECT_TRUE(Program(torchlift::trace(inverse, traced_with()))
                  .run({run_with()})[0]
                  .gt(-2)
                  .all()
                  .item<bool>());
}

template <class F>
auto loss(const F& to_dense) {
  return [to_dense](const Tensor& x) { return (to_dense(x).exp() * x.cos()).sum(); };
}

// The gradient of to_dense reaches the elements alone, unless that is asked for.
TEST(TraceSparseTest, Gradients) {
  const std::vector<std::function<Tensor(const Tensor&)>> all = {
      [](const Tensor& x) { return x.to_sparse().to_dense(); },
      [](const Tensor& x) { return x.to_sparse(1).to_dense(); },
      [](const Tensor& x) { return x.to_sparse().to_dense(std::nullopt, /*masked_grad=*/false); },
      [](const Tensor& x) { return x.to_sparse(1).to_dense(std::nullopt, /*masked_grad=*/false); },
  };
  for (const auto& each : all) {
    const auto f = loss(each);
    expect_replays(grad(f));
    expect_replays(grad([=](const Tensor& x) { return grad(f)(x).sin().sum(); }));
    expect_replays(vmap(grad(f)));
    expect_replays(hessian(f));
  }
  const auto sum = [](const Tensor& x) { return x.to_sparse().to_dense().sum(); };
  const Graph graph = torchlift::trace(grad(sum), traced_with());
  EXPECT_TRUE(Program(graph).run({run_with()})[0].equal(run_with().ne(0).to(at::kDouble)));
}

TEST(TraceSparseTest, Vmap) {
  const auto f = [](const Tensor& x) { return x.sin().to_sparse(); };
  expect_replays(vmap(f));
  expect_replays(vmap(f, {.in_dims = in(1), .out_dims = 1}));
  const Tensor first = at::stack({traced_with(), run_with()});
  expect_replays(vmap(vmap(f)), first, first.flip(0));
  expect_replays(vmap([](const Tensor& x) { return x.to_sparse(1); }), first, first.flip(0));
  expect_replays(grad([=](const Tensor& x) { return vmap(f)(x).to_dense().exp().sum(); }));
}

// Passes that look at strides, of images.
TEST(TraceSparseTest, ImagesThatAreChannelsLast) {
  const Tensor first = at::randn({2, 16, 32, 32}, at::kDouble), other = first.flip(0);
  const Tensor constant = at::eye(16).to(at::kDouble).to_sparse();
  const auto pooled = [](const Tensor& x) { return at::max_pool2d(x.sin(), {2, 2}); };
  expect_replays([=](const Tensor& x) { return pooled(x).relu().to_sparse(); }, first, other);
  expect_replays([=](const Tensor& x) { return pooled(x).relu().to_sparse(3); }, first, other);
  const auto f = [=](const Tensor& x) {
    const Tensor y = pooled(x);
    return std::vector<Tensor>{y.relu().to_sparse(), y, constant.mm(y[0].flatten(1))};
  };
  const Graph graph = torchlift::trace(f, first);
  Graph laid_out = graph;
  EXPECT_FALSE(channels_last(laid_out).empty());
  const std::vector<Tensor> outputs = Executable(graph).run({other}), expected = f(other);
  for (size_t i = 0; i < outputs.size(); ++i) expect_same(outputs[i], expected[i], "optimized");
}

TEST(TraceSparseTest, DynamicDims) {
  const auto f = [](const Tensor& x) { return x.sin().to_sparse(); };
  const TraceFunction traced = [&](const std::vector<Tensor>& inputs) {
    return torchlift::trace(f, inputs[0]);
  };
  const Graph graph = trace_dynamic(traced, {traced_with()}, {{.name = "n", .places = {{0, 0}}}});
  for (const int64_t n : {0, 1, 2, 7}) {
    const Tensor x = at::arange(n * 4, at::kDouble).remainder(3).view({n, 4});
    expect_same(Program(graph).run({x})[0], f(x), "traced");
    expect_same(Executable(graph).run({x})[0], f(x), "optimized");
  }
}

TEST(TraceSparseTest, NothingElseIsDoneWithIt) {
  const std::string fix = "it was given a sparse tensor, a result of to_sparse";
  EXPECT_THAT(error_of([](const Tensor& x) { return x.to_sparse() * 2; }),
              HasSubstr("aten::mul.Scalar: " + fix));
  EXPECT_THAT(error_of([](const Tensor& x) { return x.to_sparse().mm(x.t()); }),
              HasSubstr("aten::mm: " + fix));
  EXPECT_THAT(error_of([](const Tensor& x) { return x.to_sparse().sum(); }),
              HasSubstr("aten::sum: " + fix));
  EXPECT_THAT(error_of([](const Tensor& x) { return x.to_sparse().indices(); }),
              HasSubstr("aten::indices: " + fix));
  EXPECT_THAT(error_of([](const Tensor& x) { return x.to_sparse().values(); }),
              HasSubstr("aten::values: " + fix));
  EXPECT_THAT(error_of([](const Tensor& x) {
                return vmap([](const Tensor& row) { return row.to_sparse(); })(x) * 2;
              }),
              HasSubstr("aten::mul.Scalar: " + fix));
  EXPECT_THAT(error_of([](const Tensor& x) { return x.to_sparse_csr(); }),
              HasSubstr("its result has the layout SparseCsr, which a graph cannot give"));
  EXPECT_THAT(error_of([](const Tensor& x) { return x.to_sparse(at::kSparseCsc); }),
              HasSubstr("its result has the layout SparseCsc"));
}

TEST(TraceSparseTest, BranchesAndLoops) {
  const std::string fix = "a branch or a loop: it was given a sparse tensor";
  EXPECT_THAT(error_of([](const Tensor& x) {
                const auto branch = [](const Tensor& v) { return v.to_sparse(); };
                return cond(x.sum().gt(0), branch, branch, x);
              }),
              HasSubstr(fix));
  EXPECT_THAT(error_of([](const Tensor& x) {
                return while_loop([](const Tensor& v) { return v.sum().lt(9); },
                                  [](const Tensor& v) { return (v * 2).to_sparse(); }, x);
              }),
              HasSubstr(fix));
  expect_replays([](const Tensor& x) {
    const Tensor outside = x.sin().to_sparse();
    return cond(
        x.sum().gt(4), [&](const Tensor& v) { return v + outside.to_dense(); },
        [](const Tensor& v) { return v.to_sparse().to_dense(); }, x);
  });
}

TEST(TraceSparseTest, LibtorchsErrors) {
  EXPECT_THROW(torchlift::trace([](const Tensor& x) { return x.to_sparse(0); }, traced_with()),
               c10::Error);
  EXPECT_THROW(torchlift::trace([](const Tensor& x) { return x.to_sparse(3); }, traced_with()),
               c10::Error);
  EXPECT_THROW(
      torchlift::trace([](const Tensor& x) { return x.to_sparse(1).to_sparse(2); }, traced_with()),
      c10::Error);
}

TEST(TraceSparseTest, IsNoPartOfTheMemoryPlan) {
  const Graph graph =
      torchlift::trace([](const Tensor& x) { return x.sin().to_sparse(); }, traced_with());
  const MemoryPlan plan = memory_plan(graph);
  EXPECT_EQ(plan.output_bytes, 0);
  Graph read = graph;  // as other people's graphs may have it
  const ValueId sum = read.add_value(type_of(at::zeros({}, at::kDouble)), "sum");
  read.nodes.push_back({.op = "aten::sum",
                        .overload = "",
                        .args = {ValueRef{read.outputs[0]}, std::monostate{}},
                        .results = {{.ids = {sum}}},
                        .subgraphs = {},
                        .source = ""});
  read.outputs = {sum};
  EXPECT_THROW(memory_plan(read), UnsupportedError);
}

}  // namespace
}  // namespace torchlift::compile
