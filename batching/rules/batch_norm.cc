// Batch norm.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_batch_norm_no_update_ops.h>
#include <ATen/ops/_batch_norm_with_update_ops.h>
#include <ATen/ops/_native_batch_norm_legit.h>
#include <ATen/ops/_native_batch_norm_legit_no_training_ops.h>
#include <ATen/ops/_native_batch_norm_legit_ops.h>
#include <ATen/ops/batch_norm_backward_ops.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/native_batch_norm_backward.h>
#include <ATen/ops/native_batch_norm_backward_ops.h>
#include <ATen/ops/native_batch_norm_ops.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "batching/rules/reduction.h"
#include "core/boxed.h"
#include "core/error.h"
#include "core/lifted_tensor.h"
#include "core/promotion.h"
#include "core/recorder.h"
#include "core/tensor_operators.h"

namespace torchlift {
namespace {
namespace ops = at::_ops;

using OptionalArg = std::optional<BatchedArg>;
using BatchedTriple = std::tuple<Batched, Batched, Batched>;

bool is_defined(const OptionalArg& arg) { return arg && arg->value.defined(); }
bool is_batched(const OptionalArg& arg) { return is_defined(arg) && arg->batched(); }

int64_t size_among(std::initializer_list<const OptionalArg*> args) {
  for (const OptionalArg* arg : args) {
    if (is_batched(*arg)) return (*arg)->value.size(*(*arg)->bdim);
  }
  TORCH_INTERNAL_ASSERT(false, "torchlift: batch norm without a batched argument");
}

// NOTE [examples are channels]
// Batch norm treats channels apart, which is what vmap asks of examples. So B examples of C
// channels are one tensor of B*C channels, and every statistic, weight and gradient of an example
// is a run of C of them:
//   BNC... -> N(BC)...      BC -> (BC)
// For examples of one image (N = 1, the per-sample case) the fold is a view. No examples (B = 0)
// never come so far: of_no_examples.

// BNC... -> N(BC)...
at::Tensor channels(const BatchedArg& arg, int64_t size) {
  return expanded(arg, size).movedim(0, 1).flatten(1, 2);
}

// N(BC)... -> BNC...
Batched examples(const at::Tensor& folded, int64_t size) {
  if (!folded.defined()) return {};
  return {folded.unflatten(1, at::IntArrayRef({size, folded.size(1) / size})), 1};
}

// BC -> (BC)
std::optional<at::Tensor> per_channel(const OptionalArg& arg, int64_t size) {
  if (!is_defined(arg)) return std::nullopt;
  return expanded(*arg, size).reshape(-1);
}

// (BC) -> BC. Evaluation leaves the saved statistics empty.
Batched per_example(const at::Tensor& folded, int64_t size) {
  if (!folded.defined()) return {};
  if (folded.numel() == 0) return {folded, std::nullopt};
  return {folded.view({size, folded.size(0) / size}), 0};
}

void check_has_channels(const BatchedArg& input) {
  TORCH_CHECK(input.logical_dim() >= 2, "[vmap] batch_norm: expected an input of at least 2 dims, ",
              "(N, C, ...), but each example has ", input.logical_dim());
}

[[noreturn]] void refuse_shared_statistics(const char* which) {
  unsupported_error("vmap", "batch_norm: the running ", which,
                    " has no batch dim, but training would update it with statistics that differ "
                    "from example to example. Call eval() on the module, build it with "
                    "track_running_stats=False, or pass the buffers batched as well (stack them, "
                    "in_dims=0).");
}

void check_updatable(const OptionalArg& statistic, const char* which) {
  if (is_defined(statistic) && !statistic->batched()) refuse_shared_statistics(which);
}

// A batch of no examples. The kernels refuse tensors of no channels, or divide by their number.
Batched nothing_like(const BatchedArg& input) {
  return {at::empty_like(expanded(input, 0)), 0};  // 0NC...
}

Batched nothing_per_channel(const BatchedArg& input) {
  return {at::empty({0, logical_sizes(input)[1]}, input.value.options()), 0};
}

// Evaluation saves no statistics.
BatchedTriple of_no_examples(const BatchedArg& input, bool training) {
  const Batched saved = training ? nothing_per_channel(input)
                                 : Batched{at::empty({0}, input.value.options()), std::nullopt};
  return {nothing_like(input), saved, saved};
}

// A statistic that the function made, and into which is written what a trace records, is recorded
// from then on.
void make_recorded(const at::Tensor& statistic, const at::Tensor& written) {
  const LiftedTensorImpl* impl = as_lifted(statistic);
  if (!is_recorded(written) || impl == nullptr || impl->bdim().has_value()) return;
  const LevelPtr& level = as_lifted(written)->level_ptr();
  if (&impl->level() == level.get()) promote("aten::native_batch_norm", statistic, level);
}

// The operator that the user calls does not say that it writes the statistics, which a trace must
// know.
std::tuple<at::Tensor, at::Tensor, at::Tensor> normalize(
    const at::Tensor& input, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& mean,
    const std::optional<at::Tensor>& var, bool training, double momentum, double eps) {
  if (training && mean.has_value() && var.has_value() &&
      (is_recorded(input) || is_recorded(*mean) || is_recorded(*var))) {
    at::Tensor written_mean = *mean, written_var = *var;
    return at::_native_batch_norm_legit(input, weight, bias, written_mean, written_var, training,
                                        momentum, eps);
  }
  return at::native_batch_norm(input, weight, bias, mean, var, training, momentum, eps);
}

// Evaluation with only the input batched: more images for the same kernel.
BatchedTriple eval_with_shared_statistics(const BatchedArg& input, const OptionalArg& weight,
                                          const OptionalArg& bias, const OptionalArg& mean,
                                          const OptionalArg& var, double momentum, double eps) {
  const auto value = [](const OptionalArg& arg) {
    return is_defined(arg) ? std::optional<at::Tensor>(arg->value) : std::nullopt;
  };
  const at::Tensor x = batch_first(input);
  auto [out, save_mean, save_invstd] =
      at::native_batch_norm(x.flatten(0, 1), value(weight), value(bias), value(mean), value(var),
                            /*training=*/false, momentum, eps);
  return {Batched{out.view(x.sizes()), 0}, Batched{save_mean, std::nullopt},
          Batched{save_invstd, std::nullopt}};
}

// out * weight + bias where only these are batched: NC..., BC -> BNC...
BatchedTriple affine_apart(const BatchedArg& input, const OptionalArg& weight,
                           const OptionalArg& bias, const OptionalArg& mean, const OptionalArg& var,
                           bool training, double momentum, double eps) {
  const auto value = [](const OptionalArg& arg) {
    return is_defined(arg) ? std::optional<at::Tensor>(arg->value) : std::nullopt;
  };
  auto [out, save_mean, save_invstd] = normalize(input.value, std::nullopt, std::nullopt,
                                                 value(mean), value(var), training, momentum, eps);
  at::Tensor scaled = out;
  for (const OptionalArg* arg : {&weight, &bias}) {
    if (!is_defined(*arg)) continue;
    at::Tensor factor = batch_first(**arg);
    c10::SmallVector<int64_t, 6> shape;  // (B)1C1...
    if ((*arg)->batched()) shape.push_back(factor.size(0));
    shape.push_back(1);
    shape.push_back(factor.size(-1));
    shape.append(out.dim() - 2, 1);
    factor = factor.reshape(shape);
    scaled = arg == &weight ? scaled * factor : scaled + factor;
  }
  return {Batched{scaled.to(out.scalar_type()), 0}, Batched{save_mean, std::nullopt},
          Batched{save_invstd, std::nullopt}};
}

// A running statistic as the kernel updates it: a copy, written back by update().
struct RunningStatistic {
  std::optional<at::Tensor> folded;

