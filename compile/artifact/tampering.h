#ifndef TORCHLIFT_COMPILE_ARTIFACT_TAMPERING_H_
#define TORCHLIFT_COMPILE_ARTIFACT_TAMPERING_H_

// File: compile/artifact/tampering.h
//
// Artifacts with other sections, for tests: the checksums are right again.
//
//   const Sections sections = split(bytes);
//   parse_artifact(join({changed(sections.graph), sections.weights}));   // what does it say?

#include <cstdint>
#include <cstring>
#include <string>

#include "compile/artifact/container.h"

namespace torchlift::compile {

struct Sections {
  std::string graph;
  std::string weights;
};

inline Sections split(const std::string& bytes) {
  const FileHeader header = read_header(MemoryBytes(bytes));
  return {bytes.substr(sizeof(header), header.graph_size), bytes.substr(header.weights_offset())};
}

inline std::string join(const Sections& sections) {
  // The part of the weights that a checksum covers, as far as there is one.
  uint64_t length = 0;
  if (sections.weights.size() >= 8) std::memcpy(&length, sections.weights.data(), 8);
  const std::string weights_header =
      sections.weights.substr(0, length < sections.weights.size() ? length + 8 : std::string::npos);
  const FileHeader header = make_header(sections.graph, weights_header, sections.weights.size());
  std::string bytes(reinterpret_cast<const char*>(&header), sizeof(header));
  bytes += sections.graph;
  bytes.resize(header.weights_offset(), '\0');
  return bytes + sections.weights;
}

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_ARTIFACT_TAMPERING_H_
