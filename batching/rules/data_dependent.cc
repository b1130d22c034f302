// Operators whose result depends on the values in a way that one program for all examples cannot
// follow: a number taken out of a tensor, a shape that the values decide. They throw, and say what
// to write instead.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_is_all_true_ops.h>
#include <ATen/ops/_is_any_true.h>
#include <ATen/ops/_is_any_true_ops.h>
#include <ATen/ops/allclose_ops.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bincount_ops.h>
#include <ATen/ops/equal_ops.h>
#include <ATen/ops/isclose.h>
#include <ATen/ops/narrow_ops.h>
#include <ATen/ops/one_hot_ops.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/repeat_interleave_ops.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/tensor_split_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/tensor_split_ops.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/anomaly_mode.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "batching/rules/assumptions.h"
#include "batching/rules/dims.h"
#include "batching/rules/numbers.h"
#include "core/error.h"
#include "core/recorder.h"
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
      "  1. control flow on a value, `if x > 0:` or `while err > tol:` -> torchlift.cond(x > 0, f, "
      "g, x) or "
      "torchlift.while_loop(cond, body, x), which choose example by example; torch.where(x > 0, a, "
      "b); or a "
      "fixed number of steps;\n"
      "  2. x[i] with a 0-d index tensor i that is batched -> x.index_select(0, i).squeeze(0), "
      "x[i[None]][0] or "
      "torch.gather;\n"
      "  3. a value used as a Python number (a size, a scalar argument, printing) -> keep it a "
      "tensor: "
      "torch.mul(x, scale) rather than scale.item(), and return what is to be printed.");
}

// --- one answer where all examples agree -------------------------------------------------------
//
// Composite operators check their arguments by equal(). Where every example gives the same answer,
// that is the answer; numbers and shapes that a user may branch on are another matter (below).

constexpr const char* kKeepTensor =
    "Keep the answer a tensor: (x == y).all(), or torch.isclose(x, y).all(), and choose by "
    "torch.where.";

[[noreturn]] void throw_examples_differ(const char* op, const Level& level) {
  unsupported_error("vmap", op, " gives one True or False, but its arguments are of ",
                    level.describe(), ", and the examples differ. ", kKeepTensor);
}

// [B, ...] -> [B, numel], also for a 0-d example.
at::Tensor flat(BatchedArg self) {
  const at::Tensor rows = batch_first(self);
  return rows.dim() == 1 ? rows.unsqueeze(1) : rows.flatten(1);
}

// The answer that `each` (one bool for each example) gives for all of them, in every level.
bool agreed(const char* op, const Level& level, const at::Tensor& each) {
  refuse_recorded(each, op, kKeepTensor);
  const at::Tensor answers = innermost(each);
  if (answers.numel() == 0 || answers.all().item<bool>()) return true;
  if (!answers.any().item<bool>()) return false;
  throw_examples_differ(op, level);
}

bool equal_rule(const Level& level, BatchedArg self, BatchedArg other) {
  if (logical_sizes(self) != logical_sizes(other)) return false;
  const int64_t rank = self.logical_dim();
  const at::Tensor same = aligned(self, rank).eq(aligned(other, rank));
  const at::Tensor each = flat({same, 0}).all(1);
  if (!AssumedAnswers::open() || recorded_by(each) == nullptr) {
    return agreed("aten::equal", level, each);
  }
  const std::optional<bool> answer = AssumedAnswers::answer(each);
  if (!answer) throw_examples_differ("aten::equal", level);
  return *answer;
}

bool allclose_rule(const Level& level, BatchedArg self, BatchedArg other, double rtol, double atol,
                   bool equal_nan) {
  const int64_t rank = std::max(self.logical_dim(), other.logical_dim());
  const at::Tensor close =
      at::isclose(aligned(self, rank), aligned(other, rank), rtol, atol, equal_nan);
  return agreed("aten::allclose", level, flat({close, 0}).all(1));
}

