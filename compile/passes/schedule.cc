#include "compile/passes/schedule.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "compile/passes/memory_plan.h"

namespace torchlift::compile {
namespace {

size_t index(int32_t id) { return static_cast<size_t>(id); }

// The memory of values that may share it: allocated by one or more of them, free when the last of
// its readers has run.
struct Memory {
  int64_t bytes = 0;          // allocated so far
  size_t readers = 0;         // nodes that have not run
  size_t sum_of_readers = 0;  // of their indices: if there is one, it
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
      for (const size_t each : read_by(i)) {
        ++memory_[each].readers;
        memory_[each].sum_of_readers += i;
      }
    }
  }

  // By how much the node changes what is alive, if it runs now.
  int64_t change(size_t node) const {
    int64_t bytes = 0;
    for (const ValueId id : results_of(graph_.nodes[node])) {
      const Memory& each = memory_[class_of(id)];
      if (each.outlives || each.readers > 0) bytes += plan_.allocated[index(id)];
    }
    for (const size_t each : read_by(node)) {
      if (memory_[each].readers == 1 && !memory_[each].outlives) bytes -= memory_[each].bytes;
    }
    return bytes;
  }

  bool makes_output(size_t node) const {
    const std::vector<ValueId> results = results_of(graph_.nodes[node]);
    return std::any_of(results.begin(), results.end(),
                       [&](ValueId id) { return memory_[class_of(id)].outlives; });
  }

  // Gives the nodes whose change() is another one now.
  std::vector<size_t> run(size_t node) {
    for (const ValueId id : results_of(graph_.nodes[node])) {
      memory_[class_of(id)].bytes += plan_.allocated[index(id)];
      live_ += plan_.allocated[index(id)];
    }
    peak_ = std::max(peak_, live_);
    std::vector<size_t> changed;
    for (const ValueId id : results_of(graph_.nodes[node])) {
      drop_unread(class_of(id));
      note_last(class_of(id), &changed);
    }
    for (const size_t each : read_by(node)) {
      --memory_[each].readers;
      memory_[each].sum_of_readers -= node;
      drop_unread(each);
      note_last(each, &changed);
    }
    return changed;
  }

  int64_t peak() const { return peak_; }

 private:
  size_t class_of(ValueId id) const { return index(plan_.class_of[index(id)]); }

  std::vector<size_t> read_by(size_t node) const {
    std::vector<size_t> all;
    for (const ValueId id : arguments_of(graph_.nodes[node])) all.push_back(class_of(id));
    std::sort(all.begin(), all.end());
    all.erase(std::unique(all.begin(), all.end()), all.end());
    return all;
  }

  void drop_unread(size_t memory) {
    Memory& each = memory_[memory];
    if (each.readers > 0 || each.outlives) return;
    live_ -= each.bytes;
    each.bytes = 0;
  }

  void note_last(size_t memory, std::vector<size_t>* nodes) const {
    if (memory_[memory].readers == 1) nodes->push_back(memory_[memory].sum_of_readers);
  }

  const Graph& graph_;
  const MemoryPlan& plan_;
  std::vector<Memory> memory_;  // by class
  int64_t live_ = 0;
  int64_t peak_ = 0;
};

class Scheduler {
 public:
  Scheduler(const Graph& graph, const MemoryPlan& plan)
      : graph_(graph),
        account_(graph, plan),
        waits_for_(graph.nodes.size(), 0),
        followers_(graph.nodes.size()),
        changes_(graph.nodes.size(), 0) {
    const Uses uses(graph);
    std::optional<size_t> last;  // of those that keep their order
    for (size_t i = 0; i < graph.nodes.size(); ++i) {
      for (const ValueId id : arguments_of(graph.nodes[i])) {
        const int32_t producer = uses.producer[index(id)];
        if (producer >= 0) follow(static_cast<size_t>(producer), i);
      }
      if (!keeps_its_place(graph.nodes[i])) continue;
      if (last.has_value()) follow(*last, i);
      last = i;
    }
  }

  // Of the nodes that can run, always the one after which the least is alive; of equal ones first
  // those whose results do not stay for good, then the one that came first.
  std::vector<size_t> order() {
    for (size_t i = 0; i < graph_.nodes.size(); ++i) {
      if (waits_for_[i] == 0) add(i);
    }
    std::vector<size_t> result;
    while (!ready_.empty()) {
      const size_t node = std::get<size_t>(*ready_.begin());
      ready_.erase(ready_.begin());
      result.push_back(node);
      for (const size_t other : account_.run(node)) update(other);
      for (const size_t next : followers_[node]) {
        if (--waits_for_[next] == 0) add(next);
      }
    }
    return result;
  }

  int64_t peak() const { return account_.peak(); }

 private:
  static bool keeps_its_place(const Node& node) {
    const Effects effects = effects_of(node);
    return node.is_control_flow() || effects.draws || effects.checks;
  }

  void follow(size_t first, size_t next) {
    if (followers_[first].insert(next).second) ++waits_for_[next];
  }

  void add(size_t node) {
    changes_[node] = account_.change(node);
    ready_.insert(key(node));
  }

  void update(size_t node) {
    if (ready_.erase(key(node)) != 0) add(node);
  }

  using Key = std::tuple<int64_t, bool, size_t>;
  Key key(size_t node) const { return {changes_[node], account_.makes_output(node), node}; }

  const Graph& graph_;
  Account account_;
  std::vector<size_t> waits_for_;  // by node
  std::vector<std::set<size_t>> followers_;
  std::vector<int64_t> changes_;
  std::set<Key> ready_;
};

int64_t peak_of(const Graph& graph, const MemoryPlan& plan) {
  Account account(graph, plan);
  for (size_t i = 0; i < graph.nodes.size(); ++i) account.run(i);
  return account.peak();
}

}  // namespace

ScheduleReport schedule_for_memory(Graph& graph, double worth) {
  const MemoryPlan plan = memory_plan(graph);
  ScheduleReport report{.before = peak_of(graph, plan), .after = 0};
  report.after = report.before;
  Scheduler scheduler(graph, plan);
  const std::vector<size_t> order = scheduler.order();
  if (static_cast<double>(scheduler.peak()) > worth * static_cast<double>(report.before)) {
    return report;
  }
  report.after = scheduler.peak();
  std::vector<Node> nodes;
  nodes.reserve(order.size());
  for (const size_t i : order) nodes.push_back(std::move(graph.nodes[i]));
  graph.nodes = std::move(nodes);
  return report;
}

}  // namespace torchlift::compile
