#ifndef TORCHLIFT_COMPILE_IMPORT_EXPORTED_GRAPH_H_
#define TORCHLIFT_COMPILE_IMPORT_EXPORTED_GRAPH_H_

// File: compile/import/exported_graph.h
//
// An exported program as a graph of ours.
//
//   const ExportedGraph exported = read_exported_graph(archive.program(), tensors);
//   verify(exported.graph);
//
// NOTE [exported programs]
// Nodes call operators by their schema's names ("torch.ops.aten.add.Tensor"), with arguments by
// name; what is not given has the schema's default. Integers that depend on dynamic dims have names
// as tensors do, and the file says of each which expression it is; the nodes that compute them
// (sym_size, _operator.add) are left out, and the expressions stand in the arguments.
//
// Parameters and buffers are inputs of the graph, before those of the user; constants are
// constants. What the program writes into a buffer in place, it does here; what its signature says
// is to be written there when it has run is an aten::copy_ at the end, and the program reads a
// copy, since autograd may have kept what it read.
//
// A block of torch.no_grad() is a graph in the graph. Its nodes are put in its place, with
// aten::detach of what they read: so its results are constants to every transform.
//
// The graph is one for all sizes of dynamic dims, or, where these are given, for some: then sizes
// may be computed by anything.
//
// Throws FormatError, or UnsupportedError that names what a graph cannot say.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "compile/graph.h"
#include "compile/import/exported_nodes.h"
#include "compile/import/json.h"

namespace torchlift::compile {

struct ExportedState {
  std::string name;  // "0.weight"
  bool is_parameter = false;
};

// Sizes of the dynamic dims, by their names.
using DynamicSizes = std::map<std::string, int64_t>;

struct ExportedGraph {
  Graph graph;
  std::vector<ExportedState> state;  // the first inputs of the graph
  std::vector<std::string> input_names;
  // The dynamic dims of the program, be they symbols of the graph or not.
  std::vector<Symbol> symbols;
  std::vector<SizeCondition> conditions;
};

using FindTensor = std::function<at::Tensor(const std::string&)>;

// program: the JSON of an ExportedProgram. tensor: a parameter, buffer or constant by its name.
ExportedGraph read_exported_graph(const Json& program, const FindTensor& tensor,
                                  const std::optional<DynamicSizes>& sizes = std::nullopt);

// The sizes of the example that the program was exported for.
DynamicSizes exported_sizes(const Json& program);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_IMPORT_EXPORTED_GRAPH_H_
