#ifndef TORCHLIFT_BINDINGS_C_COMPILE_H_
#define TORCHLIFT_BINDINGS_C_COMPILE_H_

// File: bindings/_C/compile.h
//
// Graphs, and programs that run them, for Python.

#include "bindings/_C/py_util.h"

namespace torchlift::python {

// trace_leaves(call, leaves, names, transform, skipped, devices) -> (Graph, what call returned):
// call is a function of a list of leaves as in bindings/_C/returned.h. The tensors in what it
// returned mean nothing any more. The nodes know the lines of code they come from, but for files
// whose names have one of the strings `skipped` as prefix. devices: None; or one for each leaf,
// which is then taken as a shape on that device (NOTE [tracing by shapes] in
// compile/trace_scope.h).
PyObject* trace_leaves(PyObject* self, PyObject* const* args, Py_ssize_t count);

// Defines the classes Graph and Program.
void define_compile(py::module_& module);

}  // namespace torchlift::python

#endif  // TORCHLIFT_BINDINGS_C_COMPILE_H_
