#include "compile/partition/partition.h"

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <set>
#include <string_view>
#include <utility>

#include "compile/partition/min_cut.h"
#include "compile/passes/node_facts.h"
#include "core/error.h"

namespace torchlift::compile {
namespace {

// NOTE [three kinds of nodes]
// Backward nodes depend on a tangent. Forward nodes are those that the outputs need, and those that
// must run once: what draws random numbers, and what has no results. Both sets are given by the
// joint graph. The others depend on primals alone, and only gradients need them: they belong to the
// backward pass, unless their result is cheaper to save than what they read.
class Joint {
 public:
  Joint(const Graph& graph, const PartitionOptions& options)
      : graph_(graph), options_(options), uses_(graph), classes_(graph) {
    check();
    mark_backward();
    mark_forward();
    find_storages();
  }

  const Graph& graph() const { return graph_; }
  const Uses& uses() const { return uses_; }
  bool is_backward(size_t node) const { return backward_[node]; }
  bool is_forward(size_t node) const { return forward_[node]; }
  const std::vector<ValueId>& primals() const { return primals_; }
  std::vector<ValueId> gradients() const {
    return {graph_.outputs.begin() + static_cast<std::ptrdiff_t>(options_.outputs),
            graph_.outputs.end()};
  }
  bool is_constant(ValueId id) const { return constants_.count(id) > 0; }
  bool is_primal(ValueId id) const {
    return std::find(primals_.begin(), primals_.end(), id) != primals_.end();
  }

  // Whether the value exists before the backward pass begins, or can be computed then without a
  // tangent.
  bool is_primal_value(ValueId id) const {
    const int32_t producer = uses_.producer[static_cast<size_t>(id)];
    if (producer >= 0) return !backward_[static_cast<size_t>(producer)];
    return is_primal(id);
  }

  // The memory that a saved value keeps.
  int64_t bytes(ValueId id) const { return own_bytes(storage_[static_cast<size_t>(id)]); }
  ValueId storage(ValueId id) const { return storage_[static_cast<size_t>(id)]; }
  int64_t elements(ValueId id) const {
    int64_t numel = 1;
    for (const int64_t size : graph_.type(id).concrete_sizes(options_.symbols)) numel *= size;
    return numel;
  }
  int64_t own_bytes(ValueId id) const {
    const TensorType& type = graph_.type(id);
    if (type.layout != c10::kStrided) {
      unsupported_error("compile", "a joint graph of strided tensors can be partitioned, and ",
                        graph_.value(id).name, " is ", type.str(), ".");
    }
    const auto sizes = type.concrete_sizes(options_.symbols);
    const auto strides = type.concrete_strides(options_.symbols);
    auto bytes = static_cast<int64_t>(c10::elementSize(type.dtype));
    for (size_t d = 0; d < sizes.size(); ++d) bytes *= strides[d] == 0 ? 1 : sizes[d];
    return bytes;
  }

  Partition split(std::vector<ValueId> saved) const;

 private:
  void check() {
    require_functional(graph_, "a partition");
    if (options_.primals > graph_.inputs.size() || options_.outputs > graph_.outputs.size()) {
      transform_error("compile", "the joint graph has ", graph_.inputs.size(), " inputs and ",
                      graph_.outputs.size(), " outputs, which is less than the ", options_.primals,
                      " primals and ", options_.outputs,
                      " outputs of the function. Give the "
                      "numbers of the function that was differentiated.");
    }
    if (options_.symbols.size() < graph_.symbols.size()) {
      transform_error("compile", "the joint graph has ", graph_.symbols.size(),
                      " dynamic dims, and sizes were given for ", options_.symbols.size(),
                      ". Give a size for each in PartitionOptions::symbols.");
    }
    primals_.assign(graph_.inputs.begin(),
                    graph_.inputs.begin() + static_cast<std::ptrdiff_t>(options_.primals));
    for (const Constant& constant : graph_.constants) constants_.insert(constant.id);
  }

