#ifndef TORCHLIFT_CORE_ERROR_H_
#define TORCHLIFT_CORE_ERROR_H_

// File: core/error.h
//
// The exceptions a user can meet. All derive from c10::Error, so code that already catches
// libtorch's errors catches ours, and pybind11 turns them into the Python exception named beside
// each.
//
//   TransformError   bad use of a transform: wrong in_dims, inconsistent sizes, cotangents of
//                    another structure...                                       (ValueError)
//   UnsupportedError the request is sensible but cannot be met: data-dependent control flow under
//                    vmap, an operator without a rule in strict mode...       (RuntimeError)
//
// A message starts with the transform in brackets and ends with the fix:
//
//   throw_transform_error("vmap", "argument 1 has size 3 along dim 0, ... Give all ... the same
//   size.");

#include <c10/util/Exception.h>

#include <string>
#include <string_view>

#include <c10/util/StringUtil.h>

namespace torchlift {

class TransformError : public c10::Error {
  using Error::Error;
};

class UnsupportedError : public c10::Error {
  using Error::Error;
};

// Throws TransformError with the message "[transform] message".
[[noreturn]] void throw_transform_error(std::string_view transform, const std::string& message);

// Throws UnsupportedError with the message "[transform] message".
[[noreturn]] void throw_unsupported_error(std::string_view transform, const std::string& message);

// Concatenates anything printable, so that call sites read as one sentence.
template <class... Parts>
[[noreturn]] void transform_error(std::string_view transform, const Parts&... parts) {
  throw_transform_error(transform, std::string(c10::str(parts...)));
}

template <class... Parts>
[[noreturn]] void unsupported_error(std::string_view transform, const Parts&... parts) {
  throw_unsupported_error(transform, std::string(c10::str(parts...)));
}

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_ERROR_H_
