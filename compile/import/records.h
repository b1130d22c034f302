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
// Throws FormatError (compile/artifact/format_error.h), and libtorch's errors where the archive is
// none.

#include <ATen/core/Tensor.h>
#include <caffe2/serialize/inline_container.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <string>

#include "compile/artifact/bytes.h"

namespace torchlift::compile {

class Records {
 public:
  explicit Records(const std::string& path);

  const std::set<std::string>& names() const { return names_; }
  bool has(const std::string& name) const { return names_.count(name) > 0; }

  std::string text(const std::string& name);
  // A row of bytes.
  at::Tensor bytes(const std::string& name);
  // Reads all of them, for their checksums.
  void check_all();

 private:
  uint64_t size_of(const std::string& name);
  void read(const std::string& name, void* to, uint64_t size);

  // What the directory of the archive says of a file.
  struct Entry {
    uint32_t checksum = 0;
    bool compressed = false;
  };
  void read_directory();
  void add_entries(uint64_t offset, uint64_t count);

  FileBytes file_;
  caffe2::serialize::PyTorchStreamReader reader_;
  std::set<std::string> names_;
  std::map<std::string, Entry> entries_;
};

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_IMPORT_RECORDS_H_
