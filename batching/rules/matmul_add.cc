// addmm, baddbmm, addmv, addbmm, addr: beta * self + alpha * (a product), and their in-place forms.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_sparse_addmm_ops.h>
#include <ATen/ops/_trilinear.h>
#include <ATen/ops/_trilinear_ops.h>
#include <ATen/ops/add_ops.h>
#include <ATen/ops/addbmm_ops.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/addmm_ops.h>
#include <ATen/ops/addmv_ops.h>
#include <ATen/ops/addr_ops.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/baddbmm_ops.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>

#include "batching/rules/matmul.h"
#include "batching/rules/narrow_products.h"
#include "batching/rules/pointwise.h"
#include "core/registry.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;

using Sizes = c10::SmallVector<int64_t, 6>;

// self must have the product's dtype and broadcast to its shape.
void check_self(const BatchedArg& self, const BatchedArg& a, at::IntArrayRef shape,
                const char* op) {
  TORCH_CHECK(self.value.scalar_type() == a.value.scalar_type(), "[vmap] ", op,
              ": self must have the dtype of the operands, but got ", self.value.scalar_type(),
              " and ", a.value.scalar_type());
  const Sizes sizes = logical_sizes(self);
  bool fits = sizes.size() <= shape.size();
  for (size_t i = 1; fits && i <= sizes.size(); ++i) {
    const int64_t size = sizes[sizes.size() - i];
    fits = size == 1 || size == shape[shape.size() - i];
  }
  TORCH_CHECK(fits, "[vmap] ", op, ": self of shape ", at::IntArrayRef(sizes),
              " cannot be expanded to the shape of the product, ", shape);
}

// As the kernels take beta and alpha: in the dtype of the operands, so that 0.6 of integers is 0.
at::Scalar factor_for(const Batched& product, const at::Scalar& factor) {
  const at::ScalarType dtype = product.value.scalar_type();
  if (dtype == at::kBool) return factor.toBool();
  return at::isIntegralType(dtype, /*includeBool=*/false) ? at::Scalar(factor.toLong()) : factor;
}

bool is_number(const at::Scalar& factor, int64_t number) {
  return factor.isBoolean() ? factor.toBool() == (number != 0) : factor.equal(number);
}

// beta * self + alpha * product. A beta of 0 means that self is not read: its NaNs do not show.
Batched add_to(const BatchedArg& self, const Batched& product, const at::Scalar& given_beta,
               const at::Scalar& given_alpha) {
  const at::Scalar beta = factor_for(product, given_beta);
  const at::Scalar alpha = factor_for(product, given_alpha);
  Batched scaled = product;
  if (!is_number(alpha, 1)) scaled.value = product.value.mul(alpha);
  if (is_number(beta, 0)) return scaled;
  return pointwise<ops::add_Tensor>(as_arg(scaled), self, beta);
}

// The in-place form; target has a batch dim. It is given as the rule's own value, batch dim first.
void add_into(const BatchedArg& self, const Batched& product, const at::Scalar& given_beta,
              const at::Scalar& given_alpha) {
  const at::Scalar beta = factor_for(product, given_beta);
  const at::Scalar alpha = factor_for(product, given_alpha);
  at::Tensor target = batch_first(self);
  const at::Tensor value = batch_first(as_arg(product));
  if (is_number(beta, 0)) {
    target.copy_(is_number(alpha, 1) ? value : value.mul(alpha));
    return;
  }
  if (!is_number(beta, 1)) target.mul_(beta);
  target.add_(value, alpha);
}

// --- addmm ---------------------------------------------------------------------------------------

// [M, N]; checked.
Sizes addmm_shape(const BatchedArg& self, const BatchedArg& a, const BatchedArg& b,
                  const char* op) {
  check_mm(a, b, op);
  const Sizes shape{logical_sizes(a)[0], logical_sizes(b)[1]};
  check_self(self, a, shape, op);
  return shape;
}

// A bias, one for all rows: [N] or [1, N], the same for all examples.
bool is_shared_row(const BatchedArg& self) {
  return !self.bdim && (self.value.dim() < 2 || self.value.size(0) == 1);
}

