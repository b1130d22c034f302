#ifndef TORCHLIFT_COMPILE_IMPORT_PT2_ARCHIVE_H_
#define TORCHLIFT_COMPILE_IMPORT_PT2_ARCHIVE_H_

// File: compile/import/pt2_archive.h
//
// The zip archive that torch.export.save writes (torch/export/pt2_archive):
//
//   archive_format                              "pt2"
//   byteorder                                   "little"
//   models/<model>.json                         the program
//   data/weights/<model>_weights_config.json    name -> file and shape, of parameters and buffers
//   data/weights/weight_0                       the bytes of a storage
//   data/constants/<model>_constants_config.json, data/constants/tensor_0    the same of constants
//
//   Pt2Archive archive("model.pt2");
//   const Json program = archive.program();
//   const at::Tensor weight = archive.tensor("0.weight");
//
// Throws FormatError (compile/artifact/format_error.h).

#include <ATen/core/Tensor.h>

#include <map>
#include <string>

#include "compile/import/json.h"
#include "compile/import/records.h"

namespace torchlift::compile {

class Pt2Archive {
 public:
  // model: one of those in the archive; may be empty where it is the only one.
  Pt2Archive(const std::string& path, const std::string& model);
  Pt2Archive(const Pt2Archive&) = delete;
  Pt2Archive& operator=(const Pt2Archive&) = delete;

  const Json& program() const { return program_; }
  // A parameter, buffer or constant, by the name it has in the module. Those that share a storage
  // in the file share memory, and tied ones are the same tensor.
  at::Tensor tensor(const std::string& name);

 private:
  struct Payload {
    std::string record;
    Json config;
  };

  void check_format();
  std::string find_model(const std::string& model) const;
  void read_config(const std::string& path, const std::string& folder);
  const at::Tensor& storage(const std::string& record);
  at::Tensor read(const Payload& payload, const std::string& name);

  Records records_;
  Json program_;
  std::map<std::string, Payload> payloads_;
  std::map<std::string, at::Tensor> storages_;
  std::map<std::string, at::Tensor> tensors_;  // by what the file says of them
};

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_IMPORT_PT2_ARCHIVE_H_
