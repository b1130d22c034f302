#ifndef TORCHLIFT_COMPILE_GRAPH_H_
#define TORCHLIFT_COMPILE_GRAPH_H_

// File: compile/graph.h
//
// A traced program: a straight line of operators on tensors.
//
//   Graph graph = trace(f, args...);          // compile/trace.h
//   verify(graph);                            // throws if it is not well formed
//   std::cout << graph.str();
//
//   def graph(x: f32[3, 4], w: f32[4]):
//       mul = aten.mul.Tensor(x, w)  # f32[3, 4]
//       sum = aten.sum(mul, None)  # f32[]
//       return sum
//
// NOTE [values]
// A value is one tensor, known by its number. It is defined once: as an input, a constant, or the
// result of a node. Nodes stand in an order in which they can run. A node may also write into a
// value (add_, out= forms): its result then is that value itself, and later readers of it, and of
// what shares its memory, see what was written. Graphs that have been functionalised
// (compile/passes/functionalize.h) have no such nodes; most passes ask for that.
//
// A node without results checks its arguments (_linalg_check_errors), and stays.
//
// A node's arguments are those of its operator's schema, all of them, in order.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <c10/core/Device.h>
#include <c10/core/Layout.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <variant>
#include <vector>

#include "compile/size_expr.h"

namespace torchlift::compile {

// The number of a value: its place in Graph::values.
using ValueId = int32_t;
inline constexpr ValueId kNoValue = -1;  // an absent tensor: undefined, or None

// What is known of a tensor before the program runs.
struct TensorType {
  at::ScalarType dtype = at::kFloat;
  c10::Device device = c10::kCPU;
  c10::Layout layout = c10::kStrided;
  std::vector<SizeExpr> sizes;
  // Of a strided tensor, else empty.
  std::vector<SizeExpr> strides;

  int64_t dim() const { return static_cast<int64_t>(sizes.size()); }
  bool is_static() const;
  // Of given sizes of the dynamic dims.
  std::vector<int64_t> concrete_sizes(const std::vector<int64_t>& symbols = {}) const;
  std::vector<int64_t> concrete_strides(const std::vector<int64_t>& symbols = {}) const;
  // "f32[3, n]"
  std::string str(const std::vector<std::string>& symbols = {}) const;
  bool operator==(const TensorType& other) const;
  bool operator!=(const TensorType& other) const { return !(*this == other); }
};

TensorType type_of(const at::Tensor& tensor);

struct Value {
  TensorType type;
  std::string name;  // unique in its graph, a Python identifier
};

// One tensor argument.
struct ValueRef {
  ValueId id = kNoValue;
  bool operator==(const ValueRef& other) const { return id == other.id; }
};

// An argument of a node:
//   monostate                None, for an argument that is not given
//   ValueRef                 Tensor, Tensor?
//   vector<ValueRef>         Tensor[], Tensor?[]
//   IValue                   a constant without tensors: a number, bool, string, dtype, device,
//                            layout, memory format, or a list of numbers or bools. A number where
//                            the schema says Tensor is a wrapped number, as in x + 2.0: it has no
//                            say in the dtype of the result.
//   SizeExpr, vector of it   int and int[] that depend on dynamic dims
//   SizeRatio                a float, or a Scalar, that does
using Argument = std::variant<std::monostate, ValueRef, std::vector<ValueRef>, c10::IValue,
                              SizeExpr, std::vector<SizeExpr>, SizeRatio>;

// One result of a node: a tensor, or a list of them. kNoValue where the operator returned none, or
// something else than a tensor.
struct Result {
  std::vector<ValueId> ids;
  bool is_list = false;
};

class Graph;

// The operators of ours that have graphs as arguments, which are their Node::subgraphs. What a
// graph reads of the values around is among the operands.
//   cond(Tensor predicate, Tensor[] operands) -> Tensor[]       graphs: if true, if false, of
//                                                               operands
//   while_loop(Tensor[] carried, Tensor[] captured) -> Tensor[]  graphs: condition, body, of
//   carried
//                                                               and captured; body gives carried
//   scan(Tensor[] carried, Tensor[] xs, Tensor[] captured) -> Tensor[]  graph: of carried, rows of
//                                                               xs, captured; gives carried, then
//                                                               rows, which are stacked
inline constexpr const char* kCondOp = "torchlift::cond";
inline constexpr const char* kWhileOp = "torchlift::while_loop";
inline constexpr const char* kScanOp = "torchlift::scan";

struct Node {
  std::string op;        // "aten::mul"
  std::string overload;  // "Tensor"
  std::vector<Argument> args;
  std::vector<Result> results;
  std::vector<std::shared_ptr<const Graph>> subgraphs;  // of control flow
  std::string source;                                   // "model.py:12 in forward", where known

