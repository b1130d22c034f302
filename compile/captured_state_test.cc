#include "compile/captured_state.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "autodiff/grad.h"
#include "batching/control_flow.h"
#include "batching/vmap.h"
#include "compile/executable.h"
#include "compile/jit.h"
#include "compile/replay.h"
#include "compile/save.h"
#include "compile/trace.h"
#include "core/error.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using at::Tensor;
using compile::Executable;
using compile::Graph;
using compile::Program;
using ::testing::HasSubstr;

Tensor data(at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); }

// A function of x with state of its own: x is [4, 3].
struct Stateful {
  std::vector<Tensor> state;
  std::function<Tensor(const std::vector<Tensor>&, const Tensor&)> f;

  Tensor operator()(const Tensor& x) const { return f(state, x); }
  Stateful copy() const {
    Stateful other{.state = {}, .f = f};
    for (const Tensor& t : state) other.state.push_back(t.clone());
    return other;
  }
};

struct Case {
  std::string name;
  Stateful function;
};

// The running statistics of a batch norm in training mode, and the number of its batches.
Stateful batch_norm() {
  return {.state = {data({3}), at::rand({3}, at::kDouble), at::zeros({}, at::kLong)},
          .f = [](const std::vector<Tensor>& state, const Tensor& x) {
            state[2].add_(1);
            return at::batch_norm(x, {}, {}, state[0], state[1], /*training=*/true, 0.1, 1e-5,
                                  false);
          }};
}

std::vector<Case> cases() {
  return {
      {"a batch norm", batch_norm()},
      {"an instance norm",
       {.state = {data({3}), at::rand({3}, at::kDouble)},
        .f =
            [](const std::vector<Tensor>& state, const Tensor& x) {
              return at::instance_norm(x.expand({2, 4, 3}).transpose(1, 2), {}, {}, state[0],
                                       state[1], /*use_input_stats=*/true, 0.1, 1e-5, false);
            }}},
      {"a moving average, read before and after",
       {.state = {data({3})},
        .f =
            [](const std::vector<Tensor>& state, const Tensor& x) {
              const Tensor before = state[0] * 2;  // of captured tensors alone
              const Tensor away = x - state[0];
              state[0].mul_(0.9).add_(x.mean(0), 0.1);
              return before + away * (x - state[0]) + state[0].sum();
            }}},
      {"state that is only written",
       {.state = {data({3})},
        .f =
            [](const std::vector<Tensor>& state, const Tensor& x) {
              state[0].copy_(x[0]);
              return x.sin();
            }}},
      {"a counter, which plain operators write",
       {.state = {at::zeros({}, at::kLong)},
        .f =
            [](const std::vector<Tensor>& state, const Tensor& x) {
              state[0].add_(1);
              return x * state[0];
            }}},
      {"a counter that nothing reads",
       {.state = {at::zeros({}, at::kLong)},
        .f =
            [](const std::vector<Tensor>& state, const Tensor& x) {
              state[0].add_(2);
              return x.exp();
            }}},
      {"state that is returned",
       {.state = {data({3})},
        .f =
            [](const std::vector<Tensor>& state, const Tensor& x) {
              state[0].add_(x[1]);
              return state[0];
            }}},
      {"a row of a table",
       {.state = {data({5, 3})},
        .f =
            [](const std::vector<Tensor>& state, const Tensor& x) {
              state[0].select(0, 2).add_(x[1]);
              state[0].slice(0, 3).mul_(2);
              return x * state[0][2] + state[0].sum();
            }}},
      {"data() of it",
       {.state = {data({3})},
        .f =
            [](const std::vector<Tensor>& state, const Tensor& x) {
              state[0].data().mul_(0.5);
              state[0].data().add_(x[0]);
              return x * state[0];
            }}},
      {"two pieces of state that change places",
       {.state = {data({3}), data({3})},
        .f =
            [](const std::vector<Tensor>& state, const Tensor& x) {
              const Tensor first = state[0].clone();
              state[0].copy_(state[1]);
              state[1].copy_(first);
              return x * state[0];
            }}},
      {"a list of them",
       {.state = {data({3}), data({2})},
        .f =
            [](const std::vector<Tensor>& state, const Tensor& x) {
              at::_foreach_mul_(state, 0.5);
              return x.sum() * state[1];
            }}},
      {"under grad",
       {.state = {data({3})},
        .f =
            [](const std::vector<Tensor>& state, const Tensor& x) {
              return grad([&](const Tensor& y) {
                state[0].mul_(0.9).add_(y.detach().mean(0), 0.1);
                return (y * y * state[0]).sum();
              })(x);
            }}},
      {"state that a scan begins with",
       {.state = {data({3})},
        .f =
            [](const std::vector<Tensor>& state, const Tensor& x) {
              const auto step = [](const Tensor& carry, const Tensor& row) {
                return std::pair<Tensor, Tensor>(carry * 0.5 + row, carry.sin());
              };
              const auto [last, all] = scan(step, state[0], x);
              state[0].copy_(last);
              return all + state[0];
            }}},
      {"state that a loop begins with, and its rows",
       {.state = {data({3})},
        .f =
            [](const std::vector<Tensor>& state, const Tensor& x) {
              const auto goes_on = [&](const Tensor& c) { return (c.sum() + x.sum()).lt(9); };
              const Tensor last = while_loop(
                  goes_on, [](const Tensor& c) { return c + 1; }, state[0]);
              state[0].copy_(last);
              const auto below = [](const Tensor& c) { return c.lt(5); };
              return vmap([&](const Tensor& c) {
                return while_loop(
                    below, [](const Tensor& each) { return each + 1; }, c);
              })(state[0]);
            }}},
      {"an operand of a branch",
       {.state = {data({3})},
        .f =
            [](const std::vector<Tensor>& state, const Tensor& x) {
              const Tensor given = cond(
                  x.sum() > 0, [](const Tensor& s) { return s.sin(); },
                  [](const Tensor& s) { return s.cos(); }, state[0]);
              state[0].add_(x[0]);
              return given * state[0];
            }}},
      {"beside a vmap",
       {.state = {data({3})},
        .f =
            [](const std::vector<Tensor>& state, const Tensor& x) {
              const Tensor y = vmap([&](const Tensor& row) {
                state[0].add_(1);  // the same for all rows
                return row * state[0];
              })(x);
              return y + vmap([](const Tensor& each) { return each * 2; })(state[0]);
            }}},
  };
}

