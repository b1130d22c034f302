#ifndef TORCHLIFT_CORE_RUNTIME_H_
#define TORCHLIFT_CORE_RUNTIME_H_

// File: core/runtime.h
//
// Start-up: takes the dispatch keys and installs the rules, once a process. Every transform calls
// it, so users need not; loading the library alone changes nothing in libtorch.

#include <string>

namespace torchlift {

// Throws UnsupportedError if this build cannot work here: libtorch is of another version than the
// one it was built for, or another library has taken one of the dispatch keys. Cheap after the
// first call.
void initialize_runtime();

// The libtorch release this build was compiled for ("2.15.0"), and torchlift's own version.
std::string built_for_torch();
std::string version();

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_RUNTIME_H_
