#include "batching/fallback.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <mutex>
#include <optional>
#include <utility>

#include "batching/out_forms.h"
#include "core/boxed.h"
#include "core/dispatch.h"
#include "core/error.h"
#include "core/promotion.h"
#include "core/random_stream.h"
#include "core/registry.h"

namespace torchlift {
namespace {

using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;

// --- the report ----------------------------------------------------------------------------------

struct Report {
  std::mutex mutex;
  std::map<std::string, FallbackRecord> records;
  std::map<std::string, bool> warned;
};

Report& report() {
  static auto* instance = new Report();
  return *instance;
}

std::atomic<bool> warning_enabled{true};

bool& strict_flag() {
  static thread_local bool strict = false;
  return strict;
}

void record(const std::string& op, int64_t examples, double seconds, int64_t bytes) {
  const std::lock_guard<std::mutex> lock(report().mutex);
  FallbackRecord& entry = report().records[op];
  entry.op = op;
  entry.count += 1;
  entry.examples += examples;
  entry.seconds += seconds;
  entry.bytes += bytes;
}

void warn_once(const std::string& op) {
  if (!warning_enabled.load()) return;
  {
    const std::lock_guard<std::mutex> lock(report().mutex);
    if (!report().warned.emplace(op, true).second) return;
  }
  TORCH_WARN(
      "There is a performance drop because we have not yet implemented the batching rule for ", op,
      ". It runs once for each example. torchlift.fallback_report() tells what this costs, "
      "torchlift.strict() makes it an error.");
}

// --- the loop ------------------------------------------------------------------------------------

// An operator whose result shares memory with an argument cannot be looped over: the stacked copies
// would not be views, and writes through them would be lost.
void check_loopable(const OperatorHandle& op) {
  const auto& schema = op.schema();
  for (const auto& result : schema.returns()) {
    if (result.alias_info() != nullptr && !result.alias_info()->isWrite()) {
      unsupported_error(
          "vmap", "torchlift has no batching rule for the view operator ",
          toString(op.operator_name()),
          ", and a loop cannot return a view. Use .clone() of an operator it has, such "
          "as reshape, select or gather.");
    }
  }
}

void promote_targets(const OperatorHandle& op, const std::vector<IValue>& args,
                     const LevelPtr& level) {
  for (size_t i = 0; i < args.size(); ++i) {
    if (!writes_argument(op, i)) continue;
    for_each_tensor(args[i],
                    [&](const at::Tensor& t) { promote(op.schema().name().c_str(), t, level); });
  }
}

// The arguments of one example: its slice of batched values. With an empty batch there is none;
// zeros stand in, to find the shapes of the results.
IValue example(const IValue& arg, const Level& level, int64_t index, bool written) {
  return map_tensors(arg, [&](const at::Tensor& t) {
    const Lowered lowered = lower(t, level);
    if (!lowered.bdim) return lowered.value;
    if (level.size() == 0) return at::zeros(t.sizes(), lowered.value.options());
    const at::Tensor value = lowered.value.select(*lowered.bdim, index);
    // Some kernels (_embedding_bag, fractional_max_pool3d_backward...) read an index tensor from
    // its first element on, whatever its strides say.
    const bool is_index = at::isIntegralType(value.scalar_type(), /*includeBool=*/false);
    return is_index && !written ? value.contiguous() : value;
  });
}

// NOTE [gradient flags]
// A few operators take a flag compute_x_grad beside an argument x, into which their callers put
// x.requires_grad. A tensor of a level says no where only a gradient outside of the level tracks
// its value: asked again of the value, the answer may be yes.
void refresh_gradient_flags(const OperatorHandle& op, Stack* call) {
  if (!c10::GradMode::is_enabled()) return;
  const auto& formals = op.schema().arguments();
  for (size_t i = 0; i < formals.size(); ++i) {
    const std::string& flag = formals[i].name();
    if (!(*call)[i].isBool() || flag.size() < 14 || flag.rfind("compute_", 0) != 0) continue;
    if (flag.compare(flag.size() - 5, 5, "_grad") != 0) continue;
    const auto of = op.schema().argumentIndexWithName(flag.substr(8, flag.size() - 13));
    if (!of.has_value() || !(*call)[*of].isTensor()) continue;
    const at::Tensor& t = (*call)[*of].toTensor();
    if (t.defined() && t.requires_grad()) (*call)[i] = true;
  }
}

at::Tensor stacked(const std::vector<at::Tensor>& examples, int64_t batch_size) {
  if (batch_size > 0) return at::stack(examples);
  c10::SmallVector<int64_t, 8> sizes{0};
  sizes.append(examples[0].sizes().begin(), examples[0].sizes().end());
  return at::empty(sizes, examples[0].options());
}

// Of the value in all levels: a lifted tensor itself has no layout of its own.
bool is_strided(const at::Tensor& t) {
  at::Tensor value = t;
  while (const LiftedTensorImpl* impl = as_lifted(value)) value = at::Tensor(impl->value());
  return value.layout() == at::kStrided;
}

// Collects the results of all examples at one position of the schema.
class ResultStack {
 public:
  void add(const OperatorHandle& op, const IValue& result) {
    for_each_tensor(result, [&](const at::Tensor& t) { check_stackable(op, t); });
    if (result.isTensor()) {
      examples_.push_back({result.toTensor()});
    } else if (result.isTensorList()) {
      is_list_ = true;
      examples_.push_back(result.toTensorVector());
    } else {
      unsupported_error("vmap", toString(op.operator_name()), " returns a ", result.tagKind(),
                        ", which cannot differ between the examples of a batch.");
    }
  }

