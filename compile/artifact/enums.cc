#include "compile/artifact/enums.h"

#include <array>
#include <utility>

#include "compile/artifact/format_error.h"

namespace torchlift::compile {
namespace {

constexpr std::array kDtypes = {
    std::pair{fb::DType::U8, at::kByte},
    std::pair{fb::DType::I8, at::kChar},
    std::pair{fb::DType::I16, at::kShort},
    std::pair{fb::DType::I32, at::kInt},
    std::pair{fb::DType::I64, at::kLong},
    std::pair{fb::DType::F16, at::kHalf},
    std::pair{fb::DType::F32, at::kFloat},
    std::pair{fb::DType::F64, at::kDouble},
    std::pair{fb::DType::C32, at::kComplexHalf},
    std::pair{fb::DType::C64, at::kComplexFloat},
    std::pair{fb::DType::C128, at::kComplexDouble},
    std::pair{fb::DType::Bool, at::kBool},
    std::pair{fb::DType::BF16, at::kBFloat16},
    std::pair{fb::DType::U16, at::ScalarType::UInt16},
    std::pair{fb::DType::U32, at::ScalarType::UInt32},
    std::pair{fb::DType::U64, at::ScalarType::UInt64},
    std::pair{fb::DType::F8E4M3FN, at::kFloat8_e4m3fn},
    std::pair{fb::DType::F8E5M2, at::kFloat8_e5m2},
    std::pair{fb::DType::F8E4M3FNUZ, at::kFloat8_e4m3fnuz},
    std::pair{fb::DType::F8E5M2FNUZ, at::kFloat8_e5m2fnuz},
};

constexpr std::array kLayouts = {
    std::pair{fb::Layout::Strided, c10::kStrided},
    std::pair{fb::Layout::Sparse, c10::kSparse},
    std::pair{fb::Layout::SparseCsr, c10::kSparseCsr},
    std::pair{fb::Layout::Mkldnn, c10::kMkldnn},
    std::pair{fb::Layout::SparseCsc, c10::kSparseCsc},
    std::pair{fb::Layout::SparseBsr, c10::kSparseBsr},
    std::pair{fb::Layout::SparseBsc, c10::kSparseBsc},
    std::pair{fb::Layout::Jagged, c10::kJagged},
};

constexpr std::array kKinds = {
    std::pair{fb::StructureKind::Tensor, Structure::Kind::kTensor},
    std::pair{fb::StructureKind::None, Structure::Kind::kNone},
    std::pair{fb::StructureKind::Constant, Structure::Kind::kConstant},
    std::pair{fb::StructureKind::Tuple, Structure::Kind::kTuple},
    std::pair{fb::StructureKind::List, Structure::Kind::kList},
    std::pair{fb::StructureKind::Dict, Structure::Kind::kDict},
};

template <class Table, class T>
auto first_of(const Table& table, T second, const char* what) {
  for (const auto& row : table) {
    if (row.second == second) return row.first;
  }
  format_error("the ", what, " ", static_cast<int>(second), " of libtorch cannot be saved.");
}

template <class Table, class T>
auto second_of(const Table& table, T first, const char* what) {
  for (const auto& row : table) {
    if (row.first == first) return row.second;
  }
  format_error("there is no ", what, " of number ", static_cast<int>(first), ".");
}

}  // namespace

fb::DType to_file(at::ScalarType dtype) { return first_of(kDtypes, dtype, "dtype"); }
fb::Layout to_file(c10::Layout layout) { return first_of(kLayouts, layout, "layout"); }
fb::StructureKind to_file(Structure::Kind kind) { return first_of(kKinds, kind, "structure"); }
at::ScalarType from_file(fb::DType dtype) { return second_of(kDtypes, dtype, "dtype"); }
c10::Layout from_file(fb::Layout layout) { return second_of(kLayouts, layout, "layout"); }
Structure::Kind from_file(fb::StructureKind kind) { return second_of(kKinds, kind, "structure"); }

}  // namespace torchlift::compile
