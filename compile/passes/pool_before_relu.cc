#include "compile/passes/pool_before_relu.h"

#include <ATen/core/ivalue.h>

#include <algorithm>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "compile/passes/evaluate.h"
#include "compile/passes/node_facts.h"

namespace torchlift::compile {
namespace {

constexpr const char* kPool = "aten::max_pool2d_with_indices";
constexpr const char* kPoolBackward = "aten::max_pool2d_with_indices_backward";
constexpr const char* kReluBackward = "aten::threshold_backward";

size_t index(int32_t id) { return static_cast<size_t>(id); }

ValueId tensor_argument(const Node& node, const std::string& name) {
  const Argument* found = find_argument(node, name);
  const auto* ref = found == nullptr ? nullptr : std::get_if<ValueRef>(found);
  return ref == nullptr ? kNoValue : ref->id;
}

bool is_relu_backward(const Node& node) {
  if (node.full_name() != kReluBackward) return false;
  const auto* threshold = std::get_if<c10::IValue>(find_argument(node, "threshold"));
  return threshold != nullptr && threshold->isScalar() && threshold->toScalar().toDouble() == 0;
}

// A relu, the one pool that reads it, and their gradients: all that reads either's result, but for
// what reads the pooled numbers. By the numbers of nodes.
struct Match {
  int32_t relu = -1;
  int32_t pool = -1;
  std::set<int32_t> pool_backward;  // each followed, perhaps by views, by
  std::set<int32_t> relu_backward;  // ... some of these
};

class Matcher {
 public:
  Matcher(const Graph& graph, const Uses& uses) : graph_(graph), uses_(uses) {}

  // None unless all of NOTE [what passes keep] holds after the exchange.
  std::optional<Match> match(int32_t relu) {
    found_ = {};
    found_.relu = relu;
    const Node& node = graph_.nodes[index(relu)];
    const ValueId x = tensor_argument(node, "self"), y = node.results[0].ids[0];
    if (x == kNoValue || y == kNoValue || graph_.type(x) != graph_.type(y)) return std::nullopt;
    if (!is_read_for_pool(y) || found_.pool < 0 || pooled() == kNoValue) return std::nullopt;
    if (!has_private_indices() || may_have_empty_windows()) return std::nullopt;
    std::set<int32_t> reached;
    for (const int32_t backward : found_.pool_backward) {
      const Node& each = graph_.nodes[index(backward)];
      const ValueId g = tensor_argument(each, "grad_output");
      if (g == kNoValue || graph_.type(g).sizes != graph_.type(pooled()).sizes) {
        return std::nullopt;
      }
      if (!goes_to_relu(each.results[0].ids[0], &reached)) return std::nullopt;
    }
    if (reached != found_.relu_backward) return std::nullopt;
    return found_;
  }

 private:
  const Node& pool() const { return graph_.nodes[index(found_.pool)]; }
  ValueId pooled() const { return pool().results[0].ids[0]; }

  bool is_read_for_pool(ValueId id) {
    if (id == kNoValue || uses_.is_output[index(id)]) return false;
    for (const int32_t reader : uses_.readers[index(id)]) {
      const Node& node = graph_.nodes[index(reader)];
      if (node.is_control_flow()) return false;
      if (keeps_order(node)) {
        if (!is_read_for_pool(node.results[0].ids[0])) return false;
      } else if (node.full_name() == kPool) {
        if (found_.pool >= 0 && found_.pool != reader) return false;
        found_.pool = reader;
      } else if (node.full_name() == kPoolBackward && tensor_argument(node, "self") == id) {
        found_.pool_backward.insert(reader);
      } else if (is_relu_backward(node) && tensor_argument(node, "self") == id) {
        found_.relu_backward.insert(reader);
      } else {
        return false;
      }
    }
    return true;
  }

  // A window that lies in the padding alone has minus infinity for its largest number, which relu
  // would change. Without dilation none does: padding is at most half of a window.
  bool may_have_empty_windows() const {
    const auto is_all = [&](const char* name, int64_t wanted) {
      const auto* value = std::get_if<c10::IValue>(find_argument(pool(), name));
      if (value == nullptr || !value->isIntList()) return false;
      const std::vector<int64_t> numbers = value->toIntVector();
      return std::all_of(numbers.begin(), numbers.end(), [&](int64_t n) { return n == wanted; });
    };
    return !is_all("padding", 0) && !is_all("dilation", 1);
  }

  // The indices are read by the gradients of this pool alone, and all of those read them.
  bool has_private_indices() const {
    const ValueId indices = pool().results[1].ids[0];
    if (indices == kNoValue) return found_.pool_backward.empty();
    if (uses_.is_output[index(indices)]) return false;
    const auto& readers = uses_.readers[index(indices)];
    return std::set<int32_t>(readers.begin(), readers.end()) == found_.pool_backward;
  }

  // Whether all readers of a gradient before relu's are relu's, which leave its type as it is.
  bool goes_to_relu(ValueId id, std::set<int32_t>* reached) const {
    if (id == kNoValue || uses_.is_output[index(id)]) return false;
    for (const int32_t reader : uses_.readers[index(id)]) {
      const Node& node = graph_.nodes[index(reader)];
      if (node.is_control_flow()) return false;
      const ValueId result = node.results.empty() ? kNoValue : node.results[0].ids[0];
      if (keeps_order(node)) {
        if (!goes_to_relu(result, reached)) return false;
      } else if (found_.relu_backward.count(reader) == 0 || result == kNoValue ||
                 tensor_argument(node, "grad_output") != id ||
                 graph_.type(result) != graph_.type(id)) {
        return false;
      } else {
        reached->insert(reader);
      }
    }
    return true;
  }

