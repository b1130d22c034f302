#ifndef TORCHLIFT_CORE_TESTING_H_
#define TORCHLIFT_CORE_TESTING_H_

// File: core/testing.h
//
// What the tests of all layers share.

#include <ATen/core/Tensor.h>
#include <ATen/ops/allclose.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <string>

#include "core/level.h"

// Tensors of the same shape, equal to within at::allclose's tolerances.
#define EXPECT_CLOSE(a, b)                                             \
  do {                                                                 \
    const at::Tensor close_a = (a), close_b = (b);                     \
    ASSERT_EQ(close_a.sizes(), close_b.sizes());                       \
    EXPECT_TRUE(at::allclose(close_a, close_b)) << close_a << close_b; \
  } while (false)

namespace torchlift {

// The text of the error that f throws, which has to leave the levels as they were.
//
//   EXPECT_THAT(error_of([&] { vmap(f)(x); }), HasSubstr("in_dims"));
//   error_of<TransformError>(f)  // and of this class
template <class Error = c10::Error, class F>
std::string error_of(const F& f) {
  const size_t levels = level_stack().size();
  try {
    f();
  } catch (const Error& error) {
    EXPECT_EQ(level_stack().size(), levels);
    return error.what_without_backtrace();
  }
  ADD_FAILURE() << "nothing was thrown";
  return {};
}

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_TESTING_H_
