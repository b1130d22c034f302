#ifndef TORCHLIFT_BATCHING_ROW_SET_H_
#define TORCHLIFT_BATCHING_ROW_SET_H_

// File: batching/row_set.h
//
// Some of the examples of one or several vmap levels, and moving tensors between such sets. What
// control flow that differs from example to example is made of (batching/control_flow.h).
//
// NOTE [rows of several levels]
// Where a condition differs in two nested vmaps, a row is a pair of an example of the outer level
// and one of the inner one. A set of pairs is no rectangle, but tensors are: so each outer example
// that has a row in the set chooses inner examples of its own, and those with fewer than the
// largest number repeat their first one. The work is that of (outer examples with a row) x (the
// largest number of rows of one), and every slot computes what some row of the set asks for, never
// a row outside of it. What the repeated slots compute is not read.
//
//   rows of the set   slots [2, 2]
//   x . x .           (0,0) (0,2)
//   . . . .
//   . x . .           (2,1) (2,1)      the second is a repetition

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "core/level.h"
#include "core/narrow.h"

namespace torchlift {

class RowSet {
 public:
  // All rows of the levels, which are all that levels_of() a condition gives. `device`: where to
  // keep indices. (A level of a jvp has one row.)
  RowSet(std::vector<LevelPtr> levels, c10::Device device);

  // The rows of *this, a set of all, for which mask (one entry a row) is true; at least one.
  RowSet where(const std::vector<bool>& mask) const;

  // Number of rows of the levels, in the set or not.
  int64_t rows() const { return static_cast<int64_t>(positions_.back().size()); }
  // The row in each slot.
  const std::vector<int64_t>& slots() const { return slots_.back(); }
  // The levels that stand for the set: levels of fewer examples, or the levels themselves.
  const std::vector<LevelPtr>& levels() const { return levels_; }

  // The numbers (bools) that a 0-d tensor holds, one for each slot. It has a batch dim in no other
  // level than those of the set.
  std::vector<bool> read(const at::Tensor& t) const;

 private:
  friend class RowScope;
  friend class RowMover;

  RowSet() = default;
  int64_t width(size_t k) const { return levels_[k]->size(); }

  std::vector<LevelPtr> base_;
  std::vector<LevelPtr> levels_;
  c10::Device device_ = c10::Device(c10::kCPU);
  // For the first k + 1 levels: the row (of these levels) in each slot, and for each row the place
  // along level k of the first slot that holds it, -1 for none.
  std::vector<std::vector<int64_t>> slots_;
  std::vector<std::vector<int64_t>> positions_;
};

// While it lives, the levels of this thread are those of the set.
class RowScope {
 public:
  explicit RowScope(const RowSet& set);
  ~RowScope();
  RowScope(const RowScope&) = delete;
  RowScope& operator=(const RowScope&) = delete;

  // See NarrowScope.
  void check_writes(const char* transform) const;

 private:
  std::deque<NarrowScope> scopes_;
};

// Moves tensors to a set from others, which together have all of its rows. To be used where none of
// the sets is open. Recorded by autograd.
class RowMover {
 public:
  RowMover(std::vector<const RowSet*> from, const RowSet& to);

  // One tensor of each set, of the same shape and dtype.
  at::Tensor operator()(std::vector<at::Tensor> sources) const;

 private:
  using MapPtr = std::shared_ptr<const RowMap>;

  MapPtr map_to(const RowSet& to, std::vector<const RowSet*> from, size_t level) const;

  // For each source, the levels of its set...
  std::vector<std::vector<LevelPtr>> levels_;
  // ...and a map for every level but the last, null where there is nothing to do; then
  // the one that puts all together (null where there is nothing to do).
  std::vector<std::vector<MapPtr>> alone_;
  MapPtr together_;
};

// The vmap levels in which t has a batch dim, as they are open on this thread, outermost first.
std::vector<LevelPtr> batched_levels(const at::Tensor& t);

// The levels whose rows a condition decides on, which has a batch dim in these: all that are open
// on this thread from the first of them inwards, but for those of tangents, and those that are no
// domains of the code at work.
std::vector<LevelPtr> levels_of(const std::vector<LevelPtr>& condition);

// The value of a 0-d bool without a batch dim.
bool read_shared(const at::Tensor& t);

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_ROW_SET_H_