  void mark_backward() {
    std::vector<bool> tangent(graph_.values.size(), false);
    for (size_t i = options_.primals; i < graph_.inputs.size(); ++i) {
      tangent[static_cast<size_t>(graph_.inputs[i])] = true;
    }
    for (const Node& node : graph_.nodes) {
      const std::vector<ValueId> arguments = arguments_of(node);
      const bool any = std::any_of(arguments.begin(), arguments.end(),
                                   [&](ValueId id) { return tangent[static_cast<size_t>(id)]; });
      backward_.push_back(any);
      if (!any) continue;
      for (const ValueId id : results_of(node)) tangent[static_cast<size_t>(id)] = true;
    }
    for (size_t i = 0; i < options_.outputs; ++i) {
      const ValueId id = graph_.outputs[i];
      if (id != kNoValue && tangent[static_cast<size_t>(id)]) {
        transform_error("compile", "output ", i, " of the function (", graph_.value(id).name,
                        ") depends on a tangent, so that it cannot be given before the backward "
                        "pass. Check the numbers of primals and outputs.");
      }
    }
  }

  static bool runs_once(const Node& node) { return effects_of(node).draws || node.results.empty(); }

  void mark_forward() {
    forward_.assign(graph_.nodes.size(), false);
    std::vector<bool> needed(graph_.values.size(), false);
    for (size_t i = 0; i < options_.outputs; ++i) {
      if (graph_.outputs[i] != kNoValue) needed[static_cast<size_t>(graph_.outputs[i])] = true;
    }
    for (size_t i = graph_.nodes.size(); i-- > 0;) {
      const std::vector<ValueId> results = results_of(graph_.nodes[i]);
      const bool any = std::any_of(results.begin(), results.end(),
                                   [&](ValueId id) { return needed[static_cast<size_t>(id)]; });
      if (backward_[i] || (!any && !runs_once(graph_.nodes[i]))) continue;
      forward_[i] = true;
      for (const ValueId id : arguments_of(graph_.nodes[i])) needed[static_cast<size_t>(id)] = true;
    }
  }

  // The first value of each class of those that share memory is what the memory was made for.
  void find_storages() {
    std::map<int32_t, ValueId> first;
    const auto note = [&](ValueId id) { first.try_emplace(classes_.find(id), id); };
    for (const ValueId id : graph_.inputs) note(id);
    for (const Constant& constant : graph_.constants) note(constant.id);
    for (const Node& node : graph_.nodes) {
      for (const ValueId id : results_of(node)) note(id);
    }
    storage_.assign(graph_.values.size(), kNoValue);
    for (size_t i = 0; i < storage_.size(); ++i) {
      const auto id = static_cast<ValueId>(i);
      const auto found = first.find(classes_.find(id));
      storage_[i] = found == first.end() ? id : found->second;
    }
  }

  Graph extract(const std::vector<ValueId>& inputs, const std::vector<ValueId>& outputs,
                const std::vector<bool>& always, std::vector<bool>* used) const;
  void place_symbols(Graph* graph, const std::vector<ValueId>& inputs) const;
  void save_sizes(std::vector<ValueId>* saved) const;