  IValue lifted(const LevelPtr& level, int64_t* bytes) const {
    std::vector<at::Tensor> results;
    for (size_t k = 0; k < examples_[0].size(); ++k) results.push_back(lifted_at(k, level, bytes));
    return is_list_ ? IValue(results) : IValue(results[0]);
  }

 private:
  // See NOTE [nested and quantized tensors] in core/lifted_tensor.cc.
  static void check_stackable(const OperatorHandle& op, const at::Tensor& t) {
    const bool nested = t.is_nested();
    if (!nested && !t.is_quantized()) return;
    unsupported_error(
        "vmap", toString(op.operator_name()), " returns a ", nested ? "nested" : "quantized",
        " tensor, which cannot differ between the examples of a batch. ",
        nested ? "Pad the examples to one shape, and mask."
               : "Use fake_quantize_per_tensor_affine, which rounds as it does and returns an "
                 "ordinary tensor, or quantize the result of vmap.");
  }

  at::Tensor lifted_at(size_t position, const LevelPtr& level, int64_t* bytes) const {
    std::vector<at::Tensor> column;
    for (const auto& each : examples_) column.push_back(each.at(position));
    if (!column[0].defined()) return {};
    if (is_lifted(column[0]) && !is_strided(column[0])) {
      unsupported_error("vmap",
                        "a result is sparse, and nested levels of vmap cannot stack sparse "
                        "tensors. Return it from one vmap only, or compute with dense tensors.");
    }
    for (const at::Tensor& each : column) {
      if (!each.sizes().equals(column[0].sizes())) {
        unsupported_error(
            "vmap", "the examples of a batch gave results of different shapes, ", column[0].sizes(),
            " and ", each.sizes(),
            ", so they cannot be stacked. Pad them to one shape inside the function.");
      }
    }
    const at::Tensor result = stacked(column, level->size());
    *bytes += result.numel() * static_cast<int64_t>(result.element_size());
    return lift(result, 0, level);
  }

