// Products of matrices, convolutions, and what solves linear equations.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>

#include "autodiff/dependence_rules.h"
#include "core/lifted_tensor.h"

namespace torchlift {
namespace {

using at::Tensor;

// --- products of matrices ------------------------------------------------------------------------

// 1 where a factor is not zero, as numbers to multiply masks with: everywhere if it is unknown.
// Sparse factors are COO.
Tensor weights(const DependenceCall& call, const Tensor& t) {
  const Tensor value = lower(t, *call.level()).value;
  if (call.unknown(t)) return at::ones(t.sizes(), value.options().dtype(at::kFloat));
  return nonzeros(value).to(at::kFloat);
}

Tensor numbers(const Tensor& mask) { return mask.to(at::kFloat); }

// [n, k] times [inputs, k, m], the former sparse: one product for all inputs.
Tensor sparse_times(const Tensor& left, const Tensor& masks) {
  const int64_t inputs = masks.size(0), k = masks.size(1), m = masks.size(2);
  const Tensor columns = masks.permute({1, 0, 2}).reshape({k, inputs * m});
  return at::mm(left, columns).view({left.size(0), inputs, m}).permute({1, 0, 2});
}

// [inputs, ..., n, k] times [..., k, m] or [k].
Tensor times(const Tensor& masks, const Tensor& right) {
  if (right.layout() == at::kStrided) return at::matmul(masks, right);
  const Tensor rows = masks.reshape({1, -1, masks.size(-1)}).transpose(1, 2);
  const Tensor out = sparse_times(right.t(), rows).transpose(1, 2);
  std::vector<int64_t> sizes = masks.sizes().vec();
  sizes.back() = right.size(1);
  return out.reshape(sizes);
}

// The other way around: [..., n, k] (or [k], or a sparse [n, k]) times [inputs, ..., k, m] or
// [inputs, k].
Tensor times_masks(const Tensor& left, const Tensor& masks, bool is_vector) {
  if (left.layout() != at::kStrided) {
    return is_vector ? sparse_times(left, masks.unsqueeze(2)).squeeze(2)
                     : sparse_times(left, masks);
  }
  if (!is_vector) return at::matmul(left, masks);
  return at::matmul(masks, left.dim() == 1 ? left : left.transpose(-1, -2));
}

Tensor product_of(const DependenceCall& call, const Tensor& a, const Tensor& b) {
  const Tensor left = call.mask(a), right = call.mask(b);
  Tensor all;
  if (left.defined()) all = times(numbers(left), weights(call, b)).ne(0);
  if (right.defined()) {
    all = either(all, times_masks(weights(call, a), numbers(right), b.dim() == 1).ne(0));
  }
  return all;
}

// The factors of each operator.
struct Factors {
  const char* left;
  const char* right;
};

Factors factors_of(const DependenceCall& call) {
  static constexpr Factors kNames[] = {{"self", "mat2"},     {"self", "vec"},  {"self", "tensor"},
                                       {"self", "other"},    {"mat1", "mat2"}, {"mat", "vec"},
                                       {"batch1", "batch2"}, {"vec1", "vec2"}};
  for (const Factors& names : kNames) {
    const bool adds = call.op().schema().name().find("add") != std::string::npos;
    if (adds && names.left == std::string("self")) continue;
    if (call.find(names.left) != nullptr && call.find(names.right) != nullptr) return names;
  }
  TORCH_INTERNAL_ASSERT(false, "no factors of ", call.op().schema().name());
}

bool is_zero(const DependenceCall& call, const char* name) {
  const c10::IValue* scalar = call.find(name);
  return scalar != nullptr && scalar->isScalar() && scalar->toScalar().equal(0);
}

Tensor product(const DependenceCall& call, const Tensor& /*like*/, size_t /*result*/) {
  const Factors names = factors_of(call);
  return product_of(call, call.tensor(names.left), call.tensor(names.right));
}

// beta * self + alpha * product
Tensor add_product(const DependenceCall& call, const Tensor& like, size_t /*result*/) {
  const Factors names = factors_of(call);
  const Tensor a = call.tensor(names.left), b = call.tensor(names.right);
  Tensor added;
  if (!is_zero(call, "alpha")) {
    if (a.dim() == 1) {  // addr
      const Tensor rows = call.mask(a), columns = call.mask(b);
      if (rows.defined()) {
        added = at::logical_and(rows.unsqueeze(2), weights(call, b).ne(0).unsqueeze(0));
      }
      if (columns.defined()) {
        const Tensor left = weights(call, a).ne(0).unsqueeze(1);
        added = either(added, at::logical_and(left, columns.unsqueeze(1)));
      }
    } else {
      added = product_of(call, a, b);
      const bool sums = added.defined() && added.dim() == like.dim() + 2;  // addbmm
      if (sums) added = added.any(1);
    }
  }
  return is_zero(call, "beta") ? added : either(align(call.mask("self"), like.dim()), added);
}

// --- convolutions --------------------------------------------------------------------------------

std::vector<int64_t> ints(const DependenceCall& call, const char* name) {
  return call.find(name)->toIntVector();
}

// [inputs, channels] at the channels' dim of a tensor of that rank.
Tensor at_channel(const Tensor& mask, int64_t dim, int64_t rank) {
  if (!mask.defined()) return {};
  std::vector<int64_t> sizes(rank + 1, 1);
  sizes[0] = mask.size(0);
  sizes[dim + 1] = mask.size(1);
  return mask.reshape(sizes);
}

// Any along all dims but one: [inputs, size of that one].
Tensor any_but(const Tensor& mask, int64_t dim) {
  if (!mask.defined()) return {};
  const Tensor rows = mask.movedim(dim + 1, 1);
  return rows.dim() == 2 ? rows : rows.flatten(2).any(2);
}

// The examples of all inputs as one batch.
Tensor folded(const Tensor& mask) { return numbers(mask).flatten(0, 1); }

Tensor unfolded(const Tensor& folded, int64_t inputs) {
  std::vector<int64_t> sizes{inputs, folded.size(0) / inputs};
  const auto rest = folded.sizes().slice(1);
  sizes.insert(sizes.end(), rest.begin(), rest.end());
  return folded.reshape(sizes).ne(0);
}

Tensor convolution(const DependenceCall& call, const Tensor& like, size_t /*result*/) {
  const Tensor weight = call.tensor("weight");
  const bool transposed = call.find("transposed")->toBool();
  Tensor all = at_channel(call.mask("bias"), 1, like.dim());
  const Tensor of_weight = call.mask(weight);
  if (of_weight.defined()) {
    all = either(all, transposed ? any_element(of_weight, like.dim())
                                 : at_channel(any_but(of_weight, 0), 1, like.dim()));
  }
  const Tensor of_input = call.mask("input");
  if (!of_input.defined()) return all;
  const Tensor out = at::convolution(
      folded(of_input), weights(call, weight), {}, ints(call, "stride"), ints(call, "padding"),
      ints(call, "dilation"), transposed, ints(call, "output_padding"), call.integer("groups", 1));
  return either(all, unfolded(out, call.inputs()));
}

Tensor gradient_of_input(const DependenceCall& call, const Tensor& like) {
  const Tensor weight = call.tensor("weight");
  const bool transposed = call.find("transposed")->toBool();
  const int64_t groups = call.integer("groups", 1);
  const Tensor of_weight = call.mask(weight);
  Tensor all;
  if (of_weight.defined()) {
    const bool by_channel = groups == 1 && !transposed;
    all = by_channel ? at_channel(any_but(of_weight, 1), 1, like.dim())
                     : any_element(of_weight, like.dim());
  }
  const Tensor of_output = call.mask("grad_output");
  if (!of_output.defined()) return all;
  std::vector<int64_t> sizes = like.sizes().vec();
  sizes[0] *= call.inputs();
  const Tensor rows = folded(of_output);
  const Tensor input = at::ones({1}, rows.options()).expand(sizes);
  const Tensor gradient = std::get<0>(at::convolution_backward(
      rows, input, weights(call, weight), at::OptionalIntArrayRef(), ints(call, "stride"),
      ints(call, "padding"), ints(call, "dilation"), transposed, ints(call, "output_padding"),
      groups, {true, false, false}));
  return either(all, unfolded(gradient, call.inputs()));
}

Tensor gradient_of_weight(const DependenceCall& call, const Tensor& like) {
  const bool simple = call.integer("groups", 1) == 1 && !call.find("transposed")->toBool();
  const Tensor of_output = call.mask("grad_output"), of_input = call.mask("input");
  if (!simple) {
    return either(any_element(of_output, like.dim()), any_element(of_input, like.dim()));
  }
  return either(at_channel(any_but(of_output, 1), 0, like.dim()),
                at_channel(any_but(of_input, 1), 1, like.dim()));
}

Tensor convolution_backward(const DependenceCall& call, const Tensor& like, size_t result) {
  if (result == 0) return gradient_of_input(call, like);
  if (result == 1) return gradient_of_weight(call, like);
  return any_but(call.mask("grad_output"), 1);
}

// --- matrices as a whole -------------------------------------------------------------------------

// Each matrix of a batch, or what is computed of it, on all of its elements.
Tensor matrixwise(const DependenceCall& call, const Tensor& like, size_t /*result*/) {
  Tensor all;
  for (const Tensor& t : call.tensors()) {
    const Tensor mask = call.mask(t);
    if (!mask.defined() || t.dim() < 2) {
      all = either(all, any_element(mask, like.dim()));
      continue;
    }
    std::vector<int64_t> sizes = mask.sizes().vec();
    sizes.resize(sizes.size() - 2);
    sizes.resize(like.dim() + 1, 1);
    all = either(all, mask.flatten(-2).any(-1).reshape(sizes));
  }
  return all;
}

// X with A X = B (or X A = B): each column (row) on that of B and all of A.
Tensor solution(const DependenceCall& call, const Tensor& like, size_t result) {
  const Tensor right = call.tensor("B");
  const Tensor matrix = call.tensor(call.find("A") != nullptr ? "A" : "self");
  if (result > 0 || right.dim() != matrix.dim() || like.dim() != right.dim()) {
    return dense(call, like, result);
  }
  const c10::IValue* left = call.find("left");
  const bool columns = left == nullptr || left->toBool();
  return either(any_along(call.mask(matrix), {-2, -1}),
                any_along(call.mask(right), {columns ? -2 : -1}));
}

// Distances between the rows of x1 and those of x2.
Tensor distances(const DependenceCall& call, const Tensor& like, size_t /*result*/) {
  Tensor of_rows = any_along(call.mask("x1"), {-1});
  Tensor of_columns = any_along(call.mask("x2"), {-1});
  if (of_columns.defined()) of_columns = of_columns.transpose(-1, -2);
  return either(align(of_rows, like.dim()), align(of_columns, like.dim()));
}

}  // namespace

const DependenceRows& product_dependence() {
  using Kind = DependenceKind;
  static const auto* rows = [] {
    auto* all = new DependenceRows{
        {"convolution", Kind::kRule, &convolution},
        {"convolution_backward", Kind::kRule, &convolution_backward},
        {"_linalg_solve_ex", Kind::kRule, &solution},
        {"linalg_solve_triangular", Kind::kRule, &solution},
        {"_cdist_forward", Kind::kRule, &distances},
    };
    for (const char* name : {"mm", "bmm", "mv", "dot", "vdot"}) {
      all->push_back({name, Kind::kRule, &product});
    }
    for (const char* name :
         {"addmm", "addmv", "addbmm", "baddbmm", "addr", "_sparse_addmm", "sparse_addmm"}) {
      all->push_back({name, Kind::kRule, &add_product});
    }
    for (const char* name :
         {"linalg_inv_ex", "_linalg_det", "_linalg_slogdet", "linalg_cholesky_ex", "_linalg_eigh",
          "linalg_qr", "_linalg_svd", "linalg_lu_factor_ex", "linalg_matrix_exp", "linalg_eig",
          "cholesky_inverse"}) {
      all->push_back({name, Kind::kRule, &matrixwise});
    }
    return all;
  }();
  return *rows;
}

}  // namespace torchlift
