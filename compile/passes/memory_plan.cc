#include "compile/passes/memory_plan.h"

#include <algorithm>
#include <numeric>

#include "compile/passes/evaluate.h"
#include "compile/passes/node_facts.h"
#include "core/error.h"

namespace torchlift::compile {
namespace {

constexpr int32_t kNever = -1;

int64_t aligned(int64_t bytes) {
  return (bytes + kArenaAlignment - 1) / kArenaAlignment * kArenaAlignment;
}

// NOTE [lifetimes]
// A value that a node gives, and that is no view, is an allocation. Values that may share memory
// are of one class (AliasClasses, made finer here by what reshape and its like do with the types at
// hand); an allocation is alive from its node to the last node that reads numbers of its class
// (numbers_read_by: for the shape alone it is not kept). A class that an
// output is of outlives the run, and one that an input or a constant is of was there before.
class Planner {
 public:
  Planner(const Graph& graph, const std::vector<int64_t>& symbols)
      : graph_(graph), symbols_(symbols), parents_(graph.values.size()) {
    std::iota(parents_.begin(), parents_.end(), 0);
  }

  MemoryPlan run() {
    const size_t count = graph_.values.size();
    plan_.buffer_of.assign(count, -1);
    allocation_.assign(count, false);
    find_classes();
    find_lifetimes();
    describe_classes();
    place_values();
    pack();
    measure_eager();
    return std::move(plan_);
  }

 private:
  static size_t index(int32_t id) { return static_cast<size_t>(id); }

  int32_t find(int32_t id) {
    while (parents_[index(id)] != id) {
      id = parents_[index(id)] = parents_[index(parents_[index(id)])];
    }
    return id;
  }
  void merge(ValueId a, ValueId b) { parents_[index(find(b))] = find(a); }

  // --- classes ---

  // Sparse tensors that the graph returns, and that no node reads (NOTE [sparse values in graphs]
  // in compile/trace_sparse.h), are as large as their numbers ask for: they have no part in the
  // plan.
  std::vector<bool> sparse_results() const {
    std::vector<bool> found(graph_.values.size(), false);
    for (const ValueId id : graph_.outputs) {
      if (id != kNoValue) found[index(id)] = graph_.type(id).layout != c10::kStrided;
    }
    for (const Node& node : graph_.nodes) {
      for (const ValueId id : arguments_of(node)) found[index(id)] = false;
    }
    return found;
  }

  void find_classes() {
    const std::vector<bool> sparse = sparse_results();
    for (const Node& node : graph_.nodes) {
      if (node.is_control_flow()) {
        share_all(node);  // a branch may give one of its operands
      } else if (may_view(node)) {
        share(node);
      } else {
        for (const ValueId result : results_of(node)) {
          allocation_[index(result)] = !sparse[index(result)];
        }
      }
    }
  }

  // Each result may be a view, or not.
  void share_all(const Node& node) {
    for (const ValueId result : results_of(node)) {
      allocation_[index(result)] = true;
      for (const ValueId argument : arguments_of(node)) merge(argument, result);
    }
  }

  // By what the operator does with these types: reshape may copy.
  void share(const Node& node) {
    std::vector<std::vector<Inferred>> inferred;
    try {
      inferred = infer(graph_, node);
    } catch (const UnsupportedError&) {
      return share_all(node);
    }
    for (size_t i = 0; i < node.results.size(); ++i) {
      for (size_t k = 0; k < node.results[i].ids.size(); ++k) {
        const ValueId id = node.results[i].ids[k];
        if (id == kNoValue) continue;
        if (inferred.at(i).at(k).shares == kNoValue) {
          allocation_[index(id)] = true;
        } else {
          merge(inferred[i][k].shares, id);
        }
      }
    }
  }