// A tensor of numbers that all examples share, taken out of its levels. advice: what to say if they
// do not.
at::Tensor shared_numbers(const char* op, const at::Tensor& t, const char* advice) {
  at::Tensor value = t;
  while (const LiftedTensorImpl* impl = as_lifted(value)) {
    if (!impl->bdim() || impl->level().size() == 0) {
      value = impl->bdim() ? at::ones(value.sizes(), impl->value().options())
                           : at::Tensor(impl->value());
      continue;
    }
    if (impl->level().interpreter() != nullptr && recorder_of(impl->level()) == nullptr) {
      unsupported_error(
          impl->level().transform(), op,
          ": its results depend on numbers that are computed from the inputs, and are "
          "not known here. Pass numbers that are no such tensor.");
    }
    const at::Tensor rows = impl->value().movedim(*impl->bdim(), 0);
    if (!innermost(rows.eq(rows.narrow(0, 0, 1))).all().item<bool>()) {
      unsupported_error("vmap", op, " of a tensor of ", impl->level().describe(), ": ", advice);
    }
    value = rows.select(0, 0);
  }
  return value;
}

// Places that are computed from inputs of a trace are assumed.
std::vector<at::Tensor> tensor_split(const at::Tensor& self, const at::Tensor& where, int64_t dim) {
  constexpr const char* kAdvice =
      "the shapes of its results depend on numbers that differ between the examples. Pass numbers "
      "that all examples share.";
  if (!has_numbers(innermost(where))) {
    refuse_recorded(where, "tensor_split", "Pass the places as integers.");
  }
  const at::Tensor places = shared_numbers("tensor_split", where, kAdvice);
  std::vector<at::Tensor> parts = at::compositeimplicitautograd::tensor_split(self, places, dim);
  if (recorded_by(where) == nullptr) return parts;
  const char* what = places.dim() == 0 ? "the number of parts" : "the places where it cuts";
  assume(where, integers_in(places),
         assumption_message({.op = "tensor_split",
                             .what = what,
                             .fix = "Pass the places as integers, which do not change."}));
  return parts;
}

// Where the start is an input of a trace, the place of the view would be that of one run. The graph
// copies, and the trace throws if that makes a difference.
at::Tensor copied_from(const at::Tensor& self, int64_t dim, const at::Tensor& start,
                       int64_t length) {
  const int64_t size = self.size(dim);
  TORCH_CHECK(length >= 0 && length <= size, "narrow: length ", length,
              " is no part of a dimension of size ", size, ".");
  const at::Tensor first = at::where(start.lt(0), start.add(size), start).to(at::kLong);
  at::Tensor copy = self.index_select(
      dim, first.add(at::arange(length, innermost(start).options().dtype(at::kLong))));
  note_copy_for_view("narrow", self, copy, start);
  return copy;
}

at::Tensor narrow_from(const at::Tensor& self, int64_t dim, const at::Tensor& start,
                       c10::SymInt length) {
  TORCH_CHECK(start.dim() == 0 && at::isIntegralType(start.scalar_type(), /*includeBool=*/false),
              "start must be an 0-dim integral Tensor.");
  if (recorded_by(start) != nullptr) {
    return copied_from(self, dim, start, length.guard_int(__FILE__, __LINE__));
  }
  constexpr const char* kAdvice =
      "it starts at places that differ between the examples, and no view of the batch shows those. "
      "Copy them: x.index_select(dim, start + torch.arange(length)); or pass a start that all "
      "examples share.";
  const int64_t first = shared_numbers("narrow", start, kAdvice).item<int64_t>();
  return self.narrow_symint(dim, first, std::move(length));
}

// --- a shape that the values decide ------------------------------------------------------------

[[noreturn]] void throw_shape(const char* op, const Level& level, const char* fix) {
  unsupported_error(
      "vmap", op, " of a tensor of ", level.describe(),
      ": the shape of its result depends on the values, and the examples may differ. ", fix);
}

[[noreturn]] void throw_shape(const c10::OperatorHandle& op, const LevelPtr& level,
                              const char* fix) {
  throw_shape(op.schema().name().c_str(), *level, fix);
}

[[noreturn]] void throw_nonzero(const c10::OperatorHandle& op, const LevelPtr& level,
                                torch::jit::Stack* /*stack*/) {
  throw_shape(
      op, level,
      "Use torchlift.nonzero(x, size=n), which pads to a fixed number of indices, or the mask "
      "itself: torch.where(mask, x, y), (x * mask).sum().");
}

[[noreturn]] void throw_unique(const c10::OperatorHandle& op, const LevelPtr& level,
                               torch::jit::Stack* /*stack*/) {
  throw_shape(
      op, level,
      "Use torchlift.unique(x, size=n), which pads to a fixed number of values; torch.sort, whose "
      "shape is fixed (neighbours that differ start a new value); or call it outside of vmap.");
}

