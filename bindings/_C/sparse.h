#ifndef TORCHLIFT_BINDINGS_C_SPARSE_H_
#define TORCHLIFT_BINDINGS_C_SPARSE_H_

// File: bindings/_C/sparse.h
//
// Sparsity patterns, colourings and sparse Jacobians for Python, on flat lists of tensors;
// torchlift/_sparse.py takes trees apart. call(inputs) returns (leaves, count), as in
// bindings/_C/forward.h.

#include "bindings/_C/py_util.h"

namespace torchlift::python {

// pattern_leaves(second, call, inputs, chunk_size) -> (pattern, operators taken for dense)
//
// second: of the Hessian.
PyObject* pattern_leaves(PyObject* self, PyObject* const* args, Py_ssize_t count);

// color_pattern(pattern, mode) -> coloring
//
// mode: a ColoringMode. A coloring is a tuple of the fields of torchlift::Coloring.
PyObject* color_pattern(PyObject* self, PyObject* const* args, Py_ssize_t count);

// sparse_leaves(second, call, inputs, coloring, layout, chunk_size, memory_budget) -> tensor
//
// layout: a SparseLayout.
PyObject* sparse_leaves(PyObject* self, PyObject* const* args, Py_ssize_t count);

}  // namespace torchlift::python

#endif  // TORCHLIFT_BINDINGS_C_SPARSE_H_
