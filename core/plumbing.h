#ifndef TORCHLIFT_CORE_PLUMBING_H_
#define TORCHLIFT_CORE_PLUMBING_H_

// File: core/plumbing.h
//
// Turns a batching rule into the front and back kernels of an operator. The plumbing is derived
// from the operator's C++ type (at::_ops::mul_Tensor::schema); rules never see levels.
//
// A rule is a pure function. For each argument of the operator it takes
//
//   at::Tensor                     BatchedArg                 (value, optional bdim); undefined
//   stays so optional<at::Tensor>           std::optional<BatchedArg> TensorList, ITensorListRef
//   const std::vector<Batched>& List<optional<Tensor>>         const
//   std::vector<std::optional<Batched>>& c10::SymInt, SymIntArrayRef    int64_t, at::IntArrayRef
//   (and their optionals) anything else                  as it is
//
// optionally preceded by `const Level&` (for its size), and returns
//
//   at::Tensor                     Batched
//   std::tuple<at::Tensor...>      std::tuple<Batched...>
//   std::vector<at::Tensor>        std::vector<Batched>
//   at::Tensor& (in place)         void; or Batched: the value the target shows from now on
//   (squeeze_) anything else                  as it is
//
// At least one BatchedArg has a bdim; otherwise the plumbing calls the operator on the values by
// itself. For in-place operators the target (the first argument) has a bdim whenever any argument
// has one.
//
//   Batched sin_rule(BatchedArg self) { return {self.value.sin(), self.bdim}; }
//   const RuleSet kRules{rule<at::_ops::sin, &sin_rule>()};
//
// See core/registry.h for RuleSet.

#include <ATen/core/IListRef.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/boxing/impl/boxing.h>
#include <ATen/core/stack.h>
#include <c10/core/SymInt.h>
#include <c10/core/SymIntArrayRef.h>
#include <c10/util/OptionalArrayRef.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/dispatch.h"
#include "core/grad_mode.h"
#include "core/interpreter.h"
#include "core/lifted_tensor.h"
#include "core/promotion.h"

namespace torchlift {

// What a rule returns: a value and the dim that holds the examples, nullopt if all share it.
using Batched = Lowered;

// What a rule takes. Valid only during the call of the rule.
struct BatchedArg {
  const at::Tensor& value;
  std::optional<int64_t> bdim;

  bool batched() const { return bdim.has_value(); }
  // Number of dims that the user's function sees.
  int64_t logical_dim() const { return value.dim() - (bdim ? 1 : 0); }
};

namespace plumbing_internal {

template <class T>
using Bare = std::remove_cv_t<std::remove_reference_t<T>>;

template <class T>
inline constexpr bool kIsTensor = std::is_same_v<Bare<T>, at::Tensor>;
template <class T>
inline constexpr bool kIsOptionalTensor = std::is_same_v<Bare<T>, std::optional<at::Tensor>>;
template <class T>
inline constexpr bool kIsTensorList =
    std::is_same_v<Bare<T>, at::TensorList> || std::is_same_v<Bare<T>, at::ITensorListRef>;
template <class T>
inline constexpr bool kIsOptionalTensorList =
    std::is_same_v<Bare<T>, c10::List<std::optional<at::Tensor>>>;

// Calls f on every defined tensor in an argument.
template <class T, class F>
void visit_tensors(const T& arg, F& f) {
  if constexpr (kIsTensor<T>) {
    if (arg.defined()) f(arg);
  } else if constexpr (kIsOptionalTensor<T>) {
    if (arg.has_value() && arg->defined()) f(*arg);
  } else if constexpr (kIsTensorList<T>) {
    for (const at::Tensor& t : arg) {
      if (t.defined()) f(t);
    }
  } else if constexpr (kIsOptionalTensorList<T>) {
    for (const std::optional<at::Tensor>& t : arg) {
      if (t.has_value() && t->defined()) f(*t);
    }
  }
}

template <class F, class... A>
void visit_all(F& f, const A&... args) {
  (visit_tensors(args, f), ...);
}

// --- hiding: see NOTE [hidden arguments] in core/dispatch.h
// -----------------------------------------

inline at::Tensor hide(const at::Tensor& t, const LevelPtr& level) {
  return t.defined() && needs_hiding(t, *level) ? lift_alias(t, std::nullopt, level) : t;
}

template <class T>
decltype(auto) hidden(const T& arg, const LevelPtr& level) {
  if constexpr (kIsTensor<T>) {
    return hide(arg, level);
  } else if constexpr (kIsOptionalTensor<T>) {
    return arg.has_value() ? std::optional<at::Tensor>(hide(*arg, level)) : std::nullopt;
  } else if constexpr (kIsTensorList<T>) {
    std::vector<at::Tensor> list;
    for (const at::Tensor& t : arg) list.push_back(hide(t, level));
    return list;
  } else if constexpr (kIsOptionalTensorList<T>) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& t : arg) {
      list.push_back(t.has_value() ? std::optional<at::Tensor>(hide(*t, level)) : std::nullopt);
    }
    return list;
  } else {
    return (arg);
  }
}

