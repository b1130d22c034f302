#include "core/random_state.h"

#include <ATen/Context.h>

#include <algorithm>
#include <cstring>
#include <mutex>

#include "core/lifted_tensor.h"

namespace torchlift {

RandomState::RandomState(const std::vector<c10::Device>& devices) {
  save(at::globalContext().defaultGenerator(c10::kCPU));
  for (auto device = devices.begin(); device != devices.end(); ++device) {
    const bool seen = std::find(devices.begin(), device, *device) != device;
    if (device->is_cuda() && !seen) save(at::globalContext().defaultGenerator(*device));
  }
}

void RandomState::save(at::Generator generator) {
  const std::lock_guard<std::mutex> lock(generator.mutex());
  states_.emplace_back(generator, generator.get_state());
}

RandomState RandomState::now() const {
  RandomState state;
  for (const auto& entry : states_) state.save(entry.first);
  return state;
}

void RandomState::restore() const {
  for (const auto& [generator, state] : states_) {
    at::Generator target = generator;
    const std::lock_guard<std::mutex> lock(target.mutex());
    target.set_state(state);
  }
}

bool RandomState::operator==(const RandomState& other) const {
  const auto same = [](const auto& a, const auto& b) {
    return a.second.nbytes() == b.second.nbytes() &&
           std::memcmp(a.second.const_data_ptr(), b.second.const_data_ptr(), a.second.nbytes()) ==
               0;
  };
  return std::equal(states_.begin(), states_.end(), other.states_.begin(), other.states_.end(),
                    same);
}

std::vector<c10::Device> devices_of(const std::vector<at::Tensor>& tensors) {
  std::vector<c10::Device> devices;
  for (const at::Tensor& t : tensors) {
    if (!t.defined()) continue;
    const at::Tensor* value = &t;
    while (const LiftedTensorImpl* impl = as_lifted(*value)) value = &impl->value();
    if (std::find(devices.begin(), devices.end(), value->device()) == devices.end()) {
      devices.push_back(value->device());
    }
  }
  return devices;
}

}  // namespace torchlift
