#ifndef TORCHLIFT_BATCHING_RULES_POINTWISE_H_
#define TORCHLIFT_BATCHING_RULES_POINTWISE_H_

// File: batching/rules/pointwise.h
//
// Rule makers for operators that work element by element and broadcast, whatever their other
// arguments:
//
//   rule<at::_ops::sin, &pointwise<at::_ops::sin>>()            sin, neg, clamp, gelu, to copies...
//   rule<at::_ops::mul_Tensor, &pointwise<at::_ops::mul_Tensor>>()
//   rule<at::_ops::mul__Tensor, &pointwise<at::_ops::mul__Tensor>>()   in place
//
// The maker is chosen by the operator's C++ type; pointwise_row<Op>() writes the table row.

#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "batching/rules/dims.h"
#include "core/registry.h"

namespace torchlift {

// NOTE [type promotion of examples]
// libtorch lets a 0-d tensor promote others only across kinds (int, float, complex). An example
// that is 0-d is 1-d as a value, [B], and would promote fully: float32 [B, 3] * float64 [B] is
// float32 for the user. So a value that is 0-d to the user, of a kind no higher than its partners',
// takes on their dtype first. And when all are 0-d to the user, one without a batch dim (and not a
// wrapped number) must weigh as much as one with: it gets a dim as well.
namespace pointwise_internal {

template <class F, class T>
void visit_arg(const T& arg, F& f) {
  if constexpr (std::is_same_v<T, BatchedArg>) {
    if (arg.value.defined()) f(arg);
  } else if constexpr (std::is_same_v<T, std::optional<BatchedArg>>) {
    if (arg.has_value() && arg->value.defined()) f(*arg);
  }
}

// Whether the operands can go in as they are: those with a batch dim have it at the same place and
// the same rank, and the others broadcast into the dims right of it.
struct LinedUp {
  const BatchedArg* first = nullptr;
  bool same = true;
  int64_t other_rank = -1;
  bool dtypes_differ = false;
  at::ScalarType dtype = at::ScalarType::Undefined;

  void operator()(const BatchedArg& arg) {
    const at::ScalarType own = arg.value.scalar_type();
    dtypes_differ = dtypes_differ || (dtype != at::ScalarType::Undefined && own != dtype);
    dtype = own;
    if (!arg.bdim) {
      other_rank = std::max(other_rank, arg.value.dim());
    } else if (first == nullptr) {
      first = &arg;
    } else {
      same = same && *arg.bdim == *first->bdim && arg.value.dim() == first->value.dim();
    }
  }

  bool holds() const {
    if (!same || other_rank >= first->value.dim() - *first->bdim) return false;
    // See NOTE [type promotion of examples].
    return other_rank < 0 || first->value.dim() > 1 || !dtypes_differ;
  }
};

// The greatest logical rank, and the dtype of the operands that are not 0-d to the user (Undefined
// when there are none).
struct Common {
  int64_t rank = 0;
  at::ScalarType dtype = at::ScalarType::Undefined;