  std::vector<std::vector<at::Tensor>> examples_;
  bool is_list_ = false;
};

// Starts the rows of a random operator that draws reproducible numbers: see RowDraws.
void begin_rows(const OperatorHandle& op, const Level& level, const std::vector<IValue>& args,
                std::optional<RowDraws>& rows) {
  if (!op.hasTag(at::Tag::nondeterministic_seeded)) return;
  if (level.randomness() != Randomness::kReproducible && RowDraws::current() == nullptr) return;
  std::optional<at::Generator> generator;
  const auto place = op.schema().argumentIndexWithName("generator");
  if (place.has_value() && !args[*place].isNone()) generator = args[*place].toGenerator();
  rows.emplace(level, generator, op.schema().name().c_str());
}

std::vector<at::Tensor> written_tensors(const OperatorHandle& op, const Stack& args) {
  std::vector<at::Tensor> written;
  for (size_t i = 0; i < args.size(); ++i) {
    if (!writes_argument(op, i)) continue;
    for_each_tensor(args[i], [&](const at::Tensor& t) { written.push_back(t); });
  }
  return written;
}

std::vector<std::vector<int64_t>> sizes_of(const std::vector<at::Tensor>& tensors) {
  std::vector<std::vector<int64_t>> sizes;
  for (const at::Tensor& t : tensors) sizes.push_back(t.sizes().vec());
  return sizes;
}

// Throws if the operator gave one of its targets another shape.
void check_not_resized(const std::string& name, const std::vector<at::Tensor>& targets,
                       const std::vector<std::vector<int64_t>>& sizes) {
  for (size_t i = 0; i < targets.size(); ++i) {
    if (targets[i].sizes() == at::IntArrayRef(sizes[i])) continue;
    unsupported_error("vmap", name, " writes a result of shape ", targets[i].sizes(),
                      " into a tensor of shape ", at::IntArrayRef(sizes[i]),
                      ". A batched tensor cannot change its shape in place, since its memory "
                      "holds all examples. Give a target of the result's shape, or use the "
                      "operator that returns a new tensor.");
  }
}

void loop(const OperatorHandle& op, const LevelPtr& level, Stack* stack) {
  if (run_out_form(op, level, stack)) return;
  const std::string name = toString(op.operator_name());
  if (is_strict()) {
    unsupported_error("vmap", "strict mode: torchlift has no batching rule for ", name,
                      ", and would run it once for each of ", level->size(),
                      " examples. Leave strict mode to allow that, or use other operators.");
  }
  check_loopable(op);
  warn_once(name);
  const auto start = std::chrono::steady_clock::now();
  const auto& schema = op.schema();
  const std::vector<IValue> args = torch::jit::pop(*stack, schema.arguments().size());
  promote_targets(op, args, level);
  std::vector<ResultStack> results(schema.returns().size());
  const int64_t runs = std::max<int64_t>(level->size(), 1);
  std::optional<WriteScopes> writing(std::in_place, op, args);
  std::optional<RowDraws> rows;
  begin_rows(op, *level, args, rows);
  for (int64_t i = 0; i < runs; ++i) {
    if (rows.has_value()) rows->begin(i);
    Stack call;
    for (size_t a = 0; a < args.size(); ++a) {
      call.push_back(example(args[a], *level, i, writes_argument(op, a)));
    }
    refresh_gradient_flags(op, &call);
    const std::vector<at::Tensor> targets = written_tensors(op, call);
    const std::vector<std::vector<int64_t>> sizes = sizes_of(targets);
    op.callBoxed(call);
    check_not_resized(name, targets, sizes);
    for (size_t r = 0; r < results.size(); ++r) results[r].add(op, call[r]);
  }
  writing.reset();
  rows.reset();
  int64_t bytes = 0;
  std::vector<IValue> written;
  for (size_t i = 0; i < args.size(); ++i) {
    if (writes_argument(op, i)) written.push_back(args[i]);
  }
  size_t next = 0;
  for (size_t r = 0; r < results.size(); ++r) {
    const auto* alias = schema.returns()[r].alias_info();
    const bool is_argument = alias != nullptr && alias->isWrite() && next < written.size();
    stack->push_back(is_argument ? written[next++] : results[r].lifted(level, &bytes));
  }
  const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
  record(name, level->size(), spent.count(), bytes);
}

// Installed when the library is loaded.
[[maybe_unused]] const bool kInstalled = [] {
  set_fallback_rule(&loop);
  return true;
}();

}  // namespace

std::vector<FallbackRecord> fallback_report() {
  std::vector<FallbackRecord> records;
  {
    const std::lock_guard<std::mutex> lock(report().mutex);
    for (const auto& [op, entry] : report().records) records.push_back(entry);
  }
  std::sort(records.begin(), records.end(),
            [](const auto& a, const auto& b) { return a.seconds > b.seconds; });
  return records;
}

void reset_fallback_report() {
  const std::lock_guard<std::mutex> lock(report().mutex);
  report().records.clear();
}

bool set_fallback_warning_enabled(bool enabled) { return warning_enabled.exchange(enabled); }

StrictScope::StrictScope(bool strict) : saved_(std::exchange(strict_flag(), strict)) {}

StrictScope::~StrictScope() { strict_flag() = saved_; }

bool is_strict() { return strict_flag(); }

}  // namespace torchlift
