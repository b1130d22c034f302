#include "bindings/_C/module_tree.h"

#include <array>
#include <utility>

namespace torchlift::python {
namespace {

// The names of a module's dictionaries, as Python has them; those of tensors first.
constexpr size_t kTensorRegistries = 2;
const std::array<PyObject*, 3>& registry_names() {
  static const std::array<PyObject*, 3> names{PyUnicode_InternFromString("_parameters"),
                                              PyUnicode_InternFromString("_buffers"),
                                              PyUnicode_InternFromString("_modules")};
  return names;
}

PyObject* training_name() {
  static PyObject* const name = PyUnicode_InternFromString("training");
  return name;
}

// The attributes of an object; null if it has no such dict.
PyObject* attributes_of(PyObject* object) {
  PyObject** dict = _PyObject_GetDictPtr(object);
  return dict == nullptr ? nullptr : *dict;
}

// An attribute of the object itself, or null. Borrowed.
PyObject* attribute(PyObject* attributes, PyObject* name) {
  return PyDict_GetItemWithError(attributes, name);
}

}  // namespace

std::optional<ModuleTree> ModuleTree::of(PyObject* module, const Inputs& inputs) {
  ModuleTree tree;
  Seen seen;
  if (!tree.add(module, inputs, seen)) return std::nullopt;
  return tree;
}

bool ModuleTree::add(PyObject* module, const Inputs& inputs, Seen& seen) {
  if (!seen.insert(module).second) return true;
  PyObject* attributes = attributes_of(module);
  if (attributes == nullptr) return false;
  PyObject* training = attribute(attributes, training_name());
  if (training != Py_True && training != Py_False) return false;
  Part part{.module = borrow(module), .training = training, .registries = {}};
  for (PyObject* name : registry_names()) {
    PyObject* dict = attribute(attributes, name);
    if (dict == nullptr || !PyDict_CheckExact(dict)) return false;
    part.registries.push_back({.dict = borrow(dict), .entries = {}});
  }
  for (size_t i = 0; i < kTensorRegistries; ++i) {
    if (!add_tensors(part.registries[i], inputs, seen)) return false;
  }
  std::vector<PyObject*> below;
  Registry& modules = part.registries.back();
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(modules.dict.ptr(), &position, &key, &value)) {
    modules.entries.push_back({.name = borrow(key), .value = value, .facts = {}});
    if (value != Py_None) below.push_back(value);
  }
  parts_.push_back(std::move(part));
  for (PyObject* each : below) {
    if (!add(each, inputs, seen)) return false;
  }
  return true;
}

bool ModuleTree::add_tensors(Registry& registry, const Inputs& inputs, Seen& seen) {
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(registry.dict.ptr(), &position, &key, &value)) {
    Entry entry{.name = borrow(key), .facts = {}};
    if (value == Py_None) {
      entry.value = Py_None;
    } else {
      if (!is_tensor(value) || !TensorFacts::are_known(tensor_of(value))) return false;
      const auto input = inputs.find(value);
      if (input == inputs.end()) return false;
      entry.input = input->second;
      entry.first = seen.insert(value).second;
      entry.facts = TensorFacts::of(tensor_of(value));
      inputs_ += entry.first ? 1 : 0;
    }
    registry.entries.push_back(std::move(entry));
  }
  return true;
}

bool ModuleTree::take(std::vector<at::Tensor>& inputs, bool tracked_differ) const {
  for (const Part& part : parts_) {
    PyObject* attributes = attributes_of(part.module.ptr());
    if (attributes == nullptr) return false;
    if (attribute(attributes, training_name()) != part.training) return false;
    for (size_t i = 0; i < part.registries.size(); ++i) {
      const Registry& registry = part.registries[i];
      if (attribute(attributes, registry_names()[i]) != registry.dict.ptr()) return false;
      if (!take(registry, inputs, tracked_differ)) return false;
    }
  }
  return true;
}

bool ModuleTree::take(const Registry& registry, std::vector<at::Tensor>& inputs,
                      bool tracked_differ) {
  if (PyDict_GET_SIZE(registry.dict.ptr()) != static_cast<Py_ssize_t>(registry.entries.size())) {
    return false;
  }
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (const Entry& entry : registry.entries) {
    if (!PyDict_Next(registry.dict.ptr(), &position, &key, &value)) return false;
    // Names are interned; equal ones that are not go the long way.
    if (key != entry.name.ptr()) return false;
    if (entry.value != nullptr) {
      if (value != entry.value) return false;
      continue;
    }
    if (!is_tensor(value)) return false;
    const at::Tensor& t = tensor_of(value);
    if (!entry.first) {
      if (!inputs[entry.input].is_same(t)) return false;  // no longer one tensor
      continue;
    }
    if (!entry.facts.holds(t) || (tracked_differ && t.requires_grad())) return false;
    inputs[entry.input] = t;
  }
  return true;
}

}  // namespace torchlift::python
