#include "compile/passes/optimize.h"

#include <c10/util/StringUtil.h>

#include <chrono>
#include <memory>
#include <utility>

#include "compile/passes/algebraic_simplification.h"
#include "compile/passes/common_subexpressions.h"
#include "compile/passes/dead_code.h"
#include "compile/passes/pool_before_relu.h"
#include "compile/passes/view_cleanup.h"

namespace torchlift::compile {
namespace {

using Pass = int64_t (*)(Graph& graph, const OptimizeOptions& options);

struct Row {
  const char* name;
  bool OptimizeOptions::*on;
  Pass run;
};

// Constants first, as they show what is 0 or 1; then what makes nodes equal, before equal ones are
// merged; at last what is dead, so that the next round does not look at it.
const Row kPasses[] = {
    {"constant_folding", &OptimizeOptions::constant_folding,
     [](Graph& graph, const OptimizeOptions& options) {
       return constant_folding(graph, options.folding);
     }},
    {"algebraic_simplification", &OptimizeOptions::algebraic_simplification,
     [](Graph& graph, const OptimizeOptions&) { return algebraic_simplification(graph); }},
    {"view_cleanup", &OptimizeOptions::view_cleanup,
     [](Graph& graph, const OptimizeOptions&) { return view_cleanup(graph); }},
    {"common_subexpressions", &OptimizeOptions::common_subexpressions,
     [](Graph& graph, const OptimizeOptions&) { return common_subexpressions(graph); }},
    {"hoist_invariant", &OptimizeOptions::hoist_invariant,
     [](Graph& graph, const OptimizeOptions& options) {
       return hoist_invariant(graph, options.hoisting);
     }},
    {"pool_before_relu", &OptimizeOptions::pool_before_relu,
     [](Graph& graph, const OptimizeOptions&) { return pool_before_relu(graph); }},
    {"dead_code", &OptimizeOptions::dead_code,
     [](Graph& graph, const OptimizeOptions&) { return dead_code(graph); }},
};

class Optimizer {
 public:
  Optimizer(Graph& graph, const OptimizeOptions& options) : graph_(graph), options_(options) {}

  OptimizeReport run() {
    record("functionalize", 0, [&] {
      report_.functionalized = functionalize(graph_);
      return report_.functionalized.writes;
    });
    optimize_subgraphs();
    while (report_.rounds < options_.max_rounds && !report_.fixed_point) {
      ++report_.rounds;
      report_.fixed_point = round() == 0;
    }
    return std::move(report_);
  }

 private:
  int64_t round() {
    int64_t changes = 0;
    for (const Row& row : kPasses) {
      if (!(options_.*row.on)) continue;
      changes += record(row.name, report_.rounds, [&] { return row.run(graph_, options_); });
    }
    return changes;
  }

  template <class F>
  int64_t record(const char* name, int round, F&& pass) {
    PassReport report{.pass = name,
                      .round = round,
                      .changes = 0,
                      .nodes_before = graph_.nodes.size(),
                      .nodes_after = 0,
                      .microseconds = 0};
    const auto start = std::chrono::steady_clock::now();
    report.changes = pass();
    const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
    report.microseconds = took.count();
    report.nodes_after = graph_.nodes.size();
    if (options_.verify_each) verify(graph_);
    report_.passes.push_back(report);
    return report.changes;
  }

  // What a subgraph reads and gives does not change, so once is enough.
  void optimize_subgraphs() {
    for (Node& node : graph_.nodes) {
      for (auto& subgraph : node.subgraphs) {
        Graph inner = *subgraph;
        OptimizeReport report = optimize(inner, options_);
        for (PassReport& each : report.passes) report_.passes.push_back(std::move(each));
        subgraph = std::make_shared<const Graph>(std::move(inner));
      }
    }
  }

  Graph& graph_;
  const OptimizeOptions& options_;
  OptimizeReport report_;
};

}  // namespace

OptimizeOptions options_for_compilers() {
  OptimizeOptions options;
  options.constant_folding = false;
  options.common_subexpressions = false;
  options.hoist_invariant = false;
  return options;
}

int64_t OptimizeReport::changes(const std::string& pass) const {
  int64_t all = 0;
  for (const PassReport& report : passes) {
    if (report.pass == pass) all += report.changes;
  }
  return all;
}

std::string OptimizeReport::str() const {
  std::string text;
  for (const PassReport& report : passes) {
    if (report.changes == 0) continue;
    text +=
        c10::str(report.pass, ": ", report.changes, " of ", report.nodes_before, " nodes; ",
                 report.nodes_after, " left; ", static_cast<int64_t>(report.microseconds), " us\n");
  }
  return text;
}

OptimizeReport optimize(Graph& graph, const OptimizeOptions& options) {
  return Optimizer(graph, options).run();
}

}  // namespace torchlift::compile
