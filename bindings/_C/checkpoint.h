#ifndef TORCHLIFT_BINDINGS_C_CHECKPOINT_H_
#define TORCHLIFT_BINDINGS_C_CHECKPOINT_H_

// File: bindings/_C/checkpoint.h
//
// What torchlift/_checkpoint.py is made of.

#include "bindings/_C/py_util.h"

namespace torchlift::python {

// checkpoint_leaves(f, tensors, keep, names) -> list of tensors. f takes and returns a list; it is
// called now and in backward passes. keep: a CheckpointPolicy::Keep.
PyObject* checkpoint_leaves(PyObject* self, PyObject* const* args, Py_ssize_t count);

// checkpoint_name(tensor, name)
PyObject* checkpoint_name_of(PyObject* self, PyObject* const* args, Py_ssize_t count);

}  // namespace torchlift::python

#endif  // TORCHLIFT_BINDINGS_C_CHECKPOINT_H_
