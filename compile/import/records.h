#ifndef TORCHLIFT_COMPILE_IMPORT_RECORDS_H_
#define TORCHLIFT_COMPILE_IMPORT_RECORDS_H_

// File: compile/import/records.h
//
// The files in a zip archive that torch wrote, with a look at their checksums, which libtorch does
// not take: a damaged file would be a model with other weights.
//
//   Records records("model.pt2");
//   const std::string json = records.text("models/model.json");
//
// Torch writes weights and programs as they are; what it compresses (the code of TorchScript) is
// read by libtorch. Throws FormatError (compile/artifact/format_error.h).

#include <ATen/core/Tensor.h>
#include <caffe2/serialize/inline_container.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "compile/artifact/bytes.h"

namespace torchlift::compile {

class Records {
 public:
  // What the directory of the archive says of a file.
  struct Entry {
    uint64_t header = 0;  // where it begins
    uint64_t size = 0;
    uint32_t checksum = 0;
    bool compressed = false;
  };

  explicit Records(const std::string& path);

  // By the names in the archive's folder.
  const std::map<std::string, Entry>& entries() const { return entries_; }
  bool has(const std::string& name) const { return entries_.count(name) > 0; }

  std::string text(const std::string& name);
  // A row of bytes.
  at::Tensor bytes(const std::string& name);
  // Reads all of them, for their checksums.
  void check_all();

 private:
  void read_directory();
  void add_entries(uint64_t offset, uint64_t count);
  Entry entry_at(uint64_t offset) const;
  void read_large(uint64_t extra, uint64_t size, Entry& entry) const;

  const Entry& find(const std::string& name) const;
  void read(const std::string& name, const Entry& entry, void* to);

  const std::string path_;
  FileBytes file_;
  std::map<std::string, Entry> entries_;
  std::unique_ptr<caffe2::serialize::PyTorchStreamReader> inflating_;
};

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_IMPORT_RECORDS_H_
