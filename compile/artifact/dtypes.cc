#include "compile/artifact/dtypes.h"

#include <algorithm>
#include <array>

namespace torchlift::compile {
namespace {

constexpr std::array kDtypes = {
    DtypeNames{at::kFloat, "float32", "F32", 'f'},
    DtypeNames{at::kDouble, "float64", "F64", 'f'},
    DtypeNames{at::kHalf, "float16", "F16", 'f'},
    DtypeNames{at::kBFloat16, "bfloat16", "BF16", 0},
    DtypeNames{at::kLong, "int64", "I64", 'i'},
    DtypeNames{at::kInt, "int32", "I32", 'i'},
    DtypeNames{at::kShort, "int16", "I16", 'i'},
    DtypeNames{at::kChar, "int8", "I8", 'i'},
    DtypeNames{at::kByte, "uint8", "U8", 'u'},
    DtypeNames{at::ScalarType::UInt16, "uint16", "U16", 'u'},
    DtypeNames{at::ScalarType::UInt32, "uint32", "U32", 'u'},
    DtypeNames{at::ScalarType::UInt64, "uint64", "U64", 'u'},
    DtypeNames{at::kBool, "bool", "BOOL", 'b'},
    DtypeNames{at::kComplexHalf, "complex32", nullptr, 0},
    DtypeNames{at::kComplexFloat, "complex64", "C64", 'c'},
    DtypeNames{at::kComplexDouble, "complex128", nullptr, 'c'},
    DtypeNames{at::kFloat8_e4m3fn, "float8_e4m3fn", "F8_E4M3", 0},
    DtypeNames{at::kFloat8_e5m2, "float8_e5m2", "F8_E5M2", 0},
    DtypeNames{at::kFloat8_e4m3fnuz, "float8_e4m3fnuz", nullptr, 0},
    DtypeNames{at::kFloat8_e5m2fnuz, "float8_e5m2fnuz", nullptr, 0},
};

template <class Predicate>
const DtypeNames* find(Predicate&& fits) {
  const auto* found = std::find_if(kDtypes.begin(), kDtypes.end(), fits);
  return found == kDtypes.end() ? nullptr : found;
}

}  // namespace

const DtypeNames* find_dtype(at::ScalarType dtype) {
  return find([&](const DtypeNames& row) { return row.dtype == dtype; });
}

const DtypeNames* find_safetensors_dtype(std::string_view name) {
  return find(
      [&](const DtypeNames& row) { return row.safetensors != nullptr && row.safetensors == name; });
}

const DtypeNames* find_npy_dtype(char kind, size_t bytes) {
  return find([&](const DtypeNames& row) {
    return row.npy_kind != 0 && row.npy_kind == kind && c10::elementSize(row.dtype) == bytes;
  });
}

std::string_view dtype_name(at::ScalarType dtype) {
  const DtypeNames* row = find_dtype(dtype);
  return row != nullptr ? row->name : c10::toString(dtype);
}

}  // namespace torchlift::compile
