#ifndef TORCHLIFT_BINDINGS_C_FUNCTION_ROUTE_H_
#define TORCHLIFT_BINDINGS_C_FUNCTION_ROUTE_H_

// File: bindings/_C/function_route.h
//
// What torchlift/_autograd_function.py needs to know of tensors: see NOTE [functions across
// domains] there.

#include "bindings/_C/py_util.h"

namespace torchlift::python {

// function_route(args) -> None, or the GradMode of the next outer domain (a bool), or 2 to 5.
//
// None: torch's own Function.apply does right by these arguments. Otherwise some argument is
// tracked by autograd, or has a tangent, in a domain outside of the one that the function will run
// in, which it cannot see. 2: an argument has a tangent there, and none has a batch dim. 3: no_grad
// is on in a function under forward mode, so the arguments are constants. 4: an argument belongs to
// a level that is narrowed now, and has to go through function_lift first. 5: all arguments are
// plain, and one has a tangent, while a level is open: what the Function's jvp makes must be plain,
// too.
PyObject* function_route(PyObject* self, PyObject* const* args, Py_ssize_t count);

// function_lift(args) -> args, with every tensor one of the deepest level among them.
PyObject* function_lift(PyObject* self, PyObject* const* args, Py_ssize_t count);

// function_forward(forward, args): forward(*args), hidden from the domains outside of every open
// level.
PyObject* function_forward(PyObject* self, PyObject* const* args, Py_ssize_t count);

// function_forward_seen(forward, args): forward(*args), differentiated by the domains outside of
// the deepest level among args.
PyObject* function_forward_seen(PyObject* self, PyObject* const* args, Py_ssize_t count);

// function_outside(call, args): call(), in the domain around the deepest level among args,
// or in that of plain tensors if there is none.
PyObject* function_outside(PyObject* self, PyObject* const* args, Py_ssize_t count);

// lower_lifted(tensor) -> (value, bdim or None, size, randomness) of a lifted tensor
PyObject* lower_lifted(PyObject* self, PyObject* const* args, Py_ssize_t count);

// replace_value(tensor, value): the lifted tensor shows another value of the same shape and bdim.
PyObject* replace_value(PyObject* self, PyObject* const* args, Py_ssize_t count);

}  // namespace torchlift::python

#endif  // TORCHLIFT_BINDINGS_C_FUNCTION_ROUTE_H_
