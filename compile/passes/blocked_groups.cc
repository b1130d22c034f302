#include "compile/passes/blocked_groups.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/ivalue.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <variant>

#include "compile/passes/evaluate.h"
#include "compile/passes/fusion_groups.h"
#include "compile/passes/node_facts.h"

namespace torchlift::compile {
namespace {

using Dims = std::vector<int64_t>;

size_t index(ValueId id) { return static_cast<size_t>(id); }

int64_t numel(const Dims& sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>());
}

int64_t element_size(const TensorType& type) {
  return static_cast<int64_t>(c10::elementSize(type.dtype));
}

bool is_on_cpu(const TensorType& type) {
  return type.device.is_cpu() && type.layout == c10::kStrided && type.is_static();
}

// The dims that have more than one element, the outermost in memory first.
std::vector<size_t> memory_order(const Dims& sizes, const Dims& strides) {
  std::vector<size_t> order;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1) order.push_back(d);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return strides[a] > strides[b]; });
  return order;
}

// A tensor whose elements fill its memory.
bool is_dense(const Dims& sizes, const Dims& strides) {
  const std::vector<size_t> order = memory_order(sizes, strides);
  int64_t step = 1;
  for (size_t i = order.size(); i-- > 0;) {
    if (strides[order[i]] != step) return false;
    step *= sizes[order[i]];
  }
  return true;
}

// The strides of an operand along the dims of a result, in `order`: 0 where it is broadcast. None
// if its own memory has another order, so that a kernel may walk it otherwise.
std::optional<Dims> strides_along(const TensorType& type, const Dims& sizes,
                                  const std::vector<size_t>& order) {
  const Dims own_sizes = type.concrete_sizes(), own = type.concrete_strides();
  if (own_sizes.size() > sizes.size()) return std::nullopt;
  const size_t missing = sizes.size() - own_sizes.size();
  Dims result;
  int64_t last = -1;  // of those that are no broadcast
  for (const size_t d : order) {
    const bool broadcast = d < missing || own_sizes[d - missing] == 1 || own[d - missing] == 0;
    result.push_back(broadcast ? 0 : own[d - missing]);
    if (broadcast) continue;
    if (last != -1 && result.back() > last) return std::nullopt;
    last = result.back();
  }
  return result;
}

// --- which nodes ---------------------------------------------------------------------------------

// What says nothing of the shape of the result.
bool is_plain(const c10::IValue& value, const std::string& name) {
  if (name == "memory_format") {
    return value.isNone() || value.toInt() == static_cast<int64_t>(c10::MemoryFormat::Preserve);
  }
  return !value.isList();
}

bool has_plain_arguments(const Node& node) {
  const auto op = find_operator(node);
  for (size_t i = 0; i < node.args.size(); ++i) {
    const Argument& argument = node.args[i];
    if (std::holds_alternative<std::monostate>(argument) ||
        std::holds_alternative<ValueRef>(argument)) {
      continue;
    }
    const auto* constant = std::get_if<c10::IValue>(&argument);
    if (constant == nullptr || !is_plain(*constant, op->schema().arguments()[i].name())) {
      return false;
    }
  }
  return true;
}

bool may_run_in_blocks(const Graph& graph, const Node& node, const BlockingOptions& options) {
  const TensorType& type = graph.type(node.results[0].ids[0]);
  if (!is_on_cpu(type) || !has_plain_arguments(node)) return false;
  const Dims sizes = type.concrete_sizes(), strides = type.concrete_strides();
  if (numel(sizes) * element_size(type) < options.min_bytes || !is_dense(sizes, strides)) {
    return false;
  }
  const std::vector<size_t> order = memory_order(sizes, strides);
  for (const ValueId id : arguments_of(node)) {
    if (!is_on_cpu(graph.type(id)) || !strides_along(graph.type(id), sizes, order).has_value()) {
      return false;
    }
  }
  return true;
}

// --- how a group is cut --------------------------------------------------------------------------

class Cutter {
 public:
  Cutter(const Graph& graph, const FusionGroup& group, const BlockingOptions& options)
      : graph_(graph), group_(group), options_(options) {}

