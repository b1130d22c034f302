#include "compile/passes/functionalize.h"

#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "compile/passes/node_facts.h"
#include "compile/passes/testing.h"
#include "core/error.h"

namespace torchlift::compile {
namespace {

using ::testing::HasSubstr;

std::vector<at::Tensor> clones(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> copies;
  for (const at::Tensor& t : tensors) copies.push_back(t.clone());
  return copies;
}

// The graph as it was, run eagerly with its writes, gives the same outputs and leaves the same in
// the inputs.
Functionalized check(const Graph& before, const std::vector<int64_t>& symbols = {}) {
  Graph after = before;
  const Functionalized done = functionalize(after);
  verify(after);
  require_functional(after, "the test");
  const std::vector<at::Tensor> inputs = random_inputs(before, symbols);
  const std::vector<at::Tensor> eager_inputs = clones(inputs), our_inputs = clones(inputs);
  const auto expected = run_reference(before, eager_inputs, symbols, /*check_types=*/false);
  const auto got = run_reference(after, our_inputs, symbols);
  EXPECT_EQ(done.outputs, expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_TRUE(identical(expected[i], got.at(i))) << "output " << i << " of\n"
                                                   << before.str() << "\n"
                                                   << after.str();
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    EXPECT_TRUE(identical(inputs[i], our_inputs[i])) << "input " << i << " was written";
  }
  for (const InputUpdate& update : done.updates) {
    our_inputs[static_cast<size_t>(update.input)].copy_(got.at(static_cast<size_t>(update.output)));
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    EXPECT_TRUE(identical(eager_inputs[i], our_inputs[i])) << "update of input " << i << " of\n"
                                                           << before.str() << "\n"
                                                           << after.str();
  }
  return done;
}

std::string error_of(const Graph& graph) {
  Graph copy = graph;
  const std::string before = copy.str();
  try {
    functionalize(copy);
  } catch (const UnsupportedError& error) {
    EXPECT_EQ(copy.str(), before) << "the graph was changed before the error";
    return error.what_without_backtrace();
  }
  return "no error";
}

TEST(FunctionalizeTest, RandomProgramsGiveWhatEagerOnesGive) {
  int64_t writes = 0;
  for (uint64_t seed = 0; seed < 150; ++seed) {
    writes += check(random_graph(seed, {.nodes = 40, .writes = true})).writes;
    if (HasFailure()) FAIL() << "seed " << seed;
  }
  EXPECT_GT(writes, 500);
}

TEST(FunctionalizeTest, WritesIntoInputsAreOutputs) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({3, 4}));
  const ValueId row =
      b.call("aten::select.int", {{"self", ref(x)}, {"dim", number(0)}, {"index", number(1)}});
  b.call("aten::mul_.Scalar", {{"self", ref(row)}, {"other", number(2)}});
  const ValueId s = b.call("aten::sum", {{"self", ref(x)}});
  Graph graph = b.finish({s});
  check(graph);
  const Functionalized done = functionalize(graph);
  ASSERT_EQ(done.updates.size(), 1U);
  EXPECT_EQ(done.updates[0].input, 0);
  EXPECT_EQ(done.updates[0].output, 1);
  EXPECT_EQ(graph.str(),
            "def graph(x: f32[3, 4]):\n"
            "    select = aten.select.int(x, 0, 1)  # f32[4]\n"
            "    mul = aten.mul.Scalar(select, 2)  # f32[4]\n"
            "    scatter = aten.select_scatter(x, mul, 0, 1)  # f32[3, 4]\n"
            "    sum = aten.sum(scatter)  # f32[]\n"
            "    return (sum, scatter)\n");
}

TEST(FunctionalizeTest, TheOtherViewsAreMadeAnew) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({4, 4}));
  const ValueId y = b.call("aten::clone", {{"self", ref(x)}});
  const ValueId t = b.call("aten::t", {{"self", ref(y)}});
  const ValueId diagonal = b.call("aten::diagonal", {{"self", ref(y)}});
  b.call("aten::fill_.Scalar", {{"self", ref(diagonal)}, {"value", number(0)}});
  const ValueId z = b.call("aten::mul.Tensor", {{"self", ref(t)}, {"other", ref(x)}});
  const Graph graph = b.finish({z, y});
  EXPECT_TRUE(check(graph).updates.empty());
}

