#include "compile/passes/written_memory.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "compile/passes/node_facts.h"

namespace torchlift::compile {
namespace {

// The arguments that an operator writes into.
std::vector<ValueId> targets(const Node& node) {
  const bool silently = writes_silently(node);
  std::vector<ValueId> found;
  if (!silently && !effects_of(node).writes) return found;
  const auto& arguments = find_operator(node)->schema().arguments();
  for (size_t i = 0; i < node.args.size(); ++i) {
    const auto* alias = arguments[i].alias_info();
    const bool statistic = silently && arguments[i].name().starts_with("running_");
    if (!statistic && (alias == nullptr || !alias->isWrite())) continue;
    for (const ValueId id : values_in(node.args[i])) found.push_back(id);
  }
  return found;
}

// Those of a branch or a loop. The lists among its arguments are, in their order, the inputs of the
// subgraphs.
std::vector<ValueId> operands_written(const Node& node) {
  std::vector<ValueId> operands;
  for (size_t i = node.op == kCondOp ? 1 : 0; i < node.args.size(); ++i) {
    for (const ValueId id : values_in(node.args[i])) operands.push_back(id);
  }
  std::vector<ValueId> found;
  for (const auto& subgraph : node.subgraphs) {
    WrittenMemory inside(*subgraph, subgraph->inputs);
    inside.add(subgraph->nodes);
    for (size_t k = 0; k < std::min(operands.size(), subgraph->inputs.size()); ++k) {
      if (inside.contains(subgraph->inputs[k])) found.push_back(operands[k]);
    }
  }
  return found;
}

// Both are sorted, each root once: what loops and branches give may show all of their operands.
void add_to(std::vector<ValueId>& roots, const std::vector<ValueId>& others) {
  if (others.empty()) return;
  std::vector<ValueId> all;
  std::set_union(roots.begin(), roots.end(), others.begin(), others.end(), std::back_inserter(all));
  roots = std::move(all);
}

}  // namespace

WrittenMemory::WrittenMemory(const Graph& graph, const std::vector<ValueId>& roots)
    : shown_(graph.values.size()) {
  for (const ValueId id : roots) of(id) = {id};
}

void WrittenMemory::add(const std::vector<Node>& nodes) {
  for (const Node& node : nodes) add(node);
}

void WrittenMemory::add(const Node& node) {
  for (const ValueId target : node.is_control_flow() ? operands_written(node) : targets(node)) {
    written_.insert(of(target).begin(), of(target).end());
  }
  if (!node.is_control_flow() && !may_view(node)) return;
  std::vector<ValueId> all;
  for (const ValueId argument : arguments_of(node)) add_to(all, of(argument));
  if (all.empty()) return;
  for (const ValueId result : results_of(node)) add_to(of(result), all);
}

namespace {

std::vector<ValueId> constants_of(const Graph& graph) {
  std::vector<ValueId> constants;
  for (const Constant& constant : graph.constants) constants.push_back(constant.id);
  return constants;
}

}  // namespace

std::vector<ValueId> written_constants(const Graph& graph) {
  std::vector<ValueId> constants = constants_of(graph);
  WrittenMemory memory(graph, constants);
  memory.add(graph.nodes);
  std::erase_if(constants, [&](ValueId id) { return !memory.contains(id); });
  return constants;
}

std::vector<size_t> constant_outputs(const Graph& graph, const WrittenMemory& memory,
                                     const std::vector<ValueId>& state) {
  const auto is_shared = [&](ValueId root) {
    return memory.contains(root) || graph.find_constant(root) == nullptr ||
           std::find(state.begin(), state.end(), root) != state.end();
  };
  std::vector<size_t> found;
  for (size_t i = 0; i < graph.outputs.size(); ++i) {
    if (graph.outputs[i] == kNoValue) continue;
    const std::vector<ValueId>& shown = memory.shown_by(graph.outputs[i]);
    if (!std::all_of(shown.begin(), shown.end(), is_shared)) found.push_back(i);
  }
  return found;
}

std::vector<size_t> constant_outputs(const Graph& graph) {
  WrittenMemory memory(graph, constants_of(graph));
  memory.add(graph.nodes);
  return constant_outputs(graph, memory);
}

}  // namespace torchlift::compile
