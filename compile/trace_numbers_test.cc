// Traces of operators that look at numbers (NOTE [numbers in rules] in batching/rules/numbers.h):
// the graphs are run on numbers of another kind than those that they were made with.

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "autodiff/grad.h"
#include "batching/vmap.h"
#include "compile/assumptions.h"
#include "compile/executable.h"
#include "compile/graph.h"
#include "compile/replay.h"
#include "compile/trace.h"
#include "compile/trace_scope.h"
#include "core/error.h"
#include "core/testing.h"

namespace torchlift::compile {
namespace {

using at::Tensor;
using ::testing::HasSubstr;
using Tensors = std::vector<Tensor>;

Tensor rand(at::IntArrayRef sizes) { return at::rand(sizes, at::kDouble) + 0.1; }
Tensor integers(at::ArrayRef<int64_t> numbers) { return at::tensor(numbers, at::kLong); }

std::string message_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

Tensor on_meta(const Tensor& t) {
  return at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kMeta));
}

void expect_runs(const Graph& graph, const Tensors& given, const Tensor& expected) {
  EXPECT_CLOSE(Program(graph).run(given)[0], expected);
  EXPECT_CLOSE(Executable(graph).run(given)[0], expected);
}

// The graphs of f, by numbers and by shapes: both give what f does for `args` and for `others`.
template <class F, class... Args>
std::vector<Program> expect_replays(const F& f, const Tensors& others, const Args&... args) {
  std::vector<Program> programs;
  for (const Graph& graph : {torchlift::trace(f, args...), torchlift::trace(f, on_meta(args)...)}) {
    verify(graph);
    programs.emplace_back(graph);
    for (const Tensors& given : {Tensors{args...}, others}) {
      const Tensor expected = [&]<size_t... I>(std::index_sequence<I...>) { return f(given[I]...); }
      (std::index_sequence_for<Args...>());
      expect_runs(graph, given, expected);
    }
  }
  return programs;
}

void expect_error(const std::vector<Program>& programs, const Tensors& args, const char* text) {
  for (const Program& program : programs) {
    EXPECT_THAT(message_of([&] { program.run(args); }), HasSubstr(text));
  }
}

TEST(TraceNumbersTest, AnswersOfOneRunAreErrors) {
  const auto error = [](const auto& f, const Tensor& x) {
    return message_of([&] { torchlift::trace(vmap(f), x); });
  };
  constexpr const char* kText = "its result depends on numbers that are computed from the inputs";
  const Tensor ones = at::ones({2, 3}, at::kLong);
  EXPECT_THAT(error([](const Tensor& x) { return at::equal(x, x) ? x : -x; }, ones),
              HasSubstr(kText));
  EXPECT_THAT(error([](const Tensor& x) { return at::allclose(x, x) ? x : -x; }, rand({2, 3})),
              HasSubstr(kText));
  const auto by_shapes = [&](const auto& f) { return error(f, on_meta(ones)); };
  EXPECT_THAT(by_shapes([](const Tensor& x) { return at::bincount(x); }), HasSubstr(kText));
  EXPECT_THAT(by_shapes([](const Tensor& x) { return at::one_hot(x); }), HasSubstr(kText));
}

// f's graph gives what f does for both of these, and throws for `others`.
template <class F>
void expect_assumed(const F& f, const Tensors& args, const Tensors& alike, const Tensors& others,
                    const char* text) {
  const Graph graph = [&] {
    TraceScope scope;
    Tensors inputs;
    for (const Tensor& each : args) inputs.push_back(scope.input(each, "x"));
    const Tensors outputs = f(inputs);
    return scope.finish(outputs);
  }();
  verify(graph);
  EXPECT_TRUE(assumes(graph));
  const Program program(graph);
  const Executable executable(graph);
  for (const Tensors& given : {args, alike}) {
    const Tensors expected = f(given);
    for (const Tensors& got : {program.run(given), executable.run(given)}) {
      ASSERT_EQ(got.size(), expected.size());
      for (size_t i = 0; i < got.size(); ++i) {
        EXPECT_TRUE(got[i].equal(expected[i])) << got[i] << expected[i];
        EXPECT_EQ(got[i].strides(), expected[i].strides());
      }
    }
  }
  EXPECT_THAT(message_of([&] { program.run(others); }), HasSubstr(text));
  EXPECT_THAT(message_of([&] { executable.run(others); }), HasSubstr(text));
  EXPECT_THROW(program.run(others), AssumptionError);
  TraceScope scope("trace", {}, Known::kShapes);
  Tensors inputs;
  for (const Tensor& each : args) inputs.push_back(scope.input(on_meta(each), "x"));
  EXPECT_THAT(message_of([&] { f(inputs); }),
              HasSubstr("the shape of its result depends on numbers that are computed"));
}

