#include "compile/save.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <fstream>
#include <string>
#include <tuple>
#include <vector>

#include "autodiff/grad.h"
#include "autodiff/jvp.h"
#include "batching/control_flow.h"
#include "batching/vmap.h"
#include "core/error.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using at::Tensor;

struct Params {
  Tensor w;
  Tensor b;
};
TORCHLIFT_PYTREE(Params, w, b);

std::string file(const std::string& name) { return ::testing::TempDir() + name; }

Tensor loss(const Params& p, const Tensor& x) { return (p.w.mv(x) + p.b).tanh().sum(); }

TEST(SaveTest, RunsWhatWasSaved) {
  const auto per_sample = vmap(grad(&loss), {.in_dims = in(kNone, 0)});
  const Params params{at::rand({2, 3}, at::kDouble), at::rand({2}, at::kDouble)};
  const Tensor x = at::rand({5, 3}, at::kDouble);
  save(per_sample, file("per_sample.tlc"), params, x);

  const LoadedFunction loaded = load(file("per_sample.tlc"));
  const Params expected = per_sample(params, x);
  const std::vector<Tensor> outputs = loaded.run({params.w, params.b, x});
  ASSERT_EQ(outputs.size(), 2U);
  EXPECT_CLOSE(outputs[0], expected.w);
  const auto typed = loaded.as<Params(Params, Tensor)>();
  EXPECT_CLOSE(typed(params, x).b, expected.b);
}

TEST(SaveTest, ShapesAlone) {
  const auto meta = [](at::IntArrayRef sizes) {
    return at::empty(sizes, at::device(at::kMeta).dtype(at::kDouble));
  };
  const auto f = [](const Params& p, const Tensor& x) {
    const Tensor y = loss(p, x);
    return cond(
        y.gt(0), [](const Tensor& v) { return v.sin(); }, [](const Tensor& v) { return v * 2; }, y);
  };
  save(f, file("shapes.tlc"), Params{meta({2, 3}), meta({2})}, meta({3}));
  const LoadedFunction loaded = load(file("shapes.tlc"));
  EXPECT_TRUE(loaded.graph().layouts_assumed);
  EXPECT_TRUE(loaded.graph().nodes.back().subgraphs[0]->layouts_assumed);
  const Params params{at::rand({2, 3}, at::kDouble), at::rand({2}, at::kDouble)};
  const Tensor x = at::rand({3}, at::kDouble);
  EXPECT_CLOSE(loaded.run({params.w, params.b, x})[0], f(params, x));
  save(f, file("values.tlc"), params, x);
  EXPECT_FALSE(load(file("values.tlc")).graph().layouts_assumed);
}

TEST(SaveTest, WhatWasLoadedCanBeTransformedAndSavedAgain) {
  const auto f = [](const Tensor& x) { return (x.sin() * x).sum(); };
  save(f, file("f.tlc"), at::rand({3}, at::kDouble));
  const auto loaded = load(file("f.tlc")).as<Tensor(Tensor)>();
  const Tensor x = at::rand({4, 3}, at::kDouble);
  const auto gradients = vmap(grad(loaded));
  EXPECT_CLOSE(gradients(x), vmap(grad(f))(x));
  save(gradients, file("g.tlc"), x);
  EXPECT_CLOSE(load(file("g.tlc")).run({x})[0], vmap(grad(f))(x));
}

TEST(SaveTest, LoadedBranchesAndLoopsCanBeTransformed) {
  const auto f = [](const Tensor& x) {
    const Tensor y = cond(
        x.sum().gt(0), [](const Tensor& v) { return v.sin(); },
        [](const Tensor& v) { return v * v; }, x);
    const Tensor z = while_loop([](const Tensor& v) { return v.sum().lt(50); },
                                [](const Tensor& v) { return v * 2 + 1; }, y);
    const auto [last, sums] =
        scan([&](const Tensor& c, const Tensor& v) { return std::pair(c + v * z[0], c * v); },
             at::ones({}, at::kDouble), z);
    return last + sums.sum();
  };
  const Tensor x = at::randn({6, 3}, at::kDouble);
  save(f, file("flow.tlc"), x[0]);
  const auto loaded = load(file("flow.tlc")).as<Tensor(Tensor)>();
  EXPECT_CLOSE(vmap(loaded)(x), vmap(f)(x));
  for (int64_t i = 0; i < 6; ++i) EXPECT_CLOSE(loaded(x[i]), f(x[i]));
  EXPECT_CLOSE(vmap(grad(loaded))(x), vmap(grad(f))(x));
  EXPECT_CLOSE(jvp(loaded, x[0], x[1]).second, jvp(f, x[0], x[1]).second);
  save(vmap(loaded), file("rows.tlc"), x);
  EXPECT_CLOSE(load(file("rows.tlc")).run({x * 2})[0], vmap(f)(x * 2));
}

TEST(SaveTest, BadFilesAndTypesAreErrors) {
  EXPECT_THROW(load(file("no_such.tlc")), TransformError);
  std::ofstream(file("text.tlc")) << "no artifact";
  EXPECT_THROW(load(file("text.tlc")), TransformError);
  save([](const Tensor& x) { return x * 2; }, file("two.tlc"), at::ones({2}));
  const auto wrong = load(file("two.tlc")).as<std::tuple<Tensor, Tensor>(Tensor)>();
  EXPECT_THROW(wrong(at::ones({2})), TransformError);
}

}  // namespace
}  // namespace torchlift
