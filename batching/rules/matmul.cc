#include "batching/rules/matmul.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmv.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/bmm_ops.h>
#include <ATen/ops/dot_ops.h>
#include <ATen/ops/einsum_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/einsum_ops.h>
#include <ATen/ops/ger_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/ger_ops.h>
#include <ATen/ops/inner_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/inner_ops.h>
#include <ATen/ops/linalg_vecdot_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/linalg_vecdot_ops.h>
#include <ATen/ops/linear_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/linear_ops.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/matmul_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/matmul_ops.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mm_ops.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/mv_ops.h>
#include <ATen/ops/outer_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/outer_ops.h>
#include <ATen/ops/tensordot_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/tensordot_ops.h>
#include <ATen/ops/vdot_ops.h>

#include "batching/rules/narrow_products.h"
#include "core/error.h"
#include "core/registry.h"

namespace torchlift {

// NOTE [one kernel for all examples]
// A product of batches is one of these, the first that applies:
//   - K == 1 (the gradient of a weight for one sample): a broadcasting mul, 2 to 3 times faster
//   than bmm;
//   - one operand has no batch dim: the batch dim joins the rows (columns) of the other one, if
//   that is
//     a view, and all is a single mm. A copy that makes it one pays off only where the copy is much
//     smaller than the result;
//   - bmm; an operand without a batch dim goes in as an expanded (stride 0) view, which bmm reads
//   as it is.
// So vmap(vmap(mm)) is one bmm: the rule of bmm merges batch dims.

namespace {

namespace ops = at::_ops;

// How many times smaller than the result a copy must be to be cheaper than bmm over mm. Measured.
constexpr int64_t kCopyPaysOff = 4;

void check_rank(const BatchedArg& arg, int64_t rank, const char* op, const char* name) {
  TORCH_CHECK(arg.logical_dim() == rank, "[vmap] ", op, ": ", name, " must have ", rank,
              " dimensions, but got shape ", at::IntArrayRef(logical_sizes(arg)));
}

void check_dtypes(const BatchedArg& a, const BatchedArg& b, const char* op) {
  TORCH_CHECK(a.value.scalar_type() == b.value.scalar_type(), "[vmap] ", op,
              ": expected operands of one dtype, but got ", a.value.scalar_type(), " and ",
              b.value.scalar_type());
}

// The value as [B, K, N] -> [K, B, N], and the like: the batch dim next to the dim it is to join.
at::Tensor merged(const at::Tensor& value, int64_t slow) { return value.flatten(slow, slow + 1); }

// [B, M, K] times [K, N], the batch dim joining the rows.
Batched mm_rows(const BatchedArg& a, const at::Tensor& b) {
  const at::Tensor rows = batch_first(a);
  const int64_t batch = rows.size(0);
  const int64_t m = rows.size(1);
  if (can_merge(rows, 0, 1) || rows.size(2) * kCopyPaysOff <= b.size(1)) {
    return {product(merged(rows, 0), b).view({batch, m, b.size(1)}), 0};
  }
  const at::Tensor turned = rows.transpose(0, 1);
  if (can_merge(turned, 0, 1)) {
    return {product(merged(turned, 0), b).view({m, batch, b.size(1)}), 1};
  }
  return {product(rows, b.expand({batch, b.size(0), b.size(1)})), 0};
}

// [M, K] times [B, K, N], the batch dim joining the columns: [K, B, N] -> [M, B, N]. In that layout
// an example's rows do not follow each other, so view(-1) of it, which a product allows, would fail
// (as in attention with weights of an ensemble): unless there is one row, the result has the batch
// first.
Batched mm_columns(const at::Tensor& a, const BatchedArg& b) {
  const at::Tensor columns = batch_first(b).transpose(0, 1);
  const int64_t batch = columns.size(1);
  const int64_t n = columns.size(2);
  const bool one_row = a.size(0) == 1;
  if (!one_row && n >= kWideEnough) {
    return {product(a.expand({batch, a.size(0), a.size(1)}), columns.transpose(0, 1)), 0};
  }
  if (can_merge(columns, 1, 2) || columns.size(0) * kCopyPaysOff <= a.size(0)) {
    const at::Tensor out = at::mm(a, merged(columns, 1)).view({a.size(0), batch, n});
    return one_row ? Batched{out, 1} : Batched{out.transpose(0, 1).contiguous(), 0};
  }
  return {product(a.expand({batch, a.size(0), a.size(1)}), columns.transpose(0, 1)), 0};
}

// --- sparse matrices -----------------------------------------------------------------------------
//
// One that all examples share: a single product with what they have, side by side.

bool is_sparse(const at::Tensor& value) {
  at::Tensor own = value;
  while (const LiftedTensorImpl* impl = as_lifted(own)) own = at::Tensor(impl->value());
  return own.layout() != at::kStrided;
}

// [M, K] times [B, K, N]: [K, B * N] -> [B, M, N].
Batched sparse_columns(const at::Tensor& a, const BatchedArg& b) {
  const at::Tensor columns = batch_first(b).transpose(0, 1);
  const int64_t batch = columns.size(1), n = columns.size(2);
  const at::Tensor out = at::mm(a, columns.reshape({columns.size(0), batch * n}));
  return {out.view({a.size(0), batch, n}).transpose(0, 1).contiguous(), 0};
}

// [B, M, K] times [K, N]: [B * M, K] -> [B, M, N].
Batched sparse_rows(const BatchedArg& a, const at::Tensor& b) {
  const at::Tensor rows = batch_first(a);
  const int64_t batch = rows.size(0), m = rows.size(1);
  const at::Tensor out = at::mm(rows.reshape({batch * m, rows.size(2)}), b);
  return {out.reshape({batch, m, b.size(1)}), 0};
}

// --- bmm -----------------------------------------------------------------------------------------

// [B, N, M, K] times [B, N, K, P]. The two batch dims become one, in the order that is a view.
Batched bmm_both(const at::Tensor& a, const at::Tensor& b) {
  const int64_t batch = a.size(0);
  const int64_t n = a.size(1);
  const at::Tensor a_turned = a.transpose(0, 1);
  const at::Tensor b_turned = b.transpose(0, 1);
  const int straight = can_merge(a, 0, 1) + can_merge(b, 0, 1);
  const int turned = can_merge(a_turned, 0, 1) + can_merge(b_turned, 0, 1);
  if (turned > straight) {
    const at::Tensor out = product(merged(a_turned, 0), merged(b_turned, 0));
    return {out.view({n, batch, a.size(2), b.size(3)}), 1};
  }
  const at::Tensor out = product(merged(a, 0), merged(b, 0));
  return {out.view({batch, n, a.size(2), b.size(3)}), 0};
}

// [B, N, M, K] times [N, K, P]: rows [N, B*M, K].
Batched bmm_rows(const BatchedArg& a, const at::Tensor& b) {
  const at::Tensor rows = batch_first(a).transpose(0, 1);
  const at::Tensor out = product(merged(rows, 1), b);
  return {out.view({rows.size(0), rows.size(1), rows.size(2), b.size(2)}), 1};
}

// [N, M, K] times [B, N, K, P]: columns [N, K, B*P] if that is a view, else the rows of the
// transposes. The batch dim goes to the front for the reason given at mm_columns: libtorch's matmul
// comes here with the weights of an ensemble.
Batched bmm_columns(const at::Tensor& a, const BatchedArg& b) {
  const at::Tensor columns = batch_first(b).movedim(0, 2);  // [N, K, B, P]
  const at::Tensor out = at::bmm(a, merged(columns, 2));
  const at::Tensor split = out.view({a.size(0), a.size(1), columns.size(2), columns.size(3)});
  return {split.movedim(2, 0).contiguous(), 0};
}

// --- dot -----------------------------------------------------------------------------------------

// A sum of rounded products is as good as a dot product only where the dtype is precise.
bool sums_precisely(at::ScalarType dtype) { return dtype != at::kHalf && dtype != at::kBFloat16; }

Batched dot_product(const BatchedArg& a, const BatchedArg& b, const char* op) {
  check_rank(a, 1, op, "the first argument");
  check_rank(b, 1, op, "the second argument");
  check_dtypes(a, b, op);
  const at::Tensor x = batch_first(a);
  const at::Tensor y = batch_first(b);
  TORCH_CHECK(x.size(-1) == y.size(-1), "[vmap] ", op, ": inconsistent tensor size, expected ",
              "vectors of one length, but got ", x.size(-1), " and ", y.size(-1));
  if (!a.bdim) return {at::mv(y, x), 0};
  if (!b.bdim) return {at::mv(x, y), 0};
  if (sums_precisely(x.scalar_type())) {
    return {x.mul(y).sum(at::IntArrayRef{1}, /*keepdim=*/false, x.scalar_type()), 0};
  }
  return {at::bmm(x.unsqueeze(1), y.unsqueeze(2)).view({x.size(0)}), 0};
}

// --- rules ---------------------------------------------------------------------------------------

Batched mm_rule(BatchedArg a, BatchedArg b) {
  check_mm(a, b, "mm");
  return mm_product(a, b);
}

Batched bmm_rule(BatchedArg a, BatchedArg b) {
  check_bmm(a, b, "bmm");
  return bmm_product(a, b);
}

Batched mv_rule(BatchedArg a, BatchedArg v) {
  check_mv(a, v, "mv");
  return mv_product(a, v);
}

Batched dot_rule(BatchedArg a, BatchedArg b) { return dot_product(a, b, "dot"); }

Batched vdot_rule(BatchedArg a, BatchedArg b) {
  if (!a.value.is_complex()) return dot_product(a, b, "vdot");
  const at::Tensor conj = a.value.conj();
  return dot_product({conj, a.bdim}, b, "vdot");
}

namespace implicit = at::compositeimplicitautograd;

// libtorch's look at sizes first, which a nested tensor has none of. See NOTE [nested and quantized
// tensors] in core/lifted_tensor.cc.
void check_not_nested(const char* op, const at::Tensor& a, const at::Tensor& b) {
  if (C10_LIKELY(!a.is_nested() && !b.is_nested())) return;
  unsupported_error("vmap", op,
                    ": one operand is a nested tensor, and another differs between the examples of "
                    "a batch. Use to_padded_tensor() on the nested one, or work on its unbind().");
}

bool are_strided(const at::Tensor& a, const at::Tensor& b) {
  return a.layout() == c10::kStrided && b.layout() == c10::kStrided;
}

// A vector times a matrix, as functions of one example often have it, is one operator here:
// libtorch makes it a product of matrices and two views, each with a backward pass of its own.
at::Tensor matmul(const at::Tensor& a, const at::Tensor& b) {
  check_not_nested("matmul", a, b);
  if (a.dim() == 1 && b.dim() == 2 && are_strided(a, b)) return at::mv(b.t(), a);
  return implicit::matmul(a, b);
}

at::Tensor linear(const at::Tensor& input, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias) {
  check_not_nested("linear", input, weight);
  if (input.dim() == 1 && weight.dim() == 2 && are_strided(input, weight)) {
    const bool biased = bias.has_value() && bias->defined();
    return biased ? at::addmv(*bias, weight, input) : at::mv(weight, input);
  }
  return implicit::linear(input, weight, bias);
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::mm, &mm_rule>(),
    rule<ops::bmm, &bmm_rule>(),
    rule<ops::mv, &mv_rule>(),
    rule<ops::dot, &dot_rule>(),
    rule<ops::vdot, &vdot_rule>(),
    composite<ops::linear, &linear>(),
    composite<ops::matmul, &matmul>(),
    composite<ops::outer, &implicit::outer>(),
    composite<ops::ger, &implicit::ger>(),
    composite<ops::inner, &implicit::inner>(),
    composite<ops::einsum, &implicit::einsum>(),
    composite<ops::linalg_vecdot, &implicit::linalg_vecdot>(),
};

}  // namespace

bool can_merge(const at::Tensor& value, int64_t slow, int64_t fast) {
  if (value.numel() == 0 || value.size(slow) == 1 || value.size(fast) == 1) return true;
  return value.stride(slow) == value.stride(fast) * value.size(fast);
}

void check_mm(const BatchedArg& a, const BatchedArg& b, const char* op) {
  check_rank(a, 2, op, "mat1");
  check_rank(b, 2, op, "mat2");
  check_dtypes(a, b, op);
  const auto left = logical_sizes(a);
  const auto right = logical_sizes(b);
  TORCH_CHECK(left[1] == right[0], "[vmap] ", op, ": mat1 and mat2 shapes cannot be multiplied (",
              left[0], "x", left[1], " and ", right[0], "x", right[1], ")");
}

void check_bmm(const BatchedArg& a, const BatchedArg& b, const char* op) {
  check_rank(a, 3, op, "batch1");
  check_rank(b, 3, op, "batch2");
  check_dtypes(a, b, op);
  const auto left = logical_sizes(a);
  const auto right = logical_sizes(b);
  TORCH_CHECK(left[0] == right[0] && left[2] == right[1], "[vmap] ", op,
              ": batch1 and batch2 shapes cannot be multiplied (", at::IntArrayRef(left), " and ",
              at::IntArrayRef(right), "); expected [N, M, K] and [N, K, P]");
}

void check_mv(const BatchedArg& a, const BatchedArg& v, const char* op) {
  check_rank(a, 2, op, "the matrix");
  check_rank(v, 1, op, "the vector");
  check_dtypes(a, v, op);
  const auto left = logical_sizes(a);
  const auto right = logical_sizes(v);
  TORCH_CHECK(left[1] == right[0], "[vmap] ", op, ": size mismatch, got a matrix of shape ",
              at::IntArrayRef(left), " and a vector of ", right[0], " elements");
}

bool has_sparse(const BatchedArg& a, const BatchedArg& b) {
  return is_sparse(a.value) || is_sparse(b.value);
}

Batched mm_product(const BatchedArg& a, const BatchedArg& b) {
  if (C10_UNLIKELY(!a.bdim && is_sparse(a.value))) return sparse_columns(a.value, b);
  if (C10_UNLIKELY(!b.bdim && is_sparse(b.value))) return sparse_rows(a, b.value);
  const at::Tensor left = batch_first(a);
  const at::Tensor right = batch_first(b);
  if (left.size(-1) == 1) return {left.mul(right), 0};
  if (!b.bdim) return mm_rows(a, right);
  if (!a.bdim) return mm_columns(left, b);
  return {product(left, right), 0};
}

Batched bmm_product(const BatchedArg& a, const BatchedArg& b) {
  const at::Tensor left = batch_first(a);
  const at::Tensor right = batch_first(b);
  if (left.size(-1) == 1) return {left.mul(right), 0};
  if (!b.bdim) return bmm_rows(a, right);
  if (!a.bdim) return bmm_columns(left, b);
  return bmm_both(left, right);
}

Batched mv_product(const BatchedArg& a, const BatchedArg& v) {
  const at::Tensor matrix = batch_first(a);
  const at::Tensor vector = batch_first(v);
  if (C10_UNLIKELY(!a.bdim && is_sparse(matrix))) {
    return {at::mm(matrix, vector.t()).t().contiguous(), 0};
  }
  if (!v.bdim) return {at::matmul(matrix, vector), 0};
  if (!a.bdim) return {at::mm(vector, matrix.t()), 0};
  // A row times the transpose: with a single column each product takes up to 10 times as long (NOTE
  // [narrow results] in narrow_products.h), here whatever the sizes and the processor.
  return {at::bmm(vector.unsqueeze(1), matrix.mT()).squeeze(1), 0};
}

}  // namespace torchlift
