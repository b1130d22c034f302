#ifndef TORCHLIFT_BINDINGS_C_JIT_GUARD_H_
#define TORCHLIFT_BINDINGS_C_JIT_GUARD_H_

// File: bindings/_C/jit_guard.h
//
// The short way from a call of a jit function to its graph.
//
// NOTE [guards of jit]
// Python's way looks a key up (bindings/torchlift/_jit.py): it takes the arguments apart, makes a
// tuple of all that the graph depends on, and hashes it, 8 us a call. A guard holds these facts of
// one graph, and compares a call's arguments with them on the way down, 0.2 us. (For a module,
// whose tensors are inputs, it looks into the dictionaries of its parts.) It knows less than the
// key does: only tuples, lists, dicts, tensors and plain values, and no modes but grad mode. What
// it does not know, or what differs, goes Python's way, which decides. So does a call in which a
// number that the graph assumes is another one (compile/assumptions.h): such a graph has a guard
// while there is no other one for its signature.

#include "bindings/_C/py_util.h"

namespace torchlift::python {

// Defines JitGuard, and what the guards of one function count together:
//
//   counter = JitHits()                     counter.count: how often one of them ran
//   JitGuard.of(args, tensors, module, program, counter)
//                                           of a call with these positional arguments, whose
//                                           tensors, and those of the module (or None), in the
//                                           order of the graph's inputs are `tensors`; program is a
//                                           Program or an Executable. None if it knows none.
//   guard.run(args)                         the program's outputs; None if the call is another
//   guard.hits                              how often it ran
void define_jit_guard(py::module_& module);

}  // namespace torchlift::python

#endif  // TORCHLIFT_BINDINGS_C_JIT_GUARD_H_