  void find_lifetimes() {
    const size_t count = graph_.values.size();
    last_.assign(count, kNever);
    escapes_.assign(count, false);
    external_.assign(count, false);
    allocations_.assign(count, 0);
    buffers_.assign(count, -1);
    for (const ValueId id : graph_.inputs) external_[index(find(id))] = true;
    for (const Constant& constant : graph_.constants) external_[index(find(constant.id))] = true;
    for (size_t i = 0; i < graph_.nodes.size(); ++i) {
      for (const ValueId id : numbers_read_by(graph_.nodes[i])) {
        last_[index(find(id))] = static_cast<int32_t>(i);
      }
      for (const ValueId id : results_of(graph_.nodes[i])) {
        int32_t& last = last_[index(find(id))];
        last = std::max(last, static_cast<int32_t>(i));
        if (allocation_[index(id)]) ++allocations_[index(find(id))];
      }
    }
    for (const ValueId id : graph_.outputs) {
      if (id != kNoValue) escapes_[index(find(id))] = true;
    }
  }

  // --- bytes ---

  int64_t bytes(ValueId id) const {
    const TensorType& type = graph_.type(id);
    if (type.layout != c10::kStrided) {
      unsupported_error("compile", "memory is planned for strided tensors, and ",
                        graph_.value(id).name, " is ", type.str(), ".");
    }
    const auto sizes = type.concrete_sizes(symbols_), strides = type.concrete_strides(symbols_);
    int64_t last = 0;
    for (size_t d = 0; d < sizes.size(); ++d) {
      if (sizes[d] == 0) return 0;
      last += (sizes[d] - 1) * strides[d];
    }
    return (last + 1) * static_cast<int64_t>(c10::elementSize(type.dtype));
  }

  // Each element of it has its own place, and there are no others.
  bool is_dense(ValueId id) const {
    int64_t numel = static_cast<int64_t>(c10::elementSize(graph_.type(id).dtype));
    for (const int64_t size : graph_.type(id).concrete_sizes(symbols_)) numel *= size;
    return numel == bytes(id);
  }

  void describe_classes() {
    plan_.allocated.assign(graph_.values.size(), 0);
    for (size_t i = 0; i < graph_.values.size(); ++i) {
      const int32_t root = find(static_cast<int32_t>(i));
      plan_.class_of.push_back(root);
      plan_.outlives.push_back(escapes_[index(root)] || external_[index(root)]);
      if (allocation_[i]) plan_.allocated[i] = bytes(static_cast<ValueId>(i));
    }
  }

  // --- buffers ---

  void place_values() {
    for (size_t i = 0; i < graph_.nodes.size(); ++i) {
      const auto at = static_cast<int32_t>(i);
      for (const ValueId id : results_of(graph_.nodes[i])) {
        if (!allocation_[index(id)]) continue;
        if (escapes_[index(find(id))]) {
          plan_.output_bytes += bytes(id);
        } else if (!reuse(graph_.nodes[i], at, id)) {
          buffers_[index(find(id))] = plan_.buffer_of[index(id)] =
              static_cast<int32_t>(plan_.buffers.size());
          plan_.buffers.push_back(
              {.offset = 0, .bytes = bytes(id), .first = at, .last = last_[index(find(id))]});
        }
      }
    }
  }

  // Those that an operator's result may be written over, if nobody reads them any more.
  static std::vector<ValueId> replaceable(const Node& node) {
    if (is_pointwise(node)) return arguments_of(node);
    if (!replaces_elements(node)) return {};
    const std::vector<ValueId> first = values_in(node.args[0]);
    for (size_t i = 1; i < node.args.size(); ++i) {
      for (const ValueId id : values_in(node.args[i])) {
        if (id == first.at(0)) return {};  // It would be read while it is written.
      }
    }
    return first;
  }

  bool reuse(const Node& node, int32_t at, ValueId id) {
    if (!is_pure(node) || node.results.size() != 1 || !is_dense(id)) return false;
    for (const ValueId argument : replaceable(node)) {
      const int32_t root = find(argument);
      if (last_[index(root)] != at || !is_all_of_a_buffer(argument) ||
          graph_.type(argument) != graph_.type(id) || is_read_otherwise(node, argument)) {
        continue;
      }
      const int32_t buffer = buffers_[index(root)];
      buffers_[index(find(id))] = plan_.buffer_of[index(id)] = buffer;
      plan_.buffers[index(buffer)].last = last_[index(find(id))];
      plan_.in_place.push_back({.node = at, .argument = argument});
      return true;
    }
    return false;
  }

