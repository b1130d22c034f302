#include "compile/passes/schedule.h"

#include <algorithm>
#include <iterator>
#include <numeric>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "compile/assumptions.h"
#include "compile/passes/memory_plan.h"
#include "compile/passes/node_facts.h"

namespace torchlift::compile {
namespace {

size_t index(int32_t id) { return static_cast<size_t>(id); }

// The classes of the arguments whose numbers the node reads, each once.
std::vector<size_t> classes_read(const Graph& graph, const MemoryPlan& plan, size_t node) {
  std::vector<size_t> all;
  for (const ValueId id : numbers_read_by(graph.nodes[node])) {
    all.push_back(index(plan.class_of[index(id)]));
  }
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
  return all;
}

// The memory of values that may share it: allocated by one or more of them, free when the last of
// its readers has run.
struct Memory {
  int64_t bytes = 0;   // allocated so far
  size_t readers = 0;  // nodes that have not run
  bool outlives = false;
};

// What is alive while nodes run one after the other.
class Account {
 public:
  Account(const Graph& graph, const MemoryPlan& plan)
      : graph_(graph), plan_(plan), memory_(graph.values.size()) {
    for (size_t i = 0; i < graph.values.size(); ++i) {
      memory_[class_of(static_cast<ValueId>(i))].outlives = plan.outlives[i];
    }
    for (size_t i = 0; i < graph.nodes.size(); ++i) {
      for (const size_t each : classes_read(graph, plan, i)) ++memory_[each].readers;
    }
  }

  void run(size_t node) {
    const int64_t taken_over = takes_over(node);
    for (const ValueId id : results_of(graph_.nodes[node])) {
      memory_[class_of(id)].bytes += plan_.allocated[index(id)];
      live_ += plan_.allocated[index(id)];
    }
    peak_ = std::max(peak_, live_ - taken_over);
    for (const ValueId id : results_of(graph_.nodes[node])) drop_unread(class_of(id));
    for (const size_t each : classes_read(graph_, plan_, node)) {
      --memory_[each].readers;
      drop_unread(each);
    }
  }

  int64_t peak() const { return peak_; }

 private:
  size_t class_of(ValueId id) const { return index(plan_.class_of[index(id)]); }

  // The bytes of an argument that the result is written over (memory_plan.h).
  int64_t takes_over(size_t node) const {
    const Node& each = graph_.nodes[node];
    const std::vector<ValueId> results = results_of(each);
    if (results.size() != 1 || !is_pointwise(each) || !is_pure(each)) return 0;
    const int64_t bytes = plan_.allocated[index(results[0])];
    if (memory_[class_of(results[0])].outlives) return 0;
    for (const ValueId id : arguments_of(each)) {
      const Memory& memory = memory_[class_of(id)];
      if (memory.readers == 1 && !memory.outlives && memory.bytes == bytes &&
          graph_.type(id) == graph_.type(results[0])) {
        return bytes;
      }
    }
    return 0;
  }

  void drop_unread(size_t memory) {
    Memory& each = memory_[memory];
    if (each.readers > 0 || each.outlives) return;
    live_ -= each.bytes;
    each.bytes = 0;
  }

  const Graph& graph_;
  const MemoryPlan& plan_;
  std::vector<Memory> memory_;  // by class
  int64_t live_ = 0;
  int64_t peak_ = 0;
};

// From the end to the start: of the nodes that nothing waits for any more, the one before which the
// least is alive is put before those that have been placed. So each value is made shortly before
// it is read.
class Scheduler {
 public:
  Scheduler(const Graph& graph, const MemoryPlan& plan)
      : graph_(graph),
        plan_(plan),
        readers_(graph.values.size()),
        bytes_(graph.values.size(), 0),
        live_(graph.values.size(), false),
        unplaced_(graph.nodes.size(), 0),
        sources_(graph.nodes.size()),
        changes_(graph.nodes.size(), 0) {
    for (size_t i = 0; i < graph.values.size(); ++i) {
      const size_t each = index(plan.class_of[i]);
      bytes_[each] += plan.allocated[i];
      if (plan.outlives[i]) live_[each] = true;
    }
    const Uses uses(graph);
    std::optional<size_t> last;        // of those that keep their order
    std::optional<size_t> assumption;  // the last one
    for (size_t i = 0; i < graph.nodes.size(); ++i) {
      for (const size_t each : classes_read(graph, plan, i)) readers_[each].push_back(i);
      for (const ValueId id : arguments_of(graph.nodes[i])) {
        const int32_t producer = uses.producer[index(id)];
        if (producer >= 0) needs(i, static_cast<size_t>(producer));
      }
      if (assumption.has_value()) needs(i, *assumption);
      if (assumes(graph.nodes[i])) assumption = i;
      if (!keeps_its_place(graph.nodes[i])) continue;
      if (last.has_value()) needs(i, *last);
      last = i;
    }
  }