void expect_same_state(const Stateful& a, const Stateful& b, const std::string& name) {
  for (size_t i = 0; i < a.state.size(); ++i) {
    EXPECT_TRUE(at::allclose(a.state[i], b.state[i])) << name << ", state " << i;
  }
}

// Runs what `make` gives and the function itself three times, each with state of its own. That of a
// file is not seen.
template <class Make>
void expect_runs(const Case& each, const Make& make, bool seen = true) {
  const Stateful expected = each.function.copy(), got = each.function.copy();
  const auto run = make(got);
  for (int i = 0; i < 3; ++i) {
    const Tensor x = data({4, 3});
    const Tensor wanted = expected(x);
    const Tensor given = run(x);
    ASSERT_EQ(given.sizes(), wanted.sizes()) << each.name;
    EXPECT_TRUE(at::allclose(given, wanted)) << each.name << ", run " << i;
    expect_same_state(got, seen ? expected : each.function, each.name);
  }
}

TEST(CapturedStateTest, ProgramsUpdateIt) {
  for (const Case& each : cases()) {
    expect_runs(each, [&](const Stateful& f) {
      const Program program(trace(f, data({4, 3})));
      expect_same_state(f, each.function, each.name + ", traced");
      return [program](const Tensor& x) { return program.run({x})[0]; };
    });
  }
}

TEST(CapturedStateTest, ExecutablesUpdateIt) {
  for (const Case& each : cases()) {
    expect_runs(each, [&](const Stateful& f) {
      const Executable executable(trace(f, data({4, 3})));
      return [executable](const Tensor& x) { return executable.run({x})[0]; };
    });
  }
}

TEST(CapturedStateTest, JitUpdatesIt) {
  for (const Case& each : cases()) {
    expect_runs(each, [&](const Stateful& f) { return jit(f); });
  }
}