// How many bins every example has: the largest of its numbers decides, if it is above minlength.
int64_t number_of_bins(const Level& level, const at::Tensor& x, int64_t minlength) {
  if (innermost(x).numel() == 0) return minlength;
  check_all(x.ge(0), "bincount only supports 1-d non-negative integral inputs.");
  const bool by_shapes = recorded_by(x) != nullptr && !has_numbers(innermost(x));
  if (by_shapes && minlength > 0) {
    check_all(x.to(at::kLong).lt(minlength),
              "[trace] bincount: a number is not below minlength, which is the number of bins in a "
              "graph. Pass a larger one.");
    return minlength;
  }
  const std::optional<int64_t> bins =
      assumed_number(x.amax(1).to(at::kLong).add(1).clamp_min(minlength),
                     {.op = "aten::bincount",
                      .what = "the number of bins",
                      .fix = "Pass minlength=, larger than all of the numbers."});
  if (!bins.has_value()) {
    throw_shape("aten::bincount", level,
                "Pass minlength, larger than all of the numbers; or, with a known number of bins, "
                "use torch.zeros_like(bins).scatter_add(0, x, weights).");
  }
  return *bins;
}

// BN -> BC: ones, or weights, are added up in the bin of each number.
Batched bincount_rule(const Level& level, BatchedArg self, std::optional<BatchedArg> weights,
                      int64_t minlength) {
  TORCH_CHECK(self.logical_dim() == 1 && at::isIntegralType(self.value.scalar_type(), false),
              "bincount only supports 1-d non-negative integral inputs.");
  TORCH_CHECK(minlength >= 0, "minlength should be >= 0");
  const at::Tensor x = expanded(self, level.size());
  const int64_t bins = number_of_bins(level, x, minlength);
  const bool weighted = weights.has_value() && x.size(1) > 0;
  if (weighted) {
    TORCH_CHECK(logical_sizes(*weights) == logical_sizes(self),
                "weights should be 1-d and have the same length as input");
  }
  const at::ScalarType dtype = !weighted                                    ? at::kLong
                               : weights->value.scalar_type() == at::kFloat ? at::kFloat
                                                                            : at::kDouble;
  const at::Tensor added = weighted ? expanded(*weights, level.size()).to(dtype)
                                    : at::ones(x.sizes(), x.options().dtype(dtype));
  const at::Tensor zeros = at::zeros({level.size(), bins}, x.options().dtype(dtype));
  // In a run with more bins than are assumed no place may lie outside of the result, either.
  const at::Tensor places =
      recorded_by(x) == nullptr || bins == 0 ? x.to(at::kLong) : x.to(at::kLong).clamp(0, bins - 1);
  return {zeros.scatter_add(1, places, added), 0};
}

// BN -> BM, where M numbers are wanted: the place p comes from the first i whose end lies above p,
// the ends being the running sums of the repeats.
Batched repeat_interleave_rule(const Level& level, BatchedArg repeats,
                               std::optional<int64_t> output_size) {
  TORCH_CHECK(repeats.logical_dim() == 1, "repeat_interleave only accept 1D vector as repeat");
  if (!output_size.has_value()) {
    throw_shape("aten::repeat_interleave", level,
                "Pass output_size, if the repeats of every example have one sum; or repeats that "
                "all examples share (an int, or a tensor from outside).");
  }
  const at::Tensor each = batch_first(repeats);
  const at::Tensor ends = each.cumsum(1);
  check_all(each.ge(0), "repeats can not be negative");
  check_all(each.sum(1).eq(*output_size),
            c10::str("[vmap] repeat_interleave: output_size is ", *output_size,
                     ", but the repeats of some example have another sum. Give their sum, which "
                     "has to be the same for all examples.")
                .c_str());
  const at::Tensor places = at::arange(*output_size, innermost(each).options().dtype(at::kLong))
                                .expand({level.size(), *output_size});
  const at::Tensor index = at::searchsorted(ends, places.contiguous(), /*out_int32=*/false,
                                            /*right=*/true);
  return {index.to(repeats.value.scalar_type()), 0};
}

// --- all right, once asked of each example -----------------------------------------------------

Batched is_all_true_rule(BatchedArg self) { return {flat(self).all(1), 0}; }

// Where the engine looks for NaNs (torch.autograd.set_detect_anomaly), it asks about all examples
// at once: it reads the answer.
bool asks_for_anomalies() {
  return torch::autograd::AnomalyMode::is_enabled() &&
         torch::autograd::get_current_graph_task_id() >= 0;
}

