#ifndef TORCHLIFT_COMPILE_ARTIFACT_ENCODE_H_
#define TORCHLIFT_COMPILE_ARTIFACT_ENCODE_H_

// File: compile/artifact/encode.h
//
// Artifacts as the flatbuffers of artifact.fbs, and back. Storages of constants are kept apart:
//
//   const Storages storages = collect_storages(artifact.graph);
//   const std::string buffer = encode(artifact, storages);
//   const Artifact same = decode(buffer, [&](const StorageRecord& record) { return bytes; });

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>
#include <unordered_map>
#include <vector>

#include "compile/artifact/artifact.h"

namespace torchlift::compile {

// Bytes that constants share.
struct StorageRecord {
  std::string name;  // in the weights section
  uint64_t bytes = 0;
  uint32_t crc = 0;
};

// Where a constant is.
struct Place {
  size_t storage = 0;
  uint64_t offset = 0;  // bytes
};

struct Storages {
  std::vector<StorageRecord> records;
  std::vector<at::Tensor> bytes;  // uint8 on the CPU, by storage
  std::vector<at::Tensor> views;  // the first constant in it, for the dtype's name
  std::unordered_map<const Constant*, Place> places;  // of the graph and of its subgraphs
};

// See NOTE [storages] in storages.cc. Throws FormatError for a constant that cannot be kept.
Storages collect_storages(const Graph& graph);

// The graph and its subgraphs, each once, after those it contains. Throws FormatError if they are
// nested too deep.
std::vector<const Graph*> all_graphs(const Graph& graph);

// The package of machine code, if there is one, is the last storage.
std::string encode(const Artifact& artifact, const Storages& storages);

// Checks everything that compile::verify() does not. `load` gives the bytes of a storage, a uint8
// tensor of record.bytes bytes. Throws FormatError, or what verify() throws.
Artifact decode(const std::string& buffer,
                const std::function<at::Tensor(const StorageRecord&)>& load);

// How deep graphs can contain graphs.
inline constexpr int kMaxGraphDepth = 32;

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_ARTIFACT_ENCODE_H_
