#ifndef TORCHLIFT_COMPILE_STATE_FILTER_H_
#define TORCHLIFT_COMPILE_STATE_FILTER_H_

// File: compile/state_filter.h
//
// Finds the state of a function while it is traced, and puts tensors of the trace's level in its
// place: NOTE [state] in compile/captured_state.h.

#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/SmallVector.h>
#include <c10/util/intrusive_ptr.h>

#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "compile/captured_state.h"
#include "compile/graph.h"
#include "compile/recording.h"
#include "core/level.h"
#include "core/lifted_tensor.h"
#include "nn_functional/substitution.h"

namespace torchlift::compile {

// On this thread while it lives: for one run of the function.
class StateFilter final : public OperatorFilter {
 public:
  StateFilter(CapturedState& state, Recording& recording, LevelPtr level);
  // Puts back what was written if the run did not finish.
  ~StateFilter() override;
  StateFilter(const StateFilter&) = delete;
  StateFilter& operator=(const StateFilter&) = delete;

  bool call(const c10::OperatorHandle& op, torch::jit::Stack* stack) override;

  // What the graph is to have in the place of t: a tensor of the level if t is state, else t.
  at::Tensor in_place_of(const at::Tensor& t);
  // The function has returned, and its graph is made.
  void finish(const Graph& graph);

 private:
  using Memory = const c10::StorageImpl*;

  // The plain tensor inside of a tensor, and what holds it: null if it is that tensor itself.
  struct Place {
    at::Tensor plain;  // undefined if it is a value of the trace, or has no memory
    LiftedTensorImpl* holder = nullptr;
    bool recorded = false;  // a value of the trace
    size_t argument = 0;    // of the operator at work
  };

  using Places = c10::SmallVector<Place, 6>;

  Place place_of(const at::Tensor& t) const;
  bool is_state(const at::Tensor& plain) const {
    return state_memory_.count(memory_of(plain)) != 0;
  }
  static Memory memory_of(const at::Tensor& plain) {
    return plain.storage().unsafeGetStorageImpl();
  }

  void prepare(const c10::OperatorHandle& op, torch::jit::Stack* stack);
  void check_asked(const c10::OperatorHandle& op, const Places& places) const;
  // Whether it is state from now on.
  bool note_write(const at::Tensor& plain, bool recorded);
  void note_made(const c10::OperatorHandle& op, const torch::jit::Stack& stack);
  at::Tensor lifted(const at::Tensor& plain);
  const at::Tensor& base_of(const at::Tensor& plain);
  at::Tensor copied(const at::Tensor& whole) const;
  bool is_held_by_others(const c10::Storage& storage, const Graph& graph) const;

  CapturedState& state_;
  Recording& recording_;
  const LevelPtr level_;
  StateFilter* const around_;            // of a trace around this one, or null
  OperatorFilter* const shapes_filter_;  // that of a trace by shapes, or null
  std::unordered_set<Memory> state_memory_;
  std::unordered_map<Memory, at::Tensor> bases_;  // what was met in this run
  // Memory that an operator made in this run; weakly, so that nothing else comes to lie there.
  std::unordered_map<Memory, c10::weak_intrusive_ptr<c10::StorageImpl>> made_;
  std::vector<Memory> arguments_;  // of the operator at work
  std::unordered_set<Memory> written_;
  bool busy_ = false;
  bool finished_ = false;
  FilterScope scope_;
};

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_STATE_FILTER_H_
