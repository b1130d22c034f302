#include "autodiff/coloring.h"

#include <ATen/ops/_sparse_coo_tensor_unsafe.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include "autodiff/graph_coloring.h"
#include "core/error.h"
#include "core/level.h"

namespace torchlift {
namespace {

constexpr const char* kColoring = "coloring";
// Both directions run the function twice: they must save more than that.
constexpr int64_t kBothPaysOff = 2;

std::span<const int64_t> span_of(const at::Tensor& t) {
  return {t.const_data_ptr<int64_t>(), static_cast<size_t>(t.numel())};
}

at::Tensor tensor_of(const std::vector<int64_t>& values) {
  return at::tensor(values, at::TensorOptions().dtype(at::kLong));
}

// {crow_indices, col_indices}, int64, on CPU, sorted.
std::pair<at::Tensor, at::Tensor> indices_of(const at::Tensor& pattern) {
  // By way of COO, which coalesce() sorts. Elements that are zero stay.
  at::Tensor coo = pattern;
  if (pattern.layout() == at::kStrided) {
    coo = pattern.ne(0).to_sparse();
  } else if (pattern.layout() != at::kSparse) {
    coo = pattern.to_sparse();
  }
  // Of numbers, since bools cannot be added up.
  const at::Tensor ones =
      at::_sparse_coo_tensor_unsafe(coo._indices().cpu(), at::ones({coo._nnz()}, at::kFloat),
                                    coo.sizes(), at::TensorOptions().dtype(at::kFloat));
  const at::Tensor indices = ones.coalesce().indices();
  const at::Tensor counts = indices.select(0, 0).bincount({}, pattern.size(0));
  at::Tensor starts = at::zeros({pattern.size(0) + 1}, at::kLong);
  starts.narrow(0, 1, pattern.size(0)).copy_(counts.cumsum(0));
  return {starts, indices.select(0, 1).contiguous()};
}

MatrixColoring colored(const SparsePattern& pattern, ColoringMode& mode) {
  switch (mode) {
    case ColoringMode::kForward:
      return color_columns(pattern);
    case ColoringMode::kReverse:
      return color_rows(pattern);
    case ColoringMode::kBoth:
      return color_both(pattern);
    case ColoringMode::kSymmetric:
      return color_symmetric(pattern);
    case ColoringMode::kAuto:
      break;
  }
  MatrixColoring forward = color_columns(pattern), reverse = color_rows(pattern);
  mode = forward.forward < reverse.reverse ? ColoringMode::kForward : ColoringMode::kReverse;
  MatrixColoring best = mode == ColoringMode::kForward ? std::move(forward) : std::move(reverse);
  const int64_t one_way = best.forward + best.reverse;
  if (one_way <= 2 * kBothPaysOff) return best;
  MatrixColoring both = color_both(pattern);
  if (kBothPaysOff * (both.forward + both.reverse) < one_way) {
    mode = ColoringMode::kBoth;
    return both;
  }
  return best;
}

}  // namespace

const char* name_of(ColoringMode mode) {
  static constexpr const char* kNames[] = {"auto", "forward", "reverse", "both", "symmetric"};
  return kNames[static_cast<size_t>(mode)];
}

Coloring coloring(const at::Tensor& pattern, ColoringMode mode) {
  if (!pattern.defined() || pattern.dim() != 2) {
    transform_error(kColoring,
                    "a pattern is a matrix, with a row for each number that the function "
                    "returns and a column for each number of its inputs, but got ",
                    pattern.defined() ? c10::str("a tensor of shape ", pattern.sizes())
                                      : std::string("an undefined tensor"),
                    ". sparsity(f)(x) makes one.");
  }
  const RuleDepthScope plain(1);
  Coloring result;
  result.rows = pattern.size(0);
  result.columns = pattern.size(1);
  std::tie(result.crow_indices, result.col_indices) = indices_of(pattern);
  const SparsePattern view{result.rows, result.columns, span_of(result.crow_indices),
                           span_of(result.col_indices)};
  if (mode == ColoringMode::kSymmetric && !is_symmetric(view)) {
    transform_error(kColoring,
                    "mode=\"symmetric\" is for the pattern of a Hessian, but this one, of "
                    "shape ",
                    pattern.sizes(),
                    ", is not symmetric. hessian_sparsity(f)(x) makes one that is; for a Jacobian "
                    "use \"auto\".");
  }
  result.mode = mode;
  MatrixColoring found = colored(view, result.mode);
  result.forward = found.forward;
  result.reverse = found.reverse;
  result.column_colors = tensor_of(found.column_colors);
  result.row_colors = tensor_of(found.row_colors);
  result.sources = tensor_of(found.sources);
  return result;
}

}  // namespace torchlift
