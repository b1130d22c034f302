#ifndef TORCHLIFT_EXAMPLES_PER_SAMPLE_GRADIENTS_TENSOR_FILE_H_
#define TORCHLIFT_EXAMPLES_PER_SAMPLE_GRADIENTS_TENSOR_FILE_H_

// Files of named tensors, as torch.save and torch.load in Python write and read a dict of them.

#include <ATen/core/Tensor.h>

#include <map>
#include <string>

namespace digits {

using NamedTensors = std::map<std::string, at::Tensor>;

// Both throw std::runtime_error if the file cannot be read or written.
NamedTensors load_tensors(const std::string& path);
void save_tensors(const std::string& path, const NamedTensors& tensors);

}  // namespace digits

#endif  // TORCHLIFT_EXAMPLES_PER_SAMPLE_GRADIENTS_TENSOR_FILE_H_
