#ifndef TORCHLIFT_COMPILE_PASSES_NODE_FACTS_H_
#define TORCHLIFT_COMPILE_PASSES_NODE_FACTS_H_

// File: compile/passes/node_facts.h
//
// What passes ask of nodes and values before they change a graph.
//
// NOTE [what passes keep]
//  - The numbers, bit for bit, unless a pass says otherwise.
//  - The type of every value that stays, strides too: views further on rely on it.
//  - Outputs are tensors of their own: two outputs that did not share memory do not share it
//    afterwards, nor does an output with an input or a constant. A caller may write into what he
//    gets.
//  - The random numbers: operators that draw are neither dropped nor moved nor merged.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "compile/graph.h"

namespace torchlift::compile {

// Whether an operator's name ("aten::mul") is in a list of them.
template <size_t N>
bool is_one_of(const std::string& op, const std::array<std::string_view, N>& ops) {
  return std::find(ops.begin(), ops.end(), op) != ops.end();
}

// Whether the node gives the same results for the same arguments, and does nothing else: it neither
// writes nor draws, takes no generator, and its results do not depend on memory that nobody
// has written (empty).
bool is_pure(const Node& node);

// Whether the node writes though its schema does not say so: batch norms update running statistics
// in training.
bool writes_silently(const Node& node);

// The operator's tag, "pointwise".
bool is_pointwise(const Node& node);

// Whether the node gives its first argument with some elements replaced: slice_scatter, index_put
// and their like, which copy all of it to write a part.
bool replaces_elements(const Node& node);

// Whether a result may share memory with an argument: by the schema, or, as for _unsafe_view,
// though the schema does not say so.
bool may_view(const Node& node);

// Whether the result has all elements of the first argument in their order, under other sizes: view
// and its like.
bool keeps_order(const Node& node);

// Throws TransformError, naming the pass and the operator, if a node writes into a value.
void require_functional(const Graph& graph, const std::string& pass);

// Which values may share memory. Values that do are of one class.
class AliasClasses {
 public:
  explicit AliasClasses(const Graph& graph);

  int32_t find(ValueId id) const;
  // Whether all that reads `old` may read `replacement` in its place, as far as the memory of
  // outputs is concerned: NOTE [what passes keep].
  bool may_replace(ValueId old, ValueId replacement) const;
  void replaced(ValueId old, ValueId replacement);
  // A value that an input or a constant holds, and one that the caller gets.
  bool is_external(ValueId id) const { return external_[index(find(id))]; }
  bool escapes(ValueId id) const { return escapes_[index(find(id))]; }

 private:
  static size_t index(int32_t id) { return static_cast<size_t>(id); }
  void merge(ValueId a, ValueId b);

  mutable std::vector<int32_t> parents_;
  std::vector<bool> external_;
  std::vector<bool> escapes_;
};

// Puts map[id] in the place of each value, in nodes and outputs, where it is not kNoValue; follows
// chains.
void replace_everywhere(Graph& graph, std::vector<ValueId> map);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_PASSES_NODE_FACTS_H_
