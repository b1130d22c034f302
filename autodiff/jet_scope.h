#ifndef TORCHLIFT_AUTODIFF_JET_SCOPE_H_
#define TORCHLIFT_AUTODIFF_JET_SCOPE_H_

// File: autodiff/jet_scope.h
//
// One jet, below the typed API (autodiff/jet.h) and the Python one.
//
//   JetScope scope(/*order=*/3);
//   at::Tensor p = scope.series(x, derivatives);    // x: [5], derivatives: [3, 5]
//   at::Tensor y = f(p);                            // GradMode is on
//   JetOutput out = scope.finish({y})[0];           // {y, its derivatives}
//
// NOTE [series as a batch]
// The function runs once, at a level whose batch dim holds the coefficients of Taylor series,
// x^(j) / j! for j = 0..K. What is linear treats all coefficients alike, which is what batching
// rules do; autodiff/jet_interpreter.h does the rest.
//
// A scope of second derivatives in many directions (autodiff/jet_series.h) is given x and the
// directions, [D, ...x's shape]:
//
//   JetScope scope(JetScope::kLaplacian, /*directions=*/5);
//   at::Tensor y = f(scope.series(x, at::eye(5)));
//   at::Tensor laplacian = scope.finish({y})[0].series;

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "autodiff/forward_mode.h"
#include "core/inference_mode.h"
#include "core/interpreter.h"
#include "core/level.h"

namespace torchlift {

struct JetOutput {
  at::Tensor primal;
  // [order, ...]. Of a Laplacian the sum of second derivatives, [...]; of a Hessian all of them,
  // [D, D, ...]. Undefined when the output does not depend on a series.
  at::Tensor series;
};

// Held while f runs. On this thread only.
class JetScope {
 public:
  enum Seconds { kNone, kLaplacian, kHessian };

  explicit JetScope(int64_t order);
  JetScope(Seconds seconds, int64_t directions);
  ~JetScope();
  JetScope(const JetScope&) = delete;
  JetScope& operator=(const JetScope&) = delete;

  // The tensor to hand to f in place of x, whose derivatives 1..order (or directions) are stacked
  // in dim 0.
  at::Tensor series(const at::Tensor& x, const at::Tensor& derivatives) const;
  // An input of f that is constant.
  at::Tensor constant(const at::Tensor& x) const;

  // Ends f's run. Call it once.
  std::vector<JetOutput> finish(const std::vector<at::Tensor>& outputs);

 private:
  JetScope(Seconds seconds, int64_t parts, std::shared_ptr<const Interpreter> interpreter);
  JetOutput lowered(const at::Tensor& output) const;

  const Seconds seconds_;
  const bool outer_grad_;
  InferenceModeOff inference_off_;
  std::optional<LevelScope> level_scope_;
  std::optional<c10::AutoGradMode> grad_guard_;
  std::optional<ForwardModeScope> mode_;
};

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_JET_SCOPE_H_
