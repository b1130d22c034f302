#include "compile/passes/hoist_invariant.h"

#include <algorithm>
#include <array>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "compile/passes/evaluate.h"
#include "compile/passes/node_facts.h"
#include "core/error.h"

namespace torchlift::compile {
namespace {

// Dim `dim` of argument `argument`.
struct ArgumentDim {
  size_t argument;
  size_t dim;
};

// For each dim of the result: the dims of arguments that it comes from. Empty: the operator mixes
// what lies along it.
using DimMap = std::vector<std::vector<ArgumentDim>>;

class Hoister {
 public:
  Hoister(Graph& graph, const HoistOptions& options)
      : graph_(graph),
        options_(options),
        classes_(graph),
        values_(static_cast<ValueId>(graph.values.size())) {
    for (const ValueId id : graph.inputs) {
      const auto& strides = graph.type(id).strides;
      if (std::find(strides.begin(), strides.end(), SizeExpr(0)) != strides.end()) {
        from_inputs_.insert(classes_.find(id));
      }
    }
  }

  int64_t run() {
    std::vector<Node> nodes = std::move(graph_.nodes);
    for (Node& node : nodes) process(std::move(node));
    for (ValueId& id : graph_.outputs) {
      if (id != kNoValue) id = materialized(id);
    }
    graph_.nodes = std::move(nodes_);
    return hoisted_;
  }

 private:
  // --- invariance ---

  bool is_invariant(ValueId id, size_t dim) const {
    const TensorType& type = graph_.type(id);
    if (id < values_ && from_inputs_.count(classes_.find(id)) > 0) return false;
    return type.layout == c10::kStrided && type.sizes[dim] != SizeExpr(1) &&
           type.sizes[dim] != SizeExpr(0) && type.strides[dim] == SizeExpr(0);
  }

  // What a reader that does not mind strides may read for `id`.
  ValueId twin(ValueId id) const {
    const auto found = twins_.find(id);
    return found == twins_.end() ? id : found->second;
  }

  // --- nodes ---

  void process(Node node) {
    if (node.is_control_flow() || node.results.size() != 1 || node.results[0].is_list ||
        node.results[0].ids[0] == kNoValue || !is_pure(node)) {
      return keep(std::move(node));
    }
    Node on_twins = node;
    bool any = false;
    for (Argument& argument : on_twins.args) {
      auto* ref = std::get_if<ValueRef>(&argument);
      if (ref == nullptr || twins_.count(ref->id) == 0) continue;
      ref->id = twin(ref->id);
      any = true;
    }
    if (hoist(node, on_twins)) return;
    if (any && (effects_of(node).views ? view(node, on_twins) : reads_twins(node, on_twins))) {
      return;
    }
    keep(std::move(node));
  }

  // As it was.
  void keep(Node node) {
    for (Argument& argument : node.args) {
      if (auto* ref = std::get_if<ValueRef>(&argument)) ref->id = materialized(ref->id);
      if (auto* refs = std::get_if<std::vector<ValueRef>>(&argument)) {
        for (ValueRef& each : *refs) each.id = materialized(each.id);
      }
    }
    nodes_.push_back(std::move(node));
  }

  // The value itself, of its own type: where it was replaced by a twin, a copy of that.
  ValueId materialized(ValueId id) {
    const auto found = twins_.find(id);
    if (found == twins_.end() || !pending_.erase(id)) return id;
    const auto contiguous = static_cast<int64_t>(c10::MemoryFormat::Contiguous);
    Node copy =
        make_node("aten::clone", "",
                  {{"self", ValueRef{found->second}}, {"memory_format", c10::IValue(contiguous)}});
    copy.results = {{.ids = {id}, .is_list = false}};
    nodes_.push_back(std::move(copy));
    return id;
  }

  // Of what is not computed any more in its old place.
  void give_twin(ValueId id, ValueId twin) {
    twins_[id] = twin;
    pending_.insert(id);
  }

  std::optional<TensorType> inferred(const Node& node) const {
    try {
      return infer(graph_, node).at(0).at(0).type;
    } catch (const UnsupportedError&) {
      return std::nullopt;
    }
  }

