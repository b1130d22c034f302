#ifndef TORCHLIFT_BINDINGS_C_SOURCE_LINE_H_
#define TORCHLIFT_BINDINGS_C_SOURCE_LINE_H_

// File: bindings/_C/source_line.h
//
// Where in the user's Python code this thread is.

#include <string>
#include <vector>

namespace torchlift::python {

// "/home/me/model.py:12, in loss": the line of the innermost frame of a file whose name has none of
// `skipped` as prefix. Empty where there is none, as in a thread of autograd's. Takes the GIL.
std::string line_now(const std::vector<std::string>& skipped);

}  // namespace torchlift::python

#endif  // TORCHLIFT_BINDINGS_C_SOURCE_LINE_H_
