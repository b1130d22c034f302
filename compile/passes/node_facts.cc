#include "compile/passes/node_facts.h"

#include <ATen/core/enum_tag.h>
#include <ATen/core/function_schema.h>
#include <ATen/core/jit_type.h>

#include <algorithm>
#include <array>
#include <string_view>
#include <utility>

#include "core/error.h"

namespace torchlift::compile {
namespace {

bool takes_generator(const c10::FunctionSchema& schema) {
  return std::any_of(schema.arguments().begin(), schema.arguments().end(),
                     [](const c10::Argument& argument) { return argument.name() == "generator"; });
}

// Memory that nobody has written: empty, empty_like, new_empty, _empty_affine_quantized...
bool is_uninitialized(const Node& node) {
  return node.op.find("::empty") != std::string::npos ||
         node.op.find("::new_empty") != std::string::npos ||
         node.op.find("::_empty") != std::string::npos ||
         node.op.find("::_efficientzerotensor") != std::string::npos;
}

}  // namespace

bool writes_silently(const Node& node) {
  constexpr std::array<std::string_view, 3> kNorms = {
      "aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm"};
  if (std::find(kNorms.begin(), kNorms.end(), node.op) == kNorms.end()) return false;
  const auto argument = [&](const std::string& name) -> const Argument& {
    return node.args.at(
        static_cast<size_t>(find_operator(node)->schema().argumentIndexWithName(name).value()));
  };
  const auto* training = std::get_if<c10::IValue>(&argument("training"));
  return training != nullptr && training->isBool() && training->toBool() &&
         std::holds_alternative<ValueRef>(argument("running_mean"));
}

bool is_pure(const Node& node) {
  const Effects effects = effects_of(node);
  if (effects.writes || effects.draws || is_uninitialized(node) || writes_silently(node)) {
    return false;
  }
  const auto op = find_operator(node);
  return !op.has_value() || (!takes_generator(op->schema()) && !op->schema().returns().empty());
}

bool is_pointwise(const Node& node) {
  const auto op = find_operator(node);
  return op.has_value() && op->hasTag(at::Tag::pointwise);
}

bool replaces_elements(const Node& node) {
  constexpr std::array<std::string_view, 11> kOps = {
      "aten::slice_scatter", "aten::select_scatter", "aten::diagonal_scatter", "aten::index_put",
      "aten::index_add",     "aten::index_copy",     "aten::index_fill",       "aten::scatter",
      "aten::scatter_add",   "aten::masked_fill",    "aten::masked_scatter"};
  return is_one_of(node.op, kOps);
}

bool may_view(const Node& node) {
  // Their schemas promise that the argument is not used any more.
  constexpr std::array<std::string_view, 3> kHidden = {"aten::_unsafe_view", "aten::resolve_conj",
                                                       "aten::resolve_neg"};
  if (effects_of(node).views) return true;
  if (std::find(kHidden.begin(), kHidden.end(), node.op) != kHidden.end()) return true;
  // What is made of other operators may give one of its arguments back (dropout, type_as).
  const auto op = find_operator(node);
  return op.has_value() && op->hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd);
}

bool keeps_order(const Node& node) {
  constexpr std::array<std::string_view, 9> kOps = {
      "aten::view",      "aten::reshape", "aten::_unsafe_view",
      "aten::unsqueeze", "aten::squeeze", "aten::flatten",
      "aten::alias",     "aten::detach",  "aten::_reshape_alias"};
  return is_one_of(node.op, kOps) && node.overload != "dtype";
}

void require_functional(const Graph& graph, const std::string& pass) {
  for (const Node& node : graph.nodes) {
    if (!effects_of(node).writes && !writes_silently(node)) continue;
    transform_error("compile", pass, " is for graphs without writes, and got one with ",
                    node.full_name(), ". Run functionalize() first.");
  }
}

// --- classes of values that share memory ---------------------------------------------------------

AliasClasses::AliasClasses(const Graph& graph)
    : parents_(graph.values.size()),
      external_(graph.values.size(), false),
      escapes_(graph.values.size(), false) {
  for (size_t i = 0; i < parents_.size(); ++i) parents_[i] = static_cast<int32_t>(i);
  for (const ValueId id : graph.inputs) external_[index(id)] = true;
  for (const Constant& constant : graph.constants) external_[index(constant.id)] = true;
  for (const ValueId id : graph.outputs) {
    if (id != kNoValue) escapes_[index(id)] = true;
  }
  for (const Node& node : graph.nodes) {
    // What a branch or a loop gives may be one of its operands.
    if (!node.is_control_flow() && !may_view(node)) continue;
    for (const ValueId argument : arguments_of(node)) {
      for (const ValueId result : results_of(node)) merge(argument, result);
    }
  }
}

int32_t AliasClasses::find(ValueId id) const {
  int32_t root = id;
  while (parents_[index(root)] != root) root = parents_[index(root)];
  while (parents_[index(id)] != root) {
    const int32_t next = parents_[index(id)];
    parents_[index(id)] = root;
    id = next;
  }
  return root;
}

void AliasClasses::merge(ValueId a, ValueId b) {
  const int32_t x = find(a), y = find(b);
  if (x == y) return;
  parents_[index(y)] = x;
  external_[index(x)] = external_[index(x)] || external_[index(y)];
  escapes_[index(x)] = escapes_[index(x)] || escapes_[index(y)];
}

bool AliasClasses::may_replace(ValueId old, ValueId replacement) const {
  if (find(old) == find(replacement)) return true;
  return !escapes(old) || (!escapes(replacement) && !is_external(replacement));
}

void AliasClasses::replaced(ValueId old, ValueId replacement) { merge(replacement, old); }

void replace_everywhere(Graph& graph, std::vector<ValueId> map) {
  map.resize(graph.values.size(), kNoValue);
  const auto final_of = [&](ValueId id) {
    while (map[static_cast<size_t>(id)] != kNoValue) id = map[static_cast<size_t>(id)];
    return id;
  };
  for (size_t i = 0; i < map.size(); ++i) {
    if (map[i] != kNoValue) map[i] = final_of(static_cast<ValueId>(i));
  }
  for (Node& node : graph.nodes) replace_arguments(node, map);
  for (ValueId& id : graph.outputs) {
    if (id != kNoValue && map[static_cast<size_t>(id)] != kNoValue) {
      id = map[static_cast<size_t>(id)];
    }
  }
}

}  // namespace torchlift::compile
