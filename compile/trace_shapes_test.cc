#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <tuple>
#include <vector>

#include "autodiff/grad.h"
#include "autodiff/jacobian.h"
#include "autodiff/jvp.h"
#include "batching/control_flow.h"
#include "batching/vmap.h"
#include "compile/dynamic.h"
#include "compile/executable.h"
#include "compile/graph.h"
#include "compile/hollow.h"
#include "compile/replay.h"
#include "compile/trace.h"
#include "core/error.h"
#include "core/testing.h"

// Tracing by shapes alone: NOTE [tracing by shapes] in compile/trace_scope.h.

namespace torchlift::compile {
namespace {

using at::Tensor;
using ::testing::HasSubstr;

Tensor on_meta(const Tensor& t) {
  return at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kMeta));
}

Tensor meta(at::IntArrayRef sizes, at::ScalarType dtype = at::kFloat) {
  return at::empty(sizes, at::device(at::kMeta).dtype(dtype));
}

// The graph of shapes is that of values, strides too, and computes the same.
template <class F, class... Args>
void expect_same_graph(const F& f, const Args&... args) {
  const Graph known = torchlift::trace(f, args...);
  const Graph graph = torchlift::trace(f, on_meta(args)...);
  EXPECT_EQ(graph.str(), known.str());
  verify(graph);
  EXPECT_TRUE(graph.layouts_assumed);
  EXPECT_FALSE(known.layouts_assumed);
  ASSERT_EQ(graph.values.size(), known.values.size());
  for (size_t i = 0; i < graph.values.size(); ++i) {
    EXPECT_EQ(graph.values[i].type, known.values[i].type) << graph.values[i].name;
  }
  const std::vector<Tensor> inputs = {args...};
  const auto copies = [&] {
    std::vector<Tensor> all;
    for (const Tensor& t : inputs) all.push_back(t.clone());
    return all;
  };
  const std::vector<Tensor> expected = Program(known).run(copies());
  for (const auto& got : {Program(graph).run(copies()), Executable(graph).run(copies())}) {
    EXPECT_EQ(got.size(), expected.size());
    for (size_t i = 0; i < expected.size(); ++i) EXPECT_CLOSE(got[i], expected[i]);
  }
}

Tensor rows() { return at::rand({3, 4}, at::kDouble); }

TEST(TraceShapesTest, EveryTransform) {
  const auto net = [](const Tensor& row) { return (row.tanh().cumsum(0) * row.exp()).sum(); };
  const auto all = [](const Tensor& row) { return row.tanh().cumsum(0) * row; };
  expect_same_graph(net, rows());
  expect_same_graph(vmap(grad(net)), rows());
  expect_same_graph(vmap(jacrev(all)), rows());
  expect_same_graph(vmap(jacfwd(all)), rows());
  expect_same_graph(vmap(hessian(net)), rows());
  expect_same_graph(grad([&](const Tensor& x) { return vmap(grad(net))(x).pow(2).mean(); }),
                    rows());
  expect_same_graph(
      [&](const Tensor& x) {
        return std::get<1>(jvp(vmap(grad(net)), std::tuple(x), std::tuple(x.cos())));
      },
      rows());
}

TEST(TraceShapesTest, InPlaceOperatorsViewsAndConstants) {
  const Tensor captured = at::rand({4}, at::kDouble);
  expect_same_graph(
      [&](const Tensor& x) {
        Tensor y = x * 2 + captured.exp();
        y[1].add_(x[0]);
        y.t_();
        return y.contiguous().view({2, 6}).clamp_(0, 1);
      },
      rows());
  expect_same_graph(
      [](const Tensor& x) {
        Tensor z = at::zeros({5, 4}, x.options());
        z[0] = x[0];
        z.slice(0, 1, 4).mul_(2).add_(x);
        return z.sum(0);
      },
      rows());
  // What it reads as an input it writes into a copy of.
  const Tensor x = rows(), before = x.clone();
  torchlift::trace([](const Tensor& t, const Tensor&) { return t.mul_(2); }, x, meta({2}));
  EXPECT_TRUE(at::equal(x, before));
}

