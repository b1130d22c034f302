#ifndef TORCHLIFT_NN_FUNCTIONAL_GHOST_H_
#define TORCHLIFT_NN_FUNCTIONAL_GHOST_H_

// File: nn_functional/ghost.h
//
// What per_sample_grad_norms (nn_functional/per_sample.h) rests on. Not for users.
//
// NOTE [ghost norms]
// The gradient of a linear layer's weight is a sum of outer products g_t a_t^T, of the gradient g
// of its output and its input a, over positions t. Its squared norm is sum_{t,s}
// (g_t.g_s)(a_t.a_s), which needs no matrix of the weight's size (Goodfellow 2015,
// arXiv:1510.01799; for sequences Li et al. 2021, arXiv:2110.05679). Convolutions are the same over
// unfolded patches; for embeddings a_t.a_s is whether two indices agree; the weight of a norm layer
// is small enough to be made.
//
// libtorch's modules have no hooks. But their parameters are substituted where operators take them
// (NOTE [substitution] in nn_functional/substitution.h), and there an observer sees which operator
// uses which parameter: GhostPlan is what it saw for one example. A parameter that a single
// operator uses, once, in a way there is a formula for, is a constant from then on; a tensor of
// zeros, a nudge, is added to that operator's output, and its gradient is g. All other parameters
// are differentiated along with the nudges. So modules written by anybody are covered, as far as
// they call these operators.

#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "nn_functional/module_state.h"
#include "nn_functional/substitution.h"

namespace torchlift::ghost_internal {

// One call of an operator whose parameters' gradients have a formula (in ghost.cc).
struct Site;

class GhostPlan {
 public:
  // params: those to take the norm over. Only the module's tensors of these names are looked at.
  GhostPlan(const StateSlots& slots, const ModuleState& params);

  // Sees one example: while it lives, on this thread. Random generators are as before afterwards.
  class Probe;

  // {the parameters to differentiate, those that sites cover}.
  std::pair<ModuleState, ModuleState> split(const ModuleState& params) const;
  // A tensor of zeros for each site.
  std::vector<at::Tensor> nudges() const;
  // The squared norm of the gradient by all parameters, from the gradients of those that were
  // differentiated and of the nudges, and the inputs of the sites.
  at::Tensor squared_norm(const ModuleState& grads, const std::vector<at::Tensor>& nudge_grads,
                          const std::vector<at::Tensor>& inputs) const;

  // The names of the parameters whose gradients are never made.
  std::vector<std::string> covered() const;

 private:
  friend class GhostRun;

  std::map<const c10::TensorImpl*, std::string> names_;  // of the module's own parameters
  std::shared_ptr<std::vector<Site>> sites_;
};

// Fills the plan while one example runs.
class GhostPlan::Probe : public OperatorObserver {
 public:
  Probe(GhostPlan& plan, at::Device device);
  ~Probe() override;
  Probe(const Probe&) = delete;
  Probe& operator=(const Probe&) = delete;

  void call(const c10::OperatorHandle& op, torch::jit::Stack* stack) override;
  // To be called when the example has run without an exception.
  void finish();

 private:
  GhostPlan& plan_;
  std::map<const c10::TensorImpl*, at::Tensor> transposed_;  // alive, so that addresses stay theirs
  std::map<const c10::TensorImpl*, std::string> names_;      // of parameters and their transposes
  std::map<std::string, int> uses_;  // of parameters; large where no formula
  std::vector<std::pair<at::Device, at::Tensor>> generators_;
  ObserverScope scope_;
};

// Adds the nudges while the function runs.
class GhostRun : public OperatorObserver {
 public:
  GhostRun(const GhostPlan& plan, const std::vector<at::Tensor>& nudges);
  void call(const c10::OperatorHandle& op, torch::jit::Stack* stack) override;
  // Of the sites.
  const std::vector<at::Tensor>& inputs() const { return inputs_; }

 private:
  const GhostPlan& plan_;
  const std::vector<at::Tensor>& nudges_;
  std::map<const c10::TensorImpl*, at::Tensor> transposed_;
  std::map<const c10::TensorImpl*, std::string> names_;
  std::vector<at::Tensor> inputs_;
  ObserverScope scope_;
};

}  // namespace torchlift::ghost_internal

#endif  // TORCHLIFT_NN_FUNCTIONAL_GHOST_H_