Tensors all_of(const std::tuple<Tensor, Tensor, Tensor>& results) {
  return {std::get<0>(results), std::get<1>(results), std::get<2>(results)};
}

TEST(TraceNumbersTest, NumbersOfElementsAreAssumed) {
  const Tensor x = at::tensor({1.0, -1.0, 2.0, 2.0}), y = at::tensor({-3.0, 1.0, 1.0, 2.0}),
               z = at::tensor({1.0, 1.0, 1.0, 1.0});
  const auto masked = [](const Tensors& all) -> Tensors {
    return {all[0].masked_select(all[0].gt(0)), all[0].index({all[0].gt(0)})};
  };
  expect_assumed(masked, {x}, {y}, {z}, "chooses was 3 when the function was traced, and is 4 in");
  const auto nonzero = [](const Tensors& all) -> Tensors {
    return {all[0].gt(0).view({2, 2}).nonzero()};
  };
  expect_assumed(nonzero, {x}, {y}, {z}, "nonzero: the number of elements that are not zero was 3");
  const auto unique = [](const Tensors& all) {
    return all_of(at::_unique2(all[0], true, true, true));
  };
  expect_assumed(unique, {x}, {y}, {z}, "_unique2: the number of different values was 3");
  const auto rows = [](const Tensors& all) {
    return all_of(at::unique_dim(all[0].view({4, 1}), 0, true, true, true));
  };
  expect_assumed(rows, {x}, {y}, {z}, "unique_dim: the number of different values was 3");
  const auto runs = [](const Tensors& all) {
    return all_of(at::unique_consecutive(all[0], true, true));
  };
  expect_assumed(runs, {x}, {y}, {z}, "unique_consecutive: the number of different values was 3");
  const auto bins = [](const Tensors& all) -> Tensors {
    return {all[0].abs().to(at::kLong).bincount()};
  };
  expect_assumed(bins, {x}, {x + 0.5}, {z}, "bincount: the number of bins was 3");
}

// A mask chooses nothing, and then something.
TEST(TraceNumbersTest, NoElements) {
  const auto f = [](const Tensors& all) -> Tensors { return {all[0].index({all[0].gt(0)}) * 2}; };
  const Tensor none = -at::ones({3});
  expect_assumed(f, {none}, {none - 1}, {none.abs()}, "was 0 when the function was traced");
}

// The program is put into another order, and what reads the mask stays behind the check.
TEST(TraceNumbersTest, WhatComesAfterACheckStaysThere) {
  const auto f = [](const Tensor& x) {
    return grad<0>([](const Tensor& y) {
      const Tensor chosen = y.index({y.gt(0)});
      return (chosen * chosen.sin()).sum() + y.exp().sum();
    })(x);
  };
  const Tensor x = rand({40}) - 0.5;
  const Executable executable(torchlift::trace(f, x));
  bool checked = false;
  for (const Node& node : executable.graph().nodes) {
    checked = checked || assumes(node);
    EXPECT_TRUE(checked || node.op.find("index_put") == std::string::npos);
  }
  EXPECT_TRUE(checked);
  EXPECT_CLOSE(executable.run({x.flip(0)})[0], f(x.flip(0)));
  EXPECT_THROW(executable.run({x + 2}), AssumptionError);
}

