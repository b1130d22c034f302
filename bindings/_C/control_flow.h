#ifndef TORCHLIFT_BINDINGS_C_CONTROL_FLOW_H_
#define TORCHLIFT_BINDINGS_C_CONTROL_FLOW_H_

// File: bindings/_C/control_flow.h
//
// Branches and loops for Python, on leaves; torchlift/_control_flow.py takes trees apart and checks
// what functions return. The padded operators.

#include "bindings/_C/py_util.h"

namespace torchlift::python {

// cond_leaves(pred, true_call, false_call, leaves) -> leaves; each call takes and returns a list of
// tensors.
PyObject* cond_leaves(PyObject* self, PyObject* const* args, Py_ssize_t count);

// while_leaves(transform, test_call, body_call, leaves) -> leaves
PyObject* while_leaves(PyObject* self, PyObject* const* args, Py_ssize_t count);

// scan_leaves(step_call, carry, xs, length, reverse) -> (carry, ys), lists of tensors; the call
// takes and returns those of a step in one list.
PyObject* scan_leaves(PyObject* self, PyObject* const* args, Py_ssize_t count);

// nonzero, masked_select, unique with a size, as functions of the module.
void define_padded(py::module_& module);

}  // namespace torchlift::python

#endif  // TORCHLIFT_BINDINGS_C_CONTROL_FLOW_H_
