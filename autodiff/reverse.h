#ifndef TORCHLIFT_AUTODIFF_REVERSE_H_
#define TORCHLIFT_AUTODIFF_REVERSE_H_

// File: autodiff/reverse.h
//
// One reverse-mode differentiation, below the typed API (autodiff/grad.h, autodiff/vjp.h) and the
// Python one. No level is pushed and nothing is wrapped: the primals alias the inputs, f runs,
// libtorch's engine pulls back. What this file adds to torch::autograd::grad is when a graph is
// kept: see NOTE [who can see the graph].
//
//   ReverseScope scope;
//   at::Tensor p = scope.primal(x);                 // shares memory with x
//   at::Tensor y = f(p);                            // GradMode is on
//   Pullback pullback = scope.finish({y});          // GradMode is as it was
//   at::Tensor value = pullback.outputs()[0];       // what the caller may see of y
//   at::Tensor g = pullback({at::ones_like(y)})[0];

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "core/grad_mode.h"
#include "core/inference_mode.h"
#include "core/level.h"

namespace torchlift {

// What is left of a differentiation when f has run. Copyable; copies share the graph.
class Pullback {
 public:
  // The outputs as the caller may see them: connected to whatever outside of f is differentiated,
  // and to nothing else.
  const std::vector<at::Tensor>& outputs() const;

  // The vector-Jacobian product. cotangents: one per output, of the output's shape and dtype (an
  // undefined one stands for zero; callers check shapes, they know the argument's name). Returns
  // one gradient per primal, of the primal's shape; zeros where the outputs do not depend on it.
  // With free_graph the graph's buffers are released, and the pullback cannot be called again.
  std::vector<at::Tensor> operator()(std::vector<at::Tensor> cotangents,
                                     bool free_graph = false) const;

  // The same by the primals with these numbers alone, in this order. What only the others'
  // gradients need is not computed.
  std::vector<at::Tensor> of_primals(const std::vector<size_t>& numbers,
                                     std::vector<at::Tensor> cotangents,
                                     bool free_graph = false) const;

 private:
  friend class ReverseScope;
  struct State;
  static std::vector<at::Tensor> pulled(const State& state, const std::vector<at::Tensor>& primals,
                                        std::vector<at::Tensor> cotangents, bool free_graph);
  std::shared_ptr<State> state_;
};

// Held while f runs. On this thread only.
class ReverseScope {
 public:
  ReverseScope();
  ~ReverseScope();
  ReverseScope(const ReverseScope&) = delete;
  ReverseScope& operator=(const ReverseScope&) = delete;

  // The tensor to hand to f in place of x, an input that is differentiated. x must be of a floating
  // or complex dtype (callers check: they know the argument's name).
  at::Tensor primal(const at::Tensor& x);

  // Ends f's run. Call it once.
  Pullback finish(const std::vector<at::Tensor>& outputs);

 private:
  Level* level_;
  bool outer_grad_;
  InferenceModeOff inference_off_;
  bool forward_cut_;  // whether no_grad is on in a function under forward mode
  uint64_t first_node_;
  std::vector<at::Tensor> primals_;
  bool primal_tracked_outside_ = false;
  std::optional<OuterGradModeGuard> outer_guard_;
  std::optional<c10::AutoGradMode> grad_guard_;
};

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_REVERSE_H_