  const Graph& graph_;
  const PartitionOptions& options_;
  const Uses uses_;
  const AliasClasses classes_;
  std::vector<ValueId> primals_;
  std::set<ValueId> constants_;
  std::vector<bool> backward_;  // of nodes
  std::vector<bool> forward_;
  std::vector<ValueId> storage_;  // of values
};

// --- two graphs of one ---------------------------------------------------------------------------

// The nodes that compute `outputs` of `inputs` and constants, and those of `always`; tells them in
// `used`.
Graph Joint::extract(const std::vector<ValueId>& inputs, const std::vector<ValueId>& outputs,
                     const std::vector<bool>& always, std::vector<bool>* used) const {
  std::vector<bool> given(graph_.values.size(), false), needed(graph_.values.size(), false);
  for (const ValueId id : inputs) given[static_cast<size_t>(id)] = true;
  for (const ValueId id : outputs) {
    if (id != kNoValue) needed[static_cast<size_t>(id)] = true;
  }
  used->assign(graph_.nodes.size(), false);
  for (size_t i = graph_.nodes.size(); i-- > 0;) {
    const std::vector<ValueId> results = results_of(graph_.nodes[i]);
    const bool any = std::any_of(results.begin(), results.end(), [&](ValueId id) {
      return needed[static_cast<size_t>(id)] && !given[static_cast<size_t>(id)];
    });
    if (!any && !always[i]) continue;
    (*used)[i] = true;
    for (const ValueId id : arguments_of(graph_.nodes[i])) needed[static_cast<size_t>(id)] = true;
  }
  Graph part = graph_;
  part.inputs = inputs;
  part.outputs = outputs;
  part.nodes.clear();
  for (size_t i = 0; i < graph_.nodes.size(); ++i) {
    if (!(*used)[i]) continue;
    part.nodes.push_back(graph_.nodes[i]);
    // One of several results may be saved while another one is computed again.
    for (Result& result : part.nodes.back().results) {
      for (ValueId& id : result.ids) {
        if (id != kNoValue && given[static_cast<size_t>(id)]) {
          id = part.add_value(graph_.type(id), graph_.value(id).name);
        }
      }
    }
  }
  std::erase_if(part.constants, [&](const Constant& constant) {
    return !needed[static_cast<size_t>(constant.id)] || given[static_cast<size_t>(constant.id)];
  });
  place_symbols(&part, inputs);
  compact(part);
  return part;
}

std::optional<std::pair<int32_t, int32_t>> find_symbol(const Graph& graph,
                                                       const std::vector<ValueId>& inputs,
                                                       int32_t symbol) {
  for (size_t i = 0; i < inputs.size(); ++i) {
    const auto& sizes = graph.type(inputs[i]).sizes;
    for (size_t d = 0; d < sizes.size(); ++d) {
      if (sizes[d] == SizeExpr::symbol(symbol)) {
        return std::pair(static_cast<int32_t>(i), static_cast<int32_t>(d));
      }
    }
  }
  return std::nullopt;
}

void Joint::place_symbols(Graph* graph, const std::vector<ValueId>& inputs) const {
  for (size_t s = 0; s < graph_.symbols.size(); ++s) {
    const auto place = find_symbol(graph_, inputs, static_cast<int32_t>(s));
    if (!place.has_value()) {
      unsupported_error("compile", "the dynamic dim ", graph_.symbols[s].name,
                        " is a dim of tangents alone, and the forward pass does not know its "
                        "size. Mark a dim of a primal as dynamic.");
    }
    graph->symbols[s].input = place->first;
    graph->symbols[s].dim = place->second;
  }
}

// The backward pass has to know the sizes of dynamic dims: where no saved value and no tangent
// shows one, the primal that does is saved as well.
void Joint::save_sizes(std::vector<ValueId>* saved) const {
  for (size_t s = 0; s < graph_.symbols.size(); ++s) {
    std::vector<ValueId> inputs = *saved;
    inputs.insert(inputs.end(),
                  graph_.inputs.begin() + static_cast<std::ptrdiff_t>(options_.primals),
                  graph_.inputs.end());
    const auto symbol = static_cast<int32_t>(s);
    if (find_symbol(graph_, inputs, symbol).has_value()) continue;
    const auto place = find_symbol(graph_, primals_, symbol);
    if (place.has_value()) saved->push_back(primals_[static_cast<size_t>(place->first)]);
  }
}

Partition Joint::split(std::vector<ValueId> saved) const {
  save_sizes(&saved);
  Partition parts;
  std::vector<bool> once_forward(graph_.nodes.size()), once_backward(graph_.nodes.size());
  for (size_t i = 0; i < graph_.nodes.size(); ++i) {
    const bool once = runs_once(graph_.nodes[i]);
    once_forward[i] = once && !backward_[i];
    once_backward[i] = once && backward_[i];
  }
  std::vector<ValueId> forward_outputs(
      graph_.outputs.begin(),
      graph_.outputs.begin() + static_cast<std::ptrdiff_t>(options_.outputs));
  forward_outputs.insert(forward_outputs.end(), saved.begin(), saved.end());
  std::vector<ValueId> backward_inputs = saved;
  backward_inputs.insert(backward_inputs.end(),
                         graph_.inputs.begin() + static_cast<std::ptrdiff_t>(options_.primals),
                         graph_.inputs.end());
  std::vector<bool> in_forward, in_backward;
  parts.forward = extract(primals_, forward_outputs, once_forward, &in_forward);
  parts.backward = extract(backward_inputs, gradients(), once_backward, &in_backward);

  std::set<ValueId> storages;
  for (const ValueId id : saved) {
    const ValueId memory = storage(id);
    parts.saved.push_back(
        {.name = graph_.value(id).name, .bytes = bytes(id), .primal = is_primal(memory)});
    if (!storages.insert(memory).second) continue;
    parts.saved_bytes += bytes(id);
    if (!is_primal(memory)) parts.saved_activation_bytes += bytes(id);
  }
  for (size_t i = 0; i < graph_.nodes.size(); ++i) {
    if (!in_forward[i] || !in_backward[i] || may_view(graph_.nodes[i])) continue;
    ++parts.recomputed_nodes;
    for (const ValueId id : results_of(graph_.nodes[i])) {
      parts.recomputed_elements += elements(id);
      parts.recomputed_bytes += own_bytes(id);
    }
    for (const ValueId id : arguments_of(graph_.nodes[i])) parts.recomputed_bytes += own_bytes(id);
  }
  return parts;
}

// What the backward pass reads, or gives, of what was there before.
template <class F>
void for_each_read_by_backward(const Joint& joint, F&& f) {
  const Graph& graph = joint.graph();
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    if (!joint.is_backward(i)) continue;
    for (const ValueId id : arguments_of(graph.nodes[i])) {
      if (joint.is_primal_value(id)) f(id);
    }
  }
  for (const ValueId id : joint.gradients()) {
    if (id != kNoValue && joint.is_primal_value(id)) f(id);
  }
}

// --- the minimum cut -----------------------------------------------------------------------------

bool is_reduction(const Node& node) {
  constexpr std::array<std::string_view, 18> kReductions = {"aten::sum",
                                                            "aten::mean",
                                                            "aten::amax",
                                                            "aten::amin",
                                                            "aten::var",
                                                            "aten::std",
                                                            "aten::var_mean",
                                                            "aten::std_mean",
                                                            "aten::logsumexp",
                                                            "aten::_softmax",
                                                            "aten::softmax",
                                                            "aten::_log_softmax",
                                                            "aten::prod",
                                                            "aten::any",
                                                            "aten::native_layer_norm",
                                                            "aten::all",
                                                            "aten::native_group_norm",
                                                            "aten::_fused_rms_norm"};
  return is_one_of(node.op, kReductions);
}

// Moves elements, or makes them of nothing.
bool is_move(const Node& node) {
  constexpr std::array<std::string_view, 16> kMoves = {"aten::clone",
                                                       "aten::_to_copy",
                                                       "aten::cat",
                                                       "aten::stack",
                                                       "aten::triu",
                                                       "aten::tril",
                                                       "aten::embedding",
                                                       "aten::index_select",
                                                       "aten::gather",
                                                       "aten::constant_pad_nd",
                                                       "aten::zeros_like",
                                                       "aten::ones_like",
                                                       "aten::full_like",
                                                       "aten::slice_scatter",
                                                       "aten::select_scatter",
                                                       "aten::flip"};
  return is_one_of(node.op, kMoves) || arguments_of(node).empty();
}

class MinCut {
 public:
  MinCut(const Joint& joint, const MinCutOptions& options)
      : joint_(joint), options_(options), graph_(joint.graph()) {}

