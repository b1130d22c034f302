#include "compile/passes/fusion_groups.h"

#include <algorithm>
#include <iterator>
#include <optional>
#include <queue>
#include <set>
#include <utility>

#include "compile/assumptions.h"
#include "compile/passes/node_facts.h"

namespace torchlift::compile {
namespace {

// Merging two groups adds the edges of both, so that it makes a cycle just if there is a path from
// one to the other through a third. Groups are sets of nodes with a representative, and at first
// every node is one.
class Grouping {
 public:
  Grouping(Graph& graph, const FusionOptions& options)
      : graph_(graph), options_(options), uses_(graph) {
    for (size_t i = 0; i < graph.nodes.size(); ++i) {
      parents_.push_back(i);
      members_.push_back({i});
      successors_.emplace_back();
    }
    for (size_t i = 0; i < graph.nodes.size(); ++i) {
      for (const ValueId id : arguments_of(graph.nodes[i])) {
        const int32_t producer = uses_.producer[static_cast<size_t>(id)];
        if (producer < 0) continue;
        successors_[static_cast<size_t>(producer)].insert(i);
      }
    }
    keep_draws_in_order();
    keep_after_assumptions();
  }

  void merge_all() {
    for (size_t i = 0; i < graph_.nodes.size(); ++i) {
      if (!fusible(i)) continue;
      for (const ValueId id : arguments_of(graph_.nodes[i])) {
        const int32_t producer = uses_.producer[static_cast<size_t>(id)];
        if (producer < 0) continue;
        const auto p = static_cast<size_t>(producer);
        if (fusible(p) && same_space(i, p)) merge(find(p), find(i));
      }
    }
  }

  // The nodes in an order in which each group stands together.
  std::vector<FusionGroup> finish() {
    std::vector<FusionGroup> groups;
    std::vector<Node> ordered;
    for (const size_t group : order()) {
      const size_t first = ordered.size();
      for (const size_t i : members_[group]) ordered.push_back(graph_.nodes[i]);
      if (members_[group].size() > 1) {
        groups.push_back(described(group));
        groups.back().first = first;
      }
    }
    graph_.nodes = std::move(ordered);
    return groups;
  }

 private:
  // Random operators draw in the order they had, as if each read what the one before it gave.
  void keep_draws_in_order() {
    std::optional<size_t> last;
    for (size_t i = 0; i < graph_.nodes.size(); ++i) {
      if (!effects_of(graph_.nodes[i]).draws) continue;
      if (last.has_value()) successors_[*last].insert(i);
      last = i;
    }
  }

  // What comes after the check of an assumption stays there.
  void keep_after_assumptions() {
    std::optional<size_t> last;
    for (size_t i = 0; i < graph_.nodes.size(); ++i) {
      if (last.has_value()) successors_[*last].insert(i);
      if (assumes(graph_.nodes[i])) last = i;
    }
  }

  size_t find(size_t i) {
    while (parents_[i] != i) i = parents_[i] = parents_[parents_[i]];
    return i;
  }

  bool fusible(size_t i) const {
    const Node& node = graph_.nodes[i];
    if (node.is_control_flow() || !is_pointwise(node) || !is_pure(node) || may_view(node)) {
      return false;
    }
    return node.results.size() == 1 && !node.results[0].is_list &&
           node.results[0].ids[0] != kNoValue && type(i).layout == c10::kStrided &&
           (!options_.admit || options_.admit(node));
  }

  const TensorType& type(size_t i) const { return graph_.type(graph_.nodes[i].results[0].ids[0]); }

  bool same_space(size_t i, size_t j) const {
    return type(i).sizes == type(j).sizes && type(i).device == type(j).device &&
           (!options_.same_strides || type(i).strides == type(j).strides);
  }

  // Whether a path leads from group a to group b other than by an edge between the two.
  bool path_around(size_t a, size_t b) {
    std::vector<size_t> stack;
    std::set<size_t> seen;
    const auto push_all = [&](size_t group) {
      for (const size_t next : successors_[group]) {
        const size_t to = find(next);
        if (to == a || (to == b && group == a)) continue;
        if (seen.insert(to).second) stack.push_back(to);
      }
    };
    push_all(a);
    while (!stack.empty()) {
      const size_t group = stack.back();
      stack.pop_back();
      if (group == b) return true;
      push_all(group);
    }
    return false;
  }

  void merge(size_t a, size_t b) {
    if (a == b || path_around(a, b) || path_around(b, a)) return;
    parents_[b] = a;
    std::vector<size_t> all;
    std::merge(members_[a].begin(), members_[a].end(), members_[b].begin(), members_[b].end(),
               std::back_inserter(all));
    members_[a] = std::move(all);
    members_[b].clear();
    successors_[a].merge(successors_[b]);
  }

  // Groups in an order in which they can run; of those that can, the one that began first.
  std::vector<size_t> order() {
    std::vector<size_t> waits_for(graph_.nodes.size(), 0);
    std::vector<std::set<size_t>> followers(graph_.nodes.size());
    for (size_t group = 0; group < graph_.nodes.size(); ++group) {
      if (members_[group].empty()) continue;
      for (const size_t next : successors_[group]) {
        const size_t to = find(next);
        if (to != group && followers[group].insert(to).second) ++waits_for[to];
      }
    }
    const auto later = [&](size_t a, size_t b) {
      return members_[a].front() > members_[b].front();
    };
    std::priority_queue<size_t, std::vector<size_t>, decltype(later)> ready(later);
    for (size_t group = 0; group < graph_.nodes.size(); ++group) {
      if (!members_[group].empty() && waits_for[group] == 0) ready.push(group);
    }
    std::vector<size_t> all;
    while (!ready.empty()) {
      const size_t group = ready.top();
      ready.pop();
      all.push_back(group);
      for (const size_t next : followers[group]) {
        if (--waits_for[next] == 0) ready.push(next);
      }
    }
    return all;
  }

  FusionGroup described(size_t group) {
    FusionGroup result{.first = 0,
                       .count = members_[group].size(),
                       .inputs = {},
                       .outputs = {},
                       .sizes = type(members_[group][0]).sizes,
                       .device = type(members_[group][0]).device};
    std::set<ValueId> made, read;
    for (const size_t i : members_[group]) made.insert(graph_.nodes[i].results[0].ids[0]);
    for (const size_t i : members_[group]) {
      for (const ValueId id : arguments_of(graph_.nodes[i])) {
        if (made.count(id) == 0 && read.insert(id).second) result.inputs.push_back(id);
      }
      const ValueId id = graph_.nodes[i].results[0].ids[0];
      const auto& readers = uses_.readers[static_cast<size_t>(id)];
      const bool outside = std::any_of(readers.begin(), readers.end(), [&](int32_t reader) {
        return find(static_cast<size_t>(reader)) != group;
      });
      if (outside || uses_.is_output[static_cast<size_t>(id)]) result.outputs.push_back(id);
    }
    return result;
  }

  Graph& graph_;
  const FusionOptions& options_;
  const Uses uses_;
  std::vector<size_t> parents_;
  std::vector<std::vector<size_t>> members_;  // of representatives; in order
  std::vector<std::set<size_t>> successors_;  // nodes; of representatives
};

}  // namespace

std::vector<FusionGroup> fusion_groups(Graph& graph, const FusionOptions& options) {
  require_functional(graph, "fusion_groups");
  Grouping grouping(graph, options);
  grouping.merge_all();
  return grouping.finish();
}

}  // namespace torchlift::compile
