#include "compile/artifact/safetensors.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "compile/artifact/dtypes.h"
#include "compile/artifact/format_error.h"

namespace torchlift::compile {
namespace {

using Json = nlohmann::json;

constexpr uint64_t kLengthBytes = 8;
// The limit of the reference implementation.
constexpr uint64_t kMaxHeaderBytes = 100'000'000;
// {"name": {"shape": [ ] } }
constexpr int kMaxDepth = 3;
constexpr const char* kMetadata = "__metadata__";

// --- the header, read ----------------------------------------------------------------------------

// Parsed as a tree of plain values. Refuses deep nesting and a key that is there twice, of which
// the library would keep one.
Json parse_json(std::string_view text) {
  std::vector<std::set<std::string>> keys;
  const auto check = [&](int depth, Json::parse_event_t event, Json& parsed) {
    if (depth > kMaxDepth) format_error("its header is nested deeper than ", kMaxDepth, ".");
    if (event == Json::parse_event_t::object_start) keys.emplace_back();
    if (event == Json::parse_event_t::object_end) keys.pop_back();
    if (event == Json::parse_event_t::key &&
        !keys.back().insert(parsed.get<std::string>()).second) {
      format_error("its header has the key ", parsed.dump(), " twice.");
    }
    return true;
  };
  try {
    return Json::parse(text, check);
  } catch (const Json::exception& error) {
    format_error("its header is no JSON: ", error.what(), ".");
  }
}

uint64_t number(const Json& json, const std::string& name, const char* field) {
  constexpr uint64_t kMax = std::numeric_limits<int64_t>::max();
  if (!json.is_number_unsigned() || json.get<uint64_t>() > kMax) {
    format_error(field, " of tensor '", name, "' has a ", json.type_name(),
                 ", which is no whole number from 0 to 2^63 - 1.");
  }
  return json.get<uint64_t>();
}

const Json& field(const Json& entry, const std::string& name, const char* key,
                  bool fits(const Json&), const char* kind) {
  const auto found = entry.find(key);
  if (found == entry.end() || !fits(*found)) {
    format_error("tensor '", name, "' has no ", key, ", which is ", kind, ".");
  }
  return *found;
}

SafetensorsEntry parse_entry(const std::string& name, const Json& json) {
  if (!json.is_object())
    format_error("tensor '", name, "' is a ", json.type_name(), ", no object.");
  const auto is_string = [](const Json& j) { return j.is_string(); };
  const auto is_array = [](const Json& j) { return j.is_array(); };
  const auto is_pair = [](const Json& j) { return j.is_array() && j.size() == 2; };
  SafetensorsEntry entry;
  entry.name = name;
  entry.dtype = field(json, name, "dtype", is_string, "a string").get<std::string>();
  for (const Json& size : field(json, name, "shape", is_array, "a list of numbers")) {
    entry.shape.push_back(static_cast<int64_t>(number(size, name, "shape")));
  }
  const Json& offsets = field(json, name, "data_offsets", is_pair, "a pair of numbers");
  entry.begin = number(offsets[0], name, "data_offsets");
  entry.end = number(offsets[1], name, "data_offsets");
  if (entry.end < entry.begin) {
    format_error("tensor '", name, "' ends at byte ", entry.end, ", before its begin, ",
                 entry.begin, ".");
  }
  return entry;
}

std::map<std::string, std::string> parse_metadata(const Json& json) {
  std::map<std::string, std::string> metadata;
  if (!json.is_object()) format_error("its ", kMetadata, " is no object.");
  for (const auto& [key, value] : json.items()) {
    if (!value.is_string()) format_error("'", key, "' of its ", kMetadata, " is no string.");
    metadata.emplace(key, value.get<std::string>());
  }
  return metadata;
}

// --- tensors -------------------------------------------------------------------------------------

at::Tensor to_bytes_on_cpu(const at::Tensor& tensor, const std::string& name) {
  if (tensor.layout() != c10::kStrided) {
    format_error("tensor '", name, "' is ", c10::str(tensor.layout()),
                 "; only strided ones can be saved. Make it so by to_dense().");
  }
  return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous();
}

const DtypeNames& safetensors_dtype(const at::Tensor& tensor, const std::string& name) {
  const DtypeNames* dtype = find_dtype(tensor.scalar_type());
  if (dtype == nullptr || dtype->safetensors == nullptr) {
    format_error("tensor '", name, "' is of dtype ", dtype_name(tensor.scalar_type()),
                 ", which safetensors has not. Convert it, or save its torch::view_as_real().");
  }
  return *dtype;
}

at::Tensor load_tensor(const SafetensorsReader& reader, const SafetensorsEntry& entry) {
  const DtypeNames* dtype = find_safetensors_dtype(entry.dtype);
  if (dtype == nullptr) {
    format_error("tensor '", entry.name, "' is of dtype ", entry.dtype, ", which torch has not.");
  }
  const uint64_t bytes = checked_bytes(entry.shape, c10::elementSize(dtype->dtype));
  if (bytes != entry.bytes()) {
    format_error("tensor '", entry.name, "' has ", entry.bytes(), " bytes; its shape needs ", bytes,
                 ".");
  }
  at::Tensor tensor = at::empty(entry.shape, at::TensorOptions().dtype(dtype->dtype));
  if (bytes == 0) return tensor;
  reader.read(entry, tensor.mutable_data_ptr());
  if (dtype->dtype == at::kBool) check_bools(tensor.const_data_ptr(), bytes);
  return tensor;
}

void write_safetensors(const NamedTensors& tensors, const std::string& path,
                       const std::map<std::string, std::string>& metadata) {
  std::vector<SafetensorsEntry> entries;
  std::vector<at::Tensor> data;
  std::vector<uint64_t> bytes;
  std::set<std::string> names;
  for (const auto& [name, tensor] : tensors) {
    if (!tensor.defined()) format_error("tensor '", name, "' is undefined.");
    if (!names.insert(name).second) format_error("two tensors are named '", name, "'.");
    data.push_back(to_bytes_on_cpu(tensor, name));
    bytes.push_back(data.back().nbytes());
    entries.push_back({.name = name,
                       .dtype = safetensors_dtype(tensor, name).safetensors,
                       .shape = tensor.sizes().vec()});
  }
  const std::string header = safetensors_header(entries, bytes, metadata);
  FileWriter file(path);
  file.write(header);
  for (const at::Tensor& tensor : data) file.write(tensor.const_data_ptr(), tensor.nbytes());
  file.finish();
}

}  // namespace

// --- sections ------------------------------------------------------------------------------------

std::string safetensors_header(std::vector<SafetensorsEntry>& entries,
                               const std::vector<uint64_t>& bytes,
                               const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  if (!metadata.empty()) json[kMetadata] = metadata;
  uint64_t place = 0;
  for (size_t i = 0; i < entries.size(); ++i) {
    SafetensorsEntry& entry = entries[i];
    entry.begin = place;
    entry.end = place += bytes[i];
    if (entry.name == kMetadata) format_error("no tensor can be named ", kMetadata, ".");
    json[entry.name] = {
        {"dtype", entry.dtype}, {"shape", entry.shape}, {"data_offsets", {entry.begin, entry.end}}};
  }
  std::string text;
  try {
    text = json.dump();
  } catch (const nlohmann::ordered_json::exception&) {
    format_error("the name of a tensor is no UTF-8.");
  }
  text.append((8 - text.size() % 8) % 8, ' ');
  if (text.size() > kMaxHeaderBytes) format_error("there are too many tensors for safetensors.");
  const uint64_t length = text.size();
  std::string header(kLengthBytes, '\0');
  std::memcpy(header.data(), &length, kLengthBytes);
  return header + text;
}

SafetensorsReader::SafetensorsReader(const ByteSource& source, uint64_t begin, uint64_t size)
    : source_(source), begin_(begin), size_(size) {
  if (size < kLengthBytes) {
    format_error("this is no safetensors: it has ", size,
                 " bytes, and its header's length takes 8.");
  }
  uint64_t length = 0;
  source.read(begin, kLengthBytes, &length);
  if (length > kMaxHeaderBytes || length > size - kLengthBytes) {
    format_error("this is no safetensors, or it is cut: its header would have ", length,
                 " bytes, and ", size - kLengthBytes, " follow.");
  }
  header_ = source.read_string(begin, kLengthBytes + length);
  parse();
  check_places();
}

void SafetensorsReader::parse() {
  const std::string_view text = std::string_view(header_).substr(kLengthBytes);
  if (text.empty() || text.front() != '{') format_error("its header does not begin with '{'.");
  const Json json = parse_json(text);
  for (const auto& [name, value] : json.items()) {
    if (name == kMetadata) {
      metadata_ = parse_metadata(value);
    } else {
      entries_.push_back(parse_entry(name, value));
    }
  }
  std::sort(entries_.begin(), entries_.end(), [](const auto& a, const auto& b) {
    return std::tie(a.begin, a.end) < std::tie(b.begin, b.end);
  });
  for (size_t i = 0; i < entries_.size(); ++i) by_name_.emplace(entries_[i].name, i);
}

void SafetensorsReader::check_places() const {
  uint64_t place = 0;
  for (const SafetensorsEntry& entry : entries_) {
    if (entry.begin != place) {
      format_error("tensor '", entry.name, "' begins at byte ", entry.begin,
                   " of the numbers; the one before it ends at ", place,
                   ", and there must be no gap or overlap.");
    }
    place = entry.end;
  }
  const uint64_t there = size_ - header_.size();
  if (place != there) {
    format_error("its tensors have ", place, " bytes, and ", there, " follow the header.");
  }
}

const SafetensorsEntry* SafetensorsReader::find(std::string_view name) const {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? nullptr : &entries_[found->second];
}

void SafetensorsReader::read(const SafetensorsEntry& entry, void* to) const {
  source_.read(begin_ + header_.size() + entry.begin, entry.bytes(), to);
}

uint64_t checked_bytes(const std::vector<int64_t>& sizes, uint64_t element) {
  auto product = static_cast<int64_t>(element);
  bool empty = false;
  for (const int64_t size : sizes) {
    if (size < 0) format_error("a size is ", size, ", and cannot be negative.");
    empty |= size == 0;
    // A size 0 does not excuse others that overflow: libtorch computes strides of them.
    if (__builtin_mul_overflow(product, std::max<int64_t>(size, 1), &product)) {
      format_error("a tensor of ", sizes.size(), " dims has more than 2^63 - 1 bytes.");
    }
  }
  return empty ? 0 : static_cast<uint64_t>(product);
}

void check_bools(const void* bytes, uint64_t count) {
  const auto* cursor = static_cast<const unsigned char*>(bytes);
  const auto* wrong = std::find_if(cursor, cursor + count, [](unsigned char b) { return b > 1; });
  if (wrong == cursor + count) return;
  format_error("a bool has the byte ", static_cast<int>(*wrong), "; it must be 0 or 1.");
}

// --- files ---------------------------------------------------------------------------------------

void save_safetensors(const NamedTensors& tensors, const std::string& path,
                      const std::map<std::string, std::string>& metadata) {
  naming_file("save", path, [&] { write_safetensors(tensors, path, metadata); });
}

NamedTensors load_safetensors(const std::string& path) {
  return naming_file("load", path, [&] {
    const FileBytes file(path);
    const SafetensorsReader reader(file, 0, file.size());
    NamedTensors tensors;
    for (const SafetensorsEntry& entry : reader.entries()) {
      tensors.emplace_back(entry.name, load_tensor(reader, entry));
    }
    return tensors;
  });
}

}  // namespace torchlift::compile
