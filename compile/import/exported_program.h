#ifndef TORCHLIFT_COMPILE_IMPORT_EXPORTED_PROGRAM_H_
#define TORCHLIFT_COMPILE_IMPORT_EXPORTED_PROGRAM_H_

// File: compile/import/exported_program.h
//
// What torch.export.save writes (.pt2), without Python.
//
//   const tl::ImportedModule model = tl::load_exported("model.pt2");
//   const at::Tensor y = model({x})[0];          // see compile/import/imported_module.h
//
//   const compile::Graph graph = compile::read_exported("model.pt2");
//   compile::save_graph(graph, "model", "model.tlc");
//
// Inputs must have the shapes that the model was exported with; dims that were exported as dynamic
// may have any size in their range. Operators are those of the file, in its order, so a program
// that was decomposed for some compiler computes what that says.
//
// Reads schema version 8, of torch 2.9 to 2.15. Loading runs nothing and trusts nothing: a file
// that is cut, damaged or made to do harm gives a TransformError that says what is wrong with it.
// Throws UnsupportedError, naming it, for what a graph cannot say: an operator that this libtorch
// does not have, a size that depends on numbers or is no polynomial of the dynamic dims, a
// higher-order operator other than cond, while_loop and scan, custom objects.

#include <string>

#include "compile/graph.h"
#include "compile/import/imported_module.h"

namespace torchlift {

struct ExportedOptions {
  std::string model = {};  // of an archive with several
};

ImportedModule load_exported(const std::string& path, const ExportedOptions& options = {});

namespace compile {

// The program as a graph, whose inputs are the user's; parameters and buffers are constants. Throws
// UnsupportedError if the sizes must fulfil conditions that a graph does not have.
Graph read_exported(const std::string& path, const ExportedOptions& options = {});

}  // namespace compile
}  // namespace torchlift

#endif  // TORCHLIFT_COMPILE_IMPORT_EXPORTED_PROGRAM_H_
