#ifndef TORCHLIFT_BINDINGS_C_FORWARD_H_
#define TORCHLIFT_BINDINGS_C_FORWARD_H_

// File: bindings/_C/forward.h
//
// Forward mode and Jacobians for Python, on flat lists of tensors; torchlift/_forward.py and
// torchlift/_jacobian.py take trees apart and word the errors.

#include "bindings/_C/py_util.h"

namespace torchlift::python {

// jvp_leaves(call, primals, tangents) -> (outputs, tangents)
//
// call(duals) returns (leaves, count): the first `count` of them are tensors, and differentiated. A
// tangent is None where the output does not depend on the primals. Leaves that are no tensors are
// handed on.
PyObject* jvp_leaves(PyObject* self, PyObject* const* args, Py_ssize_t count);

// jet_leaves(call, primals, series, order) -> (outputs, series)
//
// The same for a jet: each series is [order, ...], or None.
PyObject* jet_leaves(PyObject* self, PyObject* const* args, Py_ssize_t count);

// jacobian_leaves(mode, call, inputs, chunk_size, memory_budget, numbers) -> (blocks, outputs)
//
// mode: 0 reverse, 1 forward, 2 whichever is cheaper. call(inputs) returns (leaves, count).
// numbers: a ComplexNumbers.
// blocks[i][j] has the shape of output i followed by that of input j.
PyObject* jacobian_leaves(PyObject* self, PyObject* const* args, Py_ssize_t count);

// second_leaves(call, inputs, chunk_size, memory_budget) -> rows
//
// The second derivatives of each output along every input number, [numbers, ...its shape].
PyObject* second_leaves(PyObject* self, PyObject* const* args, Py_ssize_t count);

// laplacian_leaves(call, inputs, chunk_size, memory_budget, directions) -> sums
//
// Their sums; or those of the second derivatives along directions, a list with a tensor
// [directions, ...its shape] for each input.
PyObject* laplacian_leaves(PyObject* self, PyObject* const* args, Py_ssize_t count);

}  // namespace torchlift::python

#endif  // TORCHLIFT_BINDINGS_C_FORWARD_H_