  void operator()(const BatchedArg& arg) {
    const int64_t own = arg.logical_dim();
    rank = std::max(rank, own);
    if (own == 0) return;
    const at::ScalarType type = arg.value.scalar_type();
    dtype = dtype == at::ScalarType::Undefined ? type : at::promoteTypes(dtype, type);
  }
};

// The value with its batch dim first, dims aligned to the common rank, dtype as promotion wants it.
at::Tensor align(const BatchedArg& arg, const Common& common);

// What the operator gets for an argument.
template <class T>
decltype(auto) aligned_arg(const T& arg, const Common& common) {
  if constexpr (std::is_same_v<T, BatchedArg>) {
    return arg.value.defined() ? align(arg, common) : at::Tensor();
  } else if constexpr (std::is_same_v<T, std::optional<BatchedArg>>) {
    return arg.has_value() ? std::optional<at::Tensor>(align(*arg, common)) : std::nullopt;
  } else {
    return (arg);
  }
}

template <class T>
decltype(auto) raw_arg(const T& arg) {
  if constexpr (std::is_same_v<T, BatchedArg>) {
    return (arg.value);
  } else if constexpr (std::is_same_v<T, std::optional<BatchedArg>>) {
    return arg.has_value() ? std::optional<at::Tensor>(arg->value) : std::nullopt;
  } else {
    return (arg);
  }
}

template <class T>
Batched with_bdim(T result, int64_t bdim) {
  return {std::move(result), bdim};
}
template <class... T>
auto with_bdim(std::tuple<T...> results, int64_t bdim) {
  return std::apply(
      [bdim](auto&... each) {
        return std::make_tuple(Batched{each, bdim}...);
      },
      results);
}

// Calls f, an operator that works element by element, on the values in args.
template <class F, class... A>
auto call_pointwise(const F& f, const A&... args) {
  LinedUp lined;
  (visit_arg(args, lined), ...);
  if (C10_LIKELY(lined.holds())) return with_bdim(f(raw_arg(args)...), *lined.first->bdim);
  Common common;
  (visit_arg(args, common), ...);
  return with_bdim(f(aligned_arg(args, common)...), 0);
}

// NOTE [values below autograd]
// Most operators that a rule calls are on plain values that nobody differentiates, and their way
// through libtorch's autograd kernel ends in the backend's kernel with nothing recorded. It takes
// about as long as all that the plumbing does, so a pointwise operator goes to the backend at once
// where the two are the same: no value has autograd metadata, no key but those of a dense tensor is
// about (no outer level, mode, autocast, conjugate...), and no profiler wants to see the call.
class DirectKeys {
 public:
  void operator()(const at::Tensor& value) {
    c10::TensorImpl* impl = value.unsafeGetTensorImpl();
    keys_ = keys_ | impl->key_set();
    constant_ = constant_ && impl->autograd_meta() == nullptr;
  }

  // The keys to dispatch with; empty where the operator has to be called as usual.
  c10::DispatchKeySet get() const;

 private:
  c10::DispatchKeySet keys_;
  bool constant_ = true;
};

template <class T>
void visit_value(const T& arg, DirectKeys& keys) {
  if constexpr (std::is_same_v<T, at::Tensor>) {
    if (arg.defined()) keys(arg);
  } else if constexpr (std::is_same_v<T, std::optional<at::Tensor>>) {
    if (arg.has_value() && arg->defined()) keys(*arg);
  }
}

// Calls an operator that is not in place.
template <class Op, class... A>
auto call_on_values(const A&... args) {
  DirectKeys direct;
  (visit_value(args, direct), ...);
  const c10::DispatchKeySet keys = direct.get();
  return C10_LIKELY(!keys.empty()) ? Op::redispatch(keys, args...) : Op::call(args...);
}

// Throws the error that libtorch gives when an operand does not broadcast into the target of an
// in-place operator, in the shapes that the user sees.
void check_target_rank(const char* op, const BatchedArg& target, int64_t rank);

template <class Op, class Schema = typename Op::schema>
struct Pointwise;

template <class Op, class R, class... P>
struct Pointwise<Op, R(P...)> {
  template <class... A>
  static auto apply(const A&... args) {
    return call_pointwise([](const auto&... values) { return call_on_values<Op>(values...); },
                          args...);
  }
};

// In place: the target's dims decide.
template <class Op, class... P>
struct Pointwise<Op, at::Tensor&(at::Tensor&, P...)> {
  template <class... A>
  static void apply(const BatchedArg& self, const A&... rest) {
    LinedUp lined;
    lined(self);
    (visit_arg(rest, lined), ...);
    at::Tensor target = self.value;
    if (C10_LIKELY(lined.holds() && lined.first == &self)) {
      Op::call(target, raw_arg(rest)...);
      return;
    }
    Common common;
    common(self);
    (visit_arg(rest, common), ...);
    check_target_rank(Op::name, self, common.rank);
    if (*self.bdim != 0) target = batch_first(self);
    Op::call(target, aligned_arg(rest, common)...);
  }
};

template <class Op>
struct Rule {
  // The plumbing calls this with what core/plumbing.h promises for each argument of Op.
  template <class... A>
  auto operator()(const A&... args) const {
    return Pointwise<Op>::apply(args...);
  }
};

}  // namespace pointwise_internal

// The rule for a pointwise operator, as an object that can be a template argument.
template <class Op>
inline constexpr pointwise_internal::Rule<Op> pointwise{};

// Its table row.
template <class Op>
RuleEntry pointwise_row() {
  return rule<Op, pointwise<Op>>();
}

// A list of rows for a list of operators.
template <class... Ops>
std::vector<RuleEntry> pointwise_rows() {
  return {pointwise_row<Ops>()...};
}

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_RULES_POINTWISE_H_
