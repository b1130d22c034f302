#ifndef TORCHLIFT_COMPILE_ARTIFACT_ARTIFACT_H_
#define TORCHLIFT_COMPILE_ARTIFACT_ARTIFACT_H_

// File: compile/artifact/artifact.h
//
// A traced program in a file (.tlc), to be run without Python and without the code it came from.
//
//   save_artifact({.graph = graph, .signature = flat_signature(graph), .name = "loss"},
//                 "loss.tlc");
//   const Artifact artifact = load_artifact("loss.tlc");
//   std::cout << artifact.signature.str() << "\n" << artifact.graph.str();
//
// What is loaded is what was saved: graph.str() is the same, constants are the same bit for bit,
// keep their strides, and share memory if they did. They come without requires_grad.
//
// A file can hold machine code beside the graph; here, that is bytes like others.
//
// Loading runs nothing and trusts nothing (docs/artifacts.md, "Safety"). A file that is cut,
// damaged or made to do harm gives a TransformError that says what is wrong with it; one that calls
// an operator which this libtorch does not have gives an UnsupportedError.

#include <map>
#include <optional>
#include <string>
#include <string_view>

#include "compile/artifact/native_code.h"
#include "compile/artifact/signature.h"
#include "compile/graph.h"

namespace torchlift::compile {

struct Artifact {
  Graph graph;
  Signature signature;
  std::string name;  // of the function
  // Who wrote it; save_artifact puts its own versions.
  std::string torchlift_version;
  std::string torch_version;
  // Anything else that belongs to it.
  std::map<std::string, std::string> metadata;
  // Machine code for what native_plan(graph) says (native_plan.h); a LoadedProgram runs it.
  std::optional<NativeCode> native = std::nullopt;
};

// Throws TransformError if the graph is not well formed, does not fit the signature, or holds a
// constant that cannot be kept (sparse, quantized, of a level).
void save_artifact(const Artifact& artifact, const std::string& path);
Artifact load_artifact(const std::string& path);

// The same, in memory; `name` stands for the file in errors. What is read does not refer to
// `bytes`.
std::string artifact_bytes(const Artifact& artifact);
Artifact parse_artifact(std::string_view bytes, const std::string& name = "artifact");

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_ARTIFACT_ARTIFACT_H_
