#ifndef TORCHLIFT_COMPILE_RECORDING_H_
#define TORCHLIFT_COMPILE_RECORDING_H_

// File: compile/recording.h
//
// What a trace has written down so far. Not for users; see compile/trace_scope.h.
//
// NOTE [frames]
// A branch or a loop body is written into a graph of its own, its frame, while it runs; frames lie
// on top of each other as the calls do. What a frame reads of those below, and every constant,
// becomes an input of its graph: an operand of the node that the frame ends up in. So the values
// that branches close over need no declaration.

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>
#include <c10/util/intrusive_ptr.h>

#include <cstdint>
#include <functional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "compile/graph.h"
#include "core/level.h"
#include "nn_functional/substitution.h"

namespace torchlift::compile {

// A tensor that a frame knows, for as long as it lives.
struct KnownTensor {
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> tensor;
  ValueId id;
};

// The first known tensor of a memory. The memory is not held, but no other has its address.
struct MemoryOwner {
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> tensor;
  c10::weak_intrusive_ptr<c10::StorageImpl> memory;
  ValueId id;
};

struct Frame {
  // A value of the frame below that is an input here.
  struct Capture {
    ValueId outer;
    ValueId id;
    at::Tensor real;  // what it is in this run
  };

  Graph graph;
  std::vector<Capture> captures;
  std::unordered_map<const c10::TensorImpl*, KnownTensor> known;
  std::unordered_map<const c10::StorageImpl*, MemoryOwner> owners;
  // Values whose memory begins at the start of its storage.
  std::unordered_set<ValueId> spread;
  // The memory of captures, and of what a loop carries, which operators here must not write to.
  std::unordered_set<const c10::StorageImpl*> outside;

  const Capture* find_capture(ValueId outer) const;
};

class Recording {
 public:
  // by_shapes: see NOTE [tracing by shapes] in compile/trace_scope.h.
  Recording(std::string transform, std::function<std::string()> source, bool by_shapes);

  // That of the frame on top.
  Graph& graph() { return top().graph; }
  Frame& top() { return *frames_.back(); }
  const std::string& transform() const { return transform_; }
  std::string source() const { return source_ ? source_() : std::string(); }
  // Whether its tensors are hollow.
  bool by_shapes() const { return by_shapes_; }

  // Values are known by the tensors inside of the level's own ones, [1, ...]: those stay the same
  // where autograd makes another tensor of the level of the same value.
  void know(const at::Tensor& inner, ValueId id) { know_in(top(), inner, id); }
  // The value in the frame on top; an input of it where it belongs to one below.
  ValueId find(const at::Tensor& inner) { return find_in(frames_.size() - 1, inner); }
  ValueId constant(const at::Tensor& t);
  // `inner` is what the level has of t, a constant of the root.
  void know_constant(const at::Tensor& t, const at::Tensor& inner);
  // Constants are asked for by what `replacement` gives for them: itself, or a tensor of the level.
  void replace_constants(std::function<at::Tensor(const at::Tensor&)> replacement) {
    replacement_ = std::move(replacement);
  }
  // Before `memory` is written to by an operator that is not written down, or gives up what shows
  // it: constants that lie there become copies of what they are now, and the graph lets go of it.
  void keep_constants(const c10::StorageImpl* memory);
  // What the graph has in the place of t.
  at::Tensor replaced(const at::Tensor& t) const { return replacement_ ? replacement_(t) : t; }
  ValueId add_value(const at::Tensor& real, const std::string& name);
  void note_spread(ValueId id) { top().spread.insert(id); }
  // Of the next assumption that is written down, in any frame.
  int64_t take_assumption_number() { return assumptions_++; }

  // For a copy in the place of a view (Recorder::note_copy_for_view). The tensors may be of any
  // level. Neither is to be written to as long as the copy lives.
  void note_copy_for_view(const char* op, const at::Tensor& base, const at::Tensor& copy);
  // To be called before something is written: copies that nobody has any more do not matter.
  void forget_dead_copies();
  // Before a write that leaves the version of t as it is.
  void note_silent_write(const at::Tensor& t);
  // Throws if one was written to, or its base.
  void check_copies() const;

 private:
  friend class FrameScope;

  static void know_in(Frame& frame, const at::Tensor& inner, ValueId id);
  ValueId find_in(size_t depth, const at::Tensor& inner);
  ValueId constant_in(size_t depth, const at::Tensor& t);
  // What frame depth - 1 calls `outer` becomes an input of the one above.
  ValueId capture_in(size_t depth, ValueId outer, const at::Tensor& real);
  // kNoValue if it is no view of promoted memory.
  ValueId view_of_owner(Frame& frame, const at::Tensor& inner);
  // A known tensor of the same memory and layout, as x.data is of x; kNoValue if there is none.
  static ValueId alias_of_known(const Frame& frame, const at::Tensor& inner);

  const std::string transform_;
  const std::function<std::string()> source_;
  const bool by_shapes_;
  std::function<at::Tensor(const at::Tensor&)> replacement_;
  Frame root_;
  std::vector<Frame*> frames_;
  std::unordered_map<const c10::TensorImpl*, ValueId> constants_;  // of the root
  // Their places in the root's list, by their memory.
  std::unordered_map<const c10::StorageImpl*, std::vector<size_t>> constants_in_;
  int64_t assumptions_ = 0;

  struct CopyForView {
    std::string op, source;
    c10::weak_intrusive_ptr<c10::StorageImpl> memory, memory_of_base;
    // Version counters of both tensors, in all levels, as they were.
    std::vector<std::pair<c10::VariableVersion, uint32_t>> versions;

    bool written_silently = false;

    bool written() const;
  };
  std::vector<CopyForView> copies_;
};

// While it lives, operators on this thread are those of the trace itself, on plain tensors: neither
// the function's, nor recorded, nor differentiated.
class UnrecordedScope {
 public:
  UnrecordedScope() : within_(1), no_grad_(false) {}
  UnrecordedScope(const UnrecordedScope&) = delete;
  UnrecordedScope& operator=(const UnrecordedScope&) = delete;

 private:
  const UnfilteredScope unseen_;
  const RuleDepthScope within_;
  const c10::AutoGradMode no_grad_;
};

// Operators are written into `frame` while it lives. A frame may be gone on with later.
class FrameScope {
 public:
  FrameScope(Recording& recording, Frame& frame) : recording_(recording) {
    frame.graph.layouts_assumed = recording.by_shapes();
    recording_.frames_.push_back(&frame);
  }
  ~FrameScope() { recording_.frames_.pop_back(); }
  FrameScope(const FrameScope&) = delete;
  FrameScope& operator=(const FrameScope&) = delete;

 private:
  Recording& recording_;
};

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_RECORDING_H_