// The views that only strides can invert: unfold, and pieces of lists.
TEST(FunctionalizeTest, AnyViewCanBeWrittenThrough) {
  const auto graph_with = [](const std::string& name, GraphBuilder::Named arguments,
                             const at::Tensor& example) {
    GraphBuilder b;
    const ValueId x = b.input(example);
    arguments.emplace_back("self", ref(x));
    const ValueId view = b.call_all(name, std::move(arguments)).back();
    b.call("aten::mul_.Scalar", {{"self", ref(view)}, {"other", number(3)}});
    return b.finish({view});
  };
  const at::Tensor x = at::randn({4, 6}, at::kDouble);
  const at::Tensor complex = at::randn({4, 6}, at::kComplexDouble);
  check(graph_with("aten::unfold",
                   {{"dimension", number(1)}, {"size", number(2)}, {"step", number(3)}}, x));
  check(graph_with("aten::unfold",
                   {{"dimension", number(0)}, {"size", number(2)}, {"step", number(2)}}, x.t()));
  check(graph_with("aten::split_with_sizes",
                   {{"split_sizes", ints({1, 2, 3})}, {"dim", number(-1)}}, x));
  check(graph_with("aten::unbind.int", {{"dim", number(1)}}, x));
  check(graph_with("aten::chunk", {{"chunks", number(4)}, {"dim", number(1)}}, x));
  check(graph_with("aten::permute", {{"dims", ints({2, 0, 1})}}, at::randn({2, 3, 4})));
  check(graph_with("aten::transpose.int", {{"dim0", number(0)}, {"dim1", number(-1)}}, x));
  check(graph_with("aten::squeeze", {}, at::randn({2, 1, 3})));
  check(graph_with("aten::view_as_real", {}, complex));
  check(graph_with("aten::_conj", {}, complex));
  check(graph_with("aten::slice.Tensor",
                   {{"dim", number(1)}, {"start", number(-4)}, {"step", number(2)}}, x));
  check(graph_with("aten::narrow",
                   {{"dim", number(1)}, {"start", number(1)}, {"length", number(3)}}, x));
  check(graph_with("aten::movedim.int", {{"source", number(0)}, {"destination", number(1)}}, x));
  check(graph_with("aten::swapaxes", {{"axis0", number(0)}, {"axis1", number(1)}}, x));
  check(graph_with("aten::expand", {{"size", ints({1, 4, 6})}}, x));
}

TEST(FunctionalizeTest, StridesOfATensorThatWasMadeThere) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({4, 6}));
  const ValueId y = b.call("aten::mul.Scalar", {{"self", ref(x)}, {"other", number(2)}});
  b.call("aten::sin_", {{"self", ref(y)}});
  const ValueId corner = b.call("aten::as_strided", {{"self", ref(y)},
                                                     {"size", ints({2, 3})},
                                                     {"stride", ints({7, 2})},
                                                     {"storage_offset", number(int64_t{1})}});
  b.call("aten::fill_.Scalar", {{"self", ref(corner)}, {"value", number(5)}});
  check(b.finish({y}));
}

TEST(FunctionalizeTest, WhatIsWrittenHasTheTypeOfItsTarget) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({3, 4}));
  const ValueId wide = b.input(at::randn({3, 1}, at::kDouble));
  const ValueId t = b.call("aten::t", {{"self", ref(x)}});
  b.call("aten::add_.Tensor",
         {{"self", ref(t)}, {"other", ref(b.call("aten::t", {{"self", ref(wide)}}))}});
  b.call("aten::mul_.Tensor", {{"self", ref(x)}, {"other", ref(wide)}});
  b.call("aten::copy_", {{"self", ref(x)}, {"src", ref(wide)}});
  check(b.finish({t}));
}

TEST(FunctionalizeTest, OutForms) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({3, 4}));
  const ValueId out = b.input(at::randn({4, 3}));
  const ValueId view = b.call("aten::t", {{"self", ref(out)}});
  b.call("aten::mul.out", {{"self", ref(x)}, {"other", ref(x)}, {"out", ref(view)}});
  const ValueId ones = b.call("aten::empty.memory_format", {{"size", ints({2})}});
  b.call("aten::ones.out", {{"size", ints({2})}, {"out", ref(ones)}});
  const ValueId largest = b.call("aten::empty.memory_format", {{"size", ints({3})}});
  const ValueId where =
      b.call("aten::empty.memory_format", {{"size", ints({3})}, {"dtype", number(int64_t{4})}});
  b.call("aten::max.dim_max",
         {{"self", ref(x)}, {"dim", number(1)}, {"max", ref(largest)}, {"max_values", ref(where)}});
  EXPECT_EQ(check(b.finish({ones, largest, where})).updates.size(), 1U);
}

TEST(FunctionalizeTest, ListsOfTensors) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({3}));
  const ValueId y = b.input(at::randn({2, 2}));
  b.call_all("aten::_foreach_mul_.Scalar", {{"self", refs({x, y})}, {"scalar", number(2.0)}});
  EXPECT_EQ(check(b.finish({})).updates.size(), 2U);
}

TEST(FunctionalizeTest, RunningStatistics) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({5, 3}));
  const ValueId mean = b.input(at::zeros({3}));
  const ValueId variance = b.input(at::ones({3}));
  const std::vector<ValueId> results =
      b.call_all("aten::native_batch_norm", {{"input", ref(x)},
                                             {"running_mean", ref(mean)},
                                             {"running_var", ref(variance)},
                                             {"training", number(true)},
                                             {"momentum", number(0.1)},
                                             {"eps", number(1e-5)}});
  EXPECT_EQ(check(b.finish({results[0]})).updates.size(), 2U);
}

