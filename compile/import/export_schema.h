#ifndef TORCHLIFT_COMPILE_IMPORT_EXPORT_SCHEMA_H_
#define TORCHLIFT_COMPILE_IMPORT_EXPORT_SCHEMA_H_

// File: compile/import/export_schema.h
//
// The enums of torch.export's files (torch/_export/serde/schema.py), whose numbers are not those of
// ATen, and what they say of a tensor.
//
//   dtype_of(7)                                   // at::kFloat
//   type_of_meta(meta, sizes, "tensor x")       // f32[s0, 3]
//
// Throws FormatError (compile/artifact/format_error.h) for what stands for nothing.

#include <c10/core/Device.h>
#include <c10/core/Layout.h>
#include <c10/core/MemoryFormat.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <string>

#include "compile/graph.h"
#include "compile/import/json.h"
#include "compile/import/size_language.h"

namespace torchlift::compile {

at::ScalarType dtype_of(int64_t number);
c10::Layout layout_of(int64_t number);
c10::MemoryFormat memory_format_of(int64_t number);
// {"type": "cuda", "index": 0}
c10::Device device_of(const Json& json, const std::string& where);

// {"as_int": 3} or {"as_expr": {"expr_str": "Symbol('s0')"}}
SizeExpr size_of(const Json& json, const SizeMeaning& sizes, const std::string& where);

// A TensorMeta.
TensorType type_of_meta(const Json& meta, const SizeMeaning& sizes, const std::string& where);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_IMPORT_EXPORT_SCHEMA_H_
