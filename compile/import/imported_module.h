#ifndef TORCHLIFT_COMPILE_IMPORT_IMPORTED_MODULE_H_
#define TORCHLIFT_COMPILE_IMPORT_IMPORTED_MODULE_H_

// File: compile/import/imported_module.h
//
// Somebody else's model, out of a file, as a function that can be transformed.
//
//   const tl::ImportedModule model = tl::load_exported("model.pt2");       // torch.export
//   const tl::ImportedModule model = tl::load_torchscript("model.pt");     // TorchScript
//
//   const at::Tensor y = model({x})[0];
//   const auto loss = [&](const tl::ModuleState& params, const at::Tensor& x, const at::Tensor& y)
//   {
//     return at::mse_loss(model(params, {x})[0], y);
//   };
//   const auto per_sample = tl::vmap(tl::grad(loss), {.in_dims = tl::in(tl::kNone, 0, 0)});
//   tl::save(per_sample, "per_sample.tlc", model.parameters(), xs, ys);
//
// inputs    the tensors among the arguments of forward(), in order; those in tuples and the like
//           are given one after the other.
// outputs   the tensors among the results, in order, also of those in tuples, lists and dicts. A
//           number is a tensor without dims; None is left out.
// state     parameters and buffers by name ("0.weight"), none of which requires a gradient. A call
//           uses the module's own where none are given. What the module writes into its buffers is
//           written into those that the call uses; to get them as results instead, also where every
//           example of a vmap has its own, see the call with ReturnBuffers
//           (nn_functional/buffers.h).
//
// It can be copied (copies share the module), and called from several threads and inside of all
// transforms; two calls that write into the same buffers at once are the caller's affair.
//
// Calls throw TransformError for inputs that are not as many as the module takes, or that it was
// not exported for, and for a state with unknown names or other shapes, dtypes or devices.

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "nn_functional/buffers.h"
#include "nn_functional/module_state.h"

namespace torchlift {
namespace compile {

// One tensor of a module's state.
struct ImportedTensor {
  std::vector<std::string> names;  // several for tied weights; the first is that of parameters()
  at::Tensor tensor;
  bool is_parameter = false;
};

// What runs an imported module; one class for each kind of file.
class ImportedCode {
 public:
  ImportedCode() = default;
  ImportedCode(const ImportedCode&) = delete;
  ImportedCode& operator=(const ImportedCode&) = delete;
  virtual ~ImportedCode() = default;

  // One tensor of `state` for each ImportedTensor.
  virtual std::vector<at::Tensor> run(at::ArrayRef<at::Tensor> state,
                                      at::ArrayRef<at::Tensor> inputs) const = 0;
};

}  // namespace compile

class ImportedModule {
 public:
  ImportedModule(std::vector<compile::ImportedTensor> state, std::vector<std::string> input_names,
                 std::shared_ptr<const compile::ImportedCode> code);

  std::vector<at::Tensor> operator()(at::ArrayRef<at::Tensor> inputs) const;
  // With these tensors in the place of the module's.
  std::vector<at::Tensor> operator()(const ModuleState& state,
                                     at::ArrayRef<at::Tensor> inputs) const;
  // {outputs, buffers after the call}; no tensor of the state is written into.
  std::pair<std::vector<at::Tensor>, ModuleState> operator()(const ModuleState& state,
                                                             const ReturnBuffers& wanted,
                                                             at::ArrayRef<at::Tensor> inputs) const;

  // The module's own tensors, not copied.
  ModuleState parameters() const;
  ModuleState buffers() const;
  ModuleState state() const;

  // Of the tensors that a call takes.
  const std::vector<std::string>& input_names() const;

 private:
  struct Contents;
  std::shared_ptr<const Contents> contents_;
};

}  // namespace torchlift

#endif  // TORCHLIFT_COMPILE_IMPORT_IMPORTED_MODULE_H_
