// Forward mode of factorizations whose formula libtorch lacks, or has for one order only.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_sparse_addmm_ops.h>
#include <ATen/ops/_sparse_coo_tensor_with_dims_and_tensors_ops.h>
#include <ATen/ops/_to_sparse_bsc_ops.h>
#include <ATen/ops/_to_sparse_bsr_ops.h>
#include <ATen/ops/_to_sparse_csc_ops.h>
#include <ATen/ops/_to_sparse_csr_ops.h>
#include <ATen/ops/_to_sparse_ops.h>
#include <ATen/ops/cholesky_inverse_ops.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_householder_product_ops.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ormqr_ops.h>
#include <ATen/ops/triangular_solve_ops.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "autodiff/forward_kernels.h"
#include "autodiff/forward_pass.h"
#include "batching/sparse_results.h"
#include "core/tensor_operators.h"

namespace torchlift::forward_internal {
namespace {

namespace ops = at::_ops;
using at::Tensor;

// --- products of Householder reflectors ----------------------------------------------------------
//
// LAPACK keeps Q = H_1 H_2 ... H_k, H_i = 1 - tau_i v_i v_i^H, as the columns v_i below the
// diagonal of a matrix, with a one on the diagonal. (LAPACK Users' Guide, "Orthogonal
// Factorizations")

class Reflectors {
 public:
  Reflectors(const Tensor& columns, const Tensor& tau) : tau_(tau) {
    const int64_t rows = columns.size(-2), count = tau.size(-1);
    const Tensor ones = at::eye(rows, count, columns.options());
    vectors_ = columns.narrow(-1, 0, count).tril(-1) + ones;
  }

  int64_t count() const { return tau_.size(-1); }

  // H_i m, or H_i^H m
  Tensor from_left(int64_t i, bool adjoint, const Tensor& m) const {
    const Tensor v = vectors_.narrow(-1, i, 1);
    return m - tau(i, adjoint) * v.matmul(v.mH().matmul(m));
  }

  // m H_i, or m H_i^H
  Tensor from_right(int64_t i, bool adjoint, const Tensor& m) const {
    const Tensor v = vectors_.narrow(-1, i, 1);
    return m - tau(i, adjoint) * m.matmul(v).matmul(v.mH());
  }

 private:
  Tensor tau(int64_t i, bool adjoint) const {
    const Tensor factor = tau_.narrow(-1, i, 1).unsqueeze(-1);
    return adjoint ? factor.conj() : factor;
  }

  Tensor tau_;
  Tensor vectors_;
};

// The first columns of Q.
Tensor householder_product(const Tensor& input, const Tensor& tau) {
  const Reflectors reflectors(input, tau);
  Tensor q = at::eye(input.size(-2), input.size(-1), input.options()).expand(input.sizes());
  for (int64_t i = reflectors.count() - 1; i >= 0; --i) q = reflectors.from_left(i, false, q);
  return q;
}

// Q m, Q^H m, m Q or m Q^H.
Tensor ormqr(const Tensor& input, const Tensor& tau, const Tensor& other, bool left,
             bool transpose) {
  const Reflectors reflectors(input, tau);
  Tensor m = other;
  // Q m starts with the last reflector, as does m Q^H.
  const bool last_first = left != transpose;
  for (int64_t step = 0; step < reflectors.count(); ++step) {
    const int64_t i = last_first ? reflectors.count() - 1 - step : step;
    m = left ? reflectors.from_left(i, transpose, m) : reflectors.from_right(i, transpose, m);
  }
  return m;
}

// --- triangular matrices -------------------------------------------------------------------------

// (L L^H)^-1 = X^H X with X = L^-1; or (U^H U)^-1 = X X^H.
Tensor cholesky_inverse(const Tensor& self, bool upper) {
  const Tensor identity = at::eye(self.size(-1), self.options()).expand(self.sizes());
  const Tensor inverse = at::linalg_solve_triangular(self, identity, upper);
  return upper ? inverse.matmul(inverse.mH()) : inverse.mH().matmul(inverse);
}

// The matrix comes back as it is, and is an output to autograd too.
std::tuple<Tensor, Tensor> triangular_solve(const Tensor& self, const Tensor& a, bool upper,
                                            bool transpose, bool unitriangular) {
  const Tensor matrix = transpose ? a.mT() : a;
  Tensor solution = at::linalg_solve_triangular(matrix, self, transpose ? !upper : upper,
                                                /*left=*/true, unitriangular);
  std::vector<int64_t> sizes(solution.sizes().begin(), solution.sizes().end() - 2);
  sizes.insert(sizes.end(), a.sizes().end() - 2, a.sizes().end());
  return {std::move(solution), a.expand(sizes).clone()};
}

// --- sparse tensors ------------------------------------------------------------------------------
//
// libtorch's have no tangents: what has one stays dense.

Tensor to_sparse(const Tensor& self, std::optional<at::Layout> /*layout*/,
                 at::OptionalIntArrayRef /*blocksize*/, std::optional<int64_t> /*dense_dim*/) {
  return self.clone();
}

Tensor to_sparse_dims(const Tensor& self, int64_t /*sparse_dim*/) { return self.clone(); }

Tensor to_sparse_rows(const Tensor& self, std::optional<int64_t> /*dense_dim*/) {
  return self.clone();
}

Tensor to_sparse_blocks(const Tensor& self, at::IntArrayRef /*blocksize*/,
                        std::optional<int64_t> /*dense_dim*/) {
  return self.clone();
}

Tensor sparse_coo(int64_t sparse_dim, int64_t /*dense_dim*/, c10::SymIntArrayRef size,
                  const Tensor& indices, const Tensor& values, std::optional<at::ScalarType> dtype,
                  std::optional<at::Layout> /*layout*/, std::optional<at::Device> /*device*/,
                  std::optional<bool> /*pin_memory*/, std::optional<bool> /*is_coalesced*/) {
  return dense_coo(sparse_dim, size, indices, values, dtype);
}

// --- products with a sparse matrix ---------------------------------------------------------------

// beta self + alpha mat1 mat2
Tensor sparse_addmm(const Tensor& self, const Tensor& mat1, const Tensor& mat2,
                    const at::Scalar& beta, const at::Scalar& alpha) {
  const Tensor product = at::mm(mat1, mat2).mul(alpha);
  return beta.equal(0) ? product : self.mul(beta).add(product);
}

}  // namespace

std::vector<ForwardKernel> linalg_formulas() {
  std::vector<ForwardKernel> kernels;
  kernels.push_back(made<ops::linalg_householder_product, &householder_product>());
  kernels.push_back(made<ops::ormqr, &ormqr>());
  kernels.push_back(made<ops::_sparse_addmm, &sparse_addmm>());
  kernels.push_back(made<ops::_sparse_coo_tensor_with_dims_and_tensors, &sparse_coo>());
  kernels.push_back(made<ops::_to_sparse, &to_sparse>());
  kernels.push_back(made<ops::_to_sparse_sparse_dim, &to_sparse_dims>());
  kernels.push_back(made<ops::_to_sparse_csr, &to_sparse_rows>());
  kernels.push_back(made<ops::_to_sparse_csc, &to_sparse_rows>());
  kernels.push_back(made<ops::_to_sparse_bsr, &to_sparse_blocks>());
  kernels.push_back(made<ops::_to_sparse_bsc, &to_sparse_blocks>());
  kernels.push_back(made<ops::cholesky_inverse, &cholesky_inverse>());
  kernels.push_back(made<ops::triangular_solve, &triangular_solve>());
  return kernels;
}

}  // namespace torchlift::forward_internal
