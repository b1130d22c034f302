#include "compile/artifact/artifact.h"

#include <ATen/ops/empty.h>

#include <set>
#include <utility>

#include "compile/artifact/container.h"
#include "compile/artifact/dtypes.h"
#include "compile/artifact/encode.h"
#include "compile/artifact/format_error.h"
#include "compile/artifact/safetensors.h"
#include "core/runtime.h"

namespace torchlift::compile {
namespace {

// --- writing -------------------------------------------------------------------------------------

// What another reader of the weights sees: the tensor itself where the storage is that and no more,
// else a row of bytes.
SafetensorsEntry weights_entry(const Storages& storages, size_t i) {
  const at::Tensor& view = storages.views[i];
  const StorageRecord& record = storages.records[i];
  const char* dtype = find_dtype(view.scalar_type())->safetensors;
  if (dtype != nullptr && view.is_contiguous() && view.nbytes() == record.bytes) {
    return {.name = record.name, .dtype = dtype, .shape = view.sizes().vec()};
  }
  return {.name = record.name, .dtype = "U8", .shape = {static_cast<int64_t>(record.bytes)}};
}

// The last storage.
void add_package(const at::Tensor& package, Storages& storages) {
  storages.records.push_back({.name = "native/package.pt2",
                              .bytes = static_cast<uint64_t>(package.numel()),
                              .crc = crc32(package.const_data_ptr(), package.nbytes())});
  storages.bytes.push_back(package);
  storages.views.push_back(package);
}

std::string weights_header(const Storages& storages) {
  std::vector<SafetensorsEntry> entries;
  std::vector<uint64_t> bytes;
  for (size_t i = 0; i < storages.records.size(); ++i) {
    entries.push_back(weights_entry(storages, i));
    bytes.push_back(storages.records[i].bytes);
  }
  return safetensors_header(entries, bytes);
}

// Gives the file to `write`, piece by piece.
template <class Write>
void write_artifact(const Artifact& artifact, Write&& write) {
  verify(artifact.graph);
  check_signature(artifact.signature, artifact.graph);
  Artifact stamped = artifact;
  stamped.torchlift_version = version();
  stamped.torch_version = built_for_torch();
  Storages storages = collect_storages(stamped.graph);
  if (stamped.native.has_value()) add_package(stamped.native->package, storages);
  const std::string graph = encode(stamped, storages);
  const std::string weights = weights_header(storages);
  uint64_t weights_size = weights.size();
  for (const StorageRecord& record : storages.records) weights_size += record.bytes;
  const FileHeader header = make_header(graph, weights, weights_size);

  write(&header, sizeof(header));
  write(graph.data(), graph.size());
  const std::string padding(header.weights_offset() - sizeof(header) - graph.size(), '\0');
  write(padding.data(), padding.size());
  write(weights.data(), weights.size());
  for (const at::Tensor& bytes : storages.bytes) write(bytes.const_data_ptr(), bytes.nbytes());
}

// --- reading -------------------------------------------------------------------------------------

// The bytes of storages, of which each tensor of the section must be one.
class Weights {
 public:
  Weights(const ByteSource& source, const FileHeader& header)
      : reader_(source, header.weights_offset(), header.weights_size) {
    const std::string& text = reader_.header();
    if (crc32(text.data(), text.size()) != header.weights_header_crc) {
      format_error("the header of the weights is damaged.");
    }
  }

  at::Tensor load(const StorageRecord& record) {
    const SafetensorsEntry* entry = reader_.find(record.name);
    if (entry == nullptr) format_error("there are no weights '", record.name, "' in it.");
    if (!used_.insert(record.name).second) {
      format_error("two storages are the weights '", record.name, "'.");
    }
    if (entry->bytes() != record.bytes) {
      format_error("the weights '", record.name, "' have ", entry->bytes(),
                   " bytes, and the graph says ", record.bytes, ".");
    }
    at::Tensor bytes = at::empty({static_cast<int64_t>(record.bytes)}, at::kByte);
    if (record.bytes > 0) reader_.read(*entry, bytes.mutable_data_ptr());
    if (crc32(bytes.const_data_ptr(), record.bytes) != record.crc) {
      format_error("the weights '", record.name, "' are damaged.");
    }
    return bytes;
  }

  void check_all_used() const {
    for (const SafetensorsEntry& entry : reader_.entries()) {
      if (used_.count(entry.name) == 0) {
        format_error("the weights '", entry.name, "' belong to no constant.");
      }
    }
  }

 private:
  SafetensorsReader reader_;
  std::set<std::string> used_;
};

Artifact read_artifact(const ByteSource& source) {
  const FileHeader header = read_header(source);
  const std::string graph = source.read_string(sizeof(header), header.graph_size);
  if (crc32(graph.data(), graph.size()) != header.graph_crc) {
    format_error("the graph section is damaged.");
  }
  Weights weights(source, header);
  Artifact artifact =
      decode(graph, [&](const StorageRecord& record) { return weights.load(record); });
  weights.check_all_used();
  return artifact;
}

}  // namespace

void save_artifact(const Artifact& artifact, const std::string& path) {
  naming_file("save", path, [&] {
    FileWriter file(path);
    write_artifact(artifact, [&](const void* bytes, size_t count) { file.write(bytes, count); });
    file.finish();
  });
}

Artifact load_artifact(const std::string& path) {
  return naming_file("load", path, [&] { return read_artifact(FileBytes(path)); });
}

std::string artifact_bytes(const Artifact& artifact) {
  return naming_file("save", artifact.name.empty() ? "artifact" : artifact.name, [&] {
    std::string result;
    write_artifact(artifact, [&](const void* bytes, size_t count) {
      result.append(static_cast<const char*>(bytes), count);
    });
    return result;
  });
}

Artifact parse_artifact(std::string_view bytes, const std::string& name) {
  return naming_file("load", name, [&] { return read_artifact(MemoryBytes(bytes)); });
}

}  // namespace torchlift::compile
