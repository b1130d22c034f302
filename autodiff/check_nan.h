#ifndef TORCHLIFT_AUTODIFF_CHECK_NAN_H_
#define TORCHLIFT_AUTODIFF_CHECK_NAN_H_

// File: autodiff/check_nan.h
//
// check_nan: finds the operator that made the first NaN.
//
//   const auto safe = tl::check_nan(tl::vmap(tl::grad(loss)));
//   at::Tensor g = safe(x);      // throws NanFound, or is what vmap(grad(loss)) returns
//
//   [check_nan] aten::log returned NaN, and no argument of it has any.
//     arguments: Double [3]
//     result: Double [3], 2 of 3 elements, the first at [1]
//     where: row 5 of vmap level 1 (size 8)
//     transforms: reverse mode inside vmap level 1 (size 8)
//     pass: forward
//
// It looks at the result of every operator that the function calls, and its transforms and backward
// passes do: check_nan(grad(f)) sees the derivative, grad(check_nan(f)) only f itself. The operator
// that is named is the one that was called (layer_norm, not what it is made of). Examples of a vmap
// are looked at one by one: a NaN that came into one row hides no other row's.
//
// No NaN to be found is one that was there before: in an argument of the function, or a constant
// (fill_(NAN), masked_fill(mask, -INFINITY) where infinities are looked for). Nor is what lies in
// memory that is not initialized yet (at::empty). In a derivative formula of reverse mode, a NaN
// that the formula itself replaces (norm's, at 0) is none.
//
// The function runs to its end, or to its own error, before NanFound is thrown: libtorch's hooks,
// by which operators are seen, cannot stop one. It is for debugging: each operator costs a pass
// over its result, and on a GPU a wait for it. What other threads that the function starts do is
// not seen; those of libtorch's autograd engine are.

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

namespace torchlift {

class NanFound : public c10::Error {
  using Error::Error;
};

struct CheckNanOptions {
  bool inf = false;  // infinities too
};

namespace check_nan_internal {

class Session;

// Looks at the operators of this thread, and of the engine's threads that work for it, from its
// construction to close(). Within another one, it does so in its place.
class Watch {
 public:
  // source: where the code is that calls operators on this thread now ("model.py:12, in loss");
  // empty where that is not known. It may be called with or without the GIL, and on other threads.
  explicit Watch(CheckNanOptions options, std::function<std::string()> source = nullptr);
  ~Watch();
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

  // Stops looking. What was found, for a message. Once.
  std::optional<std::string> close();

 private:
  std::shared_ptr<Session> session_;
  struct Outer;
  std::unique_ptr<Outer> outer_;
};

// Throws NanFound if something was found; after an error of the function, with its text.
void report(const std::optional<std::string>& found, const char* error = nullptr);

template <class F>
auto run(CheckNanOptions options, const F& f) -> std::decay_t<decltype(f())> {
  Watch watch(options);
  try {
    if constexpr (std::is_void_v<decltype(f())>) {
      f();
      report(watch.close());
    } else {
      std::decay_t<decltype(f())> result = f();
      report(watch.close());
      return result;
    }
  } catch (const NanFound&) {
    throw;
  } catch (const c10::Error& error) {
    report(watch.close(), error.what_without_backtrace());
    throw;
  } catch (const std::exception& error) {
    report(watch.close(), error.what());
    throw;
  }
}

}  // namespace check_nan_internal

// f, which throws NanFound if an operator makes a NaN. See the top of this file.
template <class F>
auto check_nan(F&& f, CheckNanOptions options = {}) {
  return [f = std::forward<F>(f), options](const auto&... args) {
    return check_nan_internal::run(options, [&]() -> decltype(auto) { return f(args...); });
  };
}

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_CHECK_NAN_H_
