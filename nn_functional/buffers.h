#ifndef TORCHLIFT_NN_FUNCTIONAL_BUFFERS_H_
#define TORCHLIFT_NN_FUNCTIONAL_BUFFERS_H_

// File: nn_functional/buffers.h
//
// Buffers as results. A module in training mode writes into its buffers (the running statistics of
// BatchNorm). Under vmap each example writes something else, and a buffer that all examples share
// has no room for it; a functional call that returns its buffers gives the module copies that have.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <string>

namespace torchlift {

// What a functional call returns for a buffer that the module writes into.
enum class BufferMode : uint8_t {
  kPerRow,  // what each example (row of the innermost vmap) wrote
  kShared,  // the mean of that over the rows, or the largest for integers: one buffer for all
  kFrozen,  // what was given
};

// Asks functional_call for the buffers:
//
//   auto [y, buffers] = tl::functional_call(net, state, tl::ReturnBuffers{}, x);
//   auto [y, buffers] = tl::functional_call(net, state, tl::ReturnBuffers{
//       .modes = {{"bn1", tl::BufferMode::kFrozen}}, .others = tl::BufferMode::kShared}, x);
struct ReturnBuffers {
  // By the name of a buffer ("bn1.running_mean") or of a module that holds some ("bn1"). The
  // longest name that fits decides.
  std::map<std::string, BufferMode> modes = {};
  BufferMode others = BufferMode::kPerRow;

  BufferMode mode_of(const std::string& buffer) const;
};

// A copy of t that has room for one value for each example of every vmap that is open on this
// thread. Gradients flow through it.
at::Tensor copy_per_row(const at::Tensor& t);

// The mean of t over the examples of the innermost vmap (integers and bools: the largest). It is
// the same for all of them. t itself where no vmap is open.
at::Tensor share_over_rows(const at::Tensor& t);

}  // namespace torchlift

#endif  // TORCHLIFT_NN_FUNCTIONAL_BUFFERS_H_
