#include "compile/passes/view_cleanup.h"

#include <array>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "compile/passes/evaluate.h"
#include "compile/passes/node_facts.h"
#include "core/error.h"

namespace torchlift::compile {
namespace {

// If the result has the type of the argument, it is the argument. Slices: one of the same sizes
// begins at the same element.
bool is_same_view(const Node& node) {
  constexpr std::array<std::string_view, 3> kOps = {"aten::expand", "aten::slice", "aten::narrow"};
  return keeps_order(node) || is_one_of(node.op, kOps);
}

// If the result has the type of the argument, it is a copy of that.
bool is_copy(const Node& node) {
  constexpr std::array<std::string_view, 10> kOps = {
      "aten::clone",       "aten::contiguous",     "aten::to",        "aten::_to_copy",
      "aten::lift_fresh",  "aten::alias_copy",     "aten::view_copy", "aten::expand_copy",
      "aten::detach_copy", "aten::lift_fresh_copy"};
  return is_one_of(node.op, kOps);
}

class Cleanup {
 public:
  explicit Cleanup(Graph& graph) : graph_(graph), classes_(graph), uses_(graph) {
    map_.assign(graph.values.size(), kNoValue);
  }

  int64_t run() {
    for (Node& node : graph_.nodes) {
      replace_arguments(node, map_);
      if (node.is_control_flow() || node.results.size() != 1 || node.results[0].is_list) continue;
      if (result(node) == kNoValue) continue;
      const ValueId x = tensor(node);
      if (x == kNoValue) continue;
      // A copy may be there to conjugate, which types do not tell.
      const bool may_conjugate = at::isComplexType(graph_.type(x).dtype);
      if ((is_same_view(node) || (is_copy(node) && !may_conjugate)) && replace(result(node), x)) {
        continue;
      }
      if (keeps_order(node)) shorten(node);
    }
    replace_everywhere(graph_, map_);
    return changed_;
  }

 private:
  static ValueId result(const Node& node) { return node.results[0].ids[0]; }
  static ValueId tensor(const Node& node) {
    const auto* ref = node.args.empty() ? nullptr : std::get_if<ValueRef>(&node.args[0]);
    return ref == nullptr ? kNoValue : ref->id;
  }

  bool replace(ValueId old, ValueId by) {
    if (graph_.type(old) != graph_.type(by) || !classes_.may_replace(old, by)) return false;
    classes_.replaced(old, by);
    map_[static_cast<size_t>(old)] = by;
    ++changed_;
    return true;
  }

  // What the chain of such nodes that ends with this one begins with.
  ValueId start_of_chain(const Node& node) const {
    ValueId x = tensor(node);
    while (true) {
      const int32_t index = uses_.producer[static_cast<size_t>(x)];
      if (index < 0) return x;
      const Node& inner = graph_.nodes[static_cast<size_t>(index)];
      if (inner.is_control_flow() || !keeps_order(inner)) return x;
      x = tensor(inner);
    }
  }

  void shorten(Node& node) {
    const ValueId x = start_of_chain(node);
    if (x == tensor(node) || replace(result(node), x)) return;
    const TensorType& type = graph_.type(result(node));
    if (type.dtype != graph_.type(x).dtype) return;
    Node view =
        make_node("aten::view", "", {{"self", ValueRef{x}}, {"size", sizes_argument(type.sizes)}});
    // A reshape in the chain may have copied, and then there is no view.
    if (!gives(view, type)) return;
    view.results = node.results;
    view.source = node.source;
    node = std::move(view);
    ++changed_;
  }

  bool gives(const Node& view, const TensorType& type) const {
    try {
      return infer(graph_, view).at(0).at(0).type == type;
    } catch (const UnsupportedError&) {
      return false;
    }
  }

  static Argument sizes_argument(const std::vector<SizeExpr>& sizes) {
    std::vector<int64_t> numbers;
    for (const SizeExpr& size : sizes) {
      if (!size.is_constant()) return sizes;
      numbers.push_back(*size.constant());
    }
    return c10::IValue(std::move(numbers));
  }

  Graph& graph_;
  AliasClasses classes_;
  const Uses uses_;  // nodes stay in their places
  std::vector<ValueId> map_;
  int64_t changed_ = 0;
};

}  // namespace

int64_t view_cleanup(Graph& graph) {
  require_functional(graph, "view_cleanup");
  return Cleanup(graph).run();
}

}  // namespace torchlift::compile