Batched addmm_rule(BatchedArg self, BatchedArg a, BatchedArg b, const at::Scalar& beta,
                   const at::Scalar& alpha) {
  const Sizes shape = addmm_shape(self, a, b, "addmm");
  if (C10_UNLIKELY((a.bdim || b.bdim) && has_sparse(a, b))) {
    return add_to(self, mm_product(a, b), beta, alpha);
  }
  if (a.bdim && b.bdim && logical_sizes(a)[1] != 1) {
    return {product_added_to(aligned(self, 2), batch_first(a), batch_first(b), beta, alpha), 0};
  }
  if (a.bdim && !b.bdim && is_shared_row(self)) {
    const at::Tensor rows = batch_first(a);
    const int64_t batch = rows.size(0);
    if (can_merge(rows, 0, 1)) {
      const at::Tensor out = product_added_to(self.value, rows.flatten(0, 1), b.value, beta, alpha);
      return {out.view({batch, shape[0], shape[1]}), 0};
    }
  }
  if (!a.bdim && b.bdim && self.bdim && self.logical_dim() == 1 &&
      logical_sizes(self)[0] == shape[1]) {
    if (shape[0] != 1 && shape[1] >= kWideEnough) {
      const at::Tensor weights = batch_first(b);
      const at::Tensor shared = expanded(a, weights.size(0));
      return {product_added_to(aligned(self, 2), shared, weights, beta, alpha), 0};
    }
    const at::Tensor columns = batch_first(b).transpose(0, 1);  // [K, B, N]
    if (can_merge(columns, 1, 2)) {
      const at::Tensor row = batch_first(self).flatten(0, 1);
      const at::Tensor out = at::addmm(row, a.value, columns.flatten(1, 2), beta, alpha)
                                 .view({shape[0], columns.size(1), shape[1]});
      // The layout that view() of the result relies on: see mm_columns.
      return shape[0] == 1 ? Batched{out, 1} : Batched{out.transpose(0, 1).contiguous(), 0};
    }
  }
  if (!a.bdim && !b.bdim) {
    return add_to(self, {product(a.value, b.value), std::nullopt}, beta, alpha);
  }
  return add_to(self, mm_product(a, b), beta, alpha);
}

void addmm_in_place(BatchedArg self, BatchedArg a, BatchedArg b, const at::Scalar& beta,
                    const at::Scalar& alpha) {
  addmm_shape(self, a, b, "addmm_");
  if (!a.bdim && !b.bdim) {
    return add_into(self, {product(a.value, b.value), std::nullopt}, beta, alpha);
  }
  if (C10_UNLIKELY(has_sparse(a, b))) return add_into(self, mm_product(a, b), beta, alpha);
  const int64_t batch = batch_size_of({&self});
  batch_first(self).baddbmm_(expanded(a, batch), expanded(b, batch), beta, alpha);
}

// --- baddbmm -------------------------------------------------------------------------------------

Sizes baddbmm_shape(const BatchedArg& self, const BatchedArg& a, const BatchedArg& b,
                    const char* op) {
  check_bmm(a, b, op);
  const Sizes shape{logical_sizes(a)[0], logical_sizes(a)[1], logical_sizes(b)[2]};
  check_self(self, a, shape, op);
  return shape;
}

Batched bmm_or_shared(const BatchedArg& a, const BatchedArg& b) {
  if (!a.bdim && !b.bdim) return {product(a.value, b.value), std::nullopt};
  return bmm_product(a, b);
}

Batched baddbmm_rule(BatchedArg self, BatchedArg a, BatchedArg b, const at::Scalar& beta,
                     const at::Scalar& alpha) {
  baddbmm_shape(self, a, b, "baddbmm");
  return add_to(self, bmm_or_shared(a, b), beta, alpha);
}

void baddbmm_in_place(BatchedArg self, BatchedArg a, BatchedArg b, const at::Scalar& beta,
                      const at::Scalar& alpha) {
  baddbmm_shape(self, a, b, "baddbmm_");
  add_into(self, bmm_or_shared(a, b), beta, alpha);
}

// --- addbmm: the sum of the N products -----------------------------------------------------------

Batched summed_bmm(const BatchedArg& self, const BatchedArg& a, const BatchedArg& b,
                   const char* op) {
  check_bmm(a, b, op);
  check_self(self, a, {logical_sizes(a)[1], logical_sizes(b)[2]}, op);
  const Batched product = bmm_or_shared(a, b);
  const int64_t dim = product.bdim == 0 ? 1 : 0;
  at::Tensor sum = product.value.sum(at::IntArrayRef{dim}, false, product.value.scalar_type());
  if (!product.bdim) return {sum, std::nullopt};
  return {sum, *product.bdim == 0 ? 0 : *product.bdim - 1};
}

Batched addbmm_rule(BatchedArg self, BatchedArg a, BatchedArg b, const at::Scalar& beta,
                    const at::Scalar& alpha) {
  return add_to(self, summed_bmm(self, a, b, "addbmm"), beta, alpha);
}

void addbmm_in_place(BatchedArg self, BatchedArg a, BatchedArg b, const at::Scalar& beta,
                     const at::Scalar& alpha) {
  add_into(self, summed_bmm(self, a, b, "addbmm_"), beta, alpha);
}

// --- addmv ---------------------------------------------------------------------------------------

