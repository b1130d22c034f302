#ifndef TORCHLIFT_BATCHING_RULES_FOLD_H_
#define TORCHLIFT_BATCHING_RULES_FOLD_H_

// File: batching/rules/fold.h
//
// Rule makers for operators that treat the examples of a leading dim apart already.
//
//   fold_row<at::_ops::avg_pool2d, 4>()     every tensor has 4 dims, N first: the batch dim joins
//   N.
//                                           Tensors of 3 dims (no N) are taken too: the batch dim
//                                           is N
//   planes_row<at::_ops::avg_pool2d, 4>()   as fold_row, of operators that also treat the channels
//                                           apart (dim 1): the batch dim joins N or C, whichever
//                                           it stands before
//   planes_of_shape_row<...>()              the same for gradients of such, which read the shape of
//                                           their second argument, no more
//   leading_row<at::_ops::linalg_det, 2>()  any number of leading dims before the last 2, which
//   broadcast
//                                           between tensors: the batch dim is one more
//
// The rows serve functional operators that return a tensor or a tuple of tensors, all with the
// leading dim.

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/SymIntArrayRef.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>

#include "batching/rules/dims.h"
#include "core/registry.h"

namespace torchlift {
namespace fold_internal {

// What Op::call takes, from what a rule is given for it.
template <class To, class From>
decltype(auto) as_schema(const From& arg) {
  if constexpr (std::is_same_v<To, c10::SymIntArrayRef>) {
    return c10::fromIntArrayRefSlow(arg);
  } else if constexpr (std::is_same_v<To, at::OptionalSymIntArrayRef>) {
    return arg.has_value() ? at::OptionalSymIntArrayRef(c10::fromIntArrayRefSlow(*arg))
                           : at::OptionalSymIntArrayRef();
  } else {
    return (arg);
  }
}

// Some kernels (adaptive_max_pool3d_backward...) read an index tensor from its first element on,
// whatever its strides say: an expanded one would send them out of its memory.
inline at::Tensor for_kernel(const at::Tensor& t) {
  return at::isIntegralType(t.scalar_type(), /*includeBool=*/false) ? t.contiguous() : t;
}

// The batch dim joins dim 0 of a tensor of `rank` dims, or is dim 0 of one with a dim less.
struct IntoFirst {
  int64_t batch;
  int64_t rank;
  int64_t n;  // what dim 0 was; -1 if there was none

  at::Tensor in(const BatchedArg& arg, const char* op) const {
    const int64_t logical = arg.logical_dim();
    TORCH_CHECK(logical == rank || logical == rank - 1, "[vmap] ", op, ": expected a tensor of ",
                rank - 1, " or ", rank, " dimensions, but got shape ",
                at::IntArrayRef(logical_sizes(arg)));
    const at::Tensor value = expanded(arg, batch);
    return for_kernel(logical == rank ? value.flatten(0, 1) : value);
  }
  Batched out(const at::Tensor& result) const {
    if (!result.defined()) return {};
    return {n < 0 ? result : result.unflatten(0, at::IntArrayRef{batch, n}), 0};
  }
};

// The batch dim joins dim 1 of a tensor of `rank` dims.
struct IntoSecond {
  int64_t batch;
  int64_t rank;

  at::Tensor in(const BatchedArg& arg, const char* op) const {
    TORCH_CHECK(arg.logical_dim() == rank, "[vmap] ", op, ": expected a tensor of ", rank,
                " dimensions, but got shape ", at::IntArrayRef(logical_sizes(arg)));
    return for_kernel(merge_dim(expanded(arg, batch), 0, 1));
  }
  Batched out(const at::Tensor& result) const {
    if (!result.defined()) return {};
    return {split_dim(result, 1, batch), 1};
  }
};

// The batch dim stays in front. All tensors get the same number of dims, so that leading dims
// broadcast.
struct InFront {
  int64_t rank;
  int64_t least_rank;

