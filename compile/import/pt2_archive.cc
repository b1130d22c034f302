#include "compile/import/pt2_archive.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/set.h>

#include <algorithm>
#include <bit>
#include <utility>
#include <vector>

#include "compile/artifact/dtypes.h"
#include "compile/artifact/format_error.h"
#include "compile/artifact/safetensors.h"
#include "compile/import/export_schema.h"

namespace torchlift::compile {
namespace {

constexpr const char* kModels = "models/";
constexpr const char* kWeights = "data/weights/";
constexpr const char* kConstants = "data/constants/";

// Of weights, which have no dynamic dims.
const SymbolicSizes kNumbers([](const std::string& name) -> SizeExpr {
  format_error("a weight has a size that depends on ", name, ".");
});

// The last number that a tensor reaches, in its storage; all in numbers.
void check_reach(const TensorType& type, int64_t offset, uint64_t room, const std::string& name) {
  const std::vector<int64_t> sizes = type.concrete_sizes();
  const std::vector<int64_t> strides = type.concrete_strides();
  if (std::find(sizes.begin(), sizes.end(), 0) != sizes.end()) return;
  auto last = static_cast<uint64_t>(offset);
  for (size_t i = 0; i < sizes.size(); ++i) {
    uint64_t span = 0;
    if (__builtin_mul_overflow(static_cast<uint64_t>(sizes[i] - 1),
                               static_cast<uint64_t>(strides[i]), &span) ||
        __builtin_add_overflow(last, span, &last)) {
      format_error("tensor '", name, "' reaches beyond 64 bits.");
    }
  }
  if (last >= room) {
    format_error("tensor '", name, "' needs ", last, " + 1 numbers, and its storage has ", room,
                 ".");
  }
}

}  // namespace

Pt2Archive::Pt2Archive(const std::string& path, const std::string& model) : records_(path) {
  check_format();
  const std::string name = find_model(model);
  program_ = parse_json(records_.text(kModels + name + ".json"), kModels + name + ".json");
  if (records_.has(kWeights + name + ".pt")) {
    format_error("its weights are pickled, as torch 2.8 and older did it. Load it in Python and ",
                 "save it anew by torch.export.save.");
  }
  read_config(kWeights + name + "_weights_config.json", kWeights);
  read_config(kConstants + name + "_constants_config.json", kConstants);
}

void Pt2Archive::check_format() {
  if (!records_.has("archive_format")) {
    const bool old = records_.has("serialized_exported_program.json");
    const bool script = records_.has("constants.pkl") || records_.has("data.pkl");
    format_error(old ? "it was written by torch 2.6 or older. Load it in Python and save it anew "
                       "by torch.export.save."
                 : script
                     ? "it is TorchScript, or what torch.save writes, and no exported program. "
                       "load_torchscript reads TorchScript."
                     : "it is no archive of torch.export.save: there is no archive_format in it.");
  }
  const std::string format = records_.text("archive_format");
  if (format != "pt2") format_error("it is an archive of the format '", format, "', not 'pt2'.");
  const char* own = std::endian::native == std::endian::little ? "little" : "big";
  const std::string order = records_.has("byteorder") ? records_.text("byteorder") : own;
  if (order != own)
    format_error("its numbers are ", order, " endian, and this machine's ", own, ".");
}

std::string Pt2Archive::find_model(const std::string& model) const {
  const std::string prefix = kModels;
  std::vector<std::string> found;
  for (const auto& [name, entry] : records_.entries()) {
    if (name.rfind(prefix, 0) != 0 || !name.ends_with(".json")) continue;
    found.push_back(name.substr(prefix.size(), name.size() - prefix.size() - 5));
  }
  if (!model.empty() && std::find(found.begin(), found.end(), model) != found.end()) return model;
  if (model.empty() && found.size() == 1) return found[0];
  std::string all;
  for (const std::string& name : found) all += (all.empty() ? "" : ", ") + name;
  if (all.empty()) format_error("there is no exported program in it.");
  format_error(model.empty() ? "there are several programs in it" : "there is no such model in it",
               "; choose one of ", all, ".");
}

void Pt2Archive::read_config(const std::string& path, const std::string& folder) {
  if (!records_.has(path)) return;
  const Json json = parse_json(records_.text(path), path);
  for (const auto& [name, config] : object_at(json, "config", path).items()) {
    const std::string where = "tensor '" + name + "'";
    if (!payloads_.emplace(name, Payload{folder + string_at(config, "path_name", where), config})
             .second) {
      format_error("there are two tensors of the name '", name, "' in it.");
    }
  }
}

const at::Tensor& Pt2Archive::storage(const std::string& record) {
  at::Tensor& bytes = storages_[record];
  if (!bytes.defined()) bytes = records_.bytes(record);
  return bytes;
}

at::Tensor Pt2Archive::tensor(const std::string& name) {
  const auto found = payloads_.find(name);
  if (found == payloads_.end()) format_error("there is no tensor '", name, "' in it.");
  const Payload& payload = found->second;
  const at::Tensor tensor = read(payload, name);
  // Empty ones are not tied: they have no memory that says so.
  if (tensor.numel() == 0) return tensor;
  const std::string key = payload.record + payload.config["tensor_meta"].dump();
  return tensors_.emplace(key, tensor).first->second;
}

at::Tensor Pt2Archive::read(const Payload& payload, const std::string& name) {
  const std::string where = "tensor '" + name + "'";
  if (bool_at(payload.config, "use_pickle", where)) {
    format_error(where, " is pickled, as tensors of Python classes are. Convert it to a plain one ",
                 "before the export.");
  }
  const Json& meta = object_at(payload.config, "tensor_meta", where);
  const TensorType type = type_of_meta(meta, kNumbers, where);
  if (type.layout != c10::kStrided) format_error(where, " is no strided tensor.");
  if (find_dtype(type.dtype) == nullptr) format_error(where, " is of a dtype that is not read.");
  const auto offset = size_of(at(meta, "storage_offset", where), kNumbers, where).constant();

  const at::Tensor& bytes = storage(payload.record);
  const auto element = static_cast<uint64_t>(c10::elementSize(type.dtype));
  check_reach(type, *offset, bytes.nbytes() / element, name);
  if (type.dtype == at::kBool) check_bools(bytes.const_data_ptr(), bytes.nbytes());
  at::Tensor tensor = at::empty({0}, at::TensorOptions().dtype(type.dtype));
  tensor.set_(bytes.storage(), *offset, type.concrete_sizes(), type.concrete_strides());
  return type.device.is_cpu() ? tensor : tensor.to(type.device);
}

}  // namespace torchlift::compile