  RunningStatistic(const OptionalArg& arg, int64_t size, bool training)
      : folded(per_channel(arg, size)) {
    if (training && folded.has_value()) folded = folded->clone();
  }
  void update(const OptionalArg& arg, int64_t size) const {
    if (!folded.has_value()) return;
    // As libtorch's kernel does, this leaves the version of the statistic as it is: autograd has
    // saved it, and does not use it after training.
    const at::Tensor statistic = batch_first(*arg);
    make_recorded(statistic, *folded);
    at::Tensor target = statistic.variable_data();
    target.copy_(per_example(*folded, size).value);
  }
};

BatchedTriple batch_norm(BatchedArg input, OptionalArg weight, OptionalArg bias, OptionalArg mean,
                         OptionalArg var, bool training, double momentum, double eps) {
  check_has_channels(input);
  const bool own_statistics = is_batched(mean) || is_batched(var);
  const bool own_affine = is_batched(weight) || is_batched(bias);
  const OptionalArg x(input);
  const int64_t size = size_among({&x, &weight, &bias, &mean, &var});
  if (training && (input.batched() || own_statistics)) {
    check_updatable(mean, "mean");
    check_updatable(var, "variance");
  }
  if (size == 0) return of_no_examples(input, training);
  if (!input.batched() && !own_statistics) {
    return affine_apart(input, weight, bias, mean, var, training, momentum, eps);
  }
  if (!training && !own_affine && !own_statistics) {
    return eval_with_shared_statistics(input, weight, bias, mean, var, momentum, eps);
  }
  const RunningStatistic running_mean(mean, size, training);
  const RunningStatistic running_var(var, size, training);
  auto [out, save_mean, save_invstd] =
      normalize(channels(input, size), per_channel(weight, size), per_channel(bias, size),
                running_mean.folded, running_var.folded, training, momentum, eps);
  if (training) {
    running_mean.update(mean, size);
    running_var.update(var, size);
  }
  return {examples(out, size), per_example(save_mean, size), per_example(save_invstd, size)};
}

BatchedTriple batch_norm_backward(BatchedArg grad, BatchedArg input, OptionalArg weight,
                                  OptionalArg mean, OptionalArg var, OptionalArg save_mean,
                                  OptionalArg save_invstd, bool train, double eps,
                                  std::array<bool, 3> mask) {
  const OptionalArg g(grad);
  const OptionalArg x(input);
  const int64_t size = size_among({&g, &x, &weight, &mean, &var, &save_mean, &save_invstd});
  if (size == 0) {
    const auto wanted = [&](bool is, const Batched& result) { return is ? result : Batched{}; };
    return {wanted(mask[0], nothing_like(input)), wanted(mask[1], nothing_per_channel(input)),
            wanted(mask[2], nothing_per_channel(input))};
  }
  auto [d_input, d_weight, d_bias] = at::native_batch_norm_backward(
      channels(grad, size), channels(input, size), per_channel(weight, size),
      per_channel(mean, size), per_channel(var, size), per_channel(save_mean, size),
      per_channel(save_invstd, size), train, eps, mask);
  return {examples(d_input, size), per_example(d_weight, size), per_example(d_bias, size)};
}

// --- variants that are plainer about the statistics ----------------------------------------

BatchedTriple batch_norm_no_stats(BatchedArg input, OptionalArg weight, OptionalArg bias,
                                  bool training, double momentum, double eps) {
  return batch_norm(input, weight, bias, std::nullopt, std::nullopt, training, momentum, eps);
}

BatchedTriple batch_norm_no_training(BatchedArg input, OptionalArg weight, OptionalArg bias,
                                     BatchedArg mean, BatchedArg var, double momentum, double eps) {
  return batch_norm(input, weight, bias, mean, var, /*training=*/false, momentum, eps);
}

// The updated statistics are results, so they may differ by example although the old ones did not.
std::tuple<Batched, Batched, Batched, Batched, Batched> batch_norm_functional(
    BatchedArg input, OptionalArg weight, OptionalArg bias, BatchedArg mean, BatchedArg var,
    bool training, double momentum, double eps) {
  const OptionalArg x(input);
  const OptionalArg m(mean);
  const OptionalArg v(var);
  const int64_t size = size_among({&x, &weight, &bias, &m, &v});
  if (size == 0) {
    const auto [out, save_mean, save_invstd] = of_no_examples(input, training);
    return {out, save_mean, save_invstd, nothing_per_channel(input), nothing_per_channel(input)};
  }
  auto [out, save_mean, save_invstd, new_mean, new_var] = at::_native_batch_norm_legit_functional(
      channels(input, size), per_channel(weight, size), per_channel(bias, size),
      *per_channel(m, size), *per_channel(v, size), training, momentum, eps);
  return {examples(out, size), per_example(save_mean, size), per_example(save_invstd, size),
          per_example(new_mean, size), per_example(new_var, size)};
}

// Operators (input, weight, bias, running_mean!, running_var!, ...), boxed, as they write arguments
// after the first.
BatchedTriple batch_norm_writing(const c10::OperatorHandle& op, const LevelPtr& level,
                                 const std::vector<c10::IValue>& args, bool training,
                                 double momentum, double eps) {
  for (const size_t statistic : {3, 4}) {
    if (training) promote(op.schema().name().c_str(), args[statistic].toTensor(), level);
  }
  std::array<Lowered, 5> lowered;
  std::array<OptionalArg, 5> tensors;
  for (size_t i = 0; i < lowered.size(); ++i) {
    if (args[i].isNone()) continue;
    lowered[i] = lower(args[i].toTensor(), *level);
    tensors[i].emplace(as_arg(lowered[i]));
  }
  return batch_norm(*tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], training, momentum,
                    eps);
}

void push(const BatchedTriple& results, const LevelPtr& level, torch::jit::Stack* stack) {
  const auto& [out, save_mean, save_invstd] = results;
  for (const Batched& result : {out, save_mean, save_invstd}) {
    stack->emplace_back(lift(result.value, result.bdim, level));
  }
}

// ..., training, momentum, eps)
void batch_norm_legit(const c10::OperatorHandle& op, const LevelPtr& level,
                      torch::jit::Stack* stack) {
  const std::vector<c10::IValue> args = torch::jit::pop(*stack, op.schema().arguments().size());
  push(
      batch_norm_writing(op, level, args, args[5].toBool(), args[6].toDouble(), args[7].toDouble()),
      level, stack);
}

// What a backend keeps for its gradient (cuDNN does): nothing, as ours is native_batch_norm's.
at::Tensor no_reserve(const at::Tensor& like) {
  return at::empty({0}, like.options().dtype(at::kByte));
}

// ..., momentum, eps), in training
void batch_norm_with_update(const c10::OperatorHandle& op, const LevelPtr& level,
                            torch::jit::Stack* stack) {
  const std::vector<c10::IValue> args = torch::jit::pop(*stack, op.schema().arguments().size());
  const BatchedTriple results = batch_norm_writing(op, level, args, /*training=*/true,
                                                   args[5].toDouble(), args[6].toDouble());
  push(results, level, stack);
  stack->emplace_back(lift(no_reserve(std::get<0>(results).value), std::nullopt, level));
}

std::tuple<Batched, Batched, Batched, Batched> batch_norm_no_update(
    BatchedArg input, OptionalArg weight, OptionalArg bias, OptionalArg mean, OptionalArg var,
    double momentum, double eps) {
  auto [out, save_mean, save_invstd] =
      batch_norm(input, weight, bias, mean, var, /*training=*/false, momentum, eps);
  return {out, save_mean, save_invstd, Batched{no_reserve(out.value), std::nullopt}};
}

std::tuple<Batched, Batched, Batched, Batched, Batched, Batched> batch_norm_with_update_functional(
    BatchedArg input, OptionalArg weight, OptionalArg bias, BatchedArg mean, BatchedArg var,
    double momentum, double eps) {
  auto [out, save_mean, save_invstd, new_mean, new_var] =
      batch_norm_functional(input, weight, bias, mean, var, /*training=*/true, momentum, eps);
  return {out,      save_mean, save_invstd, Batched{no_reserve(out.value), std::nullopt},
          new_mean, new_var};
}

BatchedTriple batch_norm_backward_reserved(BatchedArg grad, BatchedArg input, BatchedArg weight,
                                           OptionalArg mean, OptionalArg var, OptionalArg save_mean,
                                           OptionalArg save_invstd, bool update, double eps,
                                           std::array<bool, 3> mask, BatchedArg /*reserve*/) {
  return batch_norm_backward(grad, input, weight, mean, var, save_mean, save_invstd, update, eps,
                             mask);
}

[[maybe_unused]] const RuleSet kRules{
    boxed_rule("aten::_native_batch_norm_legit", "", &batch_norm_legit),
    rule<ops::native_batch_norm, &batch_norm>(),
    rule<ops::native_batch_norm_backward, &batch_norm_backward>(),
    rule<ops::_native_batch_norm_legit_no_stats, &batch_norm_no_stats>(),
    rule<ops::_native_batch_norm_legit_no_training, &batch_norm_no_training>(),
    rule<ops::_native_batch_norm_legit_functional, &batch_norm_functional>(),
    boxed_rule("aten::_batch_norm_with_update", "", &batch_norm_with_update),
    rule<ops::_batch_norm_with_update_functional, &batch_norm_with_update_functional>(),
    rule<ops::_batch_norm_no_update, &batch_norm_no_update>(),
    rule<ops::batch_norm_backward, &batch_norm_backward_reserved>(),
};

}  // namespace
}  // namespace torchlift
