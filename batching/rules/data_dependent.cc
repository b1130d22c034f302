// Operators whose result depends on the values in a way that one program for all examples cannot
// follow: a number taken out of a tensor, a shape that the values decide. They throw, and say what
// to write instead.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_is_all_true_ops.h>
#include <ATen/ops/_is_any_true_ops.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/one_hot_ops.h>

#include "batching/rules/dims.h"
#include "core/error.h"
#include "core/registry.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;

// --- a number out of a tensor ------------------------------------------------------------------

[[noreturn]] void throw_item(const c10::OperatorHandle& /*op*/, const LevelPtr& level,
                             torch::jit::Stack* /*stack*/) {
  unsupported_error(
      "vmap", "A number was asked for (.item(), float(x), int(x), bool(x)) of a tensor of ",
      level->describe(),
      ", which holds one for each example. Usual causes, and what to write instead:\n"
      "  1. control flow on a value, `if x > 0:` or `while err > tol:` -> torch.where(x > 0, a, "
      "b), or a "
      "fixed number of steps;\n"
      "  2. x[i] with a 0-d index tensor i that is batched -> x.index_select(0, i).squeeze(0), "
      "x[i[None]][0] or "
      "torch.gather;\n"
      "  3. a value used as a Python number (a size, a scalar argument, printing) -> keep it a "
      "tensor: "
      "torch.mul(x, scale) rather than scale.item(), and return what is to be printed.");
}

[[noreturn]] void throw_equal(const c10::OperatorHandle& op, const LevelPtr& level,
                              torch::jit::Stack* /*stack*/) {
  unsupported_error("vmap", op.schema().name(),
                    " gives one True or False, but its arguments are of ", level->describe(),
                    ", and the examples may differ. Keep the answer a tensor: (x == y).all(), or "
                    "torch.isclose(x, y).all(), and choose by torch.where.");
}

// --- a shape that the values decide ------------------------------------------------------------

[[noreturn]] void throw_shape(const c10::OperatorHandle& op, const LevelPtr& level,
                              const char* fix) {
  unsupported_error(
      "vmap", op.schema().name(), " of a tensor of ", level->describe(),
      ": the shape of its result depends on the values, and the examples may differ. ", fix);
}

[[noreturn]] void throw_nonzero(const c10::OperatorHandle& op, const LevelPtr& level,
                                torch::jit::Stack* /*stack*/) {
  throw_shape(
      op, level,
      "Use the mask itself: torch.where(mask, x, y), (x * mask).sum(), or torch.topk for a fixed "
      "number of indices.");
}

[[noreturn]] void throw_unique(const c10::OperatorHandle& op, const LevelPtr& level,
                               torch::jit::Stack* /*stack*/) {
  throw_shape(
      op, level,
      "Use torch.sort, whose shape is fixed (neighbours that differ start a new value), or call it "
      "outside of vmap.");
}

[[noreturn]] void throw_bincount(const c10::OperatorHandle& op, const LevelPtr& level,
                                 torch::jit::Stack* /*stack*/) {
  throw_shape(op, level,
              "With a known number of bins: torch.zeros_like(bins).scatter_add(0, x, weights), or "
              "one_hot(x, num_classes).sum(0).");
}

[[noreturn]] void throw_repeats(const c10::OperatorHandle& op, const LevelPtr& level,
                                torch::jit::Stack* /*stack*/) {
  throw_shape(op, level,
              "Pass repeats that all examples share (an int, or a tensor from outside).");
}

// --- all right, once asked of each example -----------------------------------------------------

// [B, ...] -> [B, numel], also for a 0-d example.
at::Tensor flat(BatchedArg self) {
  const at::Tensor rows = batch_first(self);
  return rows.dim() == 1 ? rows.unsqueeze(1) : rows.flatten(1);
}

Batched is_all_true_rule(BatchedArg self) { return {flat(self).all(1), 0}; }

Batched is_any_true_rule(BatchedArg self) { return {flat(self).any(1), 0}; }

// One check of all examples. The first argument is the tensor, the second, if any, a message.
void assert_async_rule(const c10::OperatorHandle& op, const LevelPtr& level,
                       torch::jit::Stack* stack) {
  std::vector<c10::IValue> args = torch::jit::pop(*stack, op.schema().arguments().size());
  args[0] = lower(args[0].toTensor(), *level).value.all();
  for (const c10::IValue& arg : args) stack->push_back(arg);
  op.callBoxed(*stack);
}

at::Tensor innermost(const at::Tensor& t) {
  at::Tensor value = t;
  while (const LiftedTensorImpl* impl = as_lifted(value)) value = at::Tensor(impl->value());
  return value;
}

// libtorch's reads the largest class and writes ones into plain zeros.
at::Tensor one_hot(const at::Tensor& self, int64_t num_classes) {
  TORCH_CHECK(self.scalar_type() == at::kLong,
              "one_hot is only applicable to index tensor of type LongTensor.");
  if (num_classes < 0) {
    unsupported_error("vmap",
                      "one_hot: the number of classes would depend on the values, and the examples "
                      "may differ. Give it: one_hot(x, num_classes=10).");
  }
  const at::Tensor all = innermost(self);
  if (all.is_cpu() && all.numel() > 0) {
    TORCH_CHECK(all.min().item<int64_t>() >= 0, "Class values must be non-negative.");
    TORCH_CHECK(all.max().item<int64_t>() < num_classes,
                "Class values must be smaller than num_classes.");
  }
  const at::Tensor classes = at::arange(num_classes, all.options());
  return self.unsqueeze(-1).eq(classes).to(at::kLong);
}

[[maybe_unused]] const RuleSet kBoxed{
    boxed_rule("aten::_local_scalar_dense", "", &throw_item),
    boxed_rule("aten::equal", "", &throw_equal),
    boxed_rule("aten::allclose", "", &throw_equal),
    boxed_rule("aten::nonzero", "", &throw_nonzero),
    boxed_rule("aten::_unique", "", &throw_unique),
    boxed_rule("aten::_unique2", "", &throw_unique),
    boxed_rule("aten::unique_dim", "", &throw_unique),
    boxed_rule("aten::unique_consecutive", "", &throw_unique),
    boxed_rule("aten::unique_dim_consecutive", "", &throw_unique),
    boxed_rule("aten::bincount", "", &throw_bincount),
    boxed_rule("aten::_assert_async", "", &assert_async_rule),
    boxed_rule("aten::_assert_async", "msg", &assert_async_rule),
    boxed_rule("aten::repeat_interleave", "Tensor", &throw_repeats),
};

[[maybe_unused]] const RuleSet kRules{
    rule<ops::_is_all_true, &is_all_true_rule>(),
    rule<ops::_is_any_true, &is_any_true_rule>(),
    composite<ops::one_hot, &one_hot>(),
};

}  // namespace
}  // namespace torchlift