TEST(FunctionalizeTest, ShapesChangedInPlace) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({3, 4}));
  const ValueId y = b.call("aten::clone", {{"self", ref(x)}});
  const ValueId flat = b.call("aten::view", {{"self", ref(y)}, {"size", ints({12})}});
  b.call("aten::t_", {{"self", ref(y)}});
  b.call("aten::unsqueeze_", {{"self", ref(y)}, {"dim", number(0)}});
  b.call("aten::fill_.Scalar",
         {{"self", ref(b.call("aten::select.int",
                              {{"self", ref(y)}, {"dim", number(1)}, {"index", number(2)}}))},
          {"value", number(7)}});
  b.call("aten::squeeze_.dim", {{"self", ref(y)}, {"dim", number(0)}});
  check(b.finish({y, flat}));
}

TEST(FunctionalizeTest, DynamicDims) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({6, 4}));
  b.dynamic(0, "n");
  const ValueId y = b.call("aten::mul.Scalar", {{"self", ref(x)}, {"other", number(2)}});
  const ValueId t = b.call("aten::t", {{"self", ref(y)}});
  const ValueId half =
      b.call_all("aten::split.Tensor", {{"self", ref(t)}, {"split_size", number(2)}}).at(1);
  b.call("aten::copy_",
         {{"self", ref(half)},
          {"src", ref(b.call("aten::sum.dim_IntList", {{"self", ref(x)}, {"dim", ints({1})}}))}});
  b.call("aten::sin_", {{"self", ref(x)}});
  const Graph graph = b.finish({y});
  check(graph, {6});
  check(graph, {1});
  check(graph, {9});
}

TEST(FunctionalizeTest, GraphsWithoutWritesStayAsTheyAre) {
  const Graph graph = random_graph(3);
  Graph after = graph;
  functionalize(after);
  EXPECT_EQ(after.str(), graph.str());
}

TEST(FunctionalizeTest, ConstantsThatAreWrittenBecomeInputs) {
  GraphBuilder b;
  const at::Tensor state = at::randn({3, 4}), weight = at::randn({4});
  const ValueId x = b.input(at::randn({4}));
  const ValueId s = b.constant(state), w = b.constant(weight);
  const ValueId row =
      b.call("aten::select.int", {{"self", ref(s)}, {"dim", number(0)}, {"index", number(1)}});
  const ValueId scaled = b.call("aten::mul.Tensor", {{"self", ref(x)}, {"other", ref(w)}});
  b.call("aten::add_.Tensor", {{"self", ref(row)}, {"other", ref(scaled)}, {"alpha", number(1)}});
  Graph graph = b.finish({scaled});
  const Functionalized done = functionalize(graph);
  ASSERT_EQ(done.state.size(), 1U);
  EXPECT_TRUE(done.state[0].is_same(state));
  EXPECT_EQ(graph.inputs.size(), 2U);
  EXPECT_EQ(graph.constants.size(), 1U);
  ASSERT_EQ(done.updates.size(), 1U);
  EXPECT_EQ(done.updates[0].input, 1);
  EXPECT_EQ(done.updates[0].output, 1);
  verify(graph);
}

TEST(FunctionalizeTest, WrittenConstantsShareNoMemory) {
  GraphBuilder b;
  const at::Tensor state = at::randn({3, 4});
  const ValueId whole = b.constant(state), row = b.constant(state[1]);
  b.call("aten::sin_", {{"self", ref(row)}});
  EXPECT_THAT(error_of(b.finish({whole})),
              HasSubstr("a constant that shares memory with another one"));
}

TEST(FunctionalizeTest, WhatHasNoFunctionalForm) {
  const auto graph_of = [](const std::string& name, GraphBuilder::Named arguments) {
    GraphBuilder b;
    const ValueId x = b.input(at::randn({3, 4}));
    arguments.emplace_back("self", ref(x));
    b.call(name, std::move(arguments));
    return b.finish({x});
  };
  EXPECT_THAT(error_of(graph_of("aten::fill_diagonal_", {{"fill_value", number(1)}})),
              HasSubstr("this libtorch has no operator that computes the same without writing"));
  EXPECT_THAT(error_of(graph_of("aten::resize_", {{"size", ints({2})}})),
              HasSubstr("aten::resize_ cannot be written"));
  EXPECT_THAT(error_of(graph_of("aten::t_", {})),
              HasSubstr("changes the shape of its input x in place by aten::t_"));
}

TEST(FunctionalizeTest, ABranchThatWritesIntoItsOperandsIsAnError) {
  GraphBuilder inner;
  const ValueId operand = inner.input(at::randn({3}));
  inner.call("aten::sin_", {{"self", ref(operand)}});
  const auto branch = std::make_shared<const Graph>(inner.finish({operand}));
  GraphBuilder b;
  b.input(at::ones({}, at::kBool));
  b.input(at::randn({3}));
  Graph graph = b.finish({});
  const ValueId out = graph.add_value(type_of(at::randn({3})), "cond");
  graph.nodes.push_back({.op = kCondOp,
                         .overload = "",
                         .args = {ref(0), refs({1})},
                         .results = {{.ids = {out}, .is_list = true}},
                         .subgraphs = {branch, branch},
                         .source = ""});
  EXPECT_THAT(error_of(graph), HasSubstr("a branch or a body writes into what it is given"));
}

}  // namespace
}  // namespace torchlift::compile