struct HidingFinder {
  const Level& level;
  bool found = false;
  void operator()(const at::Tensor& t) { found = found || needs_hiding(t, level); }
};

// See NOTE [autograd Functions and outer domains] in core/grad_mode.h.
struct OuterTrackedFinder {
  const Level& level;
  void operator()(const at::Tensor& t) const {
    if (tracked_outside(t)) throw_function_hides_outer_gradient(level);
  }
};

// --- lowering: what a rule gets for an argument
// ------------------------------------------------------

inline BatchedArg lower_arg(const at::Tensor& t, const Level& level) {
  const LiftedTensorImpl* impl = t.defined() ? as_lifted(t) : nullptr;
  if (impl == nullptr || &impl->level() != &level) return {t, std::nullopt};
  return {impl->value(), impl->bdim()};
}

inline Batched lower_owned(const at::Tensor& t, const Level& level) {
  const BatchedArg arg = lower_arg(t, level);
  return {arg.value, arg.bdim};
}

template <class T>
decltype(auto) lowered(const T& arg, const Level& level) {
  if constexpr (kIsTensor<T>) {
    return lower_arg(arg, level);
  } else if constexpr (kIsOptionalTensor<T>) {
    return arg.has_value() && arg->defined() ? std::optional<BatchedArg>(lower_arg(*arg, level))
                                             : std::optional<BatchedArg>();
  } else if constexpr (kIsTensorList<T>) {
    std::vector<Batched> list;
    list.reserve(arg.size());
    for (const at::Tensor& t : arg) list.push_back(lower_owned(t, level));
    return list;
  } else if constexpr (kIsOptionalTensorList<T>) {
    std::vector<std::optional<Batched>> list;
    list.reserve(arg.size());
    for (const std::optional<at::Tensor>& t : arg) {
      list.push_back(t.has_value() && t->defined() ? std::optional<Batched>(lower_owned(*t, level))
                                                   : std::nullopt);
    }
    return list;
  } else if constexpr (std::is_same_v<Bare<T>, c10::SymInt>) {
    return arg.guard_int(__FILE__, __LINE__);
  } else if constexpr (std::is_same_v<Bare<T>, c10::SymIntArrayRef>) {
    return C10_AS_INTARRAYREF_SLOW(arg);
  } else if constexpr (std::is_same_v<Bare<T>, std::optional<c10::SymInt>>) {
    return arg.has_value() ? std::optional<int64_t>(arg->guard_int(__FILE__, __LINE__))
                           : std::nullopt;
  } else if constexpr (std::is_same_v<Bare<T>, c10::OptionalArrayRef<c10::SymInt>>) {
    return arg.has_value() ? at::OptionalIntArrayRef(C10_AS_INTARRAYREF_SLOW(*arg))
                           : at::OptionalIntArrayRef();
  } else {
    return (arg);
  }
}

// The argument with its values in place of lifted tensors, for calling the operator itself.
template <class T>
decltype(auto) unlifted(const T& arg, const Level& level) {
  if constexpr (kIsTensor<T>) {
    return at::Tensor(lower_arg(arg, level).value);
  } else if constexpr (kIsOptionalTensor<T>) {
    return arg.has_value() ? std::optional<at::Tensor>(lower_arg(*arg, level).value) : std::nullopt;
  } else if constexpr (kIsTensorList<T>) {
    std::vector<at::Tensor> list;
    list.reserve(arg.size());
    for (const at::Tensor& t : arg) list.push_back(lower_arg(t, level).value);
    return list;
  } else if constexpr (kIsOptionalTensorList<T>) {
    c10::List<std::optional<at::Tensor>> list;
    list.reserve(arg.size());
    for (const std::optional<at::Tensor>& t : arg) {
      list.push_back(t.has_value() ? std::optional<at::Tensor>(lower_arg(*t, level).value)
                                   : std::nullopt);
    }
    return list;
  } else {
    return (arg);
  }
}

// --- lifting results
// ----------------------------------------------------------------------------------

