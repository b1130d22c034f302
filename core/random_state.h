#ifndef TORCHLIFT_CORE_RANDOM_STATE_H_
#define TORCHLIFT_CORE_RANDOM_STATE_H_

// File: core/random_state.h
//
// The state of the generators of random numbers, to draw the same ones again.

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <utility>
#include <vector>

namespace torchlift {

// The generators of some devices, as they were.
//
//   const RandomState before({device});
//   at::Tensor first = at::rand({3});
//   before.restore();
//   at::Tensor again = at::rand({3});  // equal to first
class RandomState {
 public:
  // Those of CPU and of these devices. Other devices than CPU and CUDA have none that is known.
  explicit RandomState(const std::vector<c10::Device>& devices);

  // Of the same devices, as they are now.
  RandomState now() const;
  void restore() const;
  bool operator==(const RandomState& other) const;

 private:
  RandomState() = default;
  void save(at::Generator generator);

  std::vector<std::pair<at::Generator, at::Tensor>> states_;
};

// The devices that the values of these tensors lie on.
std::vector<c10::Device> devices_of(const std::vector<at::Tensor>& tensors);

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_RANDOM_STATE_H_