  // None if no cut keeps the bits, or is worth it.
  std::optional<BlockedGroup> run() {
    result_.first = group_.first;
    result_.count = group_.count;
    for (const ValueId id : group_.outputs) result_.outputs.push_back({.id = id});
    find_space();
    merge_dims();
    if (result_.sizes.empty() || saved_bytes() < options_.min_saved_bytes || !cut() ||
        !same_on_blocks()) {
      return std::nullopt;
    }
    return std::move(result_);
  }

 private:
  const Node& node(size_t i) const { return graph_.nodes[group_.first + i]; }
  ValueId made(size_t i) const { return node(i).results[0].ids[0]; }

  void find_space() {
    const TensorType& type = graph_.type(made(0));
    const Dims sizes = type.concrete_sizes();
    const std::vector<size_t> order = memory_order(sizes, type.concrete_strides());
    for (const size_t d : order) result_.sizes.push_back(sizes[d]);
    for (const ValueId id : group_.inputs) {
      const TensorType& input = graph_.type(id);
      if (input.dim() == 0) continue;
      const bool single = numel(input.concrete_sizes()) == 1;
      result_.inputs.push_back(
          {.id = id, .strides = strides_along(input, sizes, order).value(), .single = single});
    }
  }

  bool is_one_dim(size_t d) const {
    return std::all_of(result_.inputs.begin(), result_.inputs.end(), [&](const auto& input) {
      return input.strides[d] == input.strides[d + 1] * result_.sizes[d + 1];
    });
  }

  void merge_dims() {
    for (size_t d = result_.sizes.size(); d-- > 1;) {
      if (!is_one_dim(d - 1)) continue;
      result_.sizes[d - 1] *= result_.sizes[d];
      const auto at = static_cast<int64_t>(d);
      result_.sizes.erase(result_.sizes.begin() + at);
      for (auto& input : result_.inputs) input.strides.erase(input.strides.begin() + at - 1);
    }
  }

  int64_t largest_element() const {
    int64_t largest = 1;
    for (size_t i = 0; i < group_.count; ++i) {
      largest = std::max(largest, element_size(graph_.type(made(i))));
    }
    return largest;
  }

  int64_t saved_bytes() const {
    const int64_t elements = numel(graph_.type(made(0)).concrete_sizes());
    int64_t bytes = 0;
    for (size_t i = 0; i < group_.count; ++i) bytes += element_size(graph_.type(made(i)));
    for (const ValueId id : group_.outputs) bytes -= element_size(graph_.type(id));
    return bytes * elements;
  }

  // The most values that are alive at once in a block.
  int64_t live_values() const {
    std::unordered_map<ValueId, size_t> last;
    for (size_t i = 0; i < group_.count; ++i) {
      for (const ValueId id : arguments_of(node(i))) last[id] = i;
    }
    for (const ValueId id : group_.outputs) last.erase(id);
    std::vector<int64_t> change(group_.count + 1, 0);
    for (size_t i = 0; i < group_.count; ++i) {
      const auto found = last.find(made(i));
      if (found == last.end()) continue;
      ++change[i];
      --change[found->second + 1];
    }
    int64_t live = 0, most = 0;
    for (const int64_t each : change) most = std::max(most, live += each);
    return most + static_cast<int64_t>(group_.inputs.size() + group_.outputs.size());
  }

  // NOTE [bits of blocks] in compile/blocked_group.h.
  bool cut() {
    const int64_t bytes = std::min(options_.block_bytes, options_.live_bytes / live_values());
    const int64_t wanted = std::max(bytes / largest_element(), kBlockAlignment);
    const Dims& sizes = result_.sizes;
    int64_t row = numel(sizes);  // elements in one of the split dim
    for (result_.split = 0;; ++result_.split) {
      row /= sizes[result_.split];
      if (row <= wanted) break;
    }
    const int64_t unit = kBlockAlignment / std::gcd(row, kBlockAlignment);
    result_.chunk = std::max(wanted / row / unit, int64_t{1}) * unit;
    // One row of an operand that is broadcast within it would be a single element.
    if (result_.chunk == 1 && sizes.size() > 1) result_.chunk = 2;
    const int64_t rows = sizes[result_.split];
    if (result_.split > 0 && rows * row % kBlockAlignment != 0) return false;
    if (result_.chunk * 2 > rows && result_.split == 0) return false;
    result_.chunk = std::min(result_.chunk, rows);
    return result_.chunk * row <= 4 * wanted;
  }

