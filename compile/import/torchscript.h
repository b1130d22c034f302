#ifndef TORCHLIFT_COMPILE_IMPORT_TORCHSCRIPT_H_
#define TORCHLIFT_COMPILE_IMPORT_TORCHSCRIPT_H_

// File: compile/import/torchscript.h
//
// What torch.jit.save and ScriptModule.save write, without Python.
//
//   const tl::ImportedModule model = tl::load_torchscript("model.pt");
//   const at::Tensor y = model({x})[0];          // see compile/import/imported_module.h
//
//   // def forward(self, x, lengths: List[int], mask: Optional[Tensor] = None)
//   tl::load_torchscript("model.pt", {.arguments = {{"lengths", std::vector<int64_t>{3, 2}}},
//                                     .inputs = {"x", "mask"}});
//
// The program is walked operator by operator (NOTE [running TorchScript] in
// compile/import/script_program.h), so it may have loops, lists and conditions on numbers; a
// condition on a tensor's numbers works outside of transforms only.
//
// A call keeps nothing in the module but what it writes into buffers: where the program assigns
// another attribute, or appends to a list of the module, the call throws UnsupportedError.
//
// A TorchScript file is a program, which libtorch reads: load files of people you trust. Throws
// TransformError where it cannot be read, UnsupportedError, naming it, for what cannot be run:
// calls of methods through an interface, remote calls, autocast.

#include <ATen/core/ivalue.h>
#include <c10/core/Device.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "compile/import/imported_module.h"

namespace torchlift {

struct TorchScriptOptions {
  std::string method = "forward";
  // Whether the module is in training mode; as in the file by default.
  std::optional<bool> training = {};
  // Where its tensors are to be; as in the file by default.
  std::optional<c10::Device> device = {};
  // Values for arguments that are no tensors, for all calls.
  std::map<std::string, c10::IValue> arguments = {};
  // The arguments that calls give; by default those without a default or a value above.
  std::vector<std::string> inputs = {};
};

ImportedModule load_torchscript(const std::string& path, const TorchScriptOptions& options = {});

}  // namespace torchlift

#endif  // TORCHLIFT_COMPILE_IMPORT_TORCHSCRIPT_H_