  std::vector<size_t> order() {
    for (size_t i = 0; i < graph_.nodes.size(); ++i) {
      if (unplaced_[i] == 0) add(i);
    }
    std::vector<size_t> result;
    while (!ready_.empty()) {
      const size_t node = ready_.rbegin()->second;
      ready_.erase(std::prev(ready_.end()));
      result.push_back(node);
      for (const size_t each : classes_read(graph_, plan_, node)) make_live(each);
      for (const size_t source : sources_[node]) {
        if (--unplaced_[source] == 0) add(source);
      }
    }
    std::reverse(result.begin(), result.end());
    return result;
  }

 private:
  static bool keeps_its_place(const Node& node) {
    const Effects effects = effects_of(node);
    return node.is_control_flow() || effects.draws || effects.checks;
  }

  void needs(size_t node, size_t source) {
    if (sources_[node].insert(source).second) ++unplaced_[source];
  }

  // How much less is alive before the node than after it.
  int64_t freed(size_t node) const {
    int64_t bytes = 0;
    for (const ValueId id : results_of(graph_.nodes[node])) {
      if (live_[index(plan_.class_of[index(id)])]) bytes += plan_.allocated[index(id)];
    }
    for (const size_t each : classes_read(graph_, plan_, node)) {
      if (!live_[each]) bytes -= bytes_[each];
    }
    return bytes;
  }

  void add(size_t node) {
    changes_[node] = freed(node);
    ready_.emplace(changes_[node], node);
  }

  void make_live(size_t memory) {
    if (live_[memory]) return;
    live_[memory] = true;
    for (const size_t reader : readers_[memory]) {
      if (ready_.erase({changes_[reader], reader}) != 0) add(reader);
    }
  }

  const Graph& graph_;
  const MemoryPlan& plan_;
  // Of classes.
  std::vector<std::vector<size_t>> readers_;
  std::vector<int64_t> bytes_;
  std::vector<bool> live_;  // after the node that is placed next
  // Of nodes.
  std::vector<size_t> unplaced_;  // how many that wait for it are not placed
  std::vector<std::set<size_t>> sources_;
  std::vector<int64_t> changes_;
  std::set<std::pair<int64_t, size_t>> ready_;
};

int64_t peak_of(const Graph& graph, const MemoryPlan& plan, const std::vector<size_t>& order) {
  Account account(graph, plan);
  for (const size_t node : order) account.run(node);
  return account.peak();
}

}  // namespace

ScheduleReport schedule_for_memory(Graph& graph, double worth) {
  const MemoryPlan plan = memory_plan(graph);
  std::vector<size_t> as_it_is(graph.nodes.size());
  std::iota(as_it_is.begin(), as_it_is.end(), 0);
  ScheduleReport report{.before = peak_of(graph, plan, as_it_is), .after = 0};
  report.after = report.before;
  const std::vector<size_t> order = Scheduler(graph, plan).order();
  const int64_t peak = peak_of(graph, plan, order);
  if (static_cast<double>(peak) > worth * static_cast<double>(report.before)) return report;
  report.after = peak;
  std::vector<Node> nodes;
  nodes.reserve(order.size());
  for (const size_t i : order) nodes.push_back(std::move(graph.nodes[i]));
  graph.nodes = std::move(nodes);
  return report;
}

}  // namespace torchlift::compile