TEST(CapturedStateTest, TracesOfShapesAlone) {
  for (const Case& each : cases()) {
    if (each.name.find("norm") != std::string::npos) continue;  // no meta kernel without Python
    expect_runs(each, [&](const Stateful& f) {
      const Program program(trace(f, at::empty({4, 3}, at::device(at::kMeta).dtype(at::kDouble))));
      expect_same_state(f, each.function, each.name + ", traced");
      return [program](const Tensor& x) { return program.run({x})[0]; };
    });
  }
}

TEST(CapturedStateTest, AnotherShapeGoesOnWithIt) {
  const Stateful f = batch_norm(), expected = f.copy();
  const auto fast = jit(f);
  for (const int64_t size : {4, 7, 4, 7}) {
    const Tensor x = data({size, 3});
    EXPECT_CLOSE(fast(x), expected(x));
    expect_same_state(f, expected, "sizes");
  }
  EXPECT_EQ(fast.counters<Tensor>().misses, 2);
  EXPECT_EQ(f.state[2].item<int64_t>(), 4);
}

TEST(CapturedStateTest, ChangesFromOutsideAreSeen) {
  const Tensor ema = at::ones({3}, at::kDouble);
  const auto fast = jit([&](const Tensor& x) {
    ema.mul_(0.5);
    return x * ema;
  });
  const Tensor x = data({3});
  EXPECT_CLOSE(fast(x), x * 0.5);
  ema.fill_(8);
  EXPECT_CLOSE(fast(x), x * 4);
}

TEST(CapturedStateTest, AViewThatWasMadeOutside) {
  const Tensor table = data({4, 3}), expected = table.clone();
  const Tensor column = table.select(1, 1), expected_column = expected.select(1, 1);
  const auto step = [](const Tensor& all, const Tensor& part, const Tensor& x) {
    const Tensor before = all.sum();
    part.add_(x);
    return before + all.sum() + part.sum();
  };
  const Graph graph = trace([&](const Tensor& x) { return step(table, column, x); }, data({4}));
  EXPECT_EQ(graph.constants.size(), 1U);
  const Executable executable(graph);
  for (int i = 0; i < 3; ++i) {
    const Tensor x = data({4});
    EXPECT_CLOSE(executable.run({x})[0], step(expected, expected_column, x));
    EXPECT_CLOSE(table, expected);
  }
}

TEST(CapturedStateTest, AnArgumentThatIsTheState) {
  const Tensor state = data({3}), expected = state.clone();
  const auto step = [](const Tensor& held, const Tensor& x) {
    held.add_(1);
    return x * 2;
  };
  const Executable executable(trace([&](const Tensor& x) { return step(state, x); }, data({3})));
  for (int i = 0; i < 2; ++i) {
    const Tensor given = executable.run({state})[0];
    EXPECT_CLOSE(given, step(expected, expected));
    EXPECT_CLOSE(state, expected);
  }
}

TEST(CapturedStateTest, LargeStateIsWrittenInPlace) {
  const Tensor table = data({1000, 300}), expected = table.clone();
  const auto step = [](const Tensor& all, const Tensor& x) {
    all.select(0, 7).copy_(x);
    all.select(0, 8).add_(x);
    return all.slice(0, 5, 10).mv(x);
  };
  const Executable executable(trace([&](const Tensor& x) { return step(table, x); }, data({300})));
  for (int i = 0; i < 3; ++i) {
    const Tensor x = data({300});
    EXPECT_CLOSE(executable.run({x})[0], step(expected, x));
    EXPECT_CLOSE(table, expected);
  }
}

TEST(CapturedStateTest, VersionsGoUp) {
  const Tensor state = data({3});
  const auto f = [&](const Tensor& x) {
    state.add_(x);
    return x.sin();
  };
  const Program program(trace(f, data({3})));
  const int64_t before = state._version();
  program.run({data({3})});
  EXPECT_GT(state._version(), before);
}

TEST(CapturedStateTest, WhatTheFunctionMakesIsNoState) {
  std::vector<double> numbers{1, 2, 3};
  const auto f = [&](const Tensor& x) {
    const Tensor made = at::zeros({3}, at::kDouble);
    made.add_(1);
    const Tensor of_array = at::from_blob(numbers.data(), {3}, at::kDouble).clone();
    of_array.mul_(2);
    return x + made + of_array;
  };
  const Graph graph = trace(f, data({3}));
  const Program program(graph);
  for (int i = 0; i < 2; ++i) {
    const Tensor x = data({3});
    EXPECT_CLOSE(program.run({x})[0], f(x));
  }
}

