#ifndef TORCHLIFT_COMPILE_IMPORT_EXPORTED_NODES_H_
#define TORCHLIFT_COMPILE_IMPORT_EXPORTED_NODES_H_

// File: compile/import/exported_nodes.h
//
// The nodes of an exported program, as nodes of ours. See NOTE [exported programs] in
// compile/import/exported_graph.h.
//
//   NodeReader nodes(json["graph"], graph, sizes);
//   nodes.scope().define("x", graph.add_input(type, "x"));
//   nodes.run();
//   graph.outputs.push_back(nodes.scope().tensor("add"));

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/function_schema.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "compile/graph.h"
#include "compile/import/exported_arguments.h"
#include "compile/import/json.h"
#include "compile/import/size_language.h"

namespace torchlift::compile {

// Something that the sizes of the inputs must fulfil, beyond what the graph itself says.
struct SizeCondition {
  SizeTerm term;
  std::string text;  // for people
};

// Names are printed as Python.
std::string identifier(std::string name);

// Throws UnsupportedError if this libtorch does not have it.
c10::OperatorHandle operator_of(const c10::OperatorName& name);

// aten::view asks for strides that the example had and that a transform may change. Where nothing
// is written in place, nobody can tell it from aten::reshape, which copies then: calls that.
void relax_views(Graph& graph);

// Reads the nodes of one graph of the file into one of ours.
class NodeReader {
 public:
  // All outlive this.
  NodeReader(const Json& json, Graph& graph, const SizeMeaning& sizes);

  NameScope& scope() { return scope_; }
  void run();
  // What the program asserts of its sizes.
  std::vector<SizeCondition>& conditions() { return conditions_; }

  // Adds a node of one argument and one result of the same type: clone, detach.
  ValueId add_unary(const char* op, ValueId id, const char* suffix);

 private:
  using Inputs = std::vector<std::pair<std::string, const Json*>>;

  std::vector<std::string> names_in(const char* field) const;
  void read(const Json& node);

  void read_operator(const Json& node, const std::string& target);
  std::optional<c10::OperatorHandle> with_scalar(const c10::OperatorHandle& op,
                                                 const Inputs& inputs) const;
  Node arguments(const c10::OperatorHandle& op, const Inputs& inputs) const;
  void fix_factory(const c10::FunctionSchema& schema, const Json& outputs, Node& node) const;
  void add_results(const c10::FunctionSchema& schema, const Json& outputs, Node& node);
  Result written_result(const Node& node, size_t written, const Json& output);
  Result new_result(const c10::Type& type, const Json& output, const std::string& by);
  ValueId add(const std::string& name);
  void read_assertion(const Json& node);

  void read_higher_order(const Json& node, const std::string& name);
  std::vector<ValueId> values_of(const Json& argument, const std::string& where) const;
  std::shared_ptr<const Graph> subgraph(const Json& argument, const std::string& by);
  void read_control_flow(const Json& node, const char* op);
  void read_map(const Json& node);
  void add_control_flow(Node node, const Json& outputs);
  void read_grad_mode(const Json& node);
  void inline_block(NodeReader& reader, const std::vector<ValueId>& operands, const Json& node,
                    bool detach);

  const Json& json_;
  Graph& graph_;
  const SizeMeaning& sizes_;
  NameScope scope_;
  std::vector<SizeCondition> conditions_;
  bool detaches_ = false;
};

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_IMPORT_EXPORTED_NODES_H_
