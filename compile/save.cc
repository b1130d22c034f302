#include "compile/save.h"

#include "compile/artifact/artifact.h"
#include "core/error.h"

namespace torchlift {
namespace compile {

void save_graph(Graph graph, const std::string& name, const std::string& path) {
  Signature signature = flat_signature(graph);
  save_artifact({.graph = std::move(graph),
                 .signature = std::move(signature),
                 .name = name,
                 .torchlift_version = "",
                 .torch_version = "",
                 .metadata = {}},
                path);
}

void throw_output_count(size_t expected, size_t got) {
  transform_error("load", "the function has ", got, " outputs, and the type it was to return has ",
                  expected, " tensors.");
}

}  // namespace compile

LoadedFunction load(const std::string& path, const LoadOptions& options) {
  compile::Artifact artifact = compile::load_artifact(path);
  return LoadedFunction(compile::LoadedProgram(artifact, options, path),
                        std::move(artifact.signature));
}

}  // namespace torchlift