TEST(CapturedStateTest, FilesHaveTheirOwn) {
  const std::string path = ::testing::TempDir() + "state.tlc";
  for (const Case& each : cases()) {
    for (int time = 0; time < 2; ++time) {
      const auto loaded = [&](const Stateful& f) {
        if (time == 0) save(f, path, data({4, 3}));
        return [loaded = load(path)](const Tensor& x) { return loaded.run({x})[0]; };
      };
      expect_runs(each, loaded, /*seen=*/false);
    }
  }
}

TEST(CapturedStateTest, RunsOfSeveralThreads) {
  const Stateful f{.state = {at::zeros({1000}, at::kDouble), at::zeros({}, at::kLong)},
                   .f = [](const std::vector<Tensor>& state, const Tensor& x) {
                     state[0].add_(x);
                     state[1].add_(1);
                     return x.sin() * 2;
                   }};
  const std::string path = ::testing::TempDir() + "threads.tlc";
  const Tensor x = at::ones({1000}, at::kDouble);
  save(f, path, x);
  const Program program(trace(f, x));
  const Executable executable(trace(f, x));
  const LoadedFunction loaded = load(path);
  constexpr int kRuns = 200;
  const auto in_threads = [&](const auto& run) {
    std::vector<std::thread> threads;
    for (int t = 0; t < 2; ++t) {
      threads.emplace_back([&] {
        for (int i = 0; i < kRuns; ++i) run();
      });
    }
    for (std::thread& thread : threads) thread.join();
  };
  in_threads([&] { program.run({x}); });
  EXPECT_EQ(f.state[1].item<int64_t>(), 2 * kRuns);
  in_threads([&] { executable.run({x}); });
  EXPECT_EQ(f.state[1].item<int64_t>(), 4 * kRuns);
  EXPECT_CLOSE(f.state[0], x * 4 * kRuns);
  in_threads([&] { loaded.run({x}); });
  EXPECT_EQ(f.state[1].item<int64_t>(), 4 * kRuns);
}

TEST(CapturedStateTest, RandomNumbersAreDrawnOnce) {
  const Tensor state = at::zeros({3}, at::kDouble);
  const auto f = [&](const Tensor& x) {
    const Tensor noise = at::rand_like(x);
    state.add_(noise);
    return x + noise;
  };
  const Tensor x = data({3});
  at::manual_seed(3);
  f(x);
  const Tensor expected = at::rand({2});
  at::manual_seed(3);
  trace(f, x);
  EXPECT_TRUE(at::equal(at::rand({2}), expected));
}

TEST(CapturedStateTest, AFunctionThatThrows) {
  const Tensor counter = at::zeros({}, at::kLong), ema = at::ones({3});
  const auto f = [&](const Tensor& x) -> Tensor {
    counter.add_(1);
    ema.add_(x);
    throw std::runtime_error("as it must");
  };
  for (int i = 0; i < 2; ++i) {
    EXPECT_THROW(trace(f, at::ones({3})), std::runtime_error);
    EXPECT_EQ(counter.item<int64_t>(), 0);
    EXPECT_CLOSE(ema, at::ones({3}));
  }
}

TEST(CapturedStateTest, TracedWithTheStateAsAnArgument) {
  const Tensor state = at::zeros({3}, at::kDouble);
  const auto f = [&](const Tensor& x) {
    state.add_(1);
    return x + at::rand_like(x);
  };
  const Graph graph = trace(f, state);
  const auto draws = std::count_if(graph.nodes.begin(), graph.nodes.end(),
                                   [](const auto& node) { return node.op == "aten::rand_like"; });
  EXPECT_EQ(draws, 1);
  EXPECT_CLOSE(state, at::zeros({3}, at::kDouble));
  const Tensor x = data({3});
  at::manual_seed(0);
  const Tensor expected = x + at::rand_like(x);
  at::manual_seed(0);
  EXPECT_CLOSE(Program(graph).run({x})[0], expected);
  const Tensor buffer = data({3}), before = buffer.clone();
  const Program program(trace(
      [&](const Tensor& y) {
        buffer.add_(y);
        return y * 2;
      },
      buffer));
  EXPECT_CLOSE(buffer, before);
  EXPECT_CLOSE(program.run({x})[0], x * 2);
  EXPECT_CLOSE(buffer, before + x);
}

