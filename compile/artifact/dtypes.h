#ifndef TORCHLIFT_COMPILE_ARTIFACT_DTYPES_H_
#define TORCHLIFT_COMPILE_ARTIFACT_DTYPES_H_

// File: compile/artifact/dtypes.h
//
// The dtypes that files can hold, and what each format calls them.
//
//   find_dtype(at::kBFloat16)->safetensors   // "BF16"
//   find_npy_dtype('f', 4)->dtype            // float32

#include <c10/core/ScalarType.h>

#include <cstddef>
#include <string_view>

namespace torchlift::compile {

struct DtypeNames {
  at::ScalarType dtype;
  const char* name;         // in torch
  const char* safetensors;  // null: that format has none
  char npy_kind;            // with the size of an element; 0: that format has none
};

// Null where there is none.
const DtypeNames* find_dtype(at::ScalarType dtype);
const DtypeNames* find_safetensors_dtype(std::string_view name);
const DtypeNames* find_npy_dtype(char kind, size_t bytes);

// "float32"; what c10 calls it, for others.
std::string_view dtype_name(at::ScalarType dtype);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_ARTIFACT_DTYPES_H_
