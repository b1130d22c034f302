#ifndef TORCHLIFT_AUTODIFF_STAGES_H_
#define TORCHLIFT_AUTODIFF_STAGES_H_

// File: autodiff/stages.h
//
// The arguments of one call, domain by domain (NOTE [levels] in core/level.h). What functions with
// rules of their own are made of: autodiff/custom_rules.h, autodiff/custom_batching.h. Not for
// users.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "core/domain.h"
#include "core/level.h"

namespace torchlift {

using TensorList = std::vector<at::Tensor>;
using BatchDims = std::vector<std::optional<int64_t>>;

// What the tensors are in one domain: those of `level` itself, which it may differentiate, and
// those of levels around.
struct Stage {
  LevelPtr level;  // null: plain tensors
  TensorList tensors;
  BatchDims bdims;       // in the level; none for those of levels around
  bool grad = false;     // GradMode as this domain sees it
  bool forward = false;  // likewise for forward mode

  int64_t depth() const { return level ? level->depth() : 0; }
  bool owns(const at::Tensor& t) const;
  // Whether the domain differentiates one of the tensors, in reverse and in forward mode.
  bool tracked() const;
  bool dual() const;
  // Whether a tensor differs from example to example.
  bool batched() const;
};

// Tensors as values of a level, each with its batch dim there.
struct LoweredList {
  TensorList values;
  BatchDims bdims;
};
LoweredList lower_all(const TensorList& tensors, const Level& level);

// The stages of these tensors on this thread now, the deepest first. The last one is that of plain
// tensors.
std::vector<Stage> stages_of(TensorList tensors);

// The tensors, with those of a level that is narrowed now at the one that narrows it.
TensorList narrowed(TensorList tensors);

// Whether any domain differentiates one of the tensors.
bool differentiated_anywhere(const TensorList& tensors);

// t as a constant in all domains of at least this depth; on the same memory.
at::Tensor constant_from(const at::Tensor& t, int64_t depth);

// A tensor in a domain (of this depth) without its tangent there. Its graph is kept.
at::Tensor without_tangent(const at::Tensor& t, int64_t depth);

// A value that is about to get a graph, or tangent, of its own. It may be one of `others`, or a
// view.
at::Tensor own_value(const at::Tensor& value, const TensorList& others);

// A tangent, for `primal` of a domain: of its dtype, with all of its batch dims, and no tensor of
// anybody else's.
at::Tensor tangent_for(const at::Tensor& primal, at::Tensor tangent, const TensorList& others);

bool is_differentiable(const at::Tensor& t);
int64_t deepest_of(const TensorList& tensors);

// Versions, to notice writes.
std::vector<uint32_t> versions_of(const TensorList& tensors);

// Held while code works in the domain of this depth, although levels inside of it may be open: what
// it makes belongs to no level inside.
class DomainWork {
 public:
  explicit DomainWork(int64_t depth) : within_(depth + 1), domain_(depth) {}

 private:
  const RuleDepthScope within_;
  const DomainScope domain_;
};

// Opens, on a thread of the autograd engine that has no levels, those that the tensors belong to.
class OpenLevels {
 public:
  explicit OpenLevels(const TensorList& tensors);
  ~OpenLevels();
  OpenLevels(const OpenLevels&) = delete;
  OpenLevels& operator=(const OpenLevels&) = delete;

 private:
  std::vector<std::unique_ptr<LevelScope>> opened_;
};

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_STAGES_H_
