#ifndef TORCHLIFT_COMPILE_ARTIFACT_RUNNER_IO_H_
#define TORCHLIFT_COMPILE_ARTIFACT_RUNNER_IO_H_

// File: compile/artifact/runner_io.h
//
// Inputs and outputs of torchlift-run: tensors from and to files.
//
//   const std::vector<at::Tensor> inputs = read_inputs(artifact, {"x.npy", "w.npy"});
//   write_outputs(artifact, program.run(inputs), "out.safetensors");

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "compile/artifact/artifact.h"

namespace torchlift::compile {

// In the order of the graph. Throws TransformError.
std::vector<at::Tensor> read_inputs(const Artifact& artifact,
                                    const std::vector<std::string>& files);

// Numbers that most programs can work with: normal ones, zeros and ones for integers and bools.
// `dims` are sizes of dynamic dims, by name; others have kDefaultDim, or
// the least they may be.
std::vector<at::Tensor> random_inputs(const Artifact& artifact,
                                      const std::map<std::string, int64_t>& dims, uint64_t seed);
inline constexpr int64_t kDefaultDim = 16;

// The names outputs have in files: of the signature, "output" for what has none.
std::vector<std::string> output_names(const Artifact& artifact);

// To a .safetensors file, or else to .npy files in a folder, which is made. Gives the names of the
// files.
std::vector<std::string> write_outputs(const Artifact& artifact,
                                       const std::vector<at::Tensor>& outputs,
                                       const std::string& to);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_ARTIFACT_RUNNER_IO_H_
