#ifndef TORCHLIFT_BATCHING_RULES_REDUCTION_H_
#define TORCHLIFT_BATCHING_RULES_REDUCTION_H_

// File: batching/rules/reduction.h
//
// Rule makers for operators of one tensor that work along dims:
//
//   rule<at::_ops::sum_dim_IntList, reduction<at::_ops::sum_dim_IntList>>()   the dims go: sum,
//   max, norm rule<at::_ops::cumsum, along_dim<at::_ops::cumsum>>()                     the dims
//   stay: cumsum, softmax
//
// In the operator's C++ type the first argument that is an int64_t, an optional of it, or a list of
// them is the dim; for a reduction the first bool behind it is keepdim. Arguments before and behind
// go through as they are. reduction_rows<...>() and along_dim_rows<...>() write table rows.

#include <ATen/core/Tensor.h>
#include <ATen/ops/select.h>
#include <ATen/ops/squeeze.h>
#include <c10/util/SmallVector.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "batching/rules/dims.h"
#include "core/registry.h"

namespace torchlift {

using DimList = c10::SmallVector<int64_t, 6>;

// An argument whose examples have at least one dim: a 0-d example [B] becomes [B, 1], so that there
// is a dim to work along, and the results lose it again (NOTE [0-d examples]).
struct Dimmed {
  at::Tensor value;
  int64_t bdim;
  bool scalar;  // the examples were 0-d

  int64_t physical(int64_t logical) const;
  // All dims but the batch dim.
  DimList all_dims() const;
  // Those that the user names; none named means all.
  DimList physical(at::IntArrayRef logical) const;
};

// `arg` must be batched.
Dimmed dimmed(const BatchedArg& arg);

// NOTE [0-d examples]
// libtorch lets every reduction take dim 0 or -1 of a 0-d tensor. The batch of such examples is 1-d
// and has no dim that could be reduced, so the rules insert one of size 1. With keepdim off it
// disappears in the reduction by itself; an operator that keeps its dims has it selected away.

// Where the batch dim is when `reduced` have gone.
int64_t bdim_after(int64_t bdim, const DimList& reduced);

// The value with the examples flattened: [..., B, ...] -> [B, N].
at::Tensor flattened(const BatchedArg& arg);

// The value [B] with `rank` dims of size 1 behind: what a full reduction with keepdim returns.
at::Tensor with_ones(const at::Tensor& value, int64_t rank);

// Whether autograd records what happens to the value t, outside of the level at work, however far.
bool is_tracked_outside(const at::Tensor& t);

namespace reduction_internal {

template <class T>
inline constexpr bool kIsDim = std::is_same_v<T, int64_t> || std::is_same_v<T, at::IntArrayRef> ||
                               std::is_same_v<T, at::OptionalIntArrayRef>;

// The physical dims for a dim argument; kept alive while the operator runs.
struct Dims {
  const Dimmed& self;
  DimList list;
  bool seen = false;
  bool keepdim = false;
  bool seen_keepdim = false;

  void add(int64_t dim) {
    if (std::exchange(seen, true)) return;
    list.push_back(self.physical(dim));
  }
  void add(at::IntArrayRef dims) {
    if (!std::exchange(seen, true)) list = self.physical(dims);
  }
  void add(const at::OptionalIntArrayRef& dims) {
    if (!std::exchange(seen, true))
      list = dims.has_value() ? self.physical(*dims) : self.all_dims();
  }
  void add(bool flag) {
    if (seen && !std::exchange(seen_keepdim, true)) keepdim = flag;
  }
  template <class T>
  void add(const T& /*not a dim*/) {}
};

// Hands the operator its arguments, with dim and keepdim replaced; used once for each, in order.
struct Replace {
  const Dims& dims;
  bool reduces;
  bool placed = false;
  bool placed_keepdim = false;

  template <class T>
  auto operator()(const T& arg) {
    if constexpr (kIsDim<T>) {
      if (std::exchange(placed, true)) return T(arg);
      if constexpr (std::is_same_v<T, int64_t>) {
        return dims.list[0];
      } else {
        return T(at::IntArrayRef(dims.list));
      }
    } else if constexpr (std::is_same_v<T, bool>) {
      if (!reduces || !placed || std::exchange(placed_keepdim, true)) return arg;
      return arg && !dims.self.scalar;
    } else {
      return arg;
    }
  }
};

inline Batched finish(at::Tensor result, int64_t bdim, bool drop_last) {
  if (drop_last) result = result.select(-1, 0);
  return {std::move(result), bdim};
}

template <class... T>
auto finish(std::tuple<T...> results, int64_t bdim, bool drop_last) {
  return std::apply(
      [&](auto&... each) { return std::make_tuple(finish(std::move(each), bdim, drop_last)...); },
      results);
}

template <class Op, bool kReduces>
struct Rule {
  template <class... A>
  auto operator()(BatchedArg self, const A&... rest) const {
    const Dimmed in = dimmed(self);
    Dims dims{in, {}};
    (dims.add(rest), ...);
    Replace replace{dims, kReduces};
    // Braces fix the order in which the arguments are taken: Replace counts them.
    const std::tuple<const A*...> args{&rest...};
    auto result = std::apply(
        [&](const A*... each) {
          const std::tuple<decltype(replace(*each))...> now{replace(*each)...};
          return std::apply([&](const auto&... a) { return Op::call(in.value, a...); }, now);
        },
        args);
    const bool stays = !kReduces || (dims.keepdim && !in.scalar);
    return finish(std::move(result), stays ? in.bdim : bdim_after(in.bdim, dims.list),
                  in.scalar && !kReduces);
  }
};

// In place, dims stay.
template <class Op>
struct InPlaceRule {
  template <class... A>
  void operator()(BatchedArg self, const A&... rest) const {
    const Dimmed in = dimmed(self);
    Dims dims{in, {}};
    (dims.add(rest), ...);
    Replace replace{dims, /*reduces=*/false};
    at::Tensor target = in.value;
    const std::tuple<const A*...> args{&rest...};
    std::apply(
        [&](const A*... each) {
          const std::tuple<decltype(replace(*each))...> now{replace(*each)...};
          std::apply([&](const auto&... a) { Op::call(target, a...); }, now);
        },
        args);
  }
};

}  // namespace reduction_internal

template <class Op>
inline constexpr reduction_internal::Rule<Op, true> reduction{};
template <class Op>
inline constexpr reduction_internal::Rule<Op, false> along_dim{};
template <class Op>
inline constexpr reduction_internal::InPlaceRule<Op> along_dim_in_place{};

template <class... Ops>
std::vector<RuleEntry> reduction_rows() {
  return {rule<Ops, reduction<Ops>>()...};
}

template <class... Ops>
std::vector<RuleEntry> along_dim_rows() {
  return {rule<Ops, along_dim<Ops>>()...};
}

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_RULES_REDUCTION_H_
