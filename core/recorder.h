#ifndef TORCHLIFT_CORE_RECORDER_H_
#define TORCHLIFT_CORE_RECORDER_H_

// File: core/recorder.h
//
// NOTE [recording levels]
// An interpreted level (core/interpreter.h) whose interpreter only writes down which operators run.
// It changes nothing of what they mean: its batch dim has size 1 and holds the whole value. So
// functions with rules of their own work at it as they do outside.

//
// Control flow (batching/control_flow.h) whose condition is computed from what is recorded cannot
// take the way that this one run takes. It hands its functions to the recorder, which writes down
// both branches, or the body of a loop.

#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>
#include <vector>

#include "core/interpreter.h"
#include "core/level.h"
#include "core/lifted_tensor.h"

namespace torchlift {

class Recorder : public Interpreter {
 public:
  using Leaves = std::vector<at::Tensor>;
  using Step = std::function<Leaves(const Leaves&)>;
  using Test = std::function<at::Tensor(const Leaves&)>;

  // As cond_leaves and while_leaves of batching/control_flow.h. pred, or what `test` returns, is a
  // bool without dims that has a batch dim at `level`, the recorder's.
  virtual Leaves cond(const LevelPtr& level, const at::Tensor& pred, const Step& true_fn,
                      const Step& false_fn, const Leaves& operands) const = 0;
  virtual Leaves while_loop(const LevelPtr& level, const char* transform, const Test& test,
                            const Step& body, Leaves carry) const = 0;

  // As scan_leaves there. Nothing where it is differentiated inside of what is recorded, and the
  // steps are to be written down one by one.
  virtual std::optional<std::vector<Leaves>> scan(const LevelPtr& level, const Step& step,
                                                  const Leaves& carry, const Leaves& xs,
                                                  bool reverse) const = 0;

  // `copy` stands for the view of `base` that an operator would give, if its place were not
  // computed from what is recorded. Where one of them is written to while the copy
  // lives, the two differ, and the end of the recording throws.
  virtual void note_copy_for_view(const char* op, const at::Tensor& base,
                                  const at::Tensor& copy) const = 0;
};

// The recorder of a level, or null.
inline const Recorder* recorder_of(const Level& level) {
  return dynamic_cast<const Recorder*>(level.interpreter());
}

// Whether the operators on t are written down.
inline bool is_recorded(const at::TensorBase& t) {
  const LiftedTensorImpl* impl = t.defined() ? as_lifted(t) : nullptr;
  return impl != nullptr && recorder_of(impl->level()) != nullptr;
}

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_RECORDER_H_