  // The batch dim must not pass for a dim that the operator works on.
  at::Tensor in(const BatchedArg& arg, const char* op) const {
    TORCH_CHECK(arg.logical_dim() >= least_rank, "[vmap] ", op, ": expected a tensor of at least ",
                least_rank, " dimensions, but got shape ", at::IntArrayRef(logical_sizes(arg)));
    return aligned(arg, rank);
  }
  Batched out(const at::Tensor& result) const {
    if (!result.defined()) return {};
    return {result, 0};
  }
};

template <class How, class To, class From>
decltype(auto) prepare(const How& how, const char* op, const From& arg) {
  if constexpr (std::is_same_v<From, BatchedArg>) {
    return arg.value.defined() ? how.in(arg, op) : arg.value;
  } else if constexpr (std::is_same_v<From, std::optional<BatchedArg>>) {
    return arg.has_value() ? std::optional<at::Tensor>(how.in(*arg, op)) : std::nullopt;
  } else {
    return as_schema<To>(arg);
  }
}

template <class How>
Batched restore(const How& how, const at::Tensor& result) {
  return how.out(result);
}

template <class How, class... T>
auto restore(const How& how, const std::tuple<T...>& results) {
  return std::apply([&](const T&... each) { return std::make_tuple(how.out(each)...); }, results);
}

// The first tensor argument decides whether there is an N, and how many dims the others get.
template <class First, class... Rest>
const BatchedArg& first_tensor(const First& first, const Rest&... rest) {
  if constexpr (std::is_same_v<First, BatchedArg>) {
    return first;
  } else {
    return first_tensor(rest...);
  }
}

template <class T>
int64_t rank_of(const T& arg) {
  if constexpr (std::is_same_v<T, BatchedArg>) {
    return arg.value.defined() ? arg.logical_dim() : 0;
  } else {
    return 0;
  }
}

template <class Op, int64_t Rank, class Schema = typename Op::schema>
struct Fold;

template <class Op, int64_t Rank, class R, class... A>
struct Fold<Op, Rank, R(A...)> {
  template <class... L>
  auto operator()(const Level& level, const L&... args) const {
    const BatchedArg& first = first_tensor(args...);
    const int64_t n = first.logical_dim() == Rank ? logical_sizes(first)[0] : -1;
    const IntoFirst how{level.size(), Rank, n};
    return restore(how, Op::call(prepare<IntoFirst, A>(how, Op::name, args)...));
  }
};

// The largest tensor argument decides: it is the one whose copy would cost most.
template <class First, class... Rest>
const BatchedArg* largest_tensor(const BatchedArg* largest, const First& first,
                                 const Rest&... rest) {
  if constexpr (std::is_same_v<First, BatchedArg>) {
    if (first.bdim.has_value() &&
        (largest == nullptr || first.value.numel() > largest->value.numel())) {
      largest = &first;
    }
  }
  if constexpr (sizeof...(Rest) == 0) {
    return largest;
  } else {
    return largest_tensor(largest, rest...);
  }
}

template <class Op, int64_t Rank, class Schema = typename Op::schema>
struct Planes;

template <class Op, int64_t Rank, class R, class... A>
struct Planes<Op, Rank, R(A...)> {
  template <class... L>
  auto operator()(const Level& level, const L&... args) const {
    const BatchedArg* largest = largest_tensor(nullptr, args...);
    const bool before_channels =
        first_tensor(args...).logical_dim() == Rank && largest != nullptr && largest->bdim == 1;
    // A batch of no examples would leave no channels, which kernels refuse.
    if (!before_channels || level.size() == 0) return Fold<Op, Rank>()(level, args...);
    const IntoSecond how{level.size(), Rank};
    return restore(how, Op::call(prepare<IntoSecond, A>(how, Op::name, args)...));
  }
};

// Of an operator that reads no more of its second argument, self, than the shape: the gradients of
// pools. One without a batch dim is not repeated, but stands for its examples without memory.
template <class Op, int64_t Rank>
struct PlanesOfShape {
  template <class... L>
  auto operator()(const Level& level, const BatchedArg& grad, const BatchedArg& self,
                  const L&... rest) const {
    if (self.bdim.has_value() || !grad.bdim.has_value()) {
      return Planes<Op, Rank>()(level, grad, self, rest...);
    }
    c10::SmallVector<int64_t, 6> sizes(self.value.sizes());
    sizes.insert(sizes.begin() + *grad.bdim, level.size());
    // Of zeros: a trace keeps it as a constant, which must not be another one each time.
    const at::Tensor shape = at::zeros({}, self.value.options()).expand(sizes);
    return Planes<Op, Rank>()(level, grad, BatchedArg{shape, grad.bdim}, rest...);
  }
};

template <class Op, int64_t LeastRank, class Schema = typename Op::schema>
struct Leading;

template <class Op, int64_t LeastRank, class R, class... A>
struct Leading<Op, LeastRank, R(A...)> {
  template <class... L>
  auto operator()(const L&... args) const {
    const InFront how{std::max({rank_of(args)...}), LeastRank};
    return restore(how, Op::call(prepare<InFront, A>(how, Op::name, args)...));
  }
};

// A function of exactly the types that the plumbing passes, since it asks for the type of the rule.
template <class How, class... L>
auto fold_rule(const Level& level, L... args) {
  return How{}(level, args...);
}

template <class T>
struct LoweredType {
  using Plain = std::remove_cv_t<std::remove_reference_t<T>>;
  using type = std::conditional_t<
      plumbing_internal::kIsTensor<T>, BatchedArg,
      std::conditional_t<
          plumbing_internal::kIsOptionalTensor<T>, std::optional<BatchedArg>,
          std::conditional_t<
              std::is_same_v<Plain, c10::SymInt>, int64_t,
              std::conditional_t<
                  std::is_same_v<Plain, c10::SymIntArrayRef>, at::IntArrayRef,
                  std::conditional_t<std::is_same_v<Plain, at::OptionalSymIntArrayRef>,
                                     at::OptionalIntArrayRef, Plain>>>>>;
};

template <class Op, class How, class Schema = typename Op::schema>
struct FoldRow;

template <class Op, class How, class R, class... A>
struct FoldRow<Op, How, R(A...)> {
  static RuleEntry make() { return rule<Op, &fold_rule<How, typename LoweredType<A>::type...>>(); }
};

}  // namespace fold_internal

template <class Op, int64_t Rank>
RuleEntry fold_row() {
  return fold_internal::FoldRow<Op, fold_internal::Fold<Op, Rank>>::make();
}

template <class Op, int64_t Rank>
RuleEntry planes_row() {
  return fold_internal::FoldRow<Op, fold_internal::Planes<Op, Rank>>::make();
}

template <class Op, int64_t Rank>
RuleEntry planes_of_shape_row() {
  return fold_internal::FoldRow<Op, fold_internal::PlanesOfShape<Op, Rank>>::make();
}

template <class Op, int64_t LeastRank>
inline constexpr fold_internal::Leading<Op, LeastRank> leading{};

template <class Op, int64_t LeastRank = 2>
RuleEntry leading_row() {
  return rule<Op, leading<Op, LeastRank>>();
}

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_RULES_FOLD_H_