TEST(TraceShapesTest, Layers) {
  const auto conv = [](const Tensor& x, const Tensor& w) {
    return at::conv2d(x, w, {}, 1, 1).relu().flatten(1).pow(2).mean();
  };
  const Tensor image = at::rand({2, 3, 8, 8}), kernel = at::rand({4, 3, 3, 3});
  expect_same_graph(conv, image, kernel);
  expect_same_graph(grad<1>(conv), image, kernel);
  expect_same_graph(conv, image.contiguous(at::MemoryFormat::ChannelsLast), kernel);
  expect_same_graph([](const Tensor& x, const Tensor& w) { return at::conv1d(x, w, {}, 2); },
                    at::rand({2, 3, 9}), at::rand({4, 3, 3}));
  expect_same_graph(
      [](const Tensor& x, const Tensor& w) { return at::conv_transpose2d(x, w, {}, 2); },
      at::rand({2, 3, 4, 4}), at::rand({3, 5, 3, 3}));
  for (const bool training : {true, false}) {
    expect_same_graph(
        grad([&](const Tensor& x) {
          const Tensor mean = x.detach().mean({0, 2, 3}), var = mean.square() + 1;
          return at::batch_norm(x, {}, {}, mean, var, training, 0.1, 1e-5, false).pow(3).sum();
        }),
        image);
  }
  const auto attention = [](const Tensor& q) {
    return at::scaled_dot_product_attention(q, q.sin(), q.cos()).pow(2).sum();
  };
  expect_same_graph(grad(attention), at::rand({2, 2, 5, 8}));
  expect_same_graph([](const Tensor& x) { return std::get<0>(x.sort()).median(); }, rows());
}

TEST(TraceShapesTest, RandomOperators) {
  const auto f = [](const Tensor& x) { return at::dropout(x, 0.5, true) + at::rand({3, 4}); };
  const Graph known = torchlift::trace(f, rows()), graph = torchlift::trace(f, on_meta(rows()));
  EXPECT_EQ(graph.str(), known.str());
  const Tensor x = rows();
  EXPECT_TRUE(
      at::equal(Program(graph).run({x}, {.seed = 3})[0], Program(known).run({x}, {.seed = 3})[0]));
}

TEST(TraceShapesTest, ControlFlow) {
  expect_same_graph(
      [](const Tensor& x) {
        return cond(
            x.sum().gt(0), [](const Tensor& v) { return v.sin(); },
            [](const Tensor& v) { return v * 2; }, x);
      },
      rows());
  expect_same_graph(
      [](const Tensor& x) {
        return while_loop([](const Tensor& v) { return v.sum().lt(100); },
                          [](const Tensor& v) { return v * 2 + 1; }, x);
      },
      rows());
}

TEST(TraceShapesTest, LargerThanMemory) {
  const auto f = [](const Tensor& a, const Tensor& b) {
    return (a.mm(b).tanh().mm(b) * 2).square().mean();
  };
  const Graph graph = torchlift::trace(grad<1>(f), meta({100000, 100000}), meta({100000, 100000}));
  EXPECT_THAT(graph.str(), HasSubstr("aten.mm"));
  EXPECT_EQ(graph.type(graph.outputs[0]).str(), "f32[100000, 100000]");
  for (const Constant& constant : graph.constants)
    EXPECT_LT(constant.tensor.storage().nbytes(), 64);
}

// The constant that mean() divides is one number, and the numbers are those of the function.
TEST(TraceShapesTest, LargeConstantsAreOneNumber) {
  const auto f = [](const Tensor& x) { return (-(x * 3)).div(7).mean(); };
  const Tensor x = at::rand({1024, 512});
  const Graph known = torchlift::trace(grad(f), x), graph = torchlift::trace(grad(f), on_meta(x));
  EXPECT_EQ(graph.str(), known.str());
  EXPECT_TRUE(at::equal(Program(graph).run({x})[0], Program(known).run({x})[0]));
  EXPECT_TRUE(at::equal(Program(graph).run({x})[0], grad(f)(x)));
}