  // A view of a twin is a twin of the view. Not of an output, which would share its memory with
  // outputs that are other rows.
  bool view(const Node& node, const Node& on_twins) {
    const ValueId id = node.results[0].ids[0];
    if (classes_.escapes(id)) return false;
    const TensorType& type = graph_.type(id);
    const auto twin_type = inferred(on_twins);
    if (twin_type == type) {
      nodes_.push_back(on_twins);
      return true;
    }
    if (!twin_type.has_value() || twin_type->sizes != type.sizes ||
        twin_type->dtype != type.dtype || !can_copy_back(id)) {
      return false;
    }
    Node twin = on_twins;
    const ValueId twin_id = graph_.add_value(*twin_type, graph_.value(id).name);
    twin.results[0].ids[0] = twin_id;
    nodes_.push_back(std::move(twin));
    give_twin(id, twin_id);
    return true;
  }

  bool reads_twins(const Node& node, const Node& on_twins) {
    if (inferred(on_twins) != graph_.type(node.results[0].ids[0])) return false;
    nodes_.push_back(on_twins);
    return true;
  }

  // clone() gives contiguous tensors.
  bool can_copy_back(ValueId id) const {
    const TensorType& type = graph_.type(id);
    if (type.layout != c10::kStrided) return false;
    SizeExpr stride = 1;
    for (size_t d = type.sizes.size(); d-- > 0;) {
      if (type.strides[d] != stride) return false;
      // libtorch counts an empty dim as 1.
      if (type.sizes[d] == SizeExpr(0)) return false;
      stride = stride * type.sizes[d];
    }
    return true;
  }

  bool hoist(const Node& node, const Node& on_twins) {
    try {
      return try_to_hoist(node, on_twins);
    } catch (const UnsupportedError&) {
      // The shape of a row could not be found. Views made for it are dead.
      return false;
    }
  }

  bool try_to_hoist(const Node& node, const Node& on_twins) {
    const ValueId id = node.results[0].ids[0];
    if (!can_copy_back(id)) return false;
    const DimMap map = dims_of(on_twins);
    if (!is_worth_it(on_twins, map)) return false;
    Node small = on_twins;
    bool any = false;
    for (const auto& sources : map) {
      if (!is_invariant(on_twins, sources)) continue;
      for (const ArgumentDim& source : sources) narrow(&small, source);
      any = true;
    }
    if (!any) return false;
    small.results.clear();
    const ValueId row = append(graph_, &nodes_, std::move(small), graph_.value(id).name);
    const ValueId all = append(
        graph_, &nodes_,
        make_node("aten::expand", "",
                  {{"self", ValueRef{row}}, {"size", sizes_argument(graph_.type(id).sizes)}}),
        graph_.value(id).name);
    give_twin(id, all);
    ++hoisted_;
    return true;
  }

  // By the elements that are read or written, whichever are more.
  bool is_worth_it(const Node& node, const DimMap& map) const {
    int64_t work = 0, rows = 1;
    std::vector<ValueId> ids = arguments_of(node);
    ids.push_back(node.results[0].ids[0]);
    for (const ValueId id : ids) {
      int64_t elements = 1;
      for (const SizeExpr& size : graph_.type(id).sizes) {
        if (!size.is_constant()) return true;
        elements *= *size.constant();
      }
      work = std::max(work, elements);
    }
    for (size_t d = 0; d < map.size(); ++d) {
      if (is_invariant(node, map[d])) {
        rows *= *graph_.type(node.results[0].ids[0]).sizes.at(d).constant();
      }
    }
    return rows > 0 && work - work / rows >= options_.min_saved_elements;
  }

  bool is_invariant(const Node& node, const std::vector<ArgumentDim>& sources) const {
    bool any = false;
    for (const ArgumentDim& source : sources) {
      const ValueId id = std::get<ValueRef>(node.args[source.argument]).id;
      if (graph_.type(id).sizes[source.dim] == SizeExpr(1)) continue;
      if (!is_invariant(id, source.dim)) return false;
      any = true;
    }
    return any;
  }

  // One row of the argument.
  void narrow(Node* node, const ArgumentDim& source) {
    auto& ref = std::get<ValueRef>(node->args[source.argument]);
    if (graph_.type(ref.id).sizes[source.dim] == SizeExpr(1)) return;
    ref.id = append(graph_, &nodes_,
                    make_node("aten::slice", "Tensor",
                              {{"self", ref},
                               {"dim", c10::IValue(static_cast<int64_t>(source.dim))},
                               {"start", c10::IValue(int64_t{0})},
                               {"end", c10::IValue(int64_t{1})}}),
                    graph_.value(ref.id).name);
  }

