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

#include <cstddef>
#include <cstdint>
#include <map>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "compile/captured_state.h"
#include "compile/graph.h"
#include "compile/memory_range.h"
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
  using Memory = c10::StorageImpl*;

  // The plain tensor inside of a tensor, and what holds it: null if it is that tensor itself.
  struct Place {
    c10::TensorImpl* plain = nullptr;  // null if it is a value of the trace, or has no memory
    LiftedTensorImpl* holder = nullptr;
    bool recorded = false;  // a value of the trace
    size_t argument = 0;    // of the operator at work

    at::Tensor tensor() const;
    Memory memory() const { return plain->unsafe_storage().unsafeGetStorageImpl(); }
  };

  using Places = c10::SmallVector<Place, 6>;

  // What there is to know of an operator.
  struct Facts {
    explicit Facts(const c10::OperatorHandle& op);

    const size_t arguments, results;
    bool random, asks, changes_shape;
    bool gives_other_memory;            // that of another tensor, or a storage
    bool may_write_silently;            // see writes()
    std::vector<bool> writes_argument;  // by its schema; none if it only changes what a tensor is

    // Batch norms in training mode write into their 4th and 5th argument, which their schemas do
    // not say. The 6th one tells the mode.
    bool writes(const c10::IValue* args, size_t i) const {
      if (may_write_silently && (i == 3 || i == 4) && args[5].isBool()) return args[5].toBool();
      return writes_argument[i];
    }
  };

  const Facts& facts_of(const c10::OperatorHandle& op);
  Place place_of(const at::Tensor& t) const;
  // The storage that stands for all state of this memory, or null.
  Memory state_of(Memory storage) const;
  bool is_state(const Place& place) const { return state_of(place.memory()) != nullptr; }
  void add_state(Memory storage);
  static Memory memory_of(const at::Tensor& plain) {
    return plain.storage().unsafeGetStorageImpl();
  }

  void prepare(const c10::OperatorHandle& op, const Facts& facts, torch::jit::Stack* stack);
  // Before a write into t (Recording::keep_constants).
  void keep_tangents(const at::Tensor& t);
  void note_argument(size_t i, const at::Tensor& t, Places* places);
  void check_asked(const c10::OperatorHandle& op, const Facts& facts, const Places& places) const;
  // Whether it is state from now on.
  bool note_write(const at::Tensor& plain, bool recorded);
  void note_made(const Facts& facts, const torch::jit::Stack& stack);
  void note_made(const at::Tensor& t);
  at::Tensor lifted(const at::Tensor& plain);
  const at::Tensor& base_of(const at::Tensor& plain);
  at::Tensor copied(const at::Tensor& whole) const;
  bool is_held_by_others(const c10::Storage& storage, const Graph& graph) const;

  CapturedState& state_;
  Recording& recording_;
  const LevelPtr level_;
  StateFilter* const around_;                        // of a trace around this one, or null
  OperatorFilter* const shapes_filter_;              // that of a trace by shapes, or null
  std::unordered_map<Memory, Memory> state_memory_;  // what stands for it
  std::map<uintptr_t, Memory> state_ranges_;         // by their ends; none overlap
  std::unordered_map<Memory, at::Tensor> bases_;     // what was met in this run
  std::unordered_map<const c10::FunctionSchema*, Facts> facts_;
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