TEST(CapturedStateTest, TensorsOfOneArray) {
  std::vector<double> numbers{1, 2, 3, 4};
  const auto of_array = [&](int64_t from, int64_t size) {
    return at::from_blob(numbers.data() + from, {size}, at::kDouble);
  };
  const Tensor a = of_array(0, 3), b = of_array(0, 3);
  const Tensor x = at::ones({3}, at::kDouble);
  for (const bool writes_both : {false, true}) {
    const auto step = [&](const Tensor& one, const Tensor& other, const Tensor& y) {
      const Tensor before = other * 2;
      one.add_(1);
      if (writes_both) other.add_(y);
      return y + other + before;
    };
    const Tensor expected = a.clone();
    const Graph graph = trace([&](const Tensor& y) { return step(a, b, y); }, x);
    EXPECT_EQ(graph.constants.size(), 1U);
    EXPECT_CLOSE(a, expected);
    const Tensor first = Program(graph).run({x})[0];
    EXPECT_CLOSE(first, step(expected, expected, x));
    const Tensor second = Executable(graph).run({x})[0];
    EXPECT_CLOSE(second, step(expected, expected, x));
    EXPECT_CLOSE(a, expected);
  }
  const Executable executable(trace(
      [&](const Tensor& y) {
        a.add_(1);
        return y * 2;
      },
      x));
  for (const Tensor& argument : {b, of_array(1, 3)}) {  // the latter is so in part
    const Tensor given = executable.run({argument})[0];
    EXPECT_CLOSE(given, argument * 2);
  }
  const Tensor overlapping = of_array(1, 3);
  EXPECT_THAT(error_of<UnsupportedError>([&] {
                trace(
                    [&](const Tensor& y) {
                      a.add_(1);
                      return y + overlapping;
                    },
                    x);
              }),
              HasSubstr("overlaps"));
}

TEST(CapturedStateTest, ALazyCloneIsAnotherTensor) {
  const Tensor source = data({3}), state = source._lazy_clone(), before = source.clone();
  const auto f = [&](const Tensor& y) {
    state.add_(y);
    return y + source;
  };
  const Executable executable(trace(f, data({3})));
  const Tensor x = data({3});
  EXPECT_CLOSE(executable.run({x})[0], x + before);
  EXPECT_CLOSE(source, before);
  EXPECT_CLOSE(state, before + x);
}

// An operator whose kernel is this function, as one in Python may be.
std::function<Tensor(const Tensor&)>& kernel() {
  static std::function<Tensor(const Tensor&)> function;
  return function;
}

TORCH_LIBRARY(torchlift_state_test, m) { m.def("call(Tensor x) -> Tensor"); }

TORCH_LIBRARY_IMPL(torchlift_state_test, CPU, m) {
  m.impl("call", [](const Tensor& x) { return kernel()(x); });
}

Tensor called(const Tensor& x) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torchlift_state_test::call", "")
                             .typed<Tensor(const Tensor&)>();
  return op.call(x);
}

TEST(CapturedStateTest, ARunInsideOfARun) {
  const Tensor x = data({3});
  for (const int64_t size : {3, 1 << 18}) {  // the latter is written in place
    const Tensor state = at::zeros({size}, at::kDouble);
    kernel() = [](const Tensor& t) { return t * 2; };
    const Executable executable(trace(
        [&](const Tensor& y) {
          state.add_(1);
          return called(y) + state[0];
        },
        x));
    bool inside = false;
    kernel() = [&](const Tensor& t) {
      if (inside) return t * 2;
      inside = true;
      const Tensor given = executable.run({t})[0];
      inside = false;
      return given;
    };
    if (size == 3) {
      EXPECT_THAT(error_of<UnsupportedError>([&] { executable.run({x}); }),
                  HasSubstr("runs the same program again"));
      EXPECT_EQ(state[0].item<double>(), 0);
      EXPECT_CLOSE(executable.run({x})[0], x * 2 + 1);
    } else {
      EXPECT_CLOSE(executable.run({x})[0], x * 2 + 4);
      EXPECT_EQ(state[0].item<double>(), 2);
    }
  }
}

