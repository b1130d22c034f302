#ifndef TORCHLIFT_BINDINGS_C_RETURNED_H_
#define TORCHLIFT_BINDINGS_C_RETURNED_H_

// File: bindings/_C/returned.h
//
// Functions of Python on flat lists of leaves: what differentiates them calls them by this.

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "autodiff/jacobian_blocks.h"
#include "bindings/_C/py_util.h"

namespace torchlift::python {

// What call(inputs) returned: (leaves, count), leaves that are no tensors apart.
class Returned {
 public:
  LeafOutputs operator()(PyObject* call, const std::vector<at::Tensor>& inputs) {
    const py::object result = checked(PyObject_CallOneArg(call, list_of(inputs).ptr()));
    PyObject* leaves = nullptr;
    Py_ssize_t count = 0;
    if (PyArg_ParseTuple(result.ptr(), "O!n", &PyList_Type, &leaves, &count) == 0) {
      throw_python_error();
    }
    leaves_ = borrow(leaves);
    LeafOutputs out;
    out.values = static_cast<size_t>(count);
    all_children(leaves, [&](PyObject* leaf) {
      if (is_tensor(leaf)) out.leaves.push_back(tensor_of(leaf));
      return true;
    });
    return out;
  }

  // The leaves, with these tensors in place of theirs.
  py::object with(const std::vector<at::Tensor>& tensors) const {
    size_t next = 0;
    return map_children(leaves_.ptr(), [&](PyObject* leaf) {
      return is_tensor(leaf) ? wrap(tensors[next++]) : borrow(leaf);
    });
  }

 private:
  py::object leaves_;
};

inline std::optional<int64_t> optional_int(PyObject* number) {
  if (number == Py_None) return std::nullopt;
  const int64_t value = PyLong_AsLongLong(number);
  if (value == -1 && PyErr_Occurred() != nullptr) throw_python_error();
  return value;
}

}  // namespace torchlift::python

#endif  // TORCHLIFT_BINDINGS_C_RETURNED_H_