inline at::Tensor lift_result(Batched result, const LevelPtr& level) {
  if (!result.value.defined()) return {};
  return lift(std::move(result.value), result.bdim, level);
}

// What all examples share.
inline at::Tensor lift_result(at::Tensor result, const LevelPtr& level) {
  return result.defined() ? lift_shared(std::move(result), level) : at::Tensor();
}

template <class... T>
auto lift_result(std::tuple<T...> results, const LevelPtr& level) {
  return std::apply(
      [&](auto&... each) { return std::make_tuple(lift_result(std::move(each), level)...); },
      results);
}

template <class T>
std::vector<at::Tensor> lift_result(std::vector<T> results, const LevelPtr& level) {
  std::vector<at::Tensor> lifted;
  lifted.reserve(results.size());
  for (T& each : results) lifted.push_back(lift_result(std::move(each), level));
  return lifted;
}

template <class T>
T lift_result(T result, const LevelPtr& /*level*/) requires std::is_arithmetic_v<T> ||
    std::is_same_v<T, c10::SymInt> {
  return result;
}

inline void share_version(at::Tensor& view, const at::Tensor& base) {
  if (is_lifted(base) && !base.is_inference()) {
    view.unsafeGetTensorImpl()->set_version_counter(base.unsafeGetTensorImpl()->version_counter());
  }
}

inline void share_version(std::vector<at::Tensor>& views, const at::Tensor& base) {
  for (at::Tensor& view : views) share_version(view, base);
}

inline void note_result(const at::Tensor& view, const at::Tensor& base) { note_view(view, base); }
inline void note_result(const std::vector<at::Tensor>& views, const at::Tensor& base) {
  note_views(views, base);
}

// Whether a rule wants the level (for its size) before the arguments.
template <class F>
inline constexpr bool kTakesLevel = false;
template <class R, class... P>
inline constexpr bool kTakesLevel<R (*)(const Level&, P...)> = true;

template <class F, class... A>
decltype(auto) call_rule(F rule, const Level& level, A&&... args) {
  if constexpr (kTakesLevel<F>) {
    return rule(level, std::forward<A>(args)...);
  } else {
    return rule(std::forward<A>(args)...);
  }
}

template <class First, class... Rest>
First& first_of(First& first, Rest&...) {
  return first;
}

// --- interpreted levels: see core/interpreter.h
// -----------------------------------------------------

// The results of an operator, from the stack. One that writes returns its arguments.
template <class R, class First, class... Rest>
R unboxed(torch::jit::Stack& stack, First& first, Rest&...) {
  if constexpr (std::is_same_v<R, at::Tensor&>) {
    return first;
  } else if constexpr (!std::is_void_v<R>) {
    return c10::impl::PopResult<R>::call(stack);
  }
}

}  // namespace plumbing_internal

// What the plumbing must know of an operator beyond its type.
enum class OpKind {
  kFunctional,
  kInPlace,  // writes its first argument and returns it
  kView,     // the result shares memory with the first argument
  kDomain,   // means something to autograd even where nothing is tracked (_make_dual): always
             // recorded
};

template <class Schema>
inline constexpr OpKind kDefaultKind = OpKind::kFunctional;
template <class... A>
inline constexpr OpKind kDefaultKind<at::Tensor&(at::Tensor&, A...)> = OpKind::kInPlace;

// The kernels of one operator.
template <class Op, auto Rule, OpKind Kind, class Schema = typename Op::schema>
struct Kernel;

template <class Op, auto Rule, OpKind Kind, class R, class... A>
struct Kernel<Op, Rule, Kind, R(A...)> {
  // Registered for the front key.
  static R front(c10::DispatchKeySet keys, A... args) {
    namespace pi = plumbing_internal;
    if (C10_UNLIKELY(below_autograd())) return back(args...);
    LevelFinder finder;
    pi::visit_all(finder, args...);
    const LevelPtr& level = finder.level();
    TrackedFinder found(*level, /*at_front=*/true);
    pi::visit_all(found, args...);
    if constexpr (Kind == OpKind::kInPlace) {
      if (C10_UNLIKELY(!belongs(*level, pi::first_of(args...)))) {
        return write_outside(level, found, args...);
      }
    }
    if (found.tracked() || keys.has_any(c10::autocast_dispatch_keyset) ||
        (Kind == OpKind::kView && records_views()) || Kind == OpKind::kDomain) {
      return record(keys, level, args...);
    }
    return apply(level, found.batched(), args...);
  }

  // Registered for the back key.
  static R back(A... args) {
    namespace pi = plumbing_internal;
    RestoreScope restore;
    LevelFinder finder;
    pi::visit_all(finder, args...);
    const LevelPtr& level = finder.level();
    TrackedFinder found(*level);
    pi::visit_all(found, args...);
    return apply(level, found.batched(), args...);
  }

