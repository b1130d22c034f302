#ifndef TORCHLIFT_COMPILE_ARTIFACT_ENUMS_H_
#define TORCHLIFT_COMPILE_ARTIFACT_ENUMS_H_

// File: compile/artifact/enums.h
//
// Enums of the file and of libtorch, to and fro. The file's numbers stay as they are when
// libtorch's change.

#include <c10/core/Layout.h>
#include <c10/core/ScalarType.h>

#include "compile/artifact/artifact_generated.h"
#include "compile/artifact/signature.h"

namespace torchlift::compile {

// Throw FormatError for one that the other side does not have.
fb::DType to_file(at::ScalarType dtype);
fb::Layout to_file(c10::Layout layout);
fb::StructureKind to_file(Structure::Kind kind);
at::ScalarType from_file(fb::DType dtype);
c10::Layout from_file(fb::Layout layout);
Structure::Kind from_file(fb::StructureKind kind);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_ARTIFACT_ENUMS_H_