  // Whether the value, which may be a view, has all of the memory of its class, and this is one
  // allocation of this run.
  bool is_all_of_a_buffer(ValueId id) {
    const size_t root = index(find(id));
    return buffers_[root] >= 0 && allocations_[root] == 1 && !external_[root] &&
           bytes(id) == plan_.buffers[index(buffers_[root])].bytes;
  }

  // Whether the node reads the memory of its argument by another view, too: in another order.
  bool is_read_otherwise(const Node& node, ValueId argument) {
    const auto all = arguments_of(node);
    return std::any_of(all.begin(), all.end(), [&](ValueId other) {
      return other != argument && find(other) == find(argument);
    });
  }

  static bool overlap(const Buffer& a, const Buffer& b) {
    return a.first <= b.last && b.first <= a.last;
  }

  // The largest first, each at the lowest place where all that is alive with it leaves room.
  void pack() {
    std::vector<size_t> order(plan_.buffers.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
      return plan_.buffers[a].bytes > plan_.buffers[b].bytes;
    });
    std::vector<size_t> placed;  // by offset
    for (const size_t b : order) {
      Buffer& buffer = plan_.buffers[b];
      const int64_t size = aligned(buffer.bytes);
      int64_t offset = 0;
      for (const size_t other : placed) {
        const Buffer& there = plan_.buffers[other];
        if (!overlap(buffer, there)) continue;
        if (offset + size <= there.offset) break;
        offset = std::max(offset, there.offset + aligned(there.bytes));
      }
      buffer.offset = offset;
      plan_.arena_bytes = std::max(plan_.arena_bytes, offset + size);
      const auto place = std::upper_bound(
          placed.begin(), placed.end(), offset,
          [&](int64_t value, size_t other) { return value < plan_.buffers[other].offset; });
      placed.insert(place, b);
    }
    for (size_t i = 0; i < graph_.nodes.size(); ++i) {
      int64_t live = 0;
      for (const Buffer& buffer : plan_.buffers) {
        const auto at = static_cast<int32_t>(i);
        if (buffer.first <= at && at <= buffer.last) live += aligned(buffer.bytes);
      }
      plan_.live_bytes = std::max(plan_.live_bytes, live);
    }
  }

  void measure_eager() {
    std::vector<int64_t> change(graph_.nodes.size() + 1, 0);
    for (size_t i = 0; i < graph_.nodes.size(); ++i) {
      for (const ValueId id : results_of(graph_.nodes[i])) {
        if (!allocation_[index(id)]) continue;
        change[i] += bytes(id);
        const int32_t root = find(id);
        if (!escapes_[index(root)]) change[index(last_[index(root)]) + 1] -= bytes(id);
      }
    }
    int64_t live = 0;
    for (const int64_t each : change) {
      live += each;
      plan_.eager_peak_bytes = std::max(plan_.eager_peak_bytes, live);
    }
  }

  const Graph& graph_;
  const std::vector<int64_t>& symbols_;
  std::vector<int32_t> parents_;  // of values: classes
  std::vector<bool> allocation_;  // of values
  // Of classes, by their representative.
  std::vector<int32_t> last_;
  std::vector<int32_t> allocations_;  // how many of its values are
  std::vector<int32_t> buffers_;      // where they lie; -1: nowhere yet, or not in the arena
  std::vector<bool> escapes_;
  std::vector<bool> external_;
  MemoryPlan plan_;
};

}  // namespace

MemoryPlan memory_plan(const Graph& graph, const std::vector<int64_t>& symbols) {
  require_functional(graph, "memory_plan");
  return Planner(graph, symbols).run();
}

}  // namespace torchlift::compile
