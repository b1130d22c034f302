// Linear algebra with tensors of different ranks, and what has come to libtorch lately.

#include <ATen/ExpandUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_eigvalsh.h>
#include <ATen/ops/linalg_ldl_solve.h>
#include <ATen/ops/linalg_ldl_solve_ops.h>
#include <ATen/ops/linalg_lstsq.h>
#include <ATen/ops/linalg_lstsq_ops.h>
#include <ATen/ops/linalg_matrix_rank_ops.h>
#include <ATen/ops/linalg_pinv.h>
#include <ATen/ops/linalg_pinv_ops.h>
#include <ATen/ops/linalg_svdvals.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/ormqr.h>
#include <ATen/ops/ormqr_ops.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/core/ScalarTypeToTypeMeta.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "batching/rules/dims.h"
#include "core/boxed.h"
#include "core/registry.h"
#include "core/tensor_operators.h"

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

// --- least squares -------------------------------------------------------------------------------

// b as libtorch sees it: one right side, if its shape is that of a's rows.
bool is_right_side(const BatchedArg& b, const BatchedArg& a) {
  const auto rows = logical_sizes(a), sides = logical_sizes(b);
  return sides.size() == 1 ||
         (sides.size() + 1 == rows.size() && std::equal(sides.begin(), sides.end(), rows.begin()));
}

// What the driver, or the rank of the matrices, leaves out is a tensor of no numbers for each
// example.
Batched one_each(const at::Tensor& t, int64_t size, bool computed) {
  return {computed ? t : t.new_zeros({size, 0}), 0};
}

std::tuple<Batched, Batched, Batched, Batched> lstsq_rule(const Level& level, BatchedArg a,
                                                          BatchedArg b, std::optional<double> rcond,
                                                          std::optional<std::string_view> driver) {
  check_matrix("linalg.lstsq", a);
  const bool vector = is_right_side(b, a);
  const int64_t size = level.size(), rank = a.logical_dim();
  const at::Tensor right = expanded(b, size);
  const BatchedArg sides{vector ? right.unsqueeze(-1) : right, 0};
  const auto [x, residuals, ranks, singular] =
      at::linalg_lstsq(expanded(a, size), aligned(sides, rank), rcond, driver);
  return {
      Batched{vector ? x.squeeze(-1) : x, 0}, one_each(residuals, size, residuals.dim() == rank),
      one_each(ranks, size, driver != "gels"), one_each(singular, size, singular.dim() == rank)};
}

// --- rank ----------------------------------------------------------------------------------------

double epsilon_of(at::ScalarType dtype) {
  return c10::toRealValueType(dtype) == at::kDouble ? std::numeric_limits<double>::epsilon()
                                                    : std::numeric_limits<float>::epsilon();
}

// libtorch writes the rank into a tensor that it makes for one example.
//   [..., m, n], tolerances [...] -> [...]
at::Tensor matrix_rank(const at::Tensor& a, const std::optional<at::Tensor>& atol,
                       const std::optional<at::Tensor>& rtol, bool hermitian) {
  TORCH_CHECK(a.dim() >= 2, "[vmap] linalg.matrix_rank: expected a matrix, but got shape ",
              a.sizes());
  for (const auto& tolerance : {atol, rtol}) {
    TORCH_CHECK(!tolerance.has_value() || !tolerance->is_complex(),
                "[vmap] linalg.matrix_rank: tolerances of complex type are not supported. Got ",
                tolerance.has_value() ? tolerance->scalar_type() : a.scalar_type());
  }
  if (a.numel() == 0)
    return at::zeros(a.sizes().slice(0, a.dim() - 2), a.options().dtype(at::kLong));
  const auto options = a.options().dtype(at::kDouble);
  const double usual =
      epsilon_of(a.scalar_type()) * static_cast<double>(std::max(a.size(-1), a.size(-2)));
  const at::Tensor absolute = atol.value_or(at::zeros({}, options));
  at::Tensor relative = rtol.value_or(at::full({}, usual, options));
  if (atol.has_value() && !rtol.has_value()) relative = at::where(absolute > 0, 0.0, relative);
  const at::Tensor values = hermitian ? at::linalg_eigvalsh(a).abs() : at::linalg_svdvals(a);
  const at::Tensor largest = values.amax(-1);
  const at::Tensor tolerance = at::maximum(absolute, relative * largest);
  return (values > tolerance.unsqueeze(-1)).sum(-1);
}

at::Tensor matrix_rank_above(const at::Tensor& a, const at::Tensor& tol, bool hermitian) {
  return matrix_rank(a, tol, at::zeros({}, a.options().dtype(at::kDouble)), hermitian);
}

// --- functions of one matrix ---------------------------------------------------------------------

// By name, since not all versions of libtorch have them. Leading dims are what they have anyway.
void of_matrices(const c10::OperatorHandle& op, const LevelPtr& level, torch::jit::Stack* stack) {
  const Lowered a = lower(torch::jit::pop(*stack).toTensor(), *level);
  check_matrix(op.schema().name().c_str(), as_arg(a));
  stack->emplace_back(batch_first(as_arg(a)));
  op.callBoxed(stack);
  for (auto each = stack->end() - static_cast<int64_t>(op.schema().returns().size());
       each != stack->end(); ++each) {
    *each = lift(each->toTensor(), 0, level);
  }
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::ormqr, &ormqr_rule>(),
    rule<ops::linalg_ldl_solve, &ldl_solve_rule>(),
    rule<ops::linalg_pinv_atol_rtol_tensor, &pinv_rule>(),
    rule<ops::linalg_lstsq, &lstsq_rule>(),
    composite<ops::linalg_matrix_rank_atol_rtol_tensor, &matrix_rank>(),
    composite<ops::linalg_matrix_rank_tol_tensor, &matrix_rank_above>(),
    boxed_rule("aten::linalg_matrix_sqrth", "", &of_matrices),
    boxed_rule("aten::linalg_polar", "", &of_matrices),
};

}  // namespace
}  // namespace torchlift
