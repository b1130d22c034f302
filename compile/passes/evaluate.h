#ifndef TORCHLIFT_COMPILE_PASSES_EVALUATE_H_
#define TORCHLIFT_COMPILE_PASSES_EVALUATE_H_

// File: compile/passes/evaluate.h
//
// Runs a single node, on tensors or on shapes alone, and makes new nodes: what passes need to
// compute constants and to know the types of what they put into a graph.
//
//   Node node = make_node("aten::add", "Tensor", {{"self", ValueRef{x}}, {"other", ValueRef{y}}});
//   const ValueId sum = append(graph, &nodes, std::move(node), "sum");   // with its type

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "compile/graph.h"

namespace torchlift::compile {

using TensorOf = std::function<at::Tensor(ValueId)>;

// The tensors of each result of the node, below autograd and below every level that may be open:
// what a pass computes is no part of what somebody traces or differentiates. `symbols` are the
// sizes of the dynamic dims. Throws UnsupportedError for control flow.
std::vector<std::vector<at::Tensor>> evaluate(const Node& node, const TensorOf& tensor_of,
                                              const std::vector<int64_t>& symbols = {});

// What is known of a result of a node before it runs.
struct Inferred {
  std::optional<TensorType> type;  // none: an undefined tensor
  ValueId shares = kNoValue;       // the argument whose memory it shares
  SizeExpr offset;                 // of its first element in that memory, in elements of its dtype;
                                   // arguments are taken to start at 0
};

// By running the node on meta tensors, or, if the operator has no meta kernel, on zeros. With
// dynamic dims: at several sizes, each size of the result being found among those that the
// arguments have. Throws UnsupportedError, naming the operator, where that fails.
std::vector<std::vector<Inferred>> infer(const Graph& graph, const Node& node);

// A node with the arguments given by name, and the schema's defaults for the others.
Node make_node(const std::string& op, const std::string& overload,
               std::vector<std::pair<std::string, Argument>> arguments);

// Adds a node that has no results yet to `nodes`, and its results, with their inferred types, to
// the graph. Gives the first result.
ValueId append(Graph& graph, std::vector<Node>* nodes, Node node, const std::string& name);

// The node's argument of that name, or null if the operator has none such.
const Argument* find_argument(const Node& node, const std::string& name);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_PASSES_EVALUATE_H_
