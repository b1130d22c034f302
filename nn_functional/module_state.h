#ifndef TORCHLIFT_NN_FUNCTIONAL_MODULE_STATE_H_
#define TORCHLIFT_NN_FUNCTIONAL_MODULE_STATE_H_

// File: nn_functional/module_state.h
//
// The parameters and buffers of a torch::nn::Module as values.
//
//   tl::ModuleState state = tl::extract_state(*net);     // {"0.weight": ..., "0.bias": ...}
//   tl::load_state(*net, state);                         // copies them in
//
// A ModuleState is a tree (core/tree.h): it can be mapped over and differentiated.
//
// This header does not include libtorch's modules, which take long to compile. Code that has a
// module has included them: torch/nn/module.h or torch/nn.h.

#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <typeinfo>
#include <vector>

#include "nn_functional/substitution.h"

namespace torch::nn {
class Module;
template <class Contained>
class ModuleHolder;
}  // namespace torch::nn

namespace torchlift {

// Dotted names ("layers.0.weight") to tensors.
using ModuleState = std::map<std::string, at::Tensor>;

enum class StateKind { kParameters, kBuffers, kAll };

// The module's own tensors by name, not copied. One that it holds under several names (a tied
// weight) is there once, under the first.
ModuleState extract_state(const torch::nn::Module& module, StateKind kind = StateKind::kAll);

// Copies the values into the module's tensors of these names, in place and unseen by autograd. With
// strict=false the state may have fewer names. Throws TransformError, before anything is changed,
// if a name is missing (strict) or not the module's, or if its value is of another shape, dtype or
// device.
void load_state(torch::nn::Module& module, const ModuleState& state, bool strict = true);

// How functional_call reads a state.
struct FunctionalOptions {
  // Every parameter and buffer must be given. Names that the module does not have are always
  // errors.
  bool strict = false;
};

// The tensors of a module that a functional call replaces: found once, used in many calls. It holds
// the tensors, not the module. Build it anew when the module's structure changes
// (register_parameter, replace_module) or its tensors' dtype or device (to).
class StateSlots {
 public:
  explicit StateSlots(const torch::nn::Module& module, FunctionalOptions options = {},
                      const char* transform = "functional_call");

  // What to put in place of what; each tensor once, in the order of addresses. Throws
  // TransformError naming the tensor if a name is unknown, given twice or (strict) missing, if two
  // names of one tensor are given different values, or if a value is of another shape, dtype or
  // device than the module's own (whose device may be meta).
  std::vector<Substitution> bind(const std::vector<const ModuleState*>& states) const;
  // The same with values in the order of parameter_names() and buffer_names().
  std::vector<Substitution> bind(const std::vector<at::Tensor>& parameters,
                                 const std::vector<at::Tensor>& buffers) const;

  // In the order of the module's registration, each tensor once.
  std::vector<std::string> parameter_names() const;
  std::vector<std::string> buffer_names() const;
  std::vector<at::Tensor> parameters() const;
  std::vector<at::Tensor> buffers() const;
  std::string module_name() const;

 private:
  struct Slot {
    std::string name;
    at::Tensor own;
    size_t place = 0;  // in distinct_
  };
  class Binder;

  const Slot* find(const std::string& name) const;
  std::vector<std::string> names(const std::vector<size_t>& indices) const;
  std::vector<at::Tensor> tensors(const std::vector<size_t>& indices) const;
  [[noreturn]] void throw_unknown(const std::string& name) const;

  const char* transform_;       // for errors
  const std::type_info* type_;  // of the module; its name takes time to make
  FunctionalOptions options_;
  std::vector<Slot> slots_;         // parameters, then buffers
  std::vector<size_t> parameters_;  // indices into slots_, of the first of each tensor
  std::vector<size_t> buffers_;
  std::vector<size_t> by_name_;       // indices into slots_
  std::vector<at::Tensor> distinct_;  // in the order of addresses
};

}  // namespace torchlift

#endif  // TORCHLIFT_NN_FUNCTIONAL_MODULE_STATE_H_
