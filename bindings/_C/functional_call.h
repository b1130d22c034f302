#ifndef TORCHLIFT_BINDINGS_C_FUNCTIONAL_CALL_H_
#define TORCHLIFT_BINDINGS_C_FUNCTIONAL_CALL_H_

// File: bindings/_C/functional_call.h
//
// Calling a Python torch.nn.Module with other parameters and buffers than its own.

#include "bindings/_C/py_util.h"

namespace torchlift::python {

// Makes the types ready that stand in the module during a call.
void define_functional_call();

// functional_call(module, dicts, args, kwargs, tie_weights) -> result, or NotImplemented for a
// module that does not keep its state in plain dicts (a ScriptModule).
//
// dicts: a tuple of dicts from dotted names to tensors. Names the module does not have are errors.
// Other threads see the module as it is; see call_dict.h and call_attribute.h.
PyObject* functional_call(PyObject* self, PyObject* const* args, Py_ssize_t count);

}  // namespace torchlift::python

#endif  // TORCHLIFT_BINDINGS_C_FUNCTIONAL_CALL_H_
