#ifndef TORCHLIFT_COMPILE_PASSES_OPTIMIZE_H_
#define TORCHLIFT_COMPILE_PASSES_OPTIMIZE_H_

// File: compile/passes/optimize.h
//
// All passes, in an order that makes sense, as often as they find something to do.
//
//   const OptimizeReport report = optimize(graph);
//   std::cout << report.str();
//   // functionalize: 3 of 40 nodes; 42 left; 210 us
//   // constant_folding: 2 ...
//
// report.functionalized says which outputs go back into inputs: compile/passes/functionalize.h.

#include <cstdint>
#include <string>
#include <vector>

#include "compile/graph.h"
#include "compile/passes/constant_folding.h"
#include "compile/passes/functionalize.h"
#include "compile/passes/hoist_invariant.h"

namespace torchlift::compile {

struct OptimizeOptions {
  bool constant_folding = true;
  bool algebraic_simplification = true;
  bool view_cleanup = true;
  bool common_subexpressions = true;
  bool hoist_invariant = true;
  bool pool_before_relu = true;
  bool dead_code = true;
  FoldingOptions folding;
  HoistOptions hoisting;
  // The passes run in rounds, until one changes nothing, or so many have run.
  int max_rounds = 8;
  // Whether to verify() after each pass.
#ifdef NDEBUG
  bool verify_each = false;
#else
  bool verify_each = true;
#endif
};

// For a compiler of machine code, which folds, merges and moves by itself: what it does not do is
// left, that views and copies which come to nothing go, and pools before relu.
OptimizeOptions options_for_compilers();

struct PassReport {
  std::string pass;
  int round = 0;
  int64_t changes = 0;  // what the pass counts, subgraphs included
  size_t nodes_before = 0;
  size_t nodes_after = 0;
  double microseconds = 0;
};

struct OptimizeReport {
  Functionalized functionalized;
  std::vector<PassReport> passes;  // those that ran, one after the other
  int rounds = 0;
  bool fixed_point = false;  // the last round changed nothing

  int64_t changes(const std::string& pass) const;
  // One line a pass that changed something.
  std::string str() const;
};

// Makes the graph functional and then smaller; it gives the same outputs, and then those of
// report.functionalized. Graphs of control flow are optimized too.
OptimizeReport optimize(Graph& graph, const OptimizeOptions& options = {});

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_PASSES_OPTIMIZE_H_
