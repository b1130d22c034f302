#ifndef TORCHLIFT_BINDINGS_C_CHECK_NAN_H_
#define TORCHLIFT_BINDINGS_C_CHECK_NAN_H_

// File: bindings/_C/check_nan.h
//
// What torchlift/_check_nan.py is made of.

#include "bindings/_C/py_util.h"

namespace torchlift::python {

// Defines NanWatch(inf, skipped): looks for NaNs on this thread until close(), which returns what
// was found, or None. Source lines are those of the innermost frame of a file that has none of the
// strings `skipped` as prefix.
void define_check_nan(py::module_& m);

}  // namespace torchlift::python

#endif  // TORCHLIFT_BINDINGS_C_CHECK_NAN_H_
