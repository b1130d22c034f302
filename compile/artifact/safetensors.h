#ifndef TORCHLIFT_COMPILE_ARTIFACT_SAFETENSORS_H_
#define TORCHLIFT_COMPILE_ARTIFACT_SAFETENSORS_H_

// File: compile/artifact/safetensors.h
//
// Reads and writes safetensors: the length of a JSON header (8 bytes), the header, raw numbers.
//
//   save_safetensors({{"w", w}, {"b", b}}, "weights.safetensors");
//   for (const auto& [name, tensor] : load_safetensors("weights.safetensors")) { ... }
//
// A file is believed in nothing: sizes are checked against the length of the file before memory is
// asked for, and the numbers of tensors must fill the file without gaps and overlaps, as the format
// demands.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "compile/artifact/bytes.h"

namespace torchlift::compile {

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

// Throw TransformError, which names the file and what is wrong. Tensors may have any strides and
// device; they are read as contiguous ones in memory of the CPU, in the order of the file.
void save_safetensors(const NamedTensors& tensors, const std::string& path,
                      const std::map<std::string, std::string>& metadata = {});
NamedTensors load_safetensors(const std::string& path);

// --- for formats that contain such a section -----------------------------------------------------

struct SafetensorsEntry {
  std::string name;
  std::string dtype;  // as the format calls it
  std::vector<int64_t> shape;
  uint64_t begin = 0;  // bytes, from the end of the header
  uint64_t end = 0;

  uint64_t bytes() const { return end - begin; }
};

// The header: its length and its JSON, padded so that what follows is at a multiple of 8. Sets
// begin and end of the entries, whose numbers are to follow in this order; `bytes` are their
// lengths.
std::string safetensors_header(std::vector<SafetensorsEntry>& entries,
                               const std::vector<uint64_t>& bytes,
                               const std::map<std::string, std::string>& metadata = {});

// A section of a file. Throws FormatError where it is no safetensors.
class SafetensorsReader {
 public:
  // `source` must outlive this.
  SafetensorsReader(const ByteSource& source, uint64_t begin, uint64_t size);
  // Sorted by their place in the file.
  const std::vector<SafetensorsEntry>& entries() const { return entries_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const SafetensorsEntry* find(std::string_view name) const;
  // The length and the JSON as they are in the file.
  const std::string& header() const { return header_; }
  void read(const SafetensorsEntry& entry, void* to) const;

 private:
  void parse();
  void check_places() const;

  const ByteSource& source_;
  uint64_t begin_ = 0;
  uint64_t size_ = 0;
  std::string header_;
  std::vector<SafetensorsEntry> entries_;
  std::map<std::string, size_t, std::less<>> by_name_;
  std::map<std::string, std::string> metadata_;
};

// The product of sizes, times the bytes of an element. Throws FormatError if a size is negative or
// the product is beyond 63 bits.
uint64_t checked_bytes(const std::vector<int64_t>& sizes, uint64_t element);

// Throws FormatError unless each byte is 0 or 1, which a bool must be.
void check_bools(const void* bytes, uint64_t count);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_ARTIFACT_SAFETENSORS_H_
