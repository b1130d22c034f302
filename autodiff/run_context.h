#ifndef TORCHLIFT_AUTODIFF_RUN_CONTEXT_H_
#define TORCHLIFT_AUTODIFF_RUN_CONTEXT_H_

// File: autodiff/run_context.h
//
// The state of the thread in which a function runs, to run it there once more, later and maybe on
// another thread: levels, grad modes, autocast. (For random numbers: core/random_state.h.) What
// checkpoint is made of.
//
// NOTE [running again]
// A backward pass may come when the levels that were open have ended (grad outside of vmap), when
// others are open as well (a batch of cotangents), or on a thread of the engine that has none. A
// ContextScope makes the stack of levels what it was. A level that has ended cannot be opened
// again, so one like it takes its place, and the arguments are taken there, by enter(). Only a
// tensor of an ended level that the function closes over stays behind: its use is an error.
//
// Tangents end with their jvp. A context under forward mode knows whether that is still open.

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceType.h>
#include <c10/core/ScalarType.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "core/domain.h"
#include "core/level.h"

namespace torch::autograd {
struct ForwardADLevel;
}

namespace torchlift {

class RunContext {
 public:
  // Of this thread now. The state of random numbers is apart: most functions draw none.
  RunContext();

  // Whether some examples of a level are left out here (NOTE [narrowed levels] in core/narrow.h).
  bool narrowed() const;
  // Whether the jvp around is still the one that was, if there was one.
  bool same_forward_mode() const;
  bool under_forward_mode() const { return forward_; }

 private:
  friend class ContextScope;

  struct Open {
    LevelPtr level;
    OuterGradMode outer_grad;
  };

  std::vector<Open> levels_;
  DomainLimit domain_limit_;
  c10::impl::LocalDispatchKeySet keys_;
  bool grad_mode_;
  bool forward_grad_mode_;
  bool forward_;
  bool reverse_formulas_;
  std::weak_ptr<torch::autograd::ForwardADLevel> dual_level_;
  std::vector<std::pair<c10::DeviceType, c10::ScalarType>> autocast_dtypes_;
};

// This thread is in the context while it lives. Autocast keeps no copies of weights meanwhile:
// whether one was made before would be another graph.
class ContextScope {
 public:
  explicit ContextScope(const RunContext& context);
  ~ContextScope();
  ContextScope(const ContextScope&) = delete;
  ContextScope& operator=(const ContextScope&) = delete;

  // A tensor from the context, at the levels that are open now.
  at::Tensor enter(const at::Tensor& t) const;
  // Whether levels of the context have ended.
  bool has_new_levels() const { return !again_.empty(); }

 private:
  void open_levels(const RunContext& context);
  void put(LevelPtr level);

  std::vector<std::unique_ptr<LevelScope>> pushed_;
  std::vector<LevelPtr> replaced_;
  std::vector<std::pair<LevelPtr, LevelPtr>> again_;  // (a level that has ended, one like it)
  std::vector<std::pair<LevelPtr, OuterGradMode>> outer_grad_;
  std::vector<std::pair<c10::DeviceType, c10::ScalarType>> autocast_dtypes_;
  DomainLimit domain_limit_;
  bool grad_mode_;
  bool forward_grad_mode_;
  bool reverse_formulas_;
  std::optional<c10::impl::ForceDispatchKeyGuard> keys_;
};

// Autocast keeps no copies of weights while it lives.
class NoAutocastCache {
 public:
  NoAutocastCache();
  ~NoAutocastCache();
  NoAutocastCache(const NoAutocastCache&) = delete;
  NoAutocastCache& operator=(const NoAutocastCache&) = delete;

 private:
  bool saved_;
};

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_RUN_CONTEXT_H_