TEST(TraceNumbersTest, NothingIsHalfWritten) {
  TraceScope scope;
  const Tensor given = at::tensor({1.0, -2.0, 3.0}), x = scope.input(given.clone(), "x");
  x.add_(at::rand({3}));
  const Tensor chosen = x.index({x.gt(0)});
  const Program program(scope.finish({chosen}));
  Tensor other = at::tensor({-5.0, -5.0, 5.0});
  at::manual_seed(1);
  const Tensor next = at::rand({2});
  at::manual_seed(1);
  EXPECT_THROW(program.run({other}), AssumptionError);
  EXPECT_TRUE(other.equal(at::tensor({-5.0, -5.0, 5.0})));
  EXPECT_TRUE(at::rand({2}).equal(next));
  Tensor fits = given.clone();
  EXPECT_EQ(program.run({fits})[0].numel(), 2);
  EXPECT_FALSE(fits.equal(given));
}

// Batch norm's schema does not say that it writes into its running statistics.
TEST(TraceNumbersTest, RunningStatisticsAreNotHalfWritten) {
  TraceScope scope;
  const Tensor given = at::tensor({1.0, -2.0, 3.0}).unsqueeze(1);
  const Tensor x = scope.input(given, "x");
  const Tensor mean = scope.input(at::zeros({1}, at::kDouble), "mean");
  const Tensor var = scope.input(at::ones({1}, at::kDouble), "var");
  const Tensor y = at::batch_norm(x, {}, {}, mean, var, /*training=*/true, 0.5, 1e-5, false);
  const Program program(scope.finish({y.index({x.gt(0)})}));
  const Tensor mean_given = at::zeros({1}, at::kDouble), var_given = at::ones({1}, at::kDouble);
  EXPECT_THROW(program.run({given + 5, mean_given, var_given}), AssumptionError);
  EXPECT_EQ(mean_given.item<double>(), 0);
  EXPECT_EQ(var_given.item<double>(), 1);
  program.run({given + 1, mean_given, var_given});
  EXPECT_NE(mean_given.item<double>(), 0);
}

TEST(TraceNumbersTest, ChecksArePartOfTheGraph) {
  const auto one_hot = [](const Tensor& x) { return at::one_hot(x, 3); };
  const Tensor x = integers({0, 1, 2}), y = integers({2, 2, 0});
  expect_error(expect_replays(one_hot, {y}, x), {x + 1}, "smaller than num_classes");
  const auto bins = vmap([](const Tensor& row) { return at::bincount(row, {}, 4); });
  expect_error(expect_replays(bins, {y.unsqueeze(0)}, x.unsqueeze(0)), {x.unsqueeze(0) + 2},
               "minlength");
  const auto repeated = vmap([](const Tensor& v, const Tensor& n) {
    return at::repeat_interleave(v, n, std::nullopt, std::optional<int64_t>(3));
  });
  expect_error(expect_replays(repeated, {rand({1, 3}), integers({3, 0, 0}).unsqueeze(0)},
                              rand({1, 3}), integers({1, 1, 1}).unsqueeze(0)),
               {rand({1, 3}), integers({1, 1, 0}).unsqueeze(0)}, "another sum");
}

TEST(TraceNumbersTest, AnswersAreAssumedByCovAndIstft) {
  const auto cov = [](const Tensor& x, const Tensor& w) { return at::cov(x, 1, {}, w); };
  const Tensors other = {rand({3, 5}), rand({5})};
  expect_error(expect_replays(cov, other, rand({3, 5}), rand({5})), {rand({3, 5}), -rand({5})},
               "cov: the weights are of another kind");
  const auto istft = [](const Tensor& x, const Tensor& window) {
    return at::istft(at::view_as_complex(x), 8, 3, std::nullopt, window);
  };
  expect_error(expect_replays(istft, {rand({5, 6, 2}), rand({8})}, rand({5, 6, 2}), rand({8})),
               {rand({5, 6, 2}), at::zeros({8}, at::kDouble)}, "1e-11");
}

