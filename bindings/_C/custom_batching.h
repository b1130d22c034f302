#ifndef TORCHLIFT_BINDINGS_C_CUSTOM_BATCHING_H_
#define TORCHLIFT_BINDINGS_C_CUSTOM_BATCHING_H_

// File: bindings/_C/custom_batching.h
//
// What torchlift/_custom_batching.py is made of.

#include "bindings/_C/py_util.h"

namespace torchlift::python {

// custom_batching_leaves(value, rule, tensors) -> list of tensors. value takes and returns a list;
// rule(size, tensors, batched) returns (tensors, batched), where batched is a list of bools. Both
// are called now and in backward passes.
PyObject* custom_batching_leaves(PyObject* self, PyObject* const* args, Py_ssize_t count);

}  // namespace torchlift::python

#endif  // TORCHLIFT_BINDINGS_C_CUSTOM_BATCHING_H_
