#ifndef TORCHLIFT_CORE_PROMOTION_H_
#define TORCHLIFT_CORE_PROMOTION_H_

// File: core/promotion.h
//
// NOTE [promotion]
// A tensor that f makes without looking at a batched one has one value for all examples: a lifted
// tensor without a batch dim. The first batched value written into it gives it a batch dim:
//
//   z = torch.zeros(5)       value [5]
//   row = z[2:4]             value [2], a view of the other value
//   z[2] = x[0]              now z has value [B, 5], and row [B, 2], a view of that
//
// That is done to all lifted tensors that share the memory at once, and only if nobody else can see
// it: a tensor from outside of the level, which has one value for all examples by its nature, must
// not get one for each, nor be left behind. Who shares memory is known by counting: the tensors
// that are to be promoted hold so many references to values and to the storage, and if these are
// all there are, no one else holds any. So nothing needs to be known of where a tensor came from,
// and an error is the worst that an unknown holder can cause.
//
// The tensors themselves keep their identity, and their sizes, strides and offset, which are those
// of one example before and after. So what autograd wrote down of them in the level's domain, as
// the views they are, stays true.

#include <ATen/core/Tensor.h>

#include <vector>

#include "core/level.h"
#include "core/lifted_tensor.h"

namespace torchlift {

// Writes down that `view` shares memory with `base`; nothing if either has a batch dim.
void note_view(const at::Tensor& view, const at::Tensor& base);
void note_views(const std::vector<at::Tensor>& views, const at::Tensor& base);

// Gives `target`, a tensor of `level` without a batch dim that `op` is about to write batched
// values into, a batch dim, and all tensors that share its memory with it. Throws when others can
// see that memory.
void promote(const char* op, const at::Tensor& target, const LevelPtr& level);

// What a factory returns to a user's function: `made` as a tensor of every level open on this
// thread, so that it can be promoted at each. `made` itself where no level is open, or where it is
// not a user's function that asks: a rule, or a kernel.
at::Tensor made_inside(at::Tensor made);

// Installs made_inside for the operators that make tensors: see NOTE [factories] in
// core/factory.cc.
void install_factory_kernels();

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_PROMOTION_H_
