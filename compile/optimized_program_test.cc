#include "compile/optimized_program.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <thread>
#include <tuple>
#include <vector>

#include "autodiff/grad.h"
#include "batching/vmap.h"
#include "compile/trace.h"
#include "core/testing.h"

namespace torchlift::compile {
namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;

Tensor f(const Tensor& x, const Tensor& w) { return (x.sin() * 1 + x.sin()).matmul(w).relu(); }

TEST(OptimizedProgram, GivesWhatTheGraphGives) {
  const Tensor x = at::rand({4, 3}, at::kDouble), w = at::rand({3, 2}, at::kDouble);
  const OptimizedProgram program(torchlift::trace(&f, x, w));
  const size_t nodes = program.graph().nodes.size();
  for (int i = 0; i < 2; ++i) {
    const Tensor other = at::rand({4, 3}, at::kDouble);
    EXPECT_CLOSE(program.run({other, w})[0], f(other, w));
  }
  EXPECT_EQ(program.graph().nodes.size(), nodes) << "the graph stays as it was given";
}

TEST(OptimizedProgram, UnderTransforms) {
  const Tensor x = at::rand({5, 4, 3}, at::kDouble), w = at::rand({3, 2}, at::kDouble);
  const OptimizedProgram program(torchlift::trace(&f, x[0], w));
  program.run({x[0], w});
  const auto run = [&](const Tensor& each) { return program.run({each, w})[0]; };
  EXPECT_CLOSE(vmap(run)(x), f(x, w));
  const auto total = [&](const Tensor& each) { return run(each).sum(); };
  EXPECT_CLOSE(grad(total)(x[0]), grad([&](const Tensor& each) { return f(each, w).sum(); })(x[0]));
}

TEST(OptimizedProgram, WhatIsWrittenIntoInputsIsThere) {
  const auto g = [](const Tensor& x) { return x.add_(1).sum(); };
  const Tensor x = at::zeros({3});
  const OptimizedProgram program(torchlift::trace(g, x.clone()));
  EXPECT_CLOSE(program.run({x})[0], at::full({}, 3.0F));
  EXPECT_CLOSE(x, at::ones({3}));
}

TEST(OptimizedProgram, ErrorsOfConstantsAreThoseOfTheRun) {
  Graph graph;
  const ValueId x = graph.add_input(type_of(at::zeros({2})), "x");
  const ValueId matrix = graph.add_constant(at::zeros({2, 2}));
  const ValueId inverse = graph.add_value(type_of(at::zeros({2, 2})), "inverse");
  graph.nodes.push_back({.op = "aten::linalg_inv",
                         .overload = "",
                         .args = {ValueRef{matrix}},
                         .results = {{.ids = {inverse}}},
                         .subgraphs = {},
                         .source = ""});
  graph.outputs = {inverse, x};
  const OptimizedProgram program(graph);
  for (int i = 0; i < 2; ++i) EXPECT_THROW(program.run({at::zeros({2})}), c10::Error);
}

TEST(OptimizedProgram, TypesThatAreWrongDoNoHarm) {
  const auto chain = [](const Tensor& x) { return ((x.mean() + 1) * 2).exp().sin() - 1; };
  Graph graph = torchlift::trace(chain, at::rand({8}));
  for (Value& value : graph.values) {
    if (value.type.dim() == 0) value.type = type_of(at::zeros({1024, 2048}));
  }
  const Tensor x = at::rand({8});
  EXPECT_CLOSE(OptimizedProgram(graph).run({x})[0], chain(x));
}

TEST(OptimizedProgram, FromSeveralThreads) {
  const Tensor x = at::rand({4, 3}, at::kDouble), w = at::rand({3, 2}, at::kDouble);
  const OptimizedProgram program(torchlift::trace(&f, x, w));
  Tensors results(8);
  std::vector<std::thread> threads;
  for (Tensor& result : results) {
    threads.emplace_back([&] { result = program.run({x, w})[0]; });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Tensor& result : results) EXPECT_CLOSE(result, f(x, w));
}

// Written in place where the function wrote in place: a copy of all of it for each part would take
// longer than the function.
TEST(OptimizedProgram, PartsThatAreReplaced) {
  const Tensor x = at::randn({6, 5}), y = at::randn({6, 5});
  const Tensor places = at::tensor({4, 0, 4}, at::kLong);
  const auto f = [&](const Tensor& x, const Tensor& y) {
    Tensor t = x.sin();
    t.select(0, 1).copy_(y[0]);
    t.slice(1, 1, 5, 2).mul_(2);
    t.slice(0, 2).copy_(t.slice(0, 0, 4).clone());
    t.diagonal().copy_(y[1]);
    t.index_put_({places}, y.slice(0, 0, 3), /*accumulate=*/true);
    t.index_add_(0, places, y.slice(0, 3));
    t.index_copy_(1, places.slice(0, 0, 2), y.slice(1, 0, 2));
    t.index_fill_(1, places.slice(0, 1, 2), 3);
    t.scatter_(0, places.view({1, 3}), y);
    t.scatter_add_(0, places.view({1, 3}), y);
    t.masked_fill_(y > 1, 7);
    t.masked_scatter_(y < -1, x);
    return std::tuple(t, t.select(0, 0) + 1);
  };
  const auto expected = f(x, y);
  const OptimizedProgram program(torchlift::trace(f, x, y));
  for (int i = 0; i < 2; ++i) {
    const Tensors got = program.run({x, y});
    EXPECT_CLOSE(got[0], std::get<0>(expected));
    EXPECT_CLOSE(got[1], std::get<1>(expected));
  }
}

// What a result is written over, and what takes the place of an operator that changes nothing, may
// be a view that conjugates or negates. The result is none, and view_as_real does not take one.
TEST(OptimizedProgram, ConjugateViews) {
  using Function = Tensor (*)(const Tensor&, const Tensor&);
  const std::vector<Function> functions = {
      [](const Tensor& z, const Tensor& w) { return at::view_as_real(w * z.sin().conj()).sin(); },
      [](const Tensor& z, const Tensor& w) { return at::real(z.sin().conj() + w) * 1; },
      [](const Tensor& z, const Tensor& w) { return at::imag(z.sin().conj()) * at::real(w); },
      [](const Tensor& z, const Tensor& w) {
        return (at::imag(z.sin().conj()).exp() * at::real(w)).view(at::kInt) * 1;
      },
      [](const Tensor& z, const Tensor&) { return at::view_as_real(-(-z.sin().conj())) * 2; },
      [](const Tensor& z, const Tensor&) { return at::view_as_real(-(-z)) * 2; },
      [](const Tensor& z, const Tensor&) {
        return at::view_as_real(at::cat({z.sin().conj()})) * 2;
      },
      [](const Tensor& z, const Tensor& w) {
        return at::view_as_real(at::where(at::ones({8}, at::kBool), z.sin().conj(), w)) * 2;
      }};
  const Tensor z = at::randn({8}, at::kComplexFloat), w = at::randn({8}, at::kComplexFloat);
  for (size_t i = 0; i < functions.size(); ++i) {
    const OptimizedProgram program(torchlift::trace(functions[i], z, w));
    for (const Tensor& given : {z, z.conj()}) {
      const Tensor got = program.run({given, w})[0];
      EXPECT_CLOSE(got, functions[i](given, w));
      EXPECT_FALSE(got.is_conj() || got.is_neg()) << i;
    }
  }
}

}  // namespace
}  // namespace torchlift::compile