  std::vector<ValueId> run() {
    for (const ValueId id : joint_.primals()) {
      add(kSource, in(id), kUnbounded);
      add_value(id);
    }
    for (size_t i = 0; i < graph_.nodes.size(); ++i) {
      if (!joint_.is_backward(i)) add_node(i);
    }
    for_each_read_by_backward(joint_, [&](ValueId id) { add(out(id), kSink, kUnbounded); });
    return saved();
  }

 private:
  static constexpr int32_t kSource = 0;
  static constexpr int32_t kSink = 1;
  static constexpr int64_t kUnbounded = -1;

  // Each value is an edge, as wide as it is large: to cut it is to save it.
  static int32_t in(ValueId id) { return 2 + 2 * id; }
  static int32_t out(ValueId id) { return 3 + 2 * id; }

  void add(int32_t from, int32_t to, int64_t capacity) { edges_.push_back({from, to, capacity}); }

  void add_value(ValueId id) {
    // An empty value is saved at the price of one byte, rather than for nothing.
    add(in(id), out(id), std::max<int64_t>(1, joint_.own_bytes(id)));
  }

  void add_node(size_t i) {
    const Node& node = graph_.nodes[i];
    const bool view = may_view(node) && !node.is_control_flow();
    // Nodes that only gradients need may stay in the backward pass, whatever they cost.
    const bool only_forward = joint_.is_forward(i) && !may_recompute(node);
    for (const ValueId id : results_of(node)) {
      if (only_forward) add(kSource, in(id), kUnbounded);
      for (const ValueId argument : arguments_of(node)) {
        if (joint_.is_primal_value(argument)) add(out(argument), in(id), kUnbounded);
      }
      // To save a view is to save what it views, and that costs nothing to view again.
      if (view && !only_forward) {
        add(in(id), out(id), kUnbounded);
      } else {
        add_value(id);
      }
    }
  }

