#include "compile/trace_rules.h"

#include <ATen/ExpandUtils.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/nonzero_static.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "batching/rules/numbers.h"
#include "compile/recording.h"
#include "compile/trace_sparse.h"
#include "core/error.h"
#include "core/lifted_tensor.h"

namespace torchlift::compile {
namespace {

using at::Tensor;
using c10::IValue;
using torch::jit::Stack;

std::vector<IValue> arguments(const TracedCall& call, const Stack& stack) {
  return {stack.end() - static_cast<int64_t>(call.op.schema().arguments().size()), stack.end()};
}

std::vector<IValue> take_arguments(const TracedCall& call, Stack* stack) {
  return torch::jit::pop(*stack, call.op.schema().arguments().size());
}

// --- ctc_loss ------------------------------------------------------------------------------------

// NOTE [ctc losses of one size]
// _ctc_loss gives, beside the losses, what its backward pass reads, as long as the longest target
// asks for. With lengths that are tensors that would be another shape in each run, so that the
// graph has one more example, whose target is as long as the targets can be.
bool ctc_loss(const TracedCall& call, Stack* stack) {
  if (call.op.schema().overload_name() != "Tensor") return false;
  std::vector<IValue> args = take_arguments(call, stack);
  const auto tensor = [&](size_t i) { return untracked(args[i].toTensor(), call.level); };
  const Tensor log_probs = tensor(0), targets = tensor(1);
  TORCH_CHECK(log_probs.dim() == 3 && (targets.dim() == 1 || targets.dim() == 2),
              "ctc_loss: expected log_probs of the shape [T, N, C] and targets of [N, S] or, one "
              "after the other, of one dim. Got ",
              log_probs.sizes(), " and ", targets.sizes());
  const int64_t steps = log_probs.size(0), count = log_probs.size(1), longest = targets.size(-1);
  const auto with = [&](size_t i, at::IntArrayRef sizes, int64_t value, int64_t dim) {
    stack->emplace_back(at::cat({tensor(i), tensor(i).new_full(sizes, value)}, dim));
  };
  with(0, {steps, 1, log_probs.size(2)}, 0, 1);
  if (targets.dim() == 1) with(1, {longest}, 0, 0);
  if (targets.dim() == 2) with(1, {1, longest}, 0, 0);
  with(2, {1}, steps, 0);
  with(3, {1}, longest, 0);
  stack->insert(stack->end(), args.begin() + 4, args.end());
  call.write_down(call.op, call.level, call.recording, stack);
  for (auto each = stack->end() - 2; each != stack->end(); ++each) {
    *each = each->toTensor().narrow(0, 0, count);
  }
  return true;
}

// cuDNN takes some lengths only, and may not take those of the next run.
bool use_cudnn_ctc_loss(const TracedCall& call, Stack* stack) {
  take_arguments(call, stack);
  stack->emplace_back(false);
  return true;
}

// --- answers that are assumed --------------------------------------------------------------------

// See NOTE [assumed answers] in batching/rules/numbers.h.
bool equal(const TracedCall& call, Stack* stack) {
  if (!AssumedAnswers::open()) return false;
  const std::vector<IValue> args = take_arguments(call, stack);
  const Tensor self = args[0].toTensor(), other = args[1].toTensor();
  const bool same_shape = self.sizes() == other.sizes();
  stack->emplace_back(same_shape && AssumedAnswers::answer(self.eq(other).all()).value());
  return true;
}

// There are no residuals of a system that has no more rows than columns, and none where a matrix
// has not its full rank, which two of the drivers tell.
bool lstsq(const TracedCall& call, Stack* stack) {
  const std::vector<IValue> args = arguments(call, *stack);  // self, b, rcond, driver
  const Tensor& a = args[0].toTensor();
  if (args[3].isNone() || a.dim() < 2 || a.size(-2) <= a.size(-1)) return false;
  const std::string& driver = args[3].toStringRef();
  if (driver != "gelsd" && driver != "gelss") return false;
  if (call.recording.by_shapes()) throw_shape_of_numbers(call.op, call.recording);
  call.write_down(call.op, call.level, call.recording, stack);
  const AssumedAnswers answers(
      "linalg.lstsq: with this driver there are residuals where all matrices have full rank, "
      "which they had, or had not, when the function was traced, unlike now. The driver "
      "\"gelsy\" gives none.",
      {true});
  AssumedAnswers::answer((*stack)[stack->size() - 2].toTensor().eq(a.size(-1)).all());
  return true;
}

// --- shapes that depend on numbers ---------------------------------------------------------------
//
// NOTE [shapes of one run]
// How many elements nonzero finds is a number of the run. It is assumed (NOTE [assumptions] in
// batching/rules/assumptions.h), and the result computed by operators that give so many, whatever
// the numbers: no value of the graph ever has another shape than its type, before the check or
// after it, and no place lies outside of what it is a place in.

constexpr const char* kFixOfMasks =
    "Use torchlift.masked_select(x, mask, size=n), or torch.where in place of a mask as an index.";

// As the operator, written down, is called by others. One that looks at no number.
void call_again(const TracedCall& call, const std::vector<IValue>& args, Stack* stack) {
  stack->insert(stack->end(), args.begin(), args.end());
  call.write_down(call.op, call.level, call.recording, stack);
}

// `count` is an integer without dims.
int64_t number_of_run(const TracedCall& call, const Tensor& count, const char* what,
                      const char* fix) {
  if (!has_numbers(innermost(count))) throw_shape_of_numbers(call.op, call.recording);
  const std::string& op = call.op.schema().name();
  const std::optional<int64_t> number = assumed_number(count, {.op = op, .what = what, .fix = fix});
  if (!number.has_value()) {
    unsupported_error(call.recording.transform(), op, ": ", what,
                      " differs between the examples of a level around the function that is "
                      "traced. ",
                      fix);
  }
  return *number;
}

// The first `count` places where t is not zero, a row of coordinates each; the first place where
// there are too few.
Tensor places_of_nonzero(const Tensor& t, int64_t count) {
  return at::nonzero_static(t, count, /*fill_value=*/0);
}

// A column of coordinates for each dim of the mask.
std::vector<Tensor> places_of_mask(const TracedCall& call, const Tensor& mask) {
  const Tensor chosen = mask.scalar_type() == at::kBool ? mask : mask.ne(0);
  const int64_t count =
      number_of_run(call, chosen.sum(), "the number of elements that a mask chooses", kFixOfMasks);
  return places_of_nonzero(chosen, count).t().contiguous().unbind(0);
}

bool is_mask(const Tensor& t) {
  return t.scalar_type() == at::kBool || t.scalar_type() == at::kByte;
}

// x[mask] is x at the places that the mask has now.
bool index(const TracedCall& call, Stack* stack) {
  IValue& indices = stack->back();
  if (!indices.isOptionalTensorList()) return false;
  const c10::AutoGradMode no_grad(false);
  const Tensor self = (*stack)[stack->size() - 2].toTensor();
  c10::List<std::optional<Tensor>> places;
  for (const std::optional<Tensor>& each : indices.toOptionalTensorList()) {
    const auto dim = static_cast<int64_t>(places.size());
    if (!each.has_value() || !each->defined() || !is_mask(*each) || each->dim() == 0 ||
        dim + each->dim() > self.dim()) {
      places.push_back(each);
      continue;
    }
    TORCH_CHECK_INDEX(self.sizes().slice(dim, each->dim()) == each->sizes(),
                      "The shape of the mask ", each->sizes(), " at index ", dim,
                      " does not match the shape of the indexed tensor ", self.sizes());
    for (const Tensor& place : places_of_mask(call, untracked(*each, call.level))) {
      places.push_back(place);
    }
  }
  indices = places;
  return false;
}

bool masked_select(const TracedCall& call, Stack* stack) {
  const c10::AutoGradMode no_grad(false);
  const std::vector<IValue> args = take_arguments(call, stack);
  const Tensor self = untracked(args[0].toTensor(), call.level);
  const Tensor mask = untracked(args[1].toTensor(), call.level);
  TORCH_CHECK(mask.scalar_type() == at::kBool, "masked_select: expected BoolTensor for mask");
  const std::vector<int64_t> sizes = at::infer_size(self.sizes(), mask.sizes());
  const Tensor flat = mask.expand(sizes).reshape(-1);
  const Tensor place = places_of_mask(call, flat)[0];
  stack->emplace_back(self.expand(sizes).reshape(-1).index_select(0, place));
  return true;
}

// libtorch's gives a transposed tensor.
bool nonzero(const TracedCall& call, Stack* stack) {
  const c10::AutoGradMode no_grad(false);
  const std::vector<IValue> args = take_arguments(call, stack);
  const Tensor self = untracked(args[0].toTensor(), call.level);
  const int64_t count =
      number_of_run(call, self.ne(0).sum(), "the number of elements that are not zero",
                    "Use torchlift.nonzero(x, size=n).");
  stack->emplace_back(places_of_nonzero(self, count).t().contiguous().t());
  return true;
}

// --- unique --------------------------------------------------------------------------------------

constexpr const char* kDifferent = "the number of different values";
constexpr const char* kFixOfUnique = "Use torchlift.unique(x, size=n).";

// What the operators give of n values, in groups of equal ones: a number for each value, that of
// its group; and of each group where its first value is, and how many there are.
struct Groups {
  Tensor of_each, first, sizes;
};

Tensor none(const Tensor& like) { return at::empty({0}, like.options().dtype(at::kLong)); }

// starts: whether a value is the first of its group, of values whose groups stand together.
Groups groups_from(const TracedCall& call, const Tensor& starts) {
  const int64_t n = starts.size(0);
  const int64_t count = number_of_run(call, starts.sum(), kDifferent, kFixOfUnique);
  Groups groups{.of_each = starts.cumsum(0).sub(1),
                .first = places_of_nonzero(starts, count).reshape(-1),
                .sizes = {}};
  const Tensor ends = at::cat({groups.first.narrow(0, 1, count - 1), groups.first.new_full(1, n)});
  groups.sizes = ends.sub(groups.first);
  return groups;
}

// Whether a row differs from the one before.
Tensor starts_of(const Tensor& rows) {
  const int64_t n = rows.size(0);
  const Tensor differ = rows.narrow(0, 1, n - 1).ne(rows.narrow(0, 0, n - 1));
  return at::cat(
      {at::ones({1}, differ.options()), differ.dim() == 1 ? differ : differ.flatten(1).any(1)});
}

// There is nothing to count, so the shape is known.
bool is_empty(const Tensor& self) { return self.numel() == 0; }

// (self, sorted, return_inverse, return_counts) of _unique2; _unique has no counts.
bool unique(const TracedCall& call, Stack* stack) {
  const c10::AutoGradMode no_grad(false);
  const std::vector<IValue> args = take_arguments(call, stack);
  const Tensor self = untracked(args[0].toTensor(), call.level);
  if (is_empty(self)) return call_again(call, args, stack), true;
  const auto [values, order] = self.reshape(-1).sort();
  const Groups groups = groups_from(call, starts_of(values));
  stack->emplace_back(values.index_select(0, groups.first));
  const bool inverse = args[2].toBool(), counts = args.size() > 3 && args[3].toBool();
  stack->emplace_back(
      inverse || counts
          ? at::zeros_like(order).scatter(0, order, groups.of_each).reshape(self.sizes())
          : none(order));
  if (args.size() > 3) stack->emplace_back(counts ? groups.sizes : none(order));
  return true;
}

// The values at places along a dim, with the strides that libtorch gives them, and what else is
// asked for.
void push_groups(const Groups& groups, const Tensor& self, int64_t dim, bool inverse, bool counts,
                 Stack* stack) {
  stack->emplace_back(self.movedim(dim, 0).index_select(0, groups.first).movedim(0, dim));
  stack->emplace_back(inverse ? groups.of_each : none(groups.of_each));
  stack->emplace_back(counts ? groups.sizes : none(groups.of_each));
}

// (self, return_inverse, return_counts, dim?)
bool unique_consecutive(const TracedCall& call, Stack* stack) {
  const c10::AutoGradMode no_grad(false);
  const std::vector<IValue> args = take_arguments(call, stack);
  const Tensor self = untracked(args[0].toTensor(), call.level);
  if (is_empty(self)) return call_again(call, args, stack), true;
  const bool flat = args[3].isNone();
  const int64_t dim = flat ? 0 : at::maybe_wrap_dim(args[3].toInt(), self.dim());
  const Tensor rows = flat ? self.reshape(-1) : self;
  Groups groups = groups_from(call, starts_of(flat ? rows : rows.movedim(dim, 0)));
  if (flat) groups.of_each = groups.of_each.reshape(self.sizes());
  push_groups(groups, rows, dim, args[1].toBool(), args[2].toBool(), stack);
  return true;
}

// (self, dim, return_inverse, return_counts)
bool unique_dim_consecutive(const TracedCall& call, Stack* stack) {
  const c10::AutoGradMode no_grad(false);
  const std::vector<IValue> args = take_arguments(call, stack);
  const Tensor self = untracked(args[0].toTensor(), call.level);
  if (is_empty(self)) return call_again(call, args, stack), true;
  const int64_t dim = at::maybe_wrap_dim(args[1].toInt(), self.dim());
  const Groups groups = groups_from(call, starts_of(self.movedim(dim, 0)));
  push_groups(groups, self, dim, args[2].toBool(), args[3].toBool(), stack);
  return true;
}

// (self, dim, sorted, return_inverse, return_counts). Rows are put in order by the operator itself,
// of which the graph reads the inverse alone: its shape is that of the rows.
bool unique_dim(const TracedCall& call, Stack* stack) {
  const c10::AutoGradMode no_grad(false);
  std::vector<IValue> args = take_arguments(call, stack);
  const Tensor self = untracked(args[0].toTensor(), call.level);
  if (is_empty(self)) return call_again(call, args, stack), true;
  if (!has_numbers(innermost(self))) throw_shape_of_numbers(call.op, call.recording);
  const bool inverse = args[3].toBool(), counts = args[4].toBool();
  const int64_t dim = at::maybe_wrap_dim(args[1].toInt(), self.dim()), n = self.size(dim);
  args[3] = true;
  call_again(call, args, stack);
  const Tensor of_each = (*stack)[stack->size() - 2].toTensor();
  torch::jit::drop(*stack, 3);
  const int64_t count = number_of_run(call, of_each.amax(0).add(1), kDifferent, kFixOfUnique);
  const Tensor place = of_each.clamp(0, count - 1);
  const Tensor ones = at::ones({n}, innermost(of_each).options());
  const Tensor all = at::arange(n, innermost(of_each).options());
  const Groups groups{
      .of_each = of_each,
      .first = of_each.new_full({count}, n - 1).scatter_reduce(0, place, all, "amin"),
      .sizes = of_each.new_zeros({count}).scatter_add(0, place, ones)};
  push_groups(groups, self, dim, inverse, counts, stack);
  return true;
}

// --- other counts --------------------------------------------------------------------------------

Tensor weights_of_bins(const Tensor& weights) {
  return weights.scalar_type() == at::kFloat ? weights : weights.to(at::kDouble);
}

// (self, weights?, minlength)
bool bincount(const TracedCall& call, Stack* stack) {
  const c10::AutoGradMode no_grad(false);
  std::vector<IValue> args = take_arguments(call, stack);
  const Tensor self = untracked(args[0].toTensor(), call.level);
  const int64_t minlength = args[2].toInt();
  if (is_empty(self)) return call_again(call, args, stack), true;
  TORCH_CHECK(self.dim() == 1 && at::isIntegralType(self.scalar_type(), /*includeBool=*/false),
              "bincount only supports 1-d non-negative integral inputs.");
  TORCH_CHECK(minlength >= 0, "minlength should be >= 0");
  check_all(self.ge(0), "bincount only supports 1-d non-negative integral inputs.");
  const int64_t bins =
      number_of_run(call, self.amax(0).to(at::kLong).add(1).clamp_min(minlength),
                    "the number of bins", "Pass minlength=, larger than all of the numbers.");
  const Tensor place = self.to(at::kLong).clamp(0, bins - 1);
  const bool weighted = args[1].isTensor() && args[1].toTensor().defined();
  const Tensor added = weighted ? weights_of_bins(untracked(args[1].toTensor(), call.level))
                                : at::ones(self.sizes(), innermost(place).options());
  TORCH_CHECK(added.sizes() == self.sizes(),
              "weights should be 1-d and have the same length as input");
  const Tensor zeros = at::zeros({bins}, innermost(added).options());
  stack->emplace_back(zeros.scatter_add(0, place, added));
  return true;
}

// (repeats, output_size?)
bool repeat_interleave(const TracedCall& call, Stack* stack) {
  if (call.op.schema().overload_name() != "Tensor" || !stack->back().isNone()) return false;
  const c10::AutoGradMode no_grad(false);
  const Tensor repeats = untracked((*stack)[stack->size() - 2].toTensor(), call.level);
  stack->back() =
      number_of_run(call, repeats.sum(), "the sum of the repeats", "Pass output_size=, the sum.");
  return false;
}

// --- the table -----------------------------------------------------------------------------------

const std::unordered_map<std::string, TraceRule>& rules() {
  static const auto* all = new std::unordered_map<std::string, TraceRule>{
      {"aten::_ctc_loss", &ctc_loss},
      {"aten::_to_sparse", &trace_to_sparse},
      {"aten::_to_sparse_bsc", &refuse_to_compressed},
      {"aten::_to_sparse_bsr", &refuse_to_compressed},
      {"aten::_to_sparse_csc", &refuse_to_compressed},
      {"aten::_to_sparse_csr", &refuse_to_compressed},
      {"aten::_unique", &unique},
      {"aten::_unique2", &unique},
      {"aten::_use_cudnn_ctc_loss", &use_cudnn_ctc_loss},
      {"aten::bincount", &bincount},
      {"aten::equal", &equal},
      {"aten::index", &index},
      {"aten::linalg_lstsq", &lstsq},
      {"aten::masked_select", &masked_select},
      {"aten::nonzero", &nonzero},
      {"aten::repeat_interleave", &repeat_interleave},
      {"aten::unique_consecutive", &unique_consecutive},
      {"aten::unique_dim", &unique_dim},
      {"aten::unique_dim_consecutive", &unique_dim_consecutive},
  };
  return *all;
}

}  // namespace

Tensor untracked(const Tensor& t, const LevelPtr& level) {
  const LiftedTensorImpl* impl = as_lifted(t);
  return impl == nullptr ? t : lift(Tensor(impl->value()), impl->bdim(), level);
}

TraceRule find_trace_rule(const c10::OperatorHandle& op) {
  if (op.schema().is_mutable()) return nullptr;  // out= forms
  const auto found = rules().find(op.schema().name());
  return found == rules().end() ? nullptr : found->second;
}

void throw_shape_of_numbers(const c10::OperatorHandle& op, const Recording& recording) {
  unsupported_error(
      recording.transform(), toString(op.operator_name()),
      ": the shape of its result depends on numbers that are computed from the inputs. Use "
      "torchlift.nonzero, masked_select or unique, which take size=, or torch.where in place of "
      "a mask as an index.");
}

}  // namespace torchlift::compile
