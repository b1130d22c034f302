#ifndef TORCHLIFT_COMPILE_ARTIFACT_NPY_H_
#define TORCHLIFT_COMPILE_ARTIFACT_NPY_H_

// File: compile/artifact/npy.h
//
// Reads and writes NumPy's .npy files.
//
//   save_npy(x, "x.npy");                    // numpy.load("x.npy")
//   const at::Tensor x = load_npy("x.npy");
//
// Versions 1 to 3 of the format, C and Fortran order, little endian, every dtype that both NumPy
// and libtorch have. Throw TransformError, which names the file and what is wrong. A file is
// believed in nothing: its header is checked against its length before memory is asked for.

#include <ATen/core/Tensor.h>

#include <string>

namespace torchlift::compile {

// Fortran order gives a tensor with strides of that order.
at::Tensor load_npy(const std::string& path);
// In C order, from any strides and device.
void save_npy(const at::Tensor& tensor, const std::string& path);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_ARTIFACT_NPY_H_
