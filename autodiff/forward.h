#ifndef TORCHLIFT_AUTODIFF_FORWARD_H_
#define TORCHLIFT_AUTODIFF_FORWARD_H_

// File: autodiff/forward.h
//
// One forward-mode differentiation, below the typed API (autodiff/jvp.h, autodiff/jacobian.h) and
// the Python one, on libtorch's own forward mode.
//
//   ForwardScope scope;
//   at::Tensor d = scope.dual(x, tangent);          // x, with a tangent
//   at::Tensor y = f(d);                            // GradMode is on
//   ForwardOutput out = scope.finish({y})[0];       // {y, its tangent}
//
// With several directions at once, f runs once and only the tangents are a batch:
//
//   ForwardScope scope(/*directions=*/3);
//   at::Tensor d = scope.dual(x, tangents);         // x: [5], tangents: [3, 5]
//   ForwardOutput out = scope.finish({f(d)})[0];    // out.tangent: [3, ...], out.bdim: 0

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "autodiff/forward_mode.h"
#include "core/grad_mode.h"
#include "core/inference_mode.h"
#include "core/level.h"

namespace torch::autograd {
struct ForwardADLevel;
}

namespace torchlift {

// NOTE [one dual level]
// libtorch has one dual level, for the whole process, and opens it once. A DualLevel shares it. Who
// opens it can use tangents as they are: no other tensor has one, and when the last scope closes
// the level every tangent is gone. Anybody else, a jvp inside a jvp, on another thread, or inside
// the user's own torch.autograd.forward_ad.dual_level, might meet tangents of others, and keeps its
// own apart by a level of ours (ForwardScope).
class DualLevel {
 public:
  DualLevel();
  ~DualLevel();
  DualLevel(const DualLevel&) = delete;
  DualLevel& operator=(const DualLevel&) = delete;

  // Whether nobody else has it open.
  bool first() const { return first_; }

 private:
  bool first_ = false;
  std::shared_ptr<torch::autograd::ForwardADLevel> foreign_;  // opened by somebody else
};

// What f returned, for the caller.
struct ForwardOutput {
  at::Tensor primal;   // without a tangent of this scope
  at::Tensor tangent;  // undefined when the output does not depend on a dual tensor
  // Which dim of tangent holds the directions; none when they all have the same one.
  std::optional<int64_t> bdim;
};

// Held while f runs. On this thread only.
class ForwardScope {
 public:
  // directions: how many tangents each dual tensor has at once; nullopt for a plain one.
  explicit ForwardScope(std::optional<int64_t> directions = std::nullopt);
  ~ForwardScope();
  ForwardScope(const ForwardScope&) = delete;
  ForwardScope& operator=(const ForwardScope&) = delete;

  // The tensor to hand to f in place of x. The tangent has x's shape and dtype (after a first dim
  // for the directions), and must not be used otherwise: in-place operators in f write into it.
  at::Tensor dual(const at::Tensor& x, const at::Tensor& tangent);
  // An input of f that is constant.
  at::Tensor constant(const at::Tensor& x);

  // Ends f's run. Call it once.
  std::vector<ForwardOutput> finish(const std::vector<at::Tensor>& outputs);

 private:
  at::Tensor in_domain(const at::Tensor& x) const;
  void check_output(const at::Tensor& output, std::optional<int64_t> bdim) const;

  bool outer_grad_;
  InferenceModeOff inference_off_;
  DualLevel dual_level_;
  std::optional<LevelScope> level_scope_;
  Level* domain_ = nullptr;  // of f's tensors; null for plain ones
  std::optional<OuterGradModeGuard> outer_guard_;
  std::optional<c10::AutoGradMode> grad_guard_;
  std::optional<at::AutoFwGradMode> forward_guard_;
  std::optional<ForwardModeScope> mode_;
};

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_FORWARD_H_