  bool may_recompute(const Node& node) const {
    if (node.is_control_flow() || !is_pure(node)) return false;
    if (may_view(node)) return true;
    const bool cheap = is_pointwise(node) || is_move(node) ||
                       (options_.recompute_reductions && is_reduction(node));
    if (!cheap) return false;
    int64_t read = 0, made = 0;
    for (const ValueId id : arguments_of(node)) read += joint_.own_bytes(id);
    for (const ValueId id : results_of(node)) made += joint_.own_bytes(id);
    return made * 4 >= read;
  }

  std::vector<ValueId> saved() {
    int64_t total = 1;
    for (const FlowEdge& edge : edges_) total += std::max<int64_t>(0, edge.capacity);
    for (FlowEdge& edge : edges_) {
      if (edge.capacity == kUnbounded) edge.capacity = total;
    }
    const auto vertices = static_cast<int32_t>(2 + 2 * graph_.values.size());
    const std::vector<bool> sink_side = sink_side_of_min_cut(vertices, edges_, kSource, kSink);
    std::vector<ValueId> ids;
    for (const FlowEdge& edge : edges_) {
      if (sink_side[static_cast<size_t>(edge.from)] || !sink_side[static_cast<size_t>(edge.to)]) {
        continue;
      }
      TORCH_INTERNAL_ASSERT(edge.capacity < total, "a cut of what must not be cut");
      ids.push_back((edge.from - 2) / 2);
    }
    return ids;
  }

  const Joint& joint_;
  const MinCutOptions& options_;
  const Graph& graph_;
  std::vector<FlowEdge> edges_;
};

}  // namespace

Partition default_partition(const Graph& joint_graph, const PartitionOptions& options) {
  const Joint joint(joint_graph, options);
  std::vector<ValueId> saved;
  std::set<ValueId> seen;
  const auto save = [&](ValueId id) {
    const int32_t producer = joint.uses().producer[static_cast<size_t>(id)];
    const bool there =
        producer < 0 ? joint.is_primal(id) : joint.is_forward(static_cast<size_t>(producer));
    if (there && seen.insert(id).second) saved.push_back(id);
  };
  for_each_read_by_backward(joint, save);
  // What only gradients need is computed in the backward pass, of values of the forward pass.
  for (size_t i = 0; i < joint_graph.nodes.size(); ++i) {
    if (joint.is_backward(i) || joint.is_forward(i)) continue;
    for (const ValueId id : arguments_of(joint_graph.nodes[i])) save(id);
  }
  return joint.split(std::move(saved));
}

Partition min_cut_partition(const Graph& joint_graph, const PartitionOptions& options,
                            const MinCutOptions& min_cut) {
  const Joint joint(joint_graph, options);
  return joint.split(MinCut(joint, min_cut).run());
}

}  // namespace torchlift::compile
