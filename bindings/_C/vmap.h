#ifndef TORCHLIFT_BINDINGS_C_VMAP_H_
#define TORCHLIFT_BINDINGS_C_VMAP_H_

// File: bindings/_C/vmap.h
//
// vmap for Python: the level, lifting and lowering. torchlift/_vmap.py decides what to map and
// words the errors.

#include "bindings/_C/py_util.h"

namespace torchlift::python {

// NOTE [the two paths of a transform]
// *_call takes the user's call as it stands, if all of it is tensors, plain scalars, and exact
// dicts, lists and tuples of such, with dims that fit; else it returns NotImplemented before
// anything has happened, and Python goes the general way: flatten with optree, check, word the
// error, then *_leaves.
//
// What the function returned may still be something only optree knows. Then `finish(output)` is
// called, which returns
//
//   (leaves, dims, unflatten, fail)
//
// leaves: tensors; dims: for each the out_dim, an int or None; unflatten(list) makes the result;
// fail(i, batched) raises the error that out_dim i does not suit leaf i.

// vmap_call(func, in_dims, out_dims, randomness, axis_size, finish, args, chunk_size) -> result or
// NotImplemented, which it also returns where there is more than one chunk.
PyObject* vmap_call(PyObject* self, PyObject* const* args, Py_ssize_t count);

// vmap_leaves(call, size, randomness, leaves, dims, chunks=None) -> result. call(lifted leaves)
// returns what finish does. With chunks, the leaves are those of its current chunk.
PyObject* vmap_leaves(PyObject* self, PyObject* const* args, Py_ssize_t count);

// Adds Chunks, memory_report, RandomRows and RandomRow to the module.
void define_chunks(py::module_& m);

}  // namespace torchlift::python

#endif  // TORCHLIFT_BINDINGS_C_VMAP_H_
