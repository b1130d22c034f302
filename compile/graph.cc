#include "compile/graph.h"

#include <ATen/core/function_schema.h>
#include <ATen/core/jit_type.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <string>
#include <unordered_map>
#include <unordered_set>

#include "core/boxed.h"
#include "core/error.h"

namespace torchlift::compile {
namespace {

bool is_static(const std::vector<SizeExpr>& sizes) {
  return std::all_of(sizes.begin(), sizes.end(), [](const SizeExpr& s) { return s.is_constant(); });
}

std::vector<int64_t> concrete(const std::vector<SizeExpr>& sizes,
                              const std::vector<int64_t>& symbols) {
  std::vector<int64_t> result;
  result.reserve(sizes.size());
  for (const SizeExpr& size : sizes) result.push_back(size.evaluate(symbols));
  return result;
}

// What a function does to the ids of an argument, be it one or a list.
template <class F>
void for_each_ref(const Argument& argument, F&& f) {
  if (const auto* ref = std::get_if<ValueRef>(&argument)) {
    f(*ref);
  } else if (const auto* refs = std::get_if<std::vector<ValueRef>>(&argument)) {
    for (const ValueRef& each : *refs) f(each);
  }
}

}  // namespace

// --- types ---------------------------------------------------------------------------------------

bool TensorType::is_static() const {
  return compile::is_static(sizes) && compile::is_static(strides);
}

std::vector<int64_t> TensorType::concrete_sizes(const std::vector<int64_t>& symbols) const {
  return concrete(sizes, symbols);
}

std::vector<int64_t> TensorType::concrete_strides(const std::vector<int64_t>& symbols) const {
  return concrete(strides, symbols);
}

bool TensorType::operator==(const TensorType& other) const {
  return dtype == other.dtype && device == other.device && layout == other.layout &&
         sizes == other.sizes && strides == other.strides;
}

TensorType type_of(const at::Tensor& tensor) {
  TensorType type;
  type.dtype = tensor.scalar_type();
  type.device = tensor.device();
  type.layout = tensor.layout();
  for (const int64_t size : tensor.sizes()) type.sizes.emplace_back(size);
  if (type.layout == c10::kStrided) {
    for (const int64_t stride : tensor.strides()) type.strides.emplace_back(stride);
  }
  return type;
}

// --- building ------------------------------------------------------------------------------------

ValueId Graph::add_value(TensorType type, const std::string& name) {
  const auto id = static_cast<ValueId>(values.size());
  std::string unique = name;
  while (!names_.insert(unique).second) {
    unique = name + "_" + std::to_string(++name_counts_[name]);
  }
  values.push_back({std::move(type), std::move(unique)});
  return id;
}

ValueId Graph::add_input(TensorType type, const std::string& name) {
  inputs.push_back(add_value(std::move(type), name));
  return inputs.back();
}

ValueId Graph::add_constant(at::Tensor tensor, const std::string& name) {
  const ValueId id = add_value(type_of(tensor), name);
  constants.push_back({id, std::move(tensor)});
  return id;
}

const Constant* Graph::find_constant(ValueId id) const {
  for (const Constant& constant : constants) {
    if (constant.id == id) return &constant;
  }
  return nullptr;
}

std::vector<std::string> Graph::symbol_names() const {
  std::vector<std::string> names;
  for (const Symbol& symbol : symbols) names.push_back(symbol.name);
  return names;
}

// --- nodes ---------------------------------------------------------------------------------------

std::optional<c10::OperatorHandle> find_operator(const Node& node) {
  if (node.op == kCondOp || node.op == kWhileOp || node.op == kScanOp) return std::nullopt;
  const auto op = c10::Dispatcher::singleton().findSchema({node.op, node.overload});
  if (!op.has_value()) {
    unsupported_error("compile", "the graph calls ", node.full_name(),
                      ", an operator that this libtorch does not have. Load the library that "
                      "defines it, or save the graph anew with this version.");
  }
  return op;
}

std::vector<ValueId> values_in(const Argument& argument) {
  std::vector<ValueId> ids;
  for_each_ref(argument, [&](const ValueRef& ref) {
    if (ref.id != kNoValue) ids.push_back(ref.id);
  });
  return ids;
}

std::vector<ValueId> arguments_of(const Node& node) {
  std::vector<ValueId> ids;
  for (const Argument& argument : node.args) {
    for_each_ref(argument, [&](const ValueRef& ref) {
      if (ref.id != kNoValue) ids.push_back(ref.id);
    });
  }
  return ids;
}

std::vector<ValueId> numbers_read_by(const Node& node) {
  // By the number of their argument that is looked at from outside.
  static const auto* const kLookedAt =
      new std::unordered_map<std::string, size_t>{{"aten::max_pool2d_with_indices_backward", 1},
                                                  {"aten::empty_like", 0},
                                                  {"aten::full_like", 0},
                                                  {"aten::new_empty", 0},
                                                  {"aten::new_full", 0},
                                                  {"aten::new_ones", 0},
                                                  {"aten::new_zeros", 0},
                                                  {"aten::ones_like", 0},
                                                  {"aten::zeros_like", 0},
                                                  {"aten::rand_like", 0},
                                                  {"aten::randn_like", 0}};
  std::vector<ValueId> ids = arguments_of(node);
  const auto found = kLookedAt->find(node.op);
  if (found == kLookedAt->end() || found->second >= node.args.size()) return ids;
  const auto* ref = std::get_if<ValueRef>(&node.args[found->second]);
  if (ref == nullptr) return ids;
  // Another argument may be the same value.
  ids.erase(std::find(ids.begin(), ids.end(), ref->id));
  return ids;
}

std::vector<ValueId> results_of(const Node& node) {
  std::vector<ValueId> ids;
  for (const Result& result : node.results) {
    for (const ValueId id : result.ids) {
      if (id != kNoValue) ids.push_back(id);
    }
  }
  return ids;
}

void replace_arguments(Node& node, const std::vector<ValueId>& map) {
  const auto replace = [&](ValueRef& ref) {
    const auto index = static_cast<size_t>(ref.id);
    if (ref.id != kNoValue && index < map.size() && map[index] != kNoValue) ref.id = map[index];
  };
  for (Argument& argument : node.args) {
    if (auto* ref = std::get_if<ValueRef>(&argument)) replace(*ref);
    if (auto* refs = std::get_if<std::vector<ValueRef>>(&argument)) {
      for (ValueRef& each : *refs) replace(each);
    }
  }
}

Effects effects_of(const Node& node) {
  Effects effects;
  const auto op = find_operator(node);
  if (!op.has_value()) {
    for (const auto& graph : node.subgraphs) {
      for (const Node& inner : graph->nodes) effects.draws |= effects_of(inner).draws;
    }
    return effects;
  }
  const auto& schema = op->schema();
  for (size_t i = 0; i < schema.arguments().size(); ++i) effects.writes |= writes_argument(*op, i);
  effects.checks = schema.returns().empty() && !effects.writes;
  effects.draws = op->hasTag(at::Tag::nondeterministic_seeded);
  for (const auto& result : schema.returns()) {
    effects.views |= result.alias_info() != nullptr && !result.alias_info()->isWrite();
  }
  return effects;
}

Uses::Uses(const Graph& graph)
    : producer(graph.values.size(), -1),
      readers(graph.values.size()),
      is_output(graph.values.size(), false) {
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    const auto index = static_cast<int32_t>(i);
    for (const ValueId id : arguments_of(graph.nodes[i])) {
      auto& all = readers[static_cast<size_t>(id)];
      if (all.empty() || all.back() != index) all.push_back(index);
    }
    // The first one that gives it defines it; later ones write into it.
    for (const ValueId id : results_of(graph.nodes[i])) {
      if (producer[static_cast<size_t>(id)] == -1) producer[static_cast<size_t>(id)] = index;
    }
  }
  for (const ValueId id : graph.outputs) {
    if (id != kNoValue) is_output[static_cast<size_t>(id)] = true;
  }
}

// --- numbering anew ------------------------------------------------------------------------------

void compact(Graph& graph) {
  std::vector<ValueId> map(graph.values.size(), kNoValue);
  std::vector<Value> kept;
  const auto keep = [&](ValueId& id) {
    if (id == kNoValue) return;
    ValueId& mapped = map[static_cast<size_t>(id)];
    if (mapped == kNoValue) {
      mapped = static_cast<ValueId>(kept.size());
      kept.push_back(std::move(graph.values[static_cast<size_t>(id)]));
    }
    id = mapped;
  };
  for (ValueId& id : graph.inputs) keep(id);
  for (Constant& constant : graph.constants) keep(constant.id);
  for (Node& node : graph.nodes) {
    replace_arguments(node, map);
    for (Result& result : node.results) {
      for (ValueId& id : result.ids) keep(id);
    }
  }
  for (ValueId& id : graph.outputs) keep(id);
  graph.values = std::move(kept);
}

}  // namespace torchlift::compile
