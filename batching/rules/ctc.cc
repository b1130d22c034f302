// The connectionist temporal classification loss: the examples join N.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_ctc_loss.h>
#include <ATen/ops/_ctc_loss_backward.h>
#include <ATen/ops/_ctc_loss_backward_ops.h>
#include <ATen/ops/_ctc_loss_ops.h>

#include <vector>

#include "batching/rules/dims.h"
#include "core/registry.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;

constexpr const char* kExpectedProbs =
    "[vmap] ctc_loss: expected log_probs of 3 dimensions, but got shape ";

// NOTE [ctc in one call]
//   log_probs  BTNC -> T(BN)C
//   targets    BNS -> (BN)S, or, where they lie one after the other, BL -> (BL)
//   lengths    those of N, B times; or, as tensors, BN -> (BN)
at::Tensor join_probs(const BatchedArg& log_probs, int64_t size) {
  TORCH_CHECK(log_probs.logical_dim() == 3, kExpectedProbs,
              at::IntArrayRef(logical_sizes(log_probs)));
  return expanded(log_probs, size).transpose(0, 1).flatten(1, 2);
}

at::Tensor split_probs(const at::Tensor& joined, int64_t size) {
  return joined.unflatten(1, at::IntArrayRef({size, joined.size(1) / size})).transpose(0, 1);
}

at::Tensor join_rows(const BatchedArg& arg, int64_t size) {
  return expanded(arg, size).flatten(0, 1).contiguous();
}

at::Tensor split_rows(const at::Tensor& joined, int64_t size) {
  return joined.unflatten(0, at::IntArrayRef({size, joined.size(0) / size}));
}

// The lengths of all examples: integers, which they share, or tensors, of which each may have its
// own. With those, alpha, which only the backward formula reads, is as long as the longest target
// of all examples asks for.
std::vector<int64_t> join_lengths(at::IntArrayRef lengths, int64_t size) {
  std::vector<int64_t> all;
  for (int64_t b = 0; b < size; ++b) all.insert(all.end(), lengths.begin(), lengths.end());
  return all;
}

at::Tensor join_lengths(const BatchedArg& lengths, int64_t size) {
  return join_rows(lengths, size);
}

// No numbers, of the shape [0, example...]: libtorch wants at least one example.
Batched none_like(const BatchedArg& log_probs, at::IntArrayRef example) {
  std::vector<int64_t> sizes = {0};
  sizes.insert(sizes.end(), example.begin(), example.end());
  return {log_probs.value.new_zeros(sizes), 0};
}

// Lengths: at::IntArrayRef or BatchedArg.
template <class Lengths>
std::tuple<Batched, Batched> ctc_loss_rule(const Level& level, BatchedArg log_probs,
                                           BatchedArg targets, Lengths input_lengths,
                                           Lengths target_lengths, int64_t blank,
                                           bool zero_infinity) {
  const int64_t size = level.size();
  if (size == 0) {
    const auto sizes = logical_sizes(log_probs);  // T, N, C
    TORCH_CHECK(sizes.size() == 3, kExpectedProbs, at::IntArrayRef(sizes));
    return {none_like(log_probs, {sizes[1]}), none_like(log_probs, {sizes[1], sizes[0], 1})};
  }
  const auto [loss, alpha] = at::_ctc_loss(
      join_probs(log_probs, size), join_rows(targets, size), join_lengths(input_lengths, size),
      join_lengths(target_lengths, size), blank, zero_infinity);
  return {Batched{split_rows(loss, size), 0}, Batched{split_rows(alpha, size), 0}};
}

template <class Lengths>
Batched ctc_loss_backward_rule(const Level& level, BatchedArg grad, BatchedArg log_probs,
                               BatchedArg targets, Lengths input_lengths, Lengths target_lengths,
                               BatchedArg loss, BatchedArg alpha, int64_t blank,
                               bool zero_infinity) {
  const int64_t size = level.size();
  if (size == 0) return none_like(log_probs, logical_sizes(log_probs));
  const at::Tensor joined = at::_ctc_loss_backward(
      join_rows(grad, size), join_probs(log_probs, size), join_rows(targets, size),
      join_lengths(input_lengths, size), join_lengths(target_lengths, size), join_rows(loss, size),
      join_rows(alpha, size), blank, zero_infinity);
  return {split_probs(joined, size), 0};
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::_ctc_loss, &ctc_loss_rule<at::IntArrayRef>>(),
    rule<ops::_ctc_loss_backward, &ctc_loss_backward_rule<at::IntArrayRef>>(),
    rule<ops::_ctc_loss_Tensor, &ctc_loss_rule<BatchedArg>>(),
    rule<ops::_ctc_loss_backward_Tensor, &ctc_loss_backward_rule<BatchedArg>>(),
};

}  // namespace
}  // namespace torchlift