TEST(TraceNumbersTest, NarrowFromATensor) {
  const auto f = [](const Tensor& x, const Tensor& start) { return x.narrow(0, start, 2).sin(); };
  const Tensor zero = at::scalar_tensor(0, at::kLong);
  const auto programs = expect_replays(f, {rand({5, 2}), zero + 3}, rand({5, 2}), zero);
  expect_error(programs, {rand({5, 2}), zero + 4}, "out of range");
  const Tensor xs = rand({2, 5}), starts = integers({0, -2});
  const Program each(torchlift::trace(vmap(f), xs, starts));
  EXPECT_CLOSE(each.run({xs, starts})[0], at::stack({f(xs[0], zero), f(xs[1], zero + 3)}));
  const auto writes = [](const Tensor& x, const Tensor& start) {
    Tensor y = x.clone();
    y.narrow(0, start, 2).mul_(2);
    return y;
  };
  EXPECT_THAT(message_of([&] { torchlift::trace(writes, rand({5}), zero); }),
              HasSubstr("narrow: its place is computed from the inputs"));
}

TEST(TraceNumbersTest, GradientOfWhatIsWrittenByAMask) {
  const auto f = [](const Tensor& x, const Tensor& mask, const Tensor& v) {
    const c10::List<std::optional<Tensor>> places({std::optional<Tensor>(mask)});
    return grad<2>([=](const Tensor& y, const Tensor& /*mask*/, const Tensor& w) {
      return y.sin().index_put(places, w, /*accumulate=*/true).exp().sum();
    })(x, mask, v);
  };
  const Tensor x = rand({3, 2}), v = rand({2, 2});
  const Tensor first = integers({1, 0, 1}).to(at::kBool),
               second = integers({0, 1, 1}).to(at::kBool);
  expect_error(expect_replays(f, {x + 1, second, v * 2}, x, first, v), {x, at::ones_like(first), v},
               "shape mismatch");
}

TEST(TraceNumbersTest, MasksThatAreConstants) {
  const Tensor mask = integers({1, 0, 1}).to(at::kBool);
  expect_replays([=](const Tensor& x) { return x.index({mask}).sin(); }, {rand({3, 2})},
                 rand({3, 2}));
}

TEST(TraceNumbersTest, LengthsOfCtcLosses) {
  const auto f = [](const Tensor& x, const Tensor& targets, const Tensor& in, const Tensor& out) {
    return grad<0>([](const Tensor& y, const Tensor& targets, const Tensor& in, const Tensor& out) {
      return at::ctc_loss(y.log_softmax(2), targets, in, out);
    })(x, targets, in, out);
  };
  const Tensor targets = integers({1, 2, 3, 1, 1, 2}).view({2, 3});
  expect_replays(f, {rand({6, 2, 4}), targets.flip(0), integers({4, 6}), integers({1, 2})},
                 rand({6, 2, 4}), targets, integers({6, 5}), integers({3, 2}));
}

TEST(TraceNumbersTest, LeastSquares) {
  for (const char* driver : {"gels", "gelsy"}) {
    const auto f = [=](const Tensor& a, const Tensor& b) {
      return std::get<0>(at::linalg_lstsq(a, b, std::nullopt, driver));
    };
    expect_replays(f, {rand({5, 3}), rand({5, 2})}, rand({5, 3}), rand({5, 2}));
    expect_replays(vmap(f), {rand({2, 5, 3}), rand({2, 5, 1})}, rand({2, 5, 3}), rand({2, 5, 1}));
  }
  const auto residuals = [](const Tensor& a, const Tensor& b) {
    return std::get<1>(at::linalg_lstsq(a, b, std::nullopt, "gelsd"));
  };
  const Tensor a = rand({5, 2}), b = rand({5, 1}), deficient = rand({5, 1}).expand({5, 2});
  const Program program(torchlift::trace(residuals, a, b));
  EXPECT_CLOSE(program.run({a + 1, b})[0], residuals(a + 1, b));
  EXPECT_THAT(message_of([&] { program.run({deficient, b}); }), HasSubstr("full rank"));
}

}  // namespace
}  // namespace torchlift::compile
