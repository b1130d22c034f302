#include "autodiff/hessian_blocks.h"

#include <ATen/ops/zeros.h>

#include <algorithm>
#include <utility>

#include "autodiff/jacobian_rows.h"
#include "autodiff/jet_scope.h"
#include "core/error.h"

namespace torchlift {
namespace {

using Tensors = std::vector<at::Tensor>;

// [D, D, ...value] -> [...value, ...a, ...b], of the numbers of inputs a and b, which begin at
// these among all.
at::Tensor block_of(const at::Tensor& seconds, const at::Tensor& a, int64_t a_start,
                    const at::Tensor& b, int64_t b_start) {
  const at::Tensor block =
      seconds.narrow(0, a_start, a.numel()).narrow(1, b_start, b.numel()).movedim({0, 1}, {-2, -1});
  return block.reshape(joined(joined(seconds.sizes().slice(2), a.sizes()), b.sizes()));
}

// A Hessian is the derivative of gradients, which have the dtype of the input; a series has that of
// the output, in which large second derivatives of a half-precision loss are infinite.
void check_of_one_dtype(const LeafOutputs& out, const Tensors& inputs) {
  for (size_t i = 0; i < out.values; ++i) {
    for (const at::Tensor& input : inputs) {
      if (!out.leaves[i].defined() || out.leaves[i].scalar_type() == input.scalar_type()) continue;
      unsupported_error("hessian", "an output in ", c10::toString(out.leaves[i].scalar_type()),
                        " of an input in ", c10::toString(input.scalar_type()),
                        " has no Hessian by Taylor mode.");
    }
  }
}

}  // namespace

bool takes_taylor_mode(const Tensors& inputs, const ChunkOptions& chunks, ComplexNumbers numbers) {
  const int64_t total = total_numel(inputs, inputs.size());
  const bool plain = !chunks.chunk_size.has_value() && !chunks.memory_budget.has_value() &&
                     numbers == ComplexNumbers::kRefuse;
  return plain && total > 0 && total <= kFewNumbers &&
         std::none_of(inputs.begin(), inputs.end(),
                      [](const at::Tensor& input) { return input.is_complex(); });
}

JacobianBlocks taylor_hessian(LeafFunction f, const Tensors& inputs) {
  const int64_t total = total_numel(inputs, inputs.size());
  const Tensors directions = basis_rows_of(inputs, 0, total);
  JetScope scope(JetScope::kHessian, total);
  Tensors arguments;
  for (size_t i = 0; i < inputs.size(); ++i) {
    arguments.push_back(directions[i].defined() ? scope.series(inputs[i], directions[i])
                                                : scope.constant(inputs[i]));
  }
  const LeafOutputs out = f(arguments);
  check_differentiable("jacrev", out, inputs);
  check_of_one_dtype(out, inputs);
  JacobianBlocks result;
  for (JetOutput& output : scope.finish(out.leaves)) {
    result.outputs.push_back(std::move(output.primal));
    if (result.outputs.size() > out.values) continue;
    const at::Tensor& value = result.outputs.back();
    if (!output.series.defined()) {
      output.series = at::zeros(joined({total, total}, value.sizes()), value.options());
    }
    int64_t a_start = 0;
    for (const at::Tensor& a : inputs) {
      Tensors row;
      int64_t b_start = 0;
      for (const at::Tensor& b : inputs) {
        row.push_back(block_of(output.series, a, a_start, b, b_start));
        b_start += b.numel();
      }
      result.blocks.push_back(std::move(row));
      a_start += a.numel();
    }
  }
  return result;
}

JacobianBlocks forward_over_reverse(LeafFunction f, const Tensors& inputs,
                                    const ChunkOptions& chunks, ComplexNumbers numbers) {
  const auto gradients = [&](const Tensors& leaves) {
    JacobianBlocks inner = reverse_jacobian(f, leaves, {}, numbers);
    LeafOutputs out;
    for (Tensors& row : inner.blocks) {
      for (at::Tensor& block : row) out.leaves.push_back(std::move(block));
    }
    out.values = out.leaves.size();
    for (at::Tensor& output : inner.outputs) out.leaves.push_back(std::move(output));
    return out;
  };
  JacobianBlocks hessian = forward_jacobian(gradients, inputs, chunks, numbers);
  // The caller knows the gradients' place by that of their derivatives.
  hessian.outputs.erase(hessian.outputs.begin(),
                        hessian.outputs.begin() + static_cast<int64_t>(hessian.blocks.size()));
  return hessian;
}

JacobianBlocks hessian_blocks(LeafFunction f, const Tensors& inputs, const ChunkOptions& chunks,
                              ComplexNumbers numbers) {
  if (takes_taylor_mode(inputs, chunks, numbers)) {
    try {
      return taylor_hessian(f, inputs);
    } catch (const UnsupportedError&) {  // NOLINT(bugprone-empty-catch): the other way, below.
    }
  }
  return forward_over_reverse(f, inputs, chunks, numbers);
}

}  // namespace torchlift
