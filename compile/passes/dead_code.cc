#include "compile/passes/dead_code.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "compile/passes/node_facts.h"

namespace torchlift::compile {
namespace {

bool must_stay(const Node& node) {
  const Effects effects = effects_of(node);
  return effects.writes || effects.draws || node.results.empty() || writes_silently(node);
}

}  // namespace

int64_t dead_code(Graph& graph) {
  std::vector<bool> live(graph.values.size(), false);
  const auto is_live = [&](ValueId id) { return live[static_cast<size_t>(id)]; };
  for (const ValueId id : graph.outputs) {
    if (id != kNoValue) live[static_cast<size_t>(id)] = true;
  }
  std::vector<Node> kept;
  for (size_t i = graph.nodes.size(); i-- > 0;) {
    Node& node = graph.nodes[i];
    const std::vector<ValueId> results = results_of(node);
    if (!must_stay(node) && std::none_of(results.begin(), results.end(), is_live)) continue;
    for (const ValueId id : arguments_of(node)) live[static_cast<size_t>(id)] = true;
    kept.push_back(std::move(node));
  }
  const auto dropped = static_cast<int64_t>(graph.nodes.size() - kept.size());
  std::reverse(kept.begin(), kept.end());
  graph.nodes = std::move(kept);
  std::erase_if(graph.constants, [&](const Constant& each) { return !is_live(each.id); });
  compact(graph);
  return dropped;
}

}  // namespace torchlift::compile
