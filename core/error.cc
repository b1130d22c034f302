#include "core/error.h"

namespace torchlift {
namespace {

std::string tagged(std::string_view transform, const std::string& message) {
  return c10::str("[", transform, "] ", message);
}

}  // namespace

// The errors carry no C++ backtrace: the message tells the user what to change, and making one is
// slow.
void throw_transform_error(std::string_view transform, const std::string& message) {
  throw TransformError(tagged(transform, message), /*backtrace=*/nullptr);
}

void throw_unsupported_error(std::string_view transform, const std::string& message) {
  throw UnsupportedError(tagged(transform, message), /*backtrace=*/nullptr);
}

}  // namespace torchlift
