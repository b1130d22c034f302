#include "compile/passes/common_subexpressions.h"

#include <c10/util/StringUtil.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "compile/passes/node_facts.h"

namespace torchlift::compile {
namespace {

// Constants up to this size are compared, byte by byte.
constexpr size_t kMaxComparedBytes = 4096;

// Exact: 0.0 and -0.0 differ, and so do numbers that print alike.
std::string exact(double number) {
  char text[40];
  std::snprintf(text, sizeof text, "%a", number);
  return text;
}

std::string key_of(const c10::IValue& value) {
  if (value.isDouble()) return "f" + exact(value.toDouble());
  if (value.isComplexDouble()) {
    const auto number = value.toComplexDouble();
    return "c" + exact(number.real()) + "," + exact(number.imag());
  }
  if (value.isDoubleList()) {
    std::string key = "F";
    for (const double number : value.toDoubleVector()) key += exact(number) + ",";
    return key;
  }
  if (value.isList() && !value.isIntList() && !value.isBoolList()) {
    std::string key = "L";
    for (const c10::IValue& each : value.toListRef()) key += key_of(each) + ",";
    return key;
  }
  return value.tagKind() + c10::str(value);
}

struct KeyOf {
  std::string operator()(std::monostate) const { return "none"; }
  std::string operator()(const ValueRef& ref) const { return "%" + std::to_string(ref.id); }
  std::string operator()(const std::vector<ValueRef>& refs) const {
    std::string key = "[";
    for (const ValueRef& ref : refs) key += std::to_string(ref.id) + ",";
    return key + "]";
  }
  std::string operator()(const c10::IValue& value) const { return key_of(value); }
  std::string operator()(const SizeExpr& size) const { return "s" + size.str(); }
  std::string operator()(const std::vector<SizeExpr>& sizes) const {
    std::string key = "S";
    for (const SizeExpr& size : sizes) key += size.str() + ",";
    return key;
  }
  std::string operator()(const SizeRatio& ratio) const {
    return "r" + exact(ratio.factor) + ratio.numerator.str() + "/" + ratio.denominator.str();
  }
};

std::string key_of(const Node& node) {
  std::string key = node.full_name();
  for (const Argument& argument : node.args) key += "|" + std::visit(KeyOf(), argument);
  return key;
}

// Empty: not to be compared.
std::string key_of(const Constant& constant) {
  const at::Tensor& t = constant.tensor;
  if (!t.device().is_cpu() || t.layout() != c10::kStrided || !t.is_contiguous() || t.is_conj() ||
      t.is_neg() || t._is_zerotensor() || t.requires_grad() || t.nbytes() > kMaxComparedBytes) {
    return "";
  }
  std::string key = c10::str(t.scalar_type(), t.sizes(), t.strides(),
                             t.unsafeGetTensorImpl()->is_wrapped_number(), "|");
  key.append(static_cast<const char*>(t.const_data_ptr()), t.nbytes());
  return key;
}

class Merger {
 public:
  explicit Merger(Graph& graph) : graph_(graph), classes_(graph) {
    map_.assign(graph.values.size(), kNoValue);
  }

  int64_t run() {
    merge_constants();
    std::vector<Node> kept;
    for (Node& node : graph_.nodes) {
      replace_arguments(node, map_);
      if (node.is_control_flow() || !is_pure(node) || !merge(node)) kept.push_back(node);
    }
    const auto dropped = static_cast<int64_t>(graph_.nodes.size() - kept.size());
    graph_.nodes = std::move(kept);
    replace_everywhere(graph_, map_);
    compact(graph_);
    return constants_ + dropped;
  }

 private:
  void merge_constants() {
    std::unordered_map<std::string, ValueId> seen;
    std::vector<Constant> kept;
    for (const Constant& constant : graph_.constants) {
      const std::string key = key_of(constant);
      const auto [found, is_new] = seen.try_emplace(key, constant.id);
      if (key.empty() || is_new || !replace({constant.id}, {found->second})) {
        kept.push_back(constant);
      } else {
        ++constants_;
      }
    }
    graph_.constants = std::move(kept);
  }

  bool merge(const Node& node) {
    auto& known = seen_[key_of(node)];
    for (const std::vector<ValueId>& results : known) {
      if (replace(results_of(node), results)) return true;
    }
    known.push_back(results_of(node));
    return false;
  }

  bool replace(const std::vector<ValueId>& old, const std::vector<ValueId>& by) {
    if (old.size() != by.size()) return false;
    for (size_t i = 0; i < old.size(); ++i) {
      if (!classes_.may_replace(old[i], by[i])) return false;
      if (graph_.type(old[i]) != graph_.type(by[i])) return false;
    }
    for (size_t i = 0; i < old.size(); ++i) {
      classes_.replaced(old[i], by[i]);
      map_[static_cast<size_t>(old[i])] = by[i];
    }
    return true;
  }

  Graph& graph_;
  AliasClasses classes_;
  std::vector<ValueId> map_;
  // Of nodes that are kept; several of a key where outputs must not share memory.
  std::unordered_map<std::string, std::vector<std::vector<ValueId>>> seen_;
  int64_t constants_ = 0;
};

}  // namespace

int64_t common_subexpressions(Graph& graph) {
  require_functional(graph, "common_subexpressions");
  return Merger(graph).run();
}

}  // namespace torchlift::compile
