#ifndef TORCHLIFT_COMPILE_IMPORT_EXPORTED_ARGUMENTS_H_
#define TORCHLIFT_COMPILE_IMPORT_EXPORTED_ARGUMENTS_H_

// File: compile/import/exported_arguments.h
//
// The arguments of a node of an exported program, as a node of ours has them.
//
//   const NameScope scope(graph_json, sizes);
//   node.args.push_back(read_argument(json, parameter, scope, "self of aten::add"));
//
// Throws FormatError (compile/artifact/format_error.h) for what cannot stand there,
// UnsupportedError for a kind of argument that graphs do not have.

#include <ATen/core/function_schema.h>

#include <string>
#include <unordered_map>

#include "compile/graph.h"
#include "compile/import/json.h"
#include "compile/import/size_language.h"

namespace torchlift::compile {

// What the names in a graph of the file mean.
class NameScope {
 public:
  // Both outlive this.
  NameScope(const Json& graph, const SizeMeaning& sizes);

  void define(const std::string& name, ValueId id);
  ValueId tensor(const std::string& name) const;
  // {"name": "x"}
  ValueId tensor_of(const Json& json, const std::string& where) const;
  // {"as_name": "sym_size"} or {"as_int": 3}
  SizeExpr sym_int(const Json& json, const std::string& where) const;
  SizeRatio sym_float(const Json& json, const std::string& where) const;
  SizeTerm sym_bool(const Json& json, const std::string& where) const;
  SizeExpr size(const SizeTerm& term) const { return sizes_.size(term); }
  // What the file says of a tensor.
  TensorType type(const std::string& name) const;

 private:
  // The value of {"as_name": name} in one of the tables of the graph.
  const Json& named(const char* table, const Json& json, const std::string& where) const;

  const Json& graph_;
  const SizeMeaning& sizes_;
  std::unordered_map<std::string, ValueId> tensors_;
};

Argument read_argument(const Json& json, const c10::Argument& parameter, const NameScope& scope,
                       const std::string& where);

// An argument that is not given. Throws where the schema has no default.
Argument default_argument(const c10::Argument& parameter, const std::string& where);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_IMPORT_EXPORTED_ARGUMENTS_H_