 private:
  static R record(c10::DispatchKeySet keys, const LevelPtr& level, A... args) {
    namespace pi = plumbing_internal;
    pi::HidingFinder hiding{*level};
    pi::visit_all(hiding, args...);
    FrameScope frame;
    if (C10_LIKELY(!hiding.found)) return Op::redispatch(keys & kRecordKeys, args...);
    return record_hidden(keys & kRecordKeys, level, args...);
  }

  template <class First, class... Rest>
  static R record_hidden(c10::DispatchKeySet keys, const LevelPtr& level, First&& first,
                         Rest&&... rest) {
    namespace pi = plumbing_internal;
    if constexpr (Kind == OpKind::kInPlace) {
      return Op::redispatch(keys, first, pi::hidden(rest, level)...);
    } else {
      return Op::redispatch(keys, pi::hidden(first, level), pi::hidden(rest, level)...);
    }
  }

  static R apply(const LevelPtr& level, bool batched, A... args) {
    if (OuterGradScope::suspicious(*level)) {
      plumbing_internal::OuterTrackedFinder finder{*level};
      plumbing_internal::visit_all(finder, args...);
    }
    const OuterGradScope outer_grad(*level);
    if (C10_UNLIKELY(level->interpreter() != nullptr) && batched) {
      torch::jit::Stack stack = c10::impl::boxArgs<A...>(args...);
      if (interpret(Op::name, Op::overload_name, level, &stack)) {
        return plumbing_internal::unboxed<R>(stack, args...);
      }
    }
    if constexpr (Kind == OpKind::kInPlace) {
      return apply_in_place(level, batched, args...);
    } else {
      return apply_functional(level, batched, args...);
    }
  }

  static R apply_functional(const LevelPtr& level, bool batched, A... args) {
    namespace pi = plumbing_internal;
    R result =
        batched ? pi::lift_result(pi::call_rule(Rule, *level, pi::lowered(args, *level)...), level)
                : pi::lift_result(Op::call(pi::unlifted(args, *level)...), level);
    if constexpr (Kind == OpKind::kView) {
      pi::share_version(result, pi::first_of(args...));
      if (!batched) pi::note_result(result, pi::first_of(args...));
    }
    return result;
  }

  template <class First, class... Rest>
  static R apply_in_place(const LevelPtr& level, bool batched, First& target, Rest&&... rest) {
    namespace pi = plumbing_internal;
    if (C10_UNLIKELY(!belongs(*level, target))) {
      throw_write_to_unbatched(Op::name, target, *level);
    }
    auto* impl = as_lifted(target);
    const WriteScope writing(impl);
    if (!batched) {
      at::Tensor value = impl->value();
      Op::call(value, pi::unlifted(rest, *level)...);
      impl->refresh_metadata();
    } else {
      if (!impl->bdim()) promote(Op::name, target, level);
      write(impl, level, target, rest...);
    }
    return target;
  }

  template <class... Rest>
  static void write(LiftedTensorImpl* impl, const LevelPtr& level, const at::Tensor& target,
                    Rest&&... rest) {
    namespace pi = plumbing_internal;
    using Result = decltype(pi::call_rule(Rule, *level, pi::lowered(target, *level),
                                          pi::lowered(rest, *level)...));
    if constexpr (std::is_same_v<Result, Batched>) {
      Batched shown =
          pi::call_rule(Rule, *level, pi::lowered(target, *level), pi::lowered(rest, *level)...);
      impl->replace_value(std::move(shown.value), shown.bdim);
    } else {
      pi::call_rule(Rule, *level, pi::lowered(target, *level), pi::lowered(rest, *level)...);
    }
  }

  static bool belongs(const Level& level, const at::Tensor& target) {
    const LiftedTensorImpl* impl = as_lifted(target);
    return impl != nullptr && &impl->level() == &level;
  }

  // The target is not a tensor of the level at work. What all examples share can be written into
  // it, but neither values that differ, nor ones that the level's autograd is to see.
  template <class First, class... Rest>
  static R write_outside(const LevelPtr& level, const TrackedFinder& found, First& target,
                         Rest&&... rest) {
    namespace pi = plumbing_internal;
    if (found.batched() || found.tracked()) throw_write_to_unbatched(Op::name, target, *level);
    const OuterGradScope outer_grad(*level);
    Op::call(target, pi::unlifted(rest, *level)...);
    return target;
  }
};

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_PLUMBING_H_
