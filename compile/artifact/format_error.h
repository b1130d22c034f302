#ifndef TORCHLIFT_COMPILE_ARTIFACT_FORMAT_ERROR_H_
#define TORCHLIFT_COMPILE_ARTIFACT_FORMAT_ERROR_H_

// File: compile/artifact/format_error.h
//
// What is wrong with a file, as the code inside of this folder throws it. Users never see it: the
// public functions know what was done with which file, and put that before it.
//
//   return naming_file("load", path, [&] { return read(FileBytes(path)); });
//   // TransformError: [load] model.tlc: the file ends at byte 80, and should have 4096 bytes.

#include <c10/util/StringUtil.h>

#include <stdexcept>
#include <string>
#include <string_view>

#include "core/error.h"

namespace torchlift::compile {

class FormatError : public std::runtime_error {
  using runtime_error::runtime_error;
};

template <class... Parts>
[[noreturn]] void format_error(const Parts&... parts) {
  throw FormatError(std::string(c10::str(parts...)));
}

// Calls f; what it throws for a bad file becomes a TransformError that names the file, and an
// operator that this libtorch does not have stays an UnsupportedError.
template <class F>
auto naming_file(std::string_view what, const std::string& file, F&& f) {
  try {
    return f();
  } catch (const FormatError& error) {
    transform_error(what, file, ": ", error.what());
  } catch (const UnsupportedError& error) {
    unsupported_error(what, file, ": ", error.what_without_backtrace());
  } catch (const c10::Error& error) {
    transform_error(what, file, ": ", error.what_without_backtrace());
  }
}

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_ARTIFACT_FORMAT_ERROR_H_
