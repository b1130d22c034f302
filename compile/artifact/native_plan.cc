#include "compile/artifact/native_plan.h"

#include <ATen/core/enum_tag.h>
#include <ATen/core/function_schema.h>

#include <algorithm>
#include <optional>
#include <string>
#include <unordered_set>
#include <utility>

#include "compile/memory_range.h"
#include "compile/passes/dead_code.h"
#include "compile/passes/functionalize.h"
#include "compile/passes/written_memory.h"
#include "core/error.h"

namespace torchlift::compile {
namespace {

bool aliases(const c10::Argument& argument) { return argument.alias_info() != nullptr; }

class Finish {
 public:
  explicit Finish(const Graph& graph) : graph_(graph), uses_(graph) {
    // A node that writes into a value has that value as its result.
    for (const ValueId id : graph.inputs) given_.insert(id);
    for (const Constant& constant : graph.constants) given_.insert(constant.id);
    for (const Node& node : graph.nodes) note_reshaped(node);
  }

  // Sets what of the plan belongs to it, and gives the values that the program must compute.
  std::vector<ValueId> make(NativePlan& plan) {
    Graph& finish = plan.finish;
    finish = graph_;
    finish.nodes.clear();
    for (const ValueId id : graph_.outputs) {
      if (id != kNoValue) resolve(id, finish);
    }
    finish.inputs.insert(finish.inputs.end(), roots_.begin(), roots_.end());
    dead_code(finish);
    plan.results = roots_.size();
    return roots_;
  }

 private:
  // t_(), squeeze_(): a view of such a value is another one before and after.
  void note_reshaped(const Node& node) {
    const auto op = find_operator(node);
    if (!op.has_value() || !op->hasTag(at::Tag::inplace_view)) return;
    for (const ValueId id : results_of(node)) reshaped_.insert(id);
  }

  // Sees to it that `finish` has the value.
  void resolve(ValueId id, Graph& finish) {
    if (!seen_.insert(id).second || given_.count(id) != 0) return;
    const int32_t producer = uses_.producer[static_cast<size_t>(id)];
    const Node& node = graph_.nodes[static_cast<size_t>(producer)];
    const ValueId base = base_of(node, id);
    if (base == kNoValue || reshaped_.count(id) != 0 || reshaped_.count(base) != 0) {
      roots_.push_back(id);
      return;
    }
    resolve(base, finish);
    if (copied_.insert(producer).second) finish.nodes.push_back(node);
  }

  // The one tensor that the value is a view of. Where a schema is not clear about that, the value
  // counts as one that owns its memory.
  static ValueId base_of(const Node& node, ValueId id) {
    const auto op = find_operator(node);
    if (!op.has_value() || effects_of(node).writes) return kNoValue;
    const std::vector<c10::Argument>& returns = op->schema().returns();
    for (size_t r = 0; r < node.results.size(); ++r) {
      const std::vector<ValueId>& ids = node.results[r].ids;
      const bool is_result = std::find(ids.begin(), ids.end(), id) != ids.end();
      if (is_result && aliases(returns[r])) return aliased_argument(node, op->schema());
    }
    return kNoValue;
  }

  static ValueId aliased_argument(const Node& node, const c10::FunctionSchema& schema) {
    ValueId found = kNoValue;
    for (size_t i = 0; i < node.args.size(); ++i) {
      const std::vector<ValueId> ids = values_in(node.args[i]);
      if (ids.empty()) continue;
      // A view of what may be chosen (a list), or with another tensor as argument, which is not
      // there any more when the view is made.
      if (found != kNoValue || ids.size() > 1 || !aliases(schema.arguments()[i])) return kNoValue;
      found = ids[0];
    }
    return found;
  }