TEST(TraceShapesTest, DynamicDims) {
  const auto f = vmap(grad([](const Tensor& row) { return row.tanh().square().mean(); }));
  const auto traced = [&](const std::vector<Tensor>& inputs) {
    return torchlift::trace(f, inputs[0]);
  };
  const std::vector<DynamicDim> dims = {{.name = "batch", .places = {{0, 0}}}};
  const Graph graph = trace_dynamic(traced, {on_meta(rows())}, dims);
  EXPECT_EQ(graph.str(), trace_dynamic(traced, {rows()}, dims).str());
  const Tensor x = at::rand({7, 4}, at::kDouble);
  EXPECT_CLOSE(Program(graph).run({x})[0], f(x));
}

TEST(TraceShapesTest, ErrorsSayWhatIsNotKnown) {
  const auto message = [](const std::function<void()>& run) -> std::string {
    try {
      run();
    } catch (const UnsupportedError& error) {
      return error.what();
    }
    return "";
  };
  const auto trace_of = [&](const std::function<Tensor(const Tensor&)>& f, const Tensor& x) {
    return message([&] { torchlift::trace(f, x); });
  };
  EXPECT_THAT(trace_of([](const Tensor& x) { return x * x.sum().item(); }, meta({3})),
              HasSubstr("a number was asked for"));
  EXPECT_THAT(trace_of([](const Tensor& x) { return x + meta({3}); }, meta({3})),
              HasSubstr("Pass it to the function as an argument"));
  EXPECT_THAT(trace_of([](const Tensor& x) { return at::eye(3).to_sparse().mm(x); }, meta({3, 3})),
              HasSubstr("sparse"));
  // One without a kernel on the meta device, of 64 GB.
  EXPECT_THAT(trace_of([](const Tensor& x) { return std::get<0>(at::_aminmax(x)); },
                       meta({1 << 17, 1 << 17})),
              HasSubstr("aten::_aminmax: libtorch cannot tell the shape of its result"));
  EXPECT_EQ(trace_of([](const Tensor& x) { return std::get<0>(at::_aminmax(x)); }, meta({3, 3})),
            "");
}

TEST(TraceShapesTest, HollowTensorsHaveNoMemory) {
  const Tensor t = hollow_tensor({3, 4}, {4, 1}, at::kFloat, at::kCPU);
  EXPECT_TRUE(is_hollow(t));
  EXPECT_TRUE(is_hollow(t.t()));
  EXPECT_TRUE(t.device().is_cpu());
  EXPECT_FALSE(is_hollow(at::rand({3, 4})));
  EXPECT_THROW(t.data_ptr<float>(), c10::Error);
  EXPECT_THROW(t.sin(), c10::Error);
}

// A graph whose layouts are assumed to be others than they are.
TEST(TraceShapesTest, RunsPutLayoutsRight) {
  Graph graph = torchlift::trace([](const Tensor& x) { return x.exp().as_strided({12}, {1}); },
                                 on_meta(rows()));
  const Tensor x = rows();
  EXPECT_TRUE(at::equal(Program(graph).run({x})[0], x.exp().view({12})));
  // As if a meta kernel had said that the exponential is transposed.
  TensorType& type = graph.value(graph.nodes[0].results[0].ids[0]).type;
  type.strides = {1, 3};
  const Tensor transposed = x.exp().t().contiguous().view({12});
  EXPECT_TRUE(at::equal(Program(graph).run({x})[0], transposed));
  EXPECT_TRUE(at::equal(Executable(graph).run({x})[0], transposed));
  type.sizes = {3, 5};
  try {
    Program(graph).run({x});
    ADD_FAILURE();
  } catch (const UnsupportedError& error) {
    EXPECT_THAT(error.what(), HasSubstr("aten::exp gave Double[3, 4] where the function, traced by "
                                        "shapes alone, was told Double[3, 5]"));
  }
}

}  // namespace
}  // namespace torchlift::compile
