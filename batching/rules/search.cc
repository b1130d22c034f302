// Membership, and places of what is not zero, in a number given beforehand.

#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isin.h>
#include <ATen/ops/isin_ops.h>
#include <ATen/ops/nonzero_static_ops.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <vector>

#include "batching/rules/dims.h"
#include "core/registry.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;

// --- isin ----------------------------------------------------------------------------------------

// B..., BT -> B...T, reduced over T.
Batched isin_rule(BatchedArg elements, BatchedArg tests, bool assume_unique, bool invert) {
  if (!tests.bdim) {
    return {at::isin(elements.value, tests.value, assume_unique, invert), elements.bdim};
  }
  const int64_t size = tests.value.size(*tests.bdim);
  const at::Tensor all = expanded(elements, size);
  c10::SmallVector<int64_t, 8> sizes{size};
  sizes.append(static_cast<size_t>(all.dim() - 1), 1);
  const int64_t numel = size == 0 ? 0 : tests.value.numel() / size;
  sizes.push_back(numel);
  const at::Tensor against = batch_first(tests).reshape(sizes);
  const at::Tensor found = all.unsqueeze(-1).eq(against).any(-1);
  return {invert ? found.logical_not() : found, 0};
}

Batched isin_number_rule(BatchedArg elements, const at::Scalar& test, bool assume_unique,
                         bool invert) {
  return {at::isin(elements.value, test, assume_unique, invert), elements.bdim};
}

Batched number_isin_rule(const at::Scalar& element, BatchedArg tests, bool /*assume_unique*/,
                         bool invert) {
  const at::Tensor rows = batch_first(tests);
  const at::Tensor same = rows.eq(element);
  const at::Tensor found = same.dim() == 1 ? same : same.flatten(1).any(1);
  return {invert ? found.logical_not() : found, 0};
}

// --- nonzero_static: B... -> B(size)(rank)
// --------------------------------------------------------

// A stable sort of "is zero" has the places in front, in their order.
Batched nonzero_static_rule(BatchedArg self, int64_t size, int64_t fill_value) {
  TORCH_CHECK(size >= 0, "nonzero_static: 'size' must be an non-negative integer");
  const auto sizes = logical_sizes(self);
  const int64_t numel = c10::multiply_integers(sizes);
  const int64_t batch = self.value.size(*self.bdim);
  const at::Tensor is_zero = batch_first(self).reshape({batch, numel}).eq(0);
  const at::Tensor order =
      std::get<1>(is_zero.sort(/*stable=*/true, 1, false)).narrow(1, 0, std::min(size, numel));
  const auto options = order.options();
  const at::Tensor places =
      at::cat({order, at::full({batch, std::max<int64_t>(size - numel, 0)}, 0, options)}, 1);
  const at::Tensor found = is_zero.logical_not().sum(1, /*keepdim=*/true);
  const at::Tensor valid = at::arange(size, options).lt(found);
  std::vector<at::Tensor> coordinates;
  int64_t stride = numel;
  for (const int64_t dim : sizes) {
    stride = dim == 0 ? 0 : stride / dim;
    const at::Tensor along =
        stride == 0 || dim == 0 ? places : places.floor_divide(stride).remainder(dim);
    coordinates.push_back(at::where(valid, along, at::full({}, fill_value, options)));
  }
  if (coordinates.empty()) return {at::full({batch, size, 0}, fill_value, options), 0};
  return {at::stack(coordinates, -1), 0};
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::isin_Tensor_Tensor, &isin_rule>(),
    rule<ops::isin_Tensor_Scalar, &isin_number_rule>(),
    rule<ops::isin_Scalar_Tensor, &number_isin_rule>(),
    rule<ops::nonzero_static, &nonzero_static_rule>(),
};

}  // namespace
}  // namespace torchlift
