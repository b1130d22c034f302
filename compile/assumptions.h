#ifndef TORCHLIFT_COMPILE_ASSUMPTIONS_H_
#define TORCHLIFT_COMPILE_ASSUMPTIONS_H_

// File: compile/assumptions.h
//
// What graphs assume of numbers: NOTE [assumptions] in batching/rules/assumptions.h.

#include <cstdint>
#include <string>
#include <vector>

#include "batching/rules/assumptions.h"
#include "compile/graph.h"

namespace torchlift::compile {

// Whether the node checks an assumption, or a branch or loop of it does. Nodes after it must stay
// after it.
bool assumes(const Node& node);
bool assumes(const Graph& graph);

// The node of an assumption, by the number that it has in the order of the trace; null if there is
// none. Of subgraphs, too.
const Node* find_assumption(const Graph& graph, int64_t number);

// The first assumption of numbers that a shape is made of; null if there is none.
const Node* find_assumption_of_shape(const Graph& graph);
// The operator that asked for the numbers: "aten::masked_select".
std::string asker_of(const Node& assumption);

// NOTE [answers]
// What the graph assumes of numbers, one after the other as the function that was traced asked. Two
// runs of one function ask the same question as long as they get the same answers. So the graphs of
// a function for one signature are the leaves of a tree, and the first answer that a run does not
// find as its graph assumes it tells to which of the others it may belong: to those with the
// same answers before, and this one.
using Answers = std::vector<std::vector<int64_t>>;
Answers answers_of(const Graph& graph);

// What runs have told about the answers of one call.
class KnownAnswers {
 public:
  // A graph with these answers failed.
  void note(const Answers& answers, const AssumptionError& error);
  // Whether a graph with these may be the right one.
  bool agree(const Answers& answers) const;
  // How the last one that failed differs, as a sentence; "" if none did.
  const std::string& reason() const { return reason_; }

 private:
  Answers first_;
  std::string reason_;
};

// "masked_select: the number of elements was 5 when the function was traced, and is 7 in this run"
// of the message of the error.
std::string reason_of(const AssumptionError& error);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_ASSUMPTIONS_H_
