// Linear algebra. Nearly all of it takes leading dims, of which the batch dim is one more.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_cholesky_solve_helper_ops.h>
#include <ATen/ops/_linalg_check_errors.h>
#include <ATen/ops/_linalg_det_ops.h>
#include <ATen/ops/_linalg_eigh_ops.h>
#include <ATen/ops/_linalg_eigvals_ops.h>
#include <ATen/ops/_linalg_slogdet_ops.h>
#include <ATen/ops/_linalg_solve_ex.h>
#include <ATen/ops/_linalg_solve_ex_ops.h>
#include <ATen/ops/_linalg_svd_ops.h>
#include <ATen/ops/cholesky_inverse_ops.h>
#include <ATen/ops/cholesky_solve_ops.h>
#include <ATen/ops/geqrf_ops.h>
#include <ATen/ops/linalg_cholesky_ex_ops.h>
#include <ATen/ops/linalg_cross.h>
#include <ATen/ops/linalg_cross_ops.h>
#include <ATen/ops/linalg_eig_ops.h>
#include <ATen/ops/linalg_householder_product.h>
#include <ATen/ops/linalg_householder_product_ops.h>
#include <ATen/ops/linalg_inv_ex_ops.h>
#include <ATen/ops/linalg_ldl_factor_ex_ops.h>
#include <ATen/ops/linalg_lu_factor_ex_ops.h>
#include <ATen/ops/linalg_lu_ops.h>
#include <ATen/ops/linalg_lu_solve.h>
#include <ATen/ops/linalg_lu_solve_ops.h>
#include <ATen/ops/linalg_matrix_exp.h>
#include <ATen/ops/linalg_matrix_exp_ops.h>
#include <ATen/ops/linalg_qr_ops.h>
#include <ATen/ops/linalg_solve_triangular_ops.h>
#include <ATen/ops/lu_unpack.h>
#include <ATen/ops/lu_unpack_ops.h>
#include <ATen/ops/triangular_solve_ops.h>

#include "batching/rules/fold.h"
#include "core/lifted_tensor.h"
#include "core/registry.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;

// NOTE [factors of the transpose]
// Of a real contiguous matrix, libtorch's det and slogdet factor the transpose, which needs no
// copy. Their derivative formulas ask the matrix that they see which of the two the saved factors
// belong to. Under vmap they see an example. So the batch must be contiguous where its examples
// are: if they lie apart, or are one and the same, it would not be, and the gradient would be
// another matrix's. (solve always factors the matrix itself.)
bool has_contiguous_examples(const at::Tensor& batch) {
  int64_t expected = 1;
  for (int64_t dim = batch.dim() - 1; dim > 0; --dim) {
    if (batch.size(dim) == 1) continue;
    if (batch.stride(dim) != expected) return false;
    expected *= batch.size(dim);
  }
  return true;
}

template <class Op>
auto determinant_rule(BatchedArg a) {
  at::Tensor matrices = batch_first(a);
  if (has_contiguous_examples(matrices)) matrices = matrices.contiguous();
  return leading<Op, 2>(BatchedArg{matrices, 0});
}

// --- solve: the right side is a vector or a matrix, by the shapes that the user sees -------------

bool is_vector_for(const BatchedArg& b, const BatchedArg& a) {
  auto rows = logical_sizes(a);
  rows.pop_back();
  return b.logical_dim() == 1 ||
         (b.logical_dim() + 1 == a.logical_dim() && logical_sizes(b) == rows);
}

// With 1-sized dims in front up to `rank`: else libtorch could take a matrix that all examples
// share for a batch of vectors, where its sizes happen to fit.
at::Tensor same_rank(const at::Tensor& t, int64_t rank) {
  if (t.dim() >= rank) return t;
  c10::SmallVector<int64_t, 8> sizes(static_cast<size_t>(rank - t.dim()), 1);
  sizes.append(t.sizes().begin(), t.sizes().end());
  return t.expand(sizes);
}

// [B, 1, 1, ...] without the `added` 1-sized dims.
at::Tensor without_added(const at::Tensor& t, int64_t added) {
  return added == 0 ? t : t.flatten(0, added);
}

std::tuple<Batched, Batched, Batched, Batched> solve_rule(BatchedArg a, BatchedArg b, bool left,
                                                          bool check_errors) {
  TORCH_CHECK(a.logical_dim() >= 2, "[vmap] linalg.solve: expected a matrix, but got shape ",
              at::IntArrayRef(logical_sizes(a)));
  const bool vector = is_vector_for(b, a);
  TORCH_CHECK(
      left || !vector,
      "[vmap] linalg.solve: Vector broadcasting of the left hand side is not "
      "supported for left=False. In this case linalg.solve is equivalent to B / A.squeeze(-1)");
  const at::Tensor column = vector ? b.value.unsqueeze(-1) : b.value;
  const BatchedArg right{column, b.bdim};
  const int64_t rank = std::max(a.logical_dim(), right.logical_dim());
  const auto [x, lu, pivots, info] = at::_linalg_solve_ex(
      aligned(a, rank), same_rank(aligned(right, rank), rank + 1), left, check_errors);
  // The factors have the leading dims of a, without those that `aligned` put in.
  const int64_t added = a.bdim ? rank - a.logical_dim() : 0;
  const auto factor = [&](const at::Tensor& t) {
    return a.bdim ? Batched{without_added(t, added), 0} : Batched{t, std::nullopt};
  };
  return {Batched{vector ? x.squeeze(-1) : x, 0}, factor(lu), factor(pivots), factor(info)};
}

