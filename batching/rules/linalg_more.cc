// Linear algebra with tensors of different ranks.

#include <ATen/ExpandUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/linalg_ldl_solve.h>
#include <ATen/ops/linalg_ldl_solve_ops.h>
#include <ATen/ops/linalg_pinv.h>
#include <ATen/ops/linalg_pinv_ops.h>
#include <ATen/ops/ormqr.h>
#include <ATen/ops/ormqr_ops.h>

#include <algorithm>
#include <vector>

#include "batching/rules/dims.h"
#include "core/registry.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;

void check_matrix(const char* op, const BatchedArg& a) {
  TORCH_CHECK(a.logical_dim() >= 2, "[vmap] ", op, ": expected a matrix, but got shape ",
              at::IntArrayRef(logical_sizes(a)));
}

// Leading dims must be the same for all three, so examples are spelled out.
Batched ormqr_rule(const Level& level, BatchedArg a, BatchedArg tau, BatchedArg other, bool left,
                   bool transpose) {
  check_matrix("ormqr", a);
  check_matrix("ormqr", other);
  const int64_t size = level.size();
  return {at::ormqr(expanded(a, size), expanded(tau, size), expanded(other, size), left, transpose),
          0};
}

// Leading dims broadcast between the factors (with their pivots) and the right side. That is done
// here: libtorch's kernel reads pivots that were broadcast past their end.
Batched ldl_solve_rule(const Level& level, BatchedArg factors, BatchedArg pivots, BatchedArg b,
                       bool hermitian) {
  check_matrix("linalg.ldl_solve", factors);
  check_matrix("linalg.ldl_solve", b);
  const int64_t rank = std::max(factors.logical_dim(), b.logical_dim());
  const auto in_front = [&](const BatchedArg& arg, int64_t arg_rank) {
    const at::Tensor all = expanded(arg, level.size());
    return aligned(BatchedArg{all, 0}, arg_rank);
  };
  const at::Tensor right = in_front(b, rank);
  const at::Tensor left = in_front(factors, rank);
  const auto leading =
      at::infer_size(left.sizes().slice(0, rank - 1), right.sizes().slice(0, rank - 1));
  const auto broadcast = [&](const at::Tensor& t, int64_t matrix_dims) {
    std::vector<int64_t> sizes = leading;
    for (int64_t d = -matrix_dims; d < 0; ++d) sizes.push_back(t.size(d));
    return t.expand(sizes);
  };
  return {at::linalg_ldl_solve(broadcast(left, 2),
                               broadcast(in_front(pivots, rank - 1), 1).contiguous(),
                               broadcast(right, 2), hermitian),
          0};
}

// Tolerances have the leading dims of the matrices.
Batched pinv_rule(const Level& level, BatchedArg a, std::optional<BatchedArg> atol,
                  std::optional<BatchedArg> rtol, bool hermitian) {
  check_matrix("linalg.pinv", a);
  const auto in_front = [&](const std::optional<BatchedArg>& arg) {
    if (!arg.has_value()) return std::optional<at::Tensor>();
    return std::optional<at::Tensor>(aligned(*arg, a.logical_dim() - 2));
  };
  return {at::linalg_pinv(expanded(a, level.size()), in_front(atol), in_front(rtol), hermitian), 0};
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::ormqr, &ormqr_rule>(),
    rule<ops::linalg_ldl_solve, &ldl_solve_rule>(),
    rule<ops::linalg_pinv_atol_rtol_tensor, &pinv_rule>(),
};

}  // namespace
}  // namespace torchlift
