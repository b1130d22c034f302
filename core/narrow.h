#ifndef TORCHLIFT_CORE_NARROW_H_
#define TORCHLIFT_CORE_NARROW_H_

// File: core/narrow.h
//
// Working on some of the examples of a vmap level: what control flow that differs from example to
// example is made of (batching/control_flow.h).
//
// NOTE [narrowed levels]
// A branch that some examples take, or a loop that some have left, runs at a NarrowedLevel: a level
// of fewer examples, which stands in the place of its base on this thread's stack of levels while a
// NarrowScope is open. Its tensors are LiftedTensors like others. Four things make it the same
// level to the code that runs there:
//
//  - A tensor of the base that meets an operator is brought along: the rows of those examples are
//    read out of it, and that is recorded by autograd. So a function may close over whatever it
//    likes. As an operator must look at the level of its arguments anyway, this costs nothing where
//    no level is narrowed: see Level::usual, and TrackedFinder in core/dispatch.h, whose rare cases
//    these are. It holds for operators of the base's tensors alone, too: what is computed from them
//    is computed for the examples at work and no others, so that a formula that is infinite for the
//    others puts no NaN into their gradients.
//  - It is the same domain. Autograd records from the tensors of one to those of the other, by
//    gather_rows, and a graph with nodes of both is one graph. So the two end together, and share
//    the grad mode of outer domains (NOTE [grad mode of outer domains] in core/grad_mode.h).
//  - Where a level is narrowed, so are all that are open inside of it (if only to all of their
//    examples). For the domain of such a level outlives the scope as well, and has to record what
//    becomes of the values of its tensors: a gradient must be of the rows that its tensor is of.
//  - Nothing may be written into a tensor of the base: it would be written into a copy. That is an
//    error.
//
// A backward pass over nodes of the base may run while the level is narrowed (a gradient inside the
// branch): there a tensor of the base keeps its meaning.

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>

#include <memory>
#include <vector>

#include "core/level.h"

namespace torchlift {

class NarrowedLevel final : public Level {
 public:
  // The examples `rows` of base: a tensor of `size` indices (int64, 1-d), which may itself be a
  // tensor of levels around, whose examples then choose rows of their own. Undefined for all
  // examples, in their order.
  NarrowedLevel(LevelPtr base, int64_t size, at::Tensor rows);

  const LevelPtr& base_ptr() const { return base_ptr_; }
  const at::Tensor& rows() const { return rows_; }
  // Whether autograd was evaluating this node already when the level was opened.
  bool opened_under(const void* node) const { return node == evaluating_; }

 private:
  friend class NarrowScope;
  friend at::Tensor narrow_at(const at::Tensor& t, const LevelPtr& level);

  struct Brought;

  const LevelPtr base_ptr_;
  const at::Tensor rows_;
  // What was brought along while the level is open.
  std::shared_ptr<std::vector<Brought>> brought_;
  const void* evaluating_ = nullptr;
};

using NarrowedLevelPtr = c10::intrusive_ptr<NarrowedLevel>;

// Puts a narrowed level in the place of its base on this thread.
class NarrowScope {
 public:
  explicit NarrowScope(NarrowedLevelPtr level);
  ~NarrowScope();
  NarrowScope(const NarrowScope&) = delete;
  NarrowScope& operator=(const NarrowScope&) = delete;

  // Throws UnsupportedError if the function that ran here wrote into a tensor of the base.
  void check_writes(const char* transform) const;

 private:
  NarrowedLevelPtr level_;
  LevelPtr replaced_;
};

// Where examples come from: row i of `to` is row index[i] of the rows of `from`, one after the
// other. index is as in NarrowedLevel; the levels have the same root.
struct RowMap {
  std::vector<LevelPtr> from;
  LevelPtr to;
  at::Tensor index;
};

// A tensor of map->to from one of each of map->from, of the same shape and dtype. They may also be
// tensors of deeper levels that hold such, or of lower ones (the same for all examples). Recorded
// by autograd and differentiable any number of times, in both modes.
at::Tensor gather_rows(const std::vector<at::Tensor>& sources,
                       const std::shared_ptr<const RowMap>& map);

// Whether t is a tensor of a level that this one narrows.
bool narrows_level_of(const Level& level, const at::Tensor& t);

// t, of a level that this one narrows, at this level; and likewise the values in it.
at::Tensor narrow(const at::Tensor& t, const LevelPtr& level);

// t with the values in it narrowed to this level, if they belong to one that it narrows; all levels
// inside go on as they are.
at::Tensor narrow_at(const at::Tensor& t, const LevelPtr& level);

// The level that operators on tensors of `level` belong to on this thread: the one that stands in
// its place, if any, else itself.
LevelPtr narrowed_now(const LevelPtr& level);

[[noreturn]] void throw_write_outside(const char* op, const at::Tensor& target, const Level& level);

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_NARROW_H_
