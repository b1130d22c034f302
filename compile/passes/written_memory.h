#ifndef TORCHLIFT_COMPILE_PASSES_WRITTEN_MEMORY_H_
#define TORCHLIFT_COMPILE_PASSES_WRITTEN_MEMORY_H_

// File: compile/passes/written_memory.h
//
// What of some values' memory a graph writes into, through views too.
//
//   WrittenMemory memory(graph, graph.inputs);
//   for (const Node& node : graph.nodes) memory.add(node);
//   memory.contains(graph.inputs[0]);

#include <cstddef>
#include <set>
#include <vector>

#include "compile/graph.h"

namespace torchlift::compile {

class WrittenMemory {
 public:
  // `roots`: the values, which no node makes: inputs and constants.
  WrittenMemory(const Graph& graph, const std::vector<ValueId>& roots);

  // The next of the graph's nodes, in their order.
  void add(const Node& node);
  // All of them.
  void add(const std::vector<Node>& nodes);

  // The roots that the nodes so far write into.
  const std::set<ValueId>& roots() const { return written_; }
  bool contains(ValueId root) const { return written_.count(root) != 0; }
  // The roots whose memory a value of the nodes so far may show, sorted.
  const std::vector<ValueId>& shown_by(ValueId id) const {
    return shown_.at(static_cast<size_t>(id));
  }

 private:
  std::vector<ValueId>& of(ValueId id) { return shown_.at(static_cast<size_t>(id)); }

  std::vector<std::vector<ValueId>> shown_;  // by value: the roots it may show, sorted
  std::set<ValueId> written_;
};

// The constants of the graph that its nodes write into, in the graph's order: the state that a run
// leaves to the next one (NOTE [state] in compile/captured_state.h).
std::vector<ValueId> written_constants(const Graph& graph);

// The outputs that may be, or be views of, constants that no node writes into, by their places in
// Graph::outputs: NOTE [outputs that are constants] in compile/own_copy.h. `memory`: of all nodes,
// with the constants among its roots. `state`: constants that count as written though these nodes
// do not.
std::vector<size_t> constant_outputs(const Graph& graph, const WrittenMemory& memory,
                                     const std::vector<ValueId>& state = {});
std::vector<size_t> constant_outputs(const Graph& graph);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_PASSES_WRITTEN_MEMORY_H_
