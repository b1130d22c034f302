#ifndef TORCHLIFT_COMPILE_ARTIFACT_LIBRARY_SOURCE_H_
#define TORCHLIFT_COMPILE_ARTIFACT_LIBRARY_SOURCE_H_

// File: compile/artifact/library_source.h
//
// The C++ of a library that is made out of an artifact: see compile/torchlift_library.bzl.
//
//   const LibrarySource source = library_source(
//       bytes, {.file = "loss.tlc", .header_path = "models/loss.h", .cpp_namespace =
//       "models::loss"});
//   // source.header: struct Inputs { at::Tensor x; };  Outputs run(const Inputs& inputs);

#include <string>

namespace torchlift::compile {

struct LibraryOptions {
  std::string file;         // what the artifact is called, in comments and errors
  std::string header_path;  // as #include will name it
  std::string cpp_namespace;
};

struct LibrarySource {
  std::string header;
  std::string source;
};

// Throws TransformError if `bytes` are no artifact, or too many to be embedded, or an option is no
// C++.
LibrarySource library_source(const std::string& bytes, const LibraryOptions& options);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_ARTIFACT_LIBRARY_SOURCE_H_