TEST(CapturedStateTest, VersionsGoUpWhereARunThrows) {
  const Tensor state = data({3});
  kernel() = [](const Tensor& t) { return t * 2; };
  const Program program(trace(
      [&](const Tensor& x) {
        state.add_(x);
        return called(x);
      },
      data({3})));
  kernel() = [](const Tensor& /*t*/) -> Tensor { throw std::runtime_error("as it must"); };
  const int64_t before = state._version();
  EXPECT_THROW(program.run({data({3})}), std::runtime_error);
  EXPECT_GT(state._version(), before);
}

TEST(CapturedStateTest, VersionsOfViewsGoUp) {
  for (const bool optimized : {false, true}) {
    const Tensor table = at::zeros({4, 3}, at::kDouble), row = table[1];
    const Graph graph = trace([&](const Tensor& x) { return row.add_(x) * 2; }, data({3}));
    const auto run = [&, program = Program(graph), executable = Executable(graph)] {
      const Tensor one = at::ones({3}, at::kDouble);
      optimized ? executable.run({one}) : program.run({one});
    };
    const int64_t before = row._version();
    run();
    EXPECT_GT(row._version(), before);
    EXPECT_EQ(row._version(), table._version());
    const Tensor w = data({3}).requires_grad_(true);
    const Tensor y = (w * row).sum();
    run();
    EXPECT_THROW(y.backward(), c10::Error);
  }
}

TEST(CapturedStateTest, ManyBranchesInARow) {
  const Tensor w = data({3}), state = at::zeros({3}, at::kDouble);
  const auto f = [&](const Tensor& x) {
    const Tensor positive = x.sum() > 0;
    Tensor a = x, b = x + w;
    for (int i = 0; i < 40; ++i) {
      const auto yes = [&](const Tensor& p, const Tensor& q) { return std::tuple(p + w, q * 1); };
      const auto no = [&](const Tensor& p, const Tensor& q) { return std::tuple(p, q + w); };
      std::tie(a, b) = cond(positive, yes, no, a, b);
    }
    state.add_(b);
    return a + b;
  };
  const Tensor x = data({3});
  const Program program(trace(f, x));
  const Tensor given = program.run({x})[0], written = state.clone();
  state.zero_();
  EXPECT_CLOSE(given, f(x));
  EXPECT_CLOSE(written, state);
}

TEST(CapturedStateTest, WhatIsAnError) {
  const Tensor x = data({4, 3});
  const Tensor tracked = data({3}).requires_grad_(true);
  EXPECT_THAT(error_of<UnsupportedError>([&] {
                trace(
                    [&](const Tensor& y) {
                      const at::NoGradGuard no_grad;
                      tracked.add_(y[0]);
                      return y.sin();
                    },
                    x);
              }),
              HasSubstr("requires a gradient"));
  const Tensor counter = at::zeros({}, at::kDouble);
  EXPECT_THAT(error_of<UnsupportedError>([&] {
                trace(
                    [&](const Tensor& y) {
                      counter.add_(1);
                      return y * counter.item<double>();
                    },
                    x);
              }),
              HasSubstr("captured tensor that the function writes into"));
  EXPECT_EQ(counter.item<double>(), 0);
  const Tensor row = data({3});
  EXPECT_THAT(error_of<UnsupportedError>([&] {
                trace(vmap([&](const Tensor& y) {
                        row.add_(y);
                        return y.sin();
                      }),
                      x);
              }),
              HasSubstr("[vmap]"));
  EXPECT_THAT(error_of<UnsupportedError>([&] {
                trace(
                    [&](const Tensor& y) {
                      return cond(
                          y.sum() > 0,
                          [&](const Tensor& z) {
                            counter.add_(1);
                            return z.sin();
                          },
                          [](const Tensor& z) { return z.cos(); }, y);
                    },
                    x);
              }),
              HasSubstr("a branch or loop body writes"));
  EXPECT_EQ(counter.item<double>(), 0);
}

}  // namespace
}  // namespace torchlift