  const Graph& graph_;
  const Uses& uses_;
  Match found_;
};

class Exchange {
 public:
  explicit Exchange(Graph& graph) : graph_(graph), classes_(graph) {
    map_.assign(graph.values.size(), kNoValue);
  }

  int64_t run() {
    find();
    if (matches_.empty()) return 0;
    std::vector<Node> nodes;
    for (size_t i = 0; i < graph_.nodes.size(); ++i) {
      before(static_cast<int32_t>(i), &nodes);
      nodes.push_back(graph_.nodes[i]);
      after(static_cast<int32_t>(i), &nodes);
    }
    graph_.nodes = std::move(nodes);
    // The values that were added are in nobody's place.
    map_.resize(graph_.values.size(), kNoValue);
    replace_everywhere(graph_, map_);
    for (const auto& [relu, pooled] : of_pooled_) restore(relu, pooled);
    return static_cast<int64_t>(matches_.size());
  }

 private:
  // Matches have no nodes in common, so each may be found in the graph as it was.
  void find() {
    const Uses uses(graph_);
    Matcher matcher(graph_, uses);
    for (size_t i = 0; i < graph_.nodes.size(); ++i) {
      if (graph_.nodes[i].full_name() != "aten::relu") continue;
      std::optional<Match> match = matcher.match(static_cast<int32_t>(i));
      if (match.has_value() && may_replace(*match)) matches_.push_back(*std::move(match));
    }
  }

  ValueId result(int32_t node) const { return graph_.nodes[index(node)].results[0].ids[0]; }
  ValueId gradient_before(int32_t relu_backward) const {
    return tensor_argument(graph_.nodes[index(relu_backward)], "grad_output");
  }

  bool may_replace(const Match& match) {
    const auto may = [&](int32_t node) {
      return classes_.may_replace(result(node), gradient_before(node));
    };
    if (!std::all_of(match.relu_backward.begin(), match.relu_backward.end(), may)) return false;
    for (const int32_t node : match.relu_backward) {
      classes_.replaced(result(node), gradient_before(node));
    }
    return true;
  }

  // What read the result of relu reads its argument; what read relu's gradient reads the pool's,
  // which is masked before it is spread.
  void before(int32_t i, std::vector<Node>* nodes) {
    for (const Match& match : matches_) {
      Node& node = graph_.nodes[index(i)];
      if (i == match.relu) map_of_argument(match);
      if (match.relu_backward.count(i) != 0) map_[index(result(i))] = gradient_before(i);
      if (match.pool_backward.count(i) == 0) continue;
      Node masked = make_node(kReluBackward, "",
                              {{"grad_output", ValueRef{tensor_argument(node, "grad_output")}},
                               {"self", ValueRef{map_[index(result(match.pool))]}},
                               {"threshold", c10::IValue(int64_t{0})}});
      masked.source = node.source;
      const ValueId g = tensor_argument(node, "grad_output");
      node.args[0] = ValueRef{appended(std::move(masked), g, result(match.pool), "masked", nodes)};
    }
  }

  // The result of a pointwise operator on a and b, which have the same sizes. Its type is theirs if
  // that is one; to infer it may take libtorch's meta kernels, whose first use takes a second.
  ValueId appended(Node node, ValueId a, ValueId b, const std::string& name,
                   std::vector<Node>* nodes) {
    if (graph_.type(a) != graph_.type(b)) return append(graph_, nodes, std::move(node), name);
    const ValueId id = graph_.add_value(TensorType(graph_.type(a)), name);
    node.results = {Result{.ids = {id}}};
    nodes->push_back(std::move(node));
    return id;
  }

  void map_of_argument(const Match& match) {
    map_[index(result(match.relu))] = tensor_argument(graph_.nodes[index(match.relu)], "self");
  }

  void after(int32_t i, std::vector<Node>* nodes) {
    for (const Match& match : matches_) {
      if (i != match.pool) continue;
      const ValueId pooled = result(i);
      Node relu = make_node("aten::relu", "", {{"self", ValueRef{pooled}}});
      relu.source = graph_.nodes[index(match.relu)].source;
      map_[index(pooled)] = appended(std::move(relu), pooled, pooled, "relu", nodes);
      of_pooled_.emplace_back(map_[index(pooled)], pooled);
    }
  }

  // The new relu itself reads what all others do not any more.
  void restore(ValueId relu, ValueId pooled) {
    for (Node& node : graph_.nodes) {
      if (!node.results.empty() && node.results[0].ids[0] == relu) node.args[0] = ValueRef{pooled};
    }
  }

  Graph& graph_;
  AliasClasses classes_;
  std::vector<Match> matches_;
  std::vector<ValueId> map_;
  std::vector<std::pair<ValueId, ValueId>> of_pooled_;  // what relu gives, and of what
};

}  // namespace

int64_t pool_before_relu(Graph& graph) {
  require_functional(graph, "pool_before_relu");
  return Exchange(graph).run();
}

}  // namespace torchlift::compile