  const Graph& graph_;
  const Uses uses_;
  std::unordered_set<ValueId> given_;
  std::unordered_set<ValueId> reshaped_;
  std::unordered_set<ValueId> seen_;
  std::unordered_set<int32_t> copied_;  // nodes of the program that are in `finish`
  std::vector<ValueId> roots_;
};

void check_devices(const Graph& graph) {
  for (const Value& value : graph.values) {
    if (value.type.device.is_cpu()) continue;
    unsupported_error("compile", "value ", value.name, " of the program is on ",
                      value.type.device.str(),
                      ", and machine code is made for the CPU alone. Save it without a backend.");
  }
}

// Makes the constants inputs, but for numbers, whose say in type promotion no tensor has.
void constants_to_inputs(NativePlan& plan) {
  std::vector<Constant> numbers;
  for (const Constant& constant : plan.computed.constants) {
    if (constant.tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
      numbers.push_back(constant);
    } else {
      plan.computed.inputs.push_back(constant.id);
      plan.constants.push_back(constant.tensor);
    }
  }
  plan.computed.constants = std::move(numbers);
}

// Null for a tensor without bytes.
const void* memory_of(const at::Tensor& t) {
  return t.has_storage() && t.nbytes() > 0 ? t.storage().data() : nullptr;
}

// A compiler may leave out a copy, and give an input, one tensor twice, or a part of another one,
// where the program gives tensors of their own.
void give_own_memory(const std::vector<at::Tensor>& inputs, std::vector<at::Tensor>& found) {
  std::unordered_set<const void*> taken = {nullptr};
  for (const at::Tensor& input : inputs) taken.insert(memory_of(input));
  for (at::Tensor& each : found) {
    const void* const memory = memory_of(each);
    if (memory == nullptr) continue;
    if (!taken.insert(memory).second || each.storage_offset() != 0) each = each.clone();
  }
}

}  // namespace

NativePlan native_plan(const Graph& graph) {
  check_devices(graph);
  NativePlan plan;
  plan.computed = graph;
  plan.computed.outputs = Finish(graph).make(plan);
  const Functionalized done = functionalize(plan.computed);
  for (const InputUpdate& update : done.updates) {
    if (static_cast<size_t>(update.output) != plan.results + plan.updates.size()) {
      transform_error("compile", "updates of inputs do not follow the results.");
    }
    plan.updates.push_back(update.input);
  }
  plan.constants = done.state;
  plan.state = done.state.size();
  dead_code(plan.computed);
  for (size_t i = 0; i < plan.results; ++i) {
    const ValueId id = plan.finish.inputs[graph.inputs.size() + i];
    plan.finish.value(id).type = plan.computed.type(plan.computed.outputs[i]);
  }
  constants_to_inputs(plan);
  return plan;
}

NativeFrame::NativeFrame(const Graph& graph)
    : plan_(native_plan(graph)), finish_(plan_.finish, {.state = written_constants(graph)}) {}

std::vector<int64_t> NativeFrame::dims(const std::vector<at::Tensor>& inputs) const {
  std::vector<int64_t> sizes;
  for (const Symbol& symbol : plan_.computed.symbols) {
    sizes.push_back(inputs[static_cast<size_t>(symbol.input)].size(symbol.dim));
  }
  return sizes;
}

bool NativeFrame::can_run(const std::vector<at::Tensor>& inputs) const {
  const std::vector<int64_t> sizes = dims(inputs);
  if (std::any_of(sizes.begin(), sizes.end(), [](int64_t size) { return size < kLeastDim; })) {
    return false;
  }
  const std::vector<at::Tensor> all = with_constants(inputs);
  return std::none_of(plan_.updates.begin(), plan_.updates.end(), [&](int32_t written) {
    const auto i = static_cast<size_t>(written);
    for (size_t j = 0; j < all.size(); ++j) {
      const bool has_bytes = all[i].nbytes() > 0 && all[j].nbytes() > 0;
      if (i != j && has_bytes && memory_range(all[i]).overlaps(memory_range(all[j]))) return true;
    }
    return false;
  });
}

void NativeFrame::check(const std::vector<at::Tensor>& found,
                        const std::vector<int64_t>& dims) const {
  const std::vector<ValueId>& outputs = plan_.computed.outputs;
  if (found.size() != outputs.size()) {
    unsupported_error("compile", "the machine code gave ", found.size(),
                      " tensors, and should give ", outputs.size(), ". Take backend=\"eager\".");
  }
  for (size_t i = 0; i < found.size(); ++i) {
    const TensorType& type = plan_.computed.type(outputs[i]);
    const std::vector<int64_t> sizes = type.concrete_sizes(dims);
    if (found[i].defined() && found[i].scalar_type() == type.dtype &&
        found[i].sizes() == at::IntArrayRef(sizes)) {
      continue;
    }
    unsupported_error("compile", "the machine code gave ",
                      found[i].defined() ? "a " + type_of(found[i]).str() : "no tensor",
                      " where the graph gives a ", type.str(plan_.computed.symbol_names()),
                      ". Take backend=\"eager\".");
  }
}

std::vector<at::Tensor> NativeFrame::with_constants(const std::vector<at::Tensor>& inputs) const {
  std::vector<at::Tensor> all = inputs;
  all.insert(all.end(), plan_.constants.begin(), plan_.constants.end());
  return all;
}

std::vector<at::Tensor> NativeFrame::run(const std::vector<at::Tensor>& inputs,
                                         const Compute& compute) const {
  std::optional<StateGate::Run> one;
  std::optional<StateGate::LateUpdate> late;
  if (plan_.state > 0) {
    one.emplace(*gate_);
    late.emplace(*gate_);
  }
  const std::vector<at::Tensor> all = with_constants(inputs);
  std::vector<at::Tensor> found = compute(all);
  check(found, dims(inputs));
  give_own_memory(all, found);
  std::vector<at::Tensor> given = inputs;
  given.insert(given.end(), found.begin(), found.begin() + static_cast<int64_t>(plan_.results));
  std::vector<at::Tensor> outputs = finish_.run(given);
  for (size_t i = 0; i < plan_.updates.size(); ++i) {
    all[static_cast<size_t>(plan_.updates[i])].copy_(found[plan_.results + i]);
  }
  return outputs;
}

}  // namespace torchlift::compile