  // Whether the operators give blocks for blocks, of the types that they have now. Found by running
  // them on two rows: shapes alone would make torch import its Python kernels for some.
  bool same_on_blocks() const {
    Dims sizes(result_.sizes.begin() + static_cast<int64_t>(result_.split), result_.sizes.end());
    sizes[0] = 2;
    std::unordered_map<ValueId, at::Tensor> tensors;
    for (const ValueId id : group_.inputs) tensors[id] = filled({}, {}, graph_.type(id).dtype);
    for (const auto& input : result_.inputs) {
      const Dims strides(input.strides.begin() + static_cast<int64_t>(result_.split),
                         input.strides.end());
      const at::ScalarType dtype = graph_.type(input.id).dtype;
      tensors[input.id] = input.single ? filled({1}, {1}, dtype) : filled(sizes, strides, dtype);
    }
    for (size_t i = 0; i < group_.count; ++i) {
      const at::Tensor result = result_of(node(i), tensors);
      if (!result.defined() || result.sizes() != sizes || !result.is_contiguous() ||
          result.scalar_type() != graph_.type(made(i)).dtype) {
        return false;
      }
      for (const ValueId id : arguments_of(node(i))) {
        if (tensors.at(id).storage().is_alias_of(result.storage())) return false;
      }
      tensors[made(i)] = result;
    }
    return true;
  }

  // Some numbers that are not 0, without the dispatcher: levels may be open.
  static at::Tensor filled(const Dims& sizes, const Dims& strides, at::ScalarType dtype) {
    at::Tensor tensor = at::detail::empty_strided_cpu(sizes, strides, dtype);
    std::memset(tensor.mutable_data_ptr(), 1, tensor.storage().nbytes());
    return tensor;
  }

  // Undefined if the operator does not take such arguments.
  static at::Tensor result_of(const Node& node,
                              const std::unordered_map<ValueId, at::Tensor>& tensors) {
    try {
      return evaluate(node, [&](ValueId id) { return tensors.at(id); }).at(0).at(0);
    } catch (const c10::Error&) {
      return {};
    }
  }

  const Graph& graph_;
  const FusionGroup& group_;
  const BlockingOptions& options_;
  BlockedGroup result_;
};

// The input of the group whose memory the value may take, by a chain of nodes that each write over
// their argument.
ValueId overwritten(const BlockedGroup& group, const Uses& uses,
                    const std::unordered_map<int32_t, ValueId>& in_place, ValueId value) {
  while (true) {
    const int32_t producer = uses.producer[index(value)];
    const auto at = static_cast<size_t>(producer);
    if (producer < 0 || at < group.first || at >= group.first + group.count) return value;
    const auto found = in_place.find(producer);
    if (found == in_place.end()) return kNoValue;
    value = found->second;
  }
}

}  // namespace

std::vector<BlockedGroup> blocked_groups(Graph& graph, const BlockingOptions& options) {
  if (!graph.symbols.empty()) return {};
  Graph ordered = graph;
  const FusionOptions fusion{
      .admit = [&](const Node& node) { return may_run_in_blocks(graph, node, options); },
      .same_strides = true};
  std::vector<BlockedGroup> result;
  for (const FusionGroup& group : fusion_groups(ordered, fusion)) {
    std::optional<BlockedGroup> cut = Cutter(ordered, group, options).run();
    if (cut.has_value()) result.push_back(std::move(*cut));
  }
  if (!result.empty()) graph = std::move(ordered);
  return result;
}

void take_over_memory(const Graph& graph, const std::vector<InPlace>& in_place,
                      std::vector<BlockedGroup>* groups) {
  const Uses uses(graph);
  std::unordered_map<int32_t, ValueId> written;
  for (const InPlace& each : in_place) written.emplace(each.node, each.argument);
  for (BlockedGroup& group : *groups) {
    for (BlockedGroup::Output& output : group.outputs) {
      const ValueId over = overwritten(group, uses, written, output.id);
      if (over != output.id) output.over = over;
    }
  }
}

}  // namespace torchlift::compile
