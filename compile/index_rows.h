#ifndef TORCHLIFT_COMPILE_INDEX_ROWS_H_
#define TORCHLIFT_COMPILE_INDEX_ROWS_H_

// File: compile/index_rows.h
//
// x[i], x[:, i], x[:, i, j] with lists of places, for replays.
//
//   at::Tensor rows = index_rows(x, {std::nullopt, i, j});   // as at::index(x, {{}, i, j})
//
// libtorch's kernel for it takes any number of indices of any shapes, element by element, and two
// to eight times as long on a CPU as index_select, which takes one list and copies rows. Dims next
// to each other are one dim of contiguous memory, so that several lists are one, too.

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>

namespace torchlift::compile {

using Indices = c10::List<std::optional<at::Tensor>>;

// at::index(x, indices): by index_select if that is the same: x contiguous on the CPU, and the
// indices are lists of int64, as long as each other, of dims next to each other, none out of range.
at::Tensor index_rows(const at::Tensor& x, const Indices& indices);

// at::nonzero_static(x, size, fill): by nonzero, which is quicker, if there are as many.
at::Tensor nonzero_places(const at::Tensor& x, int64_t size, int64_t fill);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_INDEX_ROWS_H_
