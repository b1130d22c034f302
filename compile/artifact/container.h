#ifndef TORCHLIFT_COMPILE_ARTIFACT_CONTAINER_H_
#define TORCHLIFT_COMPILE_ARTIFACT_CONTAINER_H_

// File: compile/artifact/container.h
//
// The frame of a .tlc file: a header that says where the sections are.
//
//   0    FileHeader
//   64   graph section: a flatbuffer (artifact.fbs)
//        zeros up to a multiple of 64
//        weights section: a safetensors file, up to the end
//
// Checksums cover all of it, so that damage is told from intent: of the header here, of the graph
// and the header of the weights in it, and of each weight in the graph section.

#include <cstdint>
#include <string>

#include "compile/artifact/bytes.h"

namespace torchlift::compile {

inline constexpr uint32_t kFormatVersion = 1;
inline constexpr uint64_t kSectionAlignment = 64;
// Begins with a byte beyond ASCII and has both kinds of line ends: a transfer as text changes it.
inline constexpr char kMagic[8] = {'\x89', 'T', 'L', 'C', '\r', '\n', '\x1a', '\n'};

struct FileHeader {
  char magic[8];
  uint32_t version;
  uint32_t header_crc;  // of this struct, with a 0 here
  uint64_t file_size;
  uint64_t graph_size;
  uint64_t weights_size;
  uint32_t graph_crc;
  uint32_t weights_header_crc;
  uint64_t reserved[2];  // zeros

  uint64_t weights_offset() const;
};
static_assert(sizeof(FileHeader) == kSectionAlignment);

// Of sections that follow it.
FileHeader make_header(const std::string& graph, const std::string& weights_header,
                       uint64_t weights_size);

// Reads the header and checks it, the sizes and the padding. Throws FormatError.
FileHeader read_header(const ByteSource& source);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_ARTIFACT_CONTAINER_H_
