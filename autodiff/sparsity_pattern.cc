#include "autodiff/sparsity_pattern.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sparse_csr_tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "autodiff/dependence.h"
#include "autodiff/jacobian_rows.h"
#include "autodiff/scalar_gradient.h"
#include "core/error.h"
#include "core/lifted_tensor.h"

namespace torchlift {
namespace {

using Tensors = std::vector<at::Tensor>;

constexpr const char* kSparsity = "sparsity";
// Elements of the masks of one tensor of the inputs' size.
constexpr int64_t kMaskElements = int64_t{1} << 22;

std::vector<std::string>& last_dense_operators() {
  static thread_local std::vector<std::string> names;
  return names;
}

void check_real(const char* what, size_t index, const at::Tensor& t) {
  if (t.defined() && t.is_floating_point()) return;
  transform_error(kSparsity, what, " ", index, " of the function ",
                  t.defined() ? c10::str("has dtype ", t.scalar_type(), " (shape ", t.sizes(), ")")
                              : std::string("is undefined"),
                  ", but a sparsity pattern is one of real floating-point tensors. Convert it, or "
                  "take the real view of complex numbers (torch.view_as_real).");
}

// The mask of one result, flat: [count, numel], bool; undefined if it depends on nothing.
at::Tensor mask_of(const at::Tensor& t, const Level& level) {
  const Lowered lowered = lower(t, level);
  if (!lowered.bdim.has_value()) return {};
  at::Tensor mask = lowered.value.movedim(*lowered.bdim, 0).ne(0);
  mask = mask.dim() == 1 ? mask.unsqueeze(1) : mask.flatten(1);
  // Of whatever example of the levels around.
  while (const LiftedTensorImpl* impl = as_lifted(mask)) {
    mask = impl->bdim() ? impl->value().any(*impl->bdim()) : at::Tensor(impl->value());
  }
  return mask;
}

int64_t chunk_for(const PatternOptions& options, int64_t total) {
  if (options.chunk_size.has_value()) {
    if (*options.chunk_size < 1) {
      transform_error(kSparsity, "chunk_size must be at least 1, got ", *options.chunk_size, ".");
    }
    return *options.chunk_size;
  }
  return std::clamp<int64_t>(kMaskElements / std::max<int64_t>(total, 1), 1, 4096);
}

// The places of the nonzeros, and how many rows there are.
struct Places {
  Tensors rows, columns;
  int64_t height = 0;
};

// Propagates inputs [start, start + count).
void propagate(const std::shared_ptr<Dependence>& dependence, LeafFunction f, const Tensors& inputs,
               int64_t start, int64_t count, Places& places) {
  // Of no level, and unseen by those around.
  Tensors masks;
  {
    const RuleDepthScope plain(1);
    int64_t offset = 0;
    for (const at::Tensor& input : inputs) {
      at::Tensor mask = basis_rows(input, offset, start, count);
      if (!mask.defined()) mask = at::zeros(joined({count}, input.sizes()), input.options());
      masks.push_back(std::move(mask));
      offset += input.numel();
    }
  }
  const c10::AutoGradMode recorded(true);
  const LevelScope scope(
      {.kind = LevelKind::kInterpreted, .size = count, .interpreter = dependence});
  Tensors leaves;
  for (at::Tensor& mask : masks) leaves.push_back(lift(std::move(mask), 0, scope.level()));
  const LeafOutputs out = f(leaves);
  if (out.values == 0) {
    transform_error(kSparsity, "the function returned no tensor. Return at least one.");
  }
  int64_t offset = 0;
  for (size_t i = 0; i < out.values; ++i) {
    check_real("output", i, out.leaves[i]);
    const at::Tensor mask = mask_of(out.leaves[i], *scope.level());
    if (mask.defined()) {
      const RuleDepthScope plain(1);
      const at::Tensor found = mask.nonzero();
      places.columns.push_back(found.select(1, 0).add(start));
      places.rows.push_back(found.select(1, 1).add(offset));
    }
    offset += out.leaves[i].numel();
  }
  places.height = offset;
}

// CSR of places that may come in any order, each at most once.
at::Tensor csr_of(const Places& places, int64_t width) {
  const auto options = at::TensorOptions().dtype(at::kLong);
  at::Tensor rows = at::empty({0}, options), columns = at::empty({0}, options);
  if (!places.rows.empty()) {
    rows = at::cat(places.rows).cpu();
    columns = at::cat(places.columns).cpu();
  }
  const at::Tensor key = std::get<0>(rows.mul(std::max<int64_t>(width, 1)).add(columns).sort());
  const at::Tensor row = key.div(std::max<int64_t>(width, 1), "floor");
  const at::Tensor counts = row.bincount({}, places.height);
  at::Tensor starts = at::zeros({places.height + 1}, options);
  starts.narrow(0, 1, places.height).copy_(counts.cumsum(0));
  return at::sparse_csr_tensor(starts, key.sub(row.mul(std::max<int64_t>(width, 1))),
                               at::ones({key.size(0)}, options.dtype(at::kBool)),
                               {places.height, width}, options.dtype(at::kBool));
}

}  // namespace

at::Tensor jacobian_pattern(LeafFunction f, const Tensors& inputs, const PatternOptions& options) {
  for (size_t i = 0; i < inputs.size(); ++i) check_real("input", i, inputs[i]);
  const int64_t width = total_numel(inputs, inputs.size());
  const int64_t chunk = chunk_for(options, width);
  const auto dependence = std::make_shared<Dependence>();
  Places places;
  // With no inputs, once, for the shapes.
  for (int64_t start = 0; start == 0 || start < width; start += chunk) {
    propagate(dependence, f, inputs, start, std::min(chunk, width - start), places);
  }
  last_dense_operators() = dependence->dense_operators();
  const RuleDepthScope plain(1);
  return csr_of(places, width);
}

namespace {

// Both of (i, j) and (j, i): a Hessian is symmetric, so where only one is in the pattern of its
// rows, neither can be other than zero.
at::Tensor symmetric_part(const at::Tensor& pattern) {
  const at::Tensor coo = pattern.to_sparse().coalesce();
  const at::Tensor rows = coo.indices().select(0, 0), columns = coo.indices().select(0, 1);
  const int64_t width = std::max<int64_t>(pattern.size(1), 1);
  const at::Tensor keys = rows.mul(width).add(columns);
  const at::Tensor mirrored = std::get<0>(columns.mul(width).add(rows).sort());
  const at::Tensor place =
      at::searchsorted(mirrored, keys).clamp_max(std::max<int64_t>(mirrored.size(0) - 1, 0));
  const at::Tensor kept = mirrored.index_select(0, place).eq(keys);
  Places places;
  places.rows.push_back(rows.masked_select(kept));
  places.columns.push_back(columns.masked_select(kept));
  places.height = pattern.size(0);
  return csr_of(places, pattern.size(1));
}

}  // namespace

at::Tensor hessian_pattern(LeafFunction f, const Tensors& inputs, const PatternOptions& options) {
  const auto gradients = [&](const Tensors& leaves) {
    LeafOutputs out;
    Tensors result = scalar_gradient("hessian_sparsity", f, leaves, out);
    const size_t count = result.size();
    return LeafOutputs{std::move(result), count};
  };
  return symmetric_part(jacobian_pattern(gradients, inputs, options));
}

const std::vector<std::string>& dense_operators() { return last_dense_operators(); }

}  // namespace torchlift
