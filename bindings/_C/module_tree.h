#ifndef TORCHLIFT_BINDINGS_C_MODULE_TREE_H_
#define TORCHLIFT_BINDINGS_C_MODULE_TREE_H_

// File: bindings/_C/module_tree.h
//
// The parts of an nn.Module and their tensors, as they were when a graph was made: what
// named_parameters() and named_buffers() take 50 us to list anew.

#include <ATen/core/Tensor.h>

#include <optional>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "bindings/_C/py_util.h"
#include "bindings/_C/tensor_facts.h"

namespace torchlift::python {

class ModuleTree {
 public:
  // Which input of the graph a tensor is.
  using Inputs = std::unordered_map<PyObject*, size_t>;

  // None where it is not as nn.Module makes it: a part keeps its tensors in something else than
  // dicts, or one of them is no input, sparse...
  static std::optional<ModuleTree> of(PyObject* module, const Inputs& inputs);

  // How many of the inputs it gives.
  size_t inputs() const { return inputs_; }

  // Puts the tensors that the module has now in their places. False if it has other parts, another
  // one in training mode, or other tensors than a graph of it was made for. tracked_differ: also if
  // one of them requires a gradient.
  bool take(std::vector<at::Tensor>& inputs, bool tracked_differ) const;

 private:
  struct Entry {
    py::object name;
    PyObject* value = nullptr;  // what None, or a module below, was; null for a tensor
    size_t input = 0;
    bool first = true;  // not a tensor that another place gives, too
    TensorFacts facts;
  };
  struct Registry {  // _parameters, _buffers or _modules
    py::object dict;
    std::vector<Entry> entries;
  };
  struct Part {
    py::object module;
    PyObject* training = nullptr;  // True or False
    std::vector<Registry> registries;
  };

  using Seen = std::unordered_set<PyObject*>;  // modules and tensors

  bool add(PyObject* module, const Inputs& inputs, Seen& seen);
  bool add_tensors(Registry& registry, const Inputs& inputs, Seen& seen);
  static bool take(const Registry& registry, std::vector<at::Tensor>& inputs, bool tracked_differ);

  std::vector<Part> parts_;
  size_t inputs_ = 0;
};

}  // namespace torchlift::python

#endif  // TORCHLIFT_BINDINGS_C_MODULE_TREE_H_
