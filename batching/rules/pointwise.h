#ifndef TORCHLIFT_BATCHING_RULES_POINTWISE_H_
#define TORCHLIFT_BATCHING_RULES_POINTWISE_H_

// File: batching/rules/pointwise.h
//
// Rule makers for operators that work element by element and broadcast, whatever their other arguments:
//
//   rule<at::_ops::sin, &pointwise<at::_ops::sin>>()            sin, neg, clamp, gelu, to copies...
//   rule<at::_ops::mul_Tensor, &pointwise<at::_ops::mul_Tensor>>()
//   rule<at::_ops::mul__Tensor, &pointwise<at::_ops::mul__Tensor>>()   in place
//
// The maker is chosen by the operator's C++ type; pointwise_row<Op>() writes the table row.

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "batching/rules/dims.h"
#include "core/registry.h"

namespace torchlift {

// NOTE [type promotion of examples]
// libtorch lets a 0-d tensor promote others only across kinds (int, float, complex). An example that is 0-d
// is 1-d as a value, [B], and would promote fully: float32 [B, 3] * float64 [B] is float32 for the user.
// So a value that is 0-d to the user, of a kind no higher than its partners', takes on their dtype first.
at::Tensor with_promoted_dtype(const BatchedArg& arg, at::ScalarType dtype);

// The dtype of the operands that are not 0-d to the user (Undefined when all or none are).
class DtypeOfDimmed {
 public:
  void add(const BatchedArg& arg);
  void add(const std::optional<BatchedArg>& arg) {
    if (arg.has_value()) add(*arg);
  }
  template <class T>
  void add(const T& /*not a tensor*/) {}

  at::ScalarType dtype() const { return scalars_ ? dtype_ : at::ScalarType::Undefined; }

 private:
  at::ScalarType dtype_ = at::ScalarType::Undefined;
  bool scalars_ = false;
};

class LogicalRank {
 public:
  void add(const BatchedArg& arg) {
    if (arg.value.defined()) rank_ = std::max(rank_, arg.logical_dim());
  }
  void add(const std::optional<BatchedArg>& arg) {
    if (arg.has_value()) add(*arg);
  }
  template <class T>
  void add(const T& /*not a tensor*/) {}
  int64_t rank() const { return rank_; }

 private:
  int64_t rank_ = 0;
};

namespace pointwise_internal {

// What the operator gets for an argument: the value, batch dim first, ranks aligned.
struct Align {
  int64_t rank;
  at::ScalarType dtype;

  at::Tensor operator()(const BatchedArg& arg) const {
    if (!arg.value.defined()) return arg.value;
    if (!arg.bdim || dtype == at::ScalarType::Undefined || arg.logical_dim() != 0) {
      return aligned(arg, rank);
    }
    const at::Tensor cast = with_promoted_dtype(arg, dtype);
    return aligned(BatchedArg{cast, arg.bdim}, rank);
  }
  std::optional<at::Tensor> operator()(const std::optional<BatchedArg>& arg) const {
    return arg.has_value() ? std::optional<at::Tensor>((*this)(*arg)) : std::nullopt;
  }
  template <class T>
  const T& operator()(const T& arg) const {
    return arg;
  }
};

template <class Op, class Schema = typename Op::schema>
struct Pointwise;

// One tensor: the same dims come out.
template <class R, class... Rest>
inline constexpr bool kIsUnary =
    !((plumbing_internal::kIsTensor<Rest> || plumbing_internal::kIsOptionalTensor<Rest>) || ...);

template <class Op, class... A>
Batched call_aligned(const A&... args) {
  LogicalRank rank;
  (rank.add(args), ...);
  DtypeOfDimmed dtype;
  (dtype.add(args), ...);
  const Align align{rank.rank(), dtype.dtype()};
  return {Op::call(align(args)...), 0};
}

// Two tensors: the operands go in as they are when their dims line up.
template <class Op, class... Extra>
Batched call_binary(const BatchedArg& a, const BatchedArg& b, const Extra&... extra) {
  if (a.bdim && b.bdim) {
    if (a.bdim == b.bdim && a.value.dim() == b.value.dim()) {
      return {Op::call(a.value, b.value, extra...), a.bdim};
    }
  } else {
    const BatchedArg& batched = a.bdim ? a : b;
    const BatchedArg& other = a.bdim ? b : a;
    // The dims right of the batch dim are enough for the other operand to broadcast into.
    const bool fits = other.value.dim() < batched.value.dim() - *batched.bdim;
    const bool promotes = batched.value.dim() == 1 && other.value.scalar_type() != batched.value.scalar_type();
    if (fits && !promotes) return {Op::call(a.value, b.value, extra...), batched.bdim};
  }
  return call_aligned<Op>(a, b, extra...);
}

template <class Op, class... Rest>
struct Pointwise<Op, at::Tensor(const at::Tensor&, Rest...)> {
  template <class... A>
  static Batched apply(BatchedArg self, const A&... rest) {
    if constexpr (kIsUnary<at::Tensor, Rest...>) {
      return {Op::call(self.value, rest...), self.bdim};
    } else {
      return binary_or_more(self, rest...);
    }
  }

 private:
  template <class Second, class... More>
  static Batched binary_or_more(const BatchedArg& self, const Second& second,
                                const More&... more) {
    constexpr bool kBinary = std::is_same_v<Second, BatchedArg> &&
                             !(std::is_same_v<More, BatchedArg> || ...) &&
                             !(std::is_same_v<More, std::optional<BatchedArg>> || ...);
    if constexpr (kBinary) {
      return call_binary<Op>(self, second, more...);
    } else {
      return call_aligned<Op>(self, second, more...);
    }
  }
};

// Scalar first: pow(2, x), and the like.
template <class Op, class... Rest>
struct Pointwise<Op, at::Tensor(const at::Scalar&, Rest...)> {
  template <class... A>
  static Batched apply(const at::Scalar& first, const A&... rest) {
    return call_aligned<Op>(first, rest...);
  }
};

// In place: the target's dims decide.
template <class Op, class... Rest>
struct Pointwise<Op, at::Tensor&(at::Tensor&, Rest...)> {
  template <class... A>
  static void apply(BatchedArg self, const A&... rest) {
    if constexpr (kIsUnary<at::Tensor, Rest...>) {
      at::Tensor target = self.value;
      Op::call(target, rest...);
    } else {
      LogicalRank rank;
      rank.add(self);
      (rank.add(rest), ...);
      const Align align{rank.rank(), at::ScalarType::Undefined};
      at::Tensor target = aligned(self, rank.rank());
      Op::call(target, align(rest)...);
    }
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
