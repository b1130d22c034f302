// Transforms in c10::InferenceMode: the same numbers as outside. See NOTE [inference mode] in
// core/inference_mode.h.

#include "core/inference_mode.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/rand.h>
#include <c10/core/InferenceMode.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "autodiff/curvature.h"
#include "autodiff/grad.h"
#include "autodiff/jacobian.h"
#include "autodiff/jvp.h"
#include "autodiff/vjp.h"
#include "batching/vmap.h"
#include "core/level.h"
#include "core/tensor_operators.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using at::Tensor;

Tensor loss(const Tensor& x) { return (x.tanh() * x.cumsum(0)).sum(); }
Tensor rows(const Tensor& x) { return x.tanh().cumsum(0) * x; }

using Program = std::function<Tensor(const Tensor&)>;

const std::vector<std::pair<std::string, Program>>& programs() {
  static const auto* const all = new std::vector<std::pair<std::string, Program>>{
      {"vmap", [](const Tensor& x) { return vmap(loss)(x); }},
      {"grad", [](const Tensor& x) { return grad(loss)(x[0]); }},
      {"vjp", [](const Tensor& x) { return vjp(rows, x[0]).second(x[1]); }},
      {"jvp", [](const Tensor& x) { return jvp(rows, x[0], x[1]).second; }},
      {"jacrev", [](const Tensor& x) { return jacrev(rows)(x[0]); }},
      {"jacfwd", [](const Tensor& x) { return jacfwd(rows)(x[0]); }},
      {"hessian", [](const Tensor& x) { return hessian(loss)(x[0]); }},
      {"laplacian", [](const Tensor& x) { return laplacian(loss)(x[0]); }},
      {"grad of grad",
       [](const Tensor& x) {
         return grad([](const Tensor& y) { return grad(loss)(y).pow(2).sum(); })(x[0]);
       }},
      {"vmap of grad", [](const Tensor& x) { return vmap(grad(loss))(x); }},
      {"vmap of jvp",
       [](const Tensor& x) {
         return vmap([](const Tensor& y) { return jvp(loss, y, y).second; })(x);
       }},
      {"vmap of hessian", [](const Tensor& x) { return vmap(hessian(loss))(x); }},
      {"grad of vmap",
       [](const Tensor& x) {
         return grad([](const Tensor& y) { return vmap(loss)(y).pow(2).sum(); })(x);
       }},
      {"jvp of vmap of grad",
       [](const Tensor& x) { return jvp(vmap(grad(loss)), x, x.cos()).second; }},
      {"closed over in a vmap",
       [](const Tensor& x) {
         return vmap([](const Tensor& y, const Tensor& w) {
           return grad([&](const Tensor& z) { return (z * w).sin().sum(); })(y);
         })(x, x.flip(0));
       }},
  };
  return *all;
}

TEST(InferenceMode, GivesTheSameNumbers) {
  const Tensor outside = at::rand({3, 4}, at::kDouble);
  for (const auto& [name, program] : programs()) {
    SCOPED_TRACE(name);
    const Tensor expected = program(outside);
    Tensor of_ordinary, of_inference;
    {
      const c10::InferenceMode on;
      of_ordinary = program(outside);
      of_inference = program(outside * 1);
      EXPECT_TRUE(c10::InferenceMode::is_enabled()) << name;
      EXPECT_FALSE(c10::GradMode::is_enabled()) << name;
    }
    EXPECT_TRUE(c10::GradMode::is_enabled()) << name;
    EXPECT_TRUE(of_ordinary.allclose(expected)) << name;
    EXPECT_TRUE(of_inference.allclose(expected)) << name;
    EXPECT_TRUE(program(outside).allclose(expected)) << name;
  }
  EXPECT_TRUE(level_stack().empty());
}

TEST(InferenceMode, GradientsStayOffInAVmap) {
  const c10::InferenceMode on;
  const Tensor x = at::rand({3});
  vmap([](const Tensor& y) {
    EXPECT_FALSE(c10::InferenceMode::is_enabled());
    EXPECT_FALSE(c10::GradMode::is_enabled());
    return y;
  })(x);
}

}  // namespace
}  // namespace torchlift