  static Argument sizes_argument(const std::vector<SizeExpr>& sizes) {
    std::vector<int64_t> numbers;
    for (const SizeExpr& size : sizes) {
      if (!size.is_constant()) return sizes;
      numbers.push_back(*size.constant());
    }
    return c10::IValue(std::move(numbers));
  }

  // --- operators ---

  size_t rank(const Node& node, size_t i) const {
    return graph_.type(std::get<ValueRef>(node.args[i]).id).sizes.size();
  }

  DimMap dims_of(const Node& node) const {
    constexpr std::array<std::string_view, 5> kReductions = {
        "aten::sum", "aten::mean", "aten::amax", "aten::amin", "aten::logsumexp"};
    constexpr std::array<std::string_view, 2> kAlongOneDim = {"aten::_softmax",
                                                              "aten::_log_softmax"};
    // This pass makes clones itself, of what was expanded.
    if (node.op == "aten::clone") return {};
    if (is_pointwise(node)) return pointwise(node);
    if (node.op == "aten::mm") return {{{0, 0}}, {{1, 1}}};
    if (node.op == "aten::bmm") return {{{0, 0}, {1, 0}}, {{0, 1}}, {{1, 2}}};
    if (is_one_of(node.op, kReductions)) return reduction(node);
    if (is_one_of(node.op, kAlongOneDim)) return along_one_dim(node);
    return {};
  }

  // Dims are counted from the right.
  DimMap pointwise(const Node& node) const {
    const size_t result = graph_.type(node.results[0].ids[0]).sizes.size();
    DimMap map(result);
    for (size_t i = 0; i < node.args.size(); ++i) {
      if (std::holds_alternative<std::vector<ValueRef>>(node.args[i])) return {};
      if (!std::holds_alternative<ValueRef>(node.args[i])) continue;
      const size_t dims = rank(node, i);
      if (dims > result) return {};
      for (size_t d = 0; d < dims; ++d) map[d + result - dims].push_back({i, d});
    }
    return map;
  }

  DimMap reduction(const Node& node) const {
    const Argument* dims = find_argument(node, "dim");
    const Argument* keepdim = find_argument(node, "keepdim");
    if (dims == nullptr || keepdim == nullptr) return {};
    const auto* list = std::get_if<c10::IValue>(dims);
    const auto* keep = std::get_if<c10::IValue>(keepdim);
    if (list == nullptr || !list->isIntList() || keep == nullptr || !keep->isBool()) return {};
    const size_t all = rank(node, 0);
    if (all == 0) return {};  // a number, which may be summed along its dim 0
    std::vector<bool> reduced(all, list->toIntVector().empty());
    for (const int64_t d : list->toIntVector()) {
      reduced.at(static_cast<size_t>(d < 0 ? d + static_cast<int64_t>(all) : d)) = true;
    }
    DimMap map;
    for (size_t d = 0; d < all; ++d) {
      if (!reduced[d]) {
        map.push_back({{0, d}});
      } else if (keep->toBool()) {
        map.emplace_back();
      }
    }
    return map;
  }

  DimMap along_one_dim(const Node& node) const {
    const auto* dim = std::get_if<c10::IValue>(&node.args[1]);
    const size_t all = rank(node, 0);
    if (dim == nullptr || !dim->isInt() || all == 0) return {};
    const int64_t d = dim->toInt();
    DimMap map(all);
    for (size_t k = 0; k < all; ++k) map[k] = {{0, k}};
    map.at(static_cast<size_t>(d < 0 ? d + static_cast<int64_t>(all) : d)).clear();
    return map;
  }

  Graph& graph_;
  const HoistOptions& options_;
  std::vector<Node> nodes_;
  const AliasClasses classes_;     // of the values that there were
  const ValueId values_;           // and their number
  std::set<int32_t> from_inputs_;  // classes of inputs that were expanded when they were traced
  std::unordered_map<ValueId, ValueId> twins_;
  std::set<ValueId> pending_;  // have a twin, and no definition yet
  int64_t hoisted_ = 0;
};

}  // namespace

int64_t hoist_invariant(Graph& graph, const HoistOptions& options) {
  require_functional(graph, "hoist_invariant");
  return Hoister(graph, options).run();
}

}  // namespace torchlift::compile