// --- operators whose tensors differ in rank, but share their leading dims ------------------------

Batched householder_rule(const Level& level, BatchedArg input, BatchedArg tau) {
  return {
      at::linalg_householder_product(expanded(input, level.size()), expanded(tau, level.size())),
      0};
}

// libtorch's takes a view of its argument that only contiguous matrices have.
Batched matrix_exp_rule(BatchedArg a) {
  TORCH_CHECK(a.logical_dim() >= 2, "[vmap] linalg.matrix_exp: expected a matrix, but got shape ",
              at::IntArrayRef(logical_sizes(a)));
  return {at::linalg_matrix_exp(batch_first(a).contiguous()), 0};
}

std::tuple<Batched, Batched, Batched> lu_unpack_rule(const Level& level, BatchedArg lu,
                                                     BatchedArg pivots, bool unpack_data,
                                                     bool unpack_pivots) {
  const auto [p, l, u] = at::lu_unpack(expanded(lu, level.size()), expanded(pivots, level.size()),
                                       unpack_data, unpack_pivots);
  const auto dim = [](bool wanted) { return wanted ? std::optional<int64_t>(0) : std::nullopt; };
  return {Batched{p, dim(unpack_pivots)}, Batched{l, dim(unpack_data)},
          Batched{u, dim(unpack_data)}};
}

Batched lu_solve_rule(const Level& level, BatchedArg lu, BatchedArg pivots, BatchedArg b, bool left,
                      bool adjoint) {
  // Leading dims broadcast between lu and b, and pivots go with lu.
  const int64_t rank = std::max(lu.logical_dim(), b.logical_dim());
  const at::Tensor factors = expanded(lu, level.size());
  const at::Tensor order = expanded(pivots, level.size());
  return {
      at::linalg_lu_solve(aligned(BatchedArg{factors, 0}, rank),
                          aligned(BatchedArg{order, 0}, rank - 1), aligned(b, rank), left, adjoint),
      0};
}

Batched cross_rule(BatchedArg a, BatchedArg b, int64_t dim) {
  TORCH_CHECK(a.logical_dim() == b.logical_dim(),
              "[vmap] linalg.cross: inputs must have the same number of "
              "dimensions, but got shapes ",
              at::IntArrayRef(logical_sizes(a)), " and ", at::IntArrayRef(logical_sizes(b)));
  const int64_t rank = a.logical_dim();
  const int64_t from_the_right = wrap_dim(dim, rank) - rank;
  const at::Tensor left = a.bdim ? batch_first(a) : a.value.unsqueeze(0);
  const at::Tensor right = b.bdim ? batch_first(b) : b.value.unsqueeze(0);
  return {at::linalg_cross(left, right, from_the_right), 0};
}

// _linalg_check_errors(info, api_name, is_matrix) throws if an info is not 0.
void check_errors(const c10::OperatorHandle& /*op*/, const LevelPtr& level,
                  torch::jit::Stack* stack) {
  const bool is_matrix = torch::jit::pop(*stack).toBool();
  const std::string name = torch::jit::pop(*stack).toStringRef();
  const Lowered info = lower(torch::jit::pop(*stack).toTensor(), *level);
  at::_linalg_check_errors(info.value, name, is_matrix && !info.bdim);
}

[[maybe_unused]] const RuleSet kRules{
    leading_row<ops::linalg_inv_ex>(),
    leading_row<ops::linalg_cholesky_ex>(),
    leading_row<ops::cholesky_solve>(),
    leading_row<ops::_cholesky_solve_helper>(),
    leading_row<ops::cholesky_inverse>(),
    rule<ops::_linalg_det, &determinant_rule<ops::_linalg_det>>(),
    rule<ops::_linalg_slogdet, &determinant_rule<ops::_linalg_slogdet>>(),
    leading_row<ops::_linalg_svd>(),
    leading_row<ops::_linalg_eigh>(),
    leading_row<ops::_linalg_eigvals>(),
    leading_row<ops::linalg_eig>(),
    leading_row<ops::linalg_qr>(),
    leading_row<ops::linalg_lu>(),
    leading_row<ops::linalg_lu_factor_ex>(),
    leading_row<ops::linalg_ldl_factor_ex>(),
    leading_row<ops::linalg_solve_triangular>(),
    leading_row<ops::triangular_solve>(),
    leading_row<ops::geqrf>(),
    rule<ops::_linalg_solve_ex, &solve_rule>(),
    rule<ops::linalg_householder_product, &householder_rule>(),
    rule<ops::linalg_matrix_exp, &matrix_exp_rule>(),
    rule<ops::lu_unpack, &lu_unpack_rule>(),
    rule<ops::linalg_lu_solve, &lu_solve_rule>(),
    rule<ops::linalg_cross, &cross_rule>(),
    boxed_rule("aten::_linalg_check_errors", "", &check_errors),
};

}  // namespace
}  // namespace torchlift
