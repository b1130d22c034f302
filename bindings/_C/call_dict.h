#ifndef TORCHLIFT_BINDINGS_C_CALL_DICT_H_
#define TORCHLIFT_BINDINGS_C_CALL_DICT_H_

// File: bindings/_C/call_dict.h
//
// NOTE [a dict for each thread]
// What functional_call does to a module may be seen by the thread that calls, and by no other: that
// one calls the module itself meanwhile, trains it, or is in a functional_call with other tensors.
// So module._parameters (and _buffers) is, for the duration of the call, a CallDict around the
// module's own dict. A thread that is in a call of the module sees the given tensors in it; all
// else, and everything for all other threads, is the module's own dict, for reading and for
// writing.
//
// A copy of the module for the call would be simpler, but what reaches a submodule other than
// through its parent (a closure, a hook, a list) would go on to see the original.
//
// It is a dict, since torch.nn asks for one, but its own storage is empty: code that reads that,
// past the methods, misses the tensors and fails, where it might otherwise compute with the wrong
// ones.

#include "bindings/_C/calling_thread.h"

namespace torchlift::python {

// The tensors of one call: a dict of those that it replaces.
using CallValues = ThreadValue<py::object>;

// Makes the type ready; throws if Python refuses.
void define_call_dict();

bool is_call_dict(PyObject* object);

// One that stands for nothing yet, and so must not be seen by Python code.
py::object new_call_dict();
void set_own_dict(const py::object& call_dict, const py::object& own);

// The dict that it stands for; `dict` itself where it is no CallDict.
py::object own_dict(const py::object& dict);

// What the calling thread sees. get: null, without an error, where there is nothing of that name.
// The key must be a str.
py::object get_seen(const py::object& dict, PyObject* key);
// As a plain dict, maybe the module's own: to be read only.
py::object all_seen(const py::object& dict);

ThreadValues<py::object>& values_of(PyObject* call_dict);

// Stands in CallValues for what the call has deleted.
PyObject* deleted_mark();

}  // namespace torchlift::python

#endif  // TORCHLIFT_BINDINGS_C_CALL_DICT_H_
