#include "compile/artifact/container.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "compile/artifact/format_error.h"

namespace torchlift::compile {
namespace {

// A flatbuffer's offsets are signed numbers of 32 bits.
constexpr uint64_t kMaxGraphBytes = std::numeric_limits<int32_t>::max();

uint64_t aligned(uint64_t size) {
  return (size + kSectionAlignment - 1) / kSectionAlignment * kSectionAlignment;
}

uint32_t crc_of(FileHeader header) {
  header.header_crc = 0;
  return crc32(&header, sizeof(header));
}

void check_padding(const ByteSource& source, uint64_t begin, uint64_t end) {
  const std::string padding = source.read_string(begin, end - begin);
  if (std::any_of(padding.begin(), padding.end(), [](char c) { return c != 0; })) {
    format_error("the bytes between graph and weights are not zeros: the file is damaged.");
  }
}

}  // namespace

uint64_t FileHeader::weights_offset() const { return aligned(sizeof(FileHeader) + graph_size); }

FileHeader make_header(const std::string& graph, const std::string& weights_header,
                       uint64_t weights_size) {
  if (graph.size() > kMaxGraphBytes) {
    format_error("the graph takes ", graph.size(), " bytes; at most ", kMaxGraphBytes, " can be.");
  }
  FileHeader header{};
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  header.version = kFormatVersion;
  header.graph_size = graph.size();
  header.weights_size = weights_size;
  header.file_size = header.weights_offset() + weights_size;
  header.graph_crc = crc32(graph.data(), graph.size());
  header.weights_header_crc = crc32(weights_header.data(), weights_header.size());
  header.header_crc = crc_of(header);
  return header;
}

FileHeader read_header(const ByteSource& source) {
  FileHeader header{};
  const uint64_t there = std::min<uint64_t>(source.size(), sizeof(header));
  source.read(0, there, &header);
  if (there < sizeof(kMagic) || std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0) {
    format_error("this is no torchlift artifact: it does not begin as one.");
  }
  if (there < sizeof(header)) {
    format_error("the file is cut: it has ", there, " bytes, and the header alone takes ",
                 sizeof(header), ".");
  }
  if (header.version != kFormatVersion) {
    format_error("the file has format version ", header.version, ", and this torchlift reads ",
                 kFormatVersion, ". Save it anew, or take the torchlift that wrote it.");
  }
  if (header.header_crc != crc_of(header)) format_error("the header is damaged.");
  if (source.size() != header.file_size) {
    format_error("the file has ", source.size(), " bytes, and should have ", header.file_size,
                 source.size() < header.file_size ? ": it is cut." : ".");
  }
  const bool fits = header.graph_size <= std::min(kMaxGraphBytes, header.file_size) &&
                    header.weights_offset() <= header.file_size &&
                    header.file_size - header.weights_offset() == header.weights_size;
  if (!fits) format_error("the sections of the file do not fill it.");
  if (header.reserved[0] != 0 || header.reserved[1] != 0) {
    format_error("the header has numbers in places that are reserved.");
  }
  check_padding(source, sizeof(header) + header.graph_size, header.weights_offset());
  return header;
}

}  // namespace torchlift::compile
