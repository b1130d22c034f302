#include "nn_functional/linearized.h"

#include <ATen/ops/einsum.h>
#include <ATen/ops/eye.h>

#include <string_view>

#include "core/error.h"
#include "core/tensor_operators.h"

namespace torchlift::linearized_internal {
namespace {

std::string_view formula_of(NtkKind kind) {
  switch (kind) {
    case NtkKind::kDiagonal:
      return "nkp,mkp->nmk";
    case NtkKind::kTrace:
      return "nkp,mkp->nm";
    case NtkKind::kFull:
      break;
  }
  return "nkp,mlp->nmkl";
}

}  // namespace

at::Tensor basis_of(const at::Tensor& output) {
  return at::eye(output.numel(), at::TensorOptions(output.device()).dtype(output.scalar_type()));
}

Leaves flat_rows(const Leaves& rows, int64_t outputs) {
  Leaves flat;
  for (const at::Tensor& row : rows) {
    const int64_t parameters = outputs == 0 ? 0 : row.numel() / outputs;
    flat.push_back(row.reshape({outputs, parameters}));
  }
  return flat;
}

at::Tensor contract(const Leaves& first, const Leaves& second, NtkKind kind) {
  if (first.empty()) transform_error("empirical_ntk", "got no parameters.");
  at::Tensor total;
  for (size_t i = 0; i < first.size(); ++i) {
    const at::Tensor part = at::einsum(formula_of(kind), {first[i], second[i]});
    total = total.defined() ? total + part : part;
  }
  return total;
}

Leaves diagonals(const Leaves& jacobian, const at::Tensor& hessian) {
  Leaves found;
  for (const at::Tensor& j : jacobian) {
    found.push_back(at::einsum("kp,kl,lp->p", {j, hessian, j}));
  }
  return found;
}

Leaves means(const char* transform, const Leaves& rows, const Leaves& like) {
  Leaves found;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].size(0) == 0) {
      transform_error(transform, "the batch has no examples, so there is no mean over them.");
    }
    found.push_back(rows[i].mean(0).reshape(like[i].sizes()));
  }
  return found;
}

}  // namespace torchlift::linearized_internal