Batched is_any_true_rule(BatchedArg self) {
  if (asks_for_anomalies()) return {at::_is_any_true(self.value), std::nullopt};
  return {flat(self).any(1), 0};
}

// The least and the largest of all examples are the expected ones.
void assume_rule(const c10::OperatorHandle& op, const LevelPtr& level, torch::jit::Stack* stack) {
  const std::vector<c10::IValue> args = torch::jit::pop(*stack, op.schema().arguments().size());
  const Lowered numbers = lower(args[0].toTensor(), *level);
  const at::Tensor rows = numbers.value.movedim(numbers.bdim.value(), 0);
  if (rows.size(0) == 0) return;
  for (const at::Tensor& each : {rows.amin(0), rows.amax(0)}) {
    stack->emplace_back(each);
    stack->insert(stack->end(), args.begin() + 1, args.end());
    op.callBoxed(*stack);
  }
}

// One check of all examples. The first argument is the tensor, the second, if any, a message.
void assert_async_rule(const c10::OperatorHandle& op, const LevelPtr& level,
                       torch::jit::Stack* stack) {
  std::vector<c10::IValue> args = torch::jit::pop(*stack, op.schema().arguments().size());
  args[0] = lower(args[0].toTensor(), *level).value.all();
  for (const c10::IValue& arg : args) stack->push_back(arg);
  op.callBoxed(*stack);
}

// One more than the largest class of every example, if it is the same for all.
int64_t number_of_classes(const at::Tensor& self) {
  TORCH_CHECK(self.numel() > 0, "Can not infer total number of classes from empty tensor.");
  const at::Tensor count = self.flatten().amax(0).add(1);
  if (innermost(count).numel() == 0) return 0;  // there is no example
  const std::optional<int64_t> classes =
      assumed_number(count, {.op = "one_hot",
                             .what = "the number of classes",
                             .fix = "Give it: one_hot(x, num_classes=10)."});
  if (!classes.has_value()) {
    unsupported_error("vmap",
                      "one_hot: the number of classes would depend on the values, and the examples "
                      "differ. Give it: one_hot(x, num_classes=10).");
  }
  return *classes;
}

// libtorch's reads the largest class and writes ones into plain zeros.
at::Tensor one_hot(const at::Tensor& self, int64_t num_classes) {
  TORCH_CHECK(self.scalar_type() == at::kLong,
              "one_hot is only applicable to index tensor of type LongTensor.");
  const at::Tensor all = innermost(self);
  if (num_classes < 0) num_classes = number_of_classes(self);
  if (all.is_cpu()) {
    check_all(self.ge(0), "Class values must be non-negative.");
    check_all(self.lt(num_classes), "Class values must be smaller than num_classes.");
  }
  const at::Tensor classes = at::arange(num_classes, all.options());
  return self.unsqueeze(-1).eq(classes).to(at::kLong);
}

[[maybe_unused]] const RuleSet kBoxed{
    boxed_rule("aten::_local_scalar_dense", "", &throw_item),
    boxed_rule("aten::nonzero", "", &throw_nonzero),
    boxed_rule("aten::_unique", "", &throw_unique),
    boxed_rule("aten::_unique2", "", &throw_unique),
    boxed_rule("aten::unique_dim", "", &throw_unique),
    boxed_rule("aten::unique_consecutive", "", &throw_unique),
    boxed_rule("aten::unique_dim_consecutive", "", &throw_unique),
    boxed_rule(kAssumeOp, "", &assume_rule),
    boxed_rule("aten::_assert_async", "", &assert_async_rule),
    boxed_rule("aten::_assert_async", "msg", &assert_async_rule),
};

[[maybe_unused]] const RuleSet kRules{
    rule<ops::equal, &equal_rule>(),
    rule<ops::allclose, &allclose_rule>(),
    rule<ops::bincount, &bincount_rule>(),
    rule<ops::repeat_interleave_Tensor, &repeat_interleave_rule>(),
    composite<ops::tensor_split_tensor_indices_or_sections, &tensor_split>(),
    composite<ops::narrow_Tensor, &narrow_from>(),
    rule<ops::_is_all_true, &is_all_true_rule>(),
    rule<ops::_is_any_true, &is_any_true_rule>(),
    composite<ops::one_hot, &one_hot>(),
};

}  // namespace
}  // namespace torchlift