  std::string full_name() const { return overload.empty() ? op : op + "." + overload; }
  bool is_control_flow() const { return !subgraphs.empty(); }
};

// A tensor that the graph holds.
struct Constant {
  ValueId id = kNoValue;
  at::Tensor tensor;
};

// A dim of an input whose size may differ from call to call.
struct Symbol {
  std::string name;
  int32_t input = 0;  // index in Graph::inputs
  int32_t dim = 0;
  int64_t least = 0;  // the least size that the graph is right for
};

class Graph {
 public:
  std::vector<Value> values;  // by ValueId; those that nothing defines any more are skipped
  std::vector<ValueId> inputs;
  std::vector<Constant> constants;
  std::vector<Node> nodes;
  std::vector<ValueId> outputs;  // may repeat; kNoValue for an undefined tensor
  std::vector<Symbol> symbols;
  // The strides of its values are those of meta kernels: a run sees to it that they are so. See
  // NOTE [assumed layouts] in compile/replay.cc.
  bool layouts_assumed = false;

  // Adds a value; `name` is made unique by a number.
  ValueId add_value(TensorType type, const std::string& name);
  ValueId add_input(TensorType type, const std::string& name);
  ValueId add_constant(at::Tensor tensor, const std::string& name = "constant");
  const Value& value(ValueId id) const { return values.at(static_cast<size_t>(id)); }
  Value& value(ValueId id) { return values.at(static_cast<size_t>(id)); }
  const TensorType& type(ValueId id) const { return value(id).type; }
  // The constant that defines `id`, or null.
  const Constant* find_constant(ValueId id) const;
  std::vector<std::string> symbol_names() const;

  // As readable code; with comments that tell where it comes from, where that is known.
  std::string str(bool sources = false) const;

 private:
  std::unordered_map<std::string, int64_t> name_counts_;
  std::unordered_set<std::string> names_;
};

// --- looking at nodes ----------------------------------------------------------------------------

// The operator, or null for control flow. Throws UnsupportedError if this libtorch does not have
// it.
std::optional<c10::OperatorHandle> find_operator(const Node& node);

// The values that an argument, or all of a node's (those of subgraphs are arguments too), mention;
// kNoValue left out.
std::vector<ValueId> values_in(const Argument& argument);
std::vector<ValueId> arguments_of(const Node& node);
std::vector<ValueId> results_of(const Node& node);
// Those of arguments_of whose numbers the node reads: of the others it looks at the shape, dtype
// and layout alone, as zeros_like does, or the gradient of a pool at what was pooled.
std::vector<ValueId> numbers_read_by(const Node& node);
// Puts map[id] in the place of each value of the node's arguments; kNoValue in map: leave as is.
void replace_arguments(Node& node, const std::vector<ValueId>& map);

// What a node does beyond computing its results.
struct Effects {
  bool writes = false;  // into an argument
  bool draws = false;   // random numbers
  bool views = false;   // a result shares memory with an argument, by the schema
  bool checks = false;  // has no results: throws, or does nothing

  // Whether it can be left out where nobody reads its results, or done once for two equal ones.
  bool pure() const { return !writes && !draws && !checks; }
};
Effects effects_of(const Node& node);

// Who defines and who reads each value, by its id. Valid until the graph changes.
struct Uses {
  explicit Uses(const Graph& graph);
  std::vector<int32_t> producer;              // index in nodes; -1 for inputs and constants
  std::vector<std::vector<int32_t>> readers;  // indices in nodes
  std::vector<bool> is_output;
};

// Throws TransformError, saying where and what, unless: every value read is defined before; every
// value is defined once (NOTE [values]); every node's operator exists, has as many arguments and
// results, of these kinds; symbols name dims of inputs; names are unique; subgraphs are well
// formed, and fit.
void verify(const Graph& graph);

// Drops the values that nothing defines, and numbers the rest anew.
void compact(Graph& graph);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_GRAPH_H_
