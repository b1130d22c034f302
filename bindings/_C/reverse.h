#ifndef TORCHLIFT_BINDINGS_C_REVERSE_H_
#define TORCHLIFT_BINDINGS_C_REVERSE_H_

// File: bindings/_C/reverse.h
//
// grad and vjp for Python: the scope of a differentiation, the engine's call without the GIL.
// See NOTE [the two paths of a transform] in bindings/_C/vmap.h.

#include "bindings/_C/py_util.h"

namespace torchlift::python {

// grad_call(func, argnums, has_aux, order, help, args, kwargs) -> result or NotImplemented
//
// argnums: an int or a tuple of ints. order: what is returned, 0 gradients, 1 (value, gradients),
// 2 (gradients, value). help(kind, object): for "loss", raises the error that the function returned
// no scalar; for "aux", flattens a structure that only optree knows and returns (leaves,
// unflatten).
PyObject* grad_call(PyObject* self, PyObject* const* args, Py_ssize_t count);

// grad_leaves(call, leaves) -> (gradients, value, aux leaves)
//
// call(primals) returns (loss, aux leaves); aux leaves that are no tensors are handed on.
PyObject* grad_leaves(PyObject* self, PyObject* const* args, Py_ssize_t count);

// vjp_leaves(call, leaves) -> (output leaves, Pullback). call(primals) returns the output leaves.
PyObject* vjp_leaves(PyObject* self, PyObject* const* args, Py_ssize_t count);

// run_backward(tensors, grads, keep_graph, create_graph, inputs, allow_unused, accumulate)
//   -> gradients or None, or NotImplemented when no tensor is lifted
//
// What torch.autograd.grad and Tensor.backward call, for lifted tensors: see
// torchlift/_autograd.py.
PyObject* run_backward(PyObject* self, PyObject* const* args, Py_ssize_t count);

void define_pullback(py::module_& m);

}  // namespace torchlift::python

#endif  // TORCHLIFT_BINDINGS_C_REVERSE_H_
