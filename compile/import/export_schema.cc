#include "compile/import/export_schema.h"

#include <map>
#include <vector>

#include "compile/artifact/format_error.h"
#include "compile/artifact/safetensors.h"

namespace torchlift::compile {
namespace {

const std::map<int64_t, at::ScalarType> kDtypes = {
    {1, at::kByte},
    {2, at::kChar},
    {3, at::kShort},
    {4, at::kInt},
    {5, at::kLong},
    {6, at::kHalf},
    {7, at::kFloat},
    {8, at::kDouble},
    {9, at::kComplexHalf},
    {10, at::kComplexFloat},
    {11, at::kComplexDouble},
    {12, at::kBool},
    {13, at::kBFloat16},
    {28, at::ScalarType::UInt16},
    {29, at::kFloat8_e4m3fn},
    {30, at::kFloat8_e5m2},
    {31, at::kFloat8_e4m3fnuz},
    {32, at::kFloat8_e5m2fnuz},
    {34, at::ScalarType::UInt32},
    {35, at::ScalarType::UInt64},
};

const std::map<int64_t, c10::Layout> kLayouts = {
    {1, c10::kSparse},    {2, c10::kSparseCsr}, {3, c10::kSparseCsc}, {4, c10::kSparseBsr},
    {5, c10::kSparseBsc}, {6, c10::kMkldnn},    {7, c10::kStrided},
};

const std::map<int64_t, c10::MemoryFormat> kMemoryFormats = {
    {1, c10::MemoryFormat::Contiguous},
    {2, c10::MemoryFormat::ChannelsLast},
    {3, c10::MemoryFormat::ChannelsLast3d},
    {4, c10::MemoryFormat::Preserve},
};

template <class Value>
Value look_up(const std::map<int64_t, Value>& table, int64_t number, const char* what) {
  const auto found = table.find(number);
  if (found == table.end()) {
    format_error("there is the ", what, " ", number, " in it, which this torchlift does not know.");
  }
  return found->second;
}

std::vector<SizeExpr> sizes_of(const Json& list, const SizeMeaning& meaning,
                               const std::string& where) {
  std::vector<SizeExpr> sizes;
  for (const Json& each : list) sizes.push_back(size_of(each, meaning, where));
  return sizes;
}

void check_range(const TensorType& type, const std::string& where) {
  std::vector<int64_t> sizes;
  for (const SizeExpr& size : type.sizes) sizes.push_back(size.constant().value_or(0));
  for (const SizeExpr& stride : type.strides) {
    if (stride.constant().value_or(0) < 0) format_error(where, " has a negative stride.");
  }
  checked_bytes(sizes, c10::elementSize(type.dtype));
}

}  // namespace

at::ScalarType dtype_of(int64_t number) { return look_up(kDtypes, number, "dtype"); }

c10::Layout layout_of(int64_t number) { return look_up(kLayouts, number, "layout"); }

c10::MemoryFormat memory_format_of(int64_t number) {
  return look_up(kMemoryFormats, number, "memory format");
}

c10::Device device_of(const Json& json, const std::string& where) {
  std::string text = string_at(json, "type", where + "'s device");
  if (const Json* index = find(json, "index")) {
    const int64_t number = as_int(*index, where + "'s device");
    if (number < 0 || number > 127) format_error(where, " is on a device of index ", number, ".");
    text += ":" + std::to_string(number);
  }
  try {
    return c10::Device(text);
  } catch (const c10::Error&) {
    format_error("there is no device '", text, "'.");
  }
}

SizeExpr size_of(const Json& json, const SizeMeaning& sizes, const std::string& where) {
  const auto [kind, value] = as_union(json, where);
  if (kind == "as_int") {
    const int64_t number = as_int(value, where);
    if (number < 0) format_error(where, " has the size or stride ", number, ".");
    return number;
  }
  if (kind != "as_expr") format_error(where, " has a size that is ", kind, ".");
  return sizes.size(parse_size(string_at(value, "expr_str", where)));
}

TensorType type_of_meta(const Json& meta, const SizeMeaning& sizes, const std::string& where) {
  TensorType type;
  type.dtype = dtype_of(as_int(at(meta, "dtype", where), where));
  type.layout = layout_of(as_int(at(meta, "layout", where), where));
  type.device = device_of(at(meta, "device", where), where);
  type.sizes = sizes_of(array_at(meta, "sizes", where), sizes, where);
  if (type.layout == c10::kStrided) {
    type.strides = sizes_of(array_at(meta, "strides", where), sizes, where);
    if (type.strides.size() != type.sizes.size()) {
      format_error(where, " has ", type.sizes.size(), " sizes and ", type.strides.size(),
                   " strides.");
    }
  }
  check_range(type, where);
  return type;
}

}  // namespace torchlift::compile