Batched checked_mv(const BatchedArg& self, const BatchedArg& a, const BatchedArg& v,
                   const char* op) {
  check_mv(a, v, op);
  check_self(self, a, {logical_sizes(a)[0]}, op);
  if (!a.bdim && !v.bdim) return {a.value.mv(v.value), std::nullopt};
  return mv_product(a, v);
}

Batched addmv_rule(BatchedArg self, BatchedArg a, BatchedArg v, const at::Scalar& beta,
                   const at::Scalar& alpha) {
  return add_to(self, checked_mv(self, a, v, "addmv"), beta, alpha);
}

void addmv_in_place(BatchedArg self, BatchedArg a, BatchedArg v, const at::Scalar& beta,
                    const at::Scalar& alpha) {
  add_into(self, checked_mv(self, a, v, "addmv_"), beta, alpha);
}

// --- addr ----------------------------------------------------------------------------------------

Batched outer_product(const BatchedArg& a, const BatchedArg& b, const char* op) {
  TORCH_CHECK(a.logical_dim() == 1 && b.logical_dim() == 1, "[vmap] ", op,
              ": expected two vectors, but got shapes ", at::IntArrayRef(logical_sizes(a)), " and ",
              at::IntArrayRef(logical_sizes(b)));
  const bool batched = a.bdim || b.bdim;
  return {at::mul(batch_first(a).unsqueeze(-1), batch_first(b).unsqueeze(-2)),
          batched ? std::optional<int64_t>(0) : std::nullopt};
}

// Unlike the others, addr refuses what it would have to round.
void check_addr_factors(const Batched& product, const at::Scalar& beta, const at::Scalar& alpha,
                        const char* op) {
  const at::ScalarType dtype = product.value.scalar_type();
  if (!at::isIntegralType(dtype, /*includeBool=*/true)) return;
  for (const at::Scalar& factor : {beta, alpha}) {
    TORCH_CHECK(!factor.isFloatingPoint() && !factor.isComplex(), "[vmap] ", op,
                ": the tensors are of dtype ", dtype,
                ", so beta and alpha must be integers, but one", " of them is ", factor,
                ". Convert the tensors (.to(torch.float)) first.");
    TORCH_CHECK(!factor.isBoolean() || dtype == at::kBool, "[vmap] ", op,
                ": a bool as beta or alpha needs bool tensors, but these are of dtype ", dtype,
                ".");
  }
}

Batched addr_rule(BatchedArg self, BatchedArg a, BatchedArg b, const at::Scalar& beta,
                  const at::Scalar& alpha) {
  const Batched product = outer_product(a, b, "addr");
  check_addr_factors(product, beta, alpha, "addr");
  return add_to(self, product, beta, alpha);
}

void addr_in_place(BatchedArg self, BatchedArg a, BatchedArg b, const at::Scalar& beta,
                   const at::Scalar& alpha) {
  const Batched product = outer_product(a, b, "addr_");
  check_addr_factors(product, beta, alpha, "addr_");
  add_into(self, product, beta, alpha);
}

// --- bilinear ------------------------------------------------------------------------------------

std::vector<int64_t> shifted(at::IntArrayRef dims, int64_t rank) {
  std::vector<int64_t> out;
  for (const int64_t dim : dims) out.push_back(wrap_dim(dim, rank) + 1);
  return out;
}

Batched trilinear_rule(const Level& level, BatchedArg a, BatchedArg b, BatchedArg c,
                       at::IntArrayRef expand_a, at::IntArrayRef expand_b, at::IntArrayRef expand_c,
                       at::IntArrayRef sum_dims, int64_t unroll_dim) {
  const int64_t rank = a.logical_dim() + static_cast<int64_t>(expand_a.size());
  return {at::_trilinear(expanded(a, level.size()), expanded(b, level.size()),
                         expanded(c, level.size()), shifted(expand_a, rank),
                         shifted(expand_b, rank), shifted(expand_c, rank), shifted(sum_dims, rank),
                         wrap_dim(unroll_dim, rank) + 1),
          0};
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::addmm, &addmm_rule>(),          rule<ops::_sparse_addmm, &addmm_rule>(),
    rule<ops::addmm_, &addmm_in_place>(),     rule<ops::baddbmm, &baddbmm_rule>(),
    rule<ops::baddbmm_, &baddbmm_in_place>(), rule<ops::addbmm, &addbmm_rule>(),
    rule<ops::addbmm_, &addbmm_in_place>(),   rule<ops::addmv, &addmv_rule>(),
    rule<ops::addmv_, &addmv_in_place>(),     rule<ops::addr, &addr_rule>(),
    rule<ops::addr_, &addr_in_place>(),       rule<ops::_trilinear, &trilinear_rule>(),
};

}  // namespace
}  // namespace torchlift
