#include "batching/rules/narrow_softmax.h"

#include <ATen/ops/_log_softmax.h>
#include <ATen/ops/_log_softmax_backward_data.h>
#include <ATen/ops/_softmax.h>
#include <ATen/ops/_softmax_backward_data.h>

#include "core/lifted_tensor.h"

namespace torchlift {
namespace {

// A vector of AVX-512; and from how many rows on the copies cost less than they save. Measured.
constexpr int64_t kVectorBytes = 64;
constexpr int64_t kManyRows = 128;
// As many rows as are laid out as columns at a time: their columns, and themselves, stay in the
// fastest cache.
constexpr int64_t kBlockRows = 256;

// Operators on values of another vmap come to the rules of its level, with the sizes that count.
bool is_narrow(const at::Tensor& x, int64_t dim) {
  if (x.dim() == 0 || (dim != -1 && dim != x.dim() - 1)) return false;
  if (!x.is_cpu() || (x.scalar_type() != at::kFloat && x.scalar_type() != at::kDouble))
    return false;
  const int64_t columns = x.size(-1);
  return columns > 1 && columns * static_cast<int64_t>(x.element_size()) < kVectorBytes &&
         x.numel() >= kManyRows * columns && x.is_contiguous() && as_lifted(x) == nullptr;
}

// [..., C] -> [blocks, C, rows of a block]; one block if there is a rest.
at::Tensor as_columns(const at::Tensor& x) {
  const int64_t columns = x.size(-1), rows = x.numel() / columns;
  const int64_t block = rows % kBlockRows == 0 ? kBlockRows : rows;
  return x.reshape({rows / block, block, columns}).mT().contiguous();
}

at::Tensor as_rows(const at::Tensor& columns, at::IntArrayRef sizes) {
  return columns.mT().contiguous().view(sizes);
}

template <class F>
at::Tensor along(const at::Tensor& x, int64_t dim, const F& softmax) {
  if (!is_narrow(x, dim)) return softmax(x, dim);
  return as_rows(softmax(as_columns(x), 1), x.sizes());
}

template <class F>
at::Tensor backward_along(const at::Tensor& grad, const at::Tensor& output, int64_t dim,
                          const F& backward) {
  if (!is_narrow(output, dim) || as_lifted(grad) != nullptr) return backward(grad, output, dim);
  return as_rows(backward(as_columns(grad), as_columns(output), 1), output.sizes());
}

}  // namespace

at::Tensor softmax_along(const at::Tensor& x, int64_t dim, bool half_to_float) {
  return along(x, dim,
               [&](const at::Tensor& t, int64_t d) { return at::_softmax(t, d, half_to_float); });
}

at::Tensor log_softmax_along(const at::Tensor& x, int64_t dim, bool half_to_float) {
  return along(x, dim, [&](const at::Tensor& t, int64_t d) {
    return at::_log_softmax(t, d, half_to_float);
  });
}

at::Tensor softmax_backward_along(const at::Tensor& grad, const at::Tensor& output, int64_t dim,
                                  at::ScalarType input_dtype) {
  return backward_along(grad, output, dim,
                        [&](const at::Tensor& g, const at::Tensor& out, int64_t d) {
                          return at::_softmax_backward_data(g, out, d, input_dtype);
                        });
}

at::Tensor log_softmax_backward_along(const at::Tensor& grad, const at::Tensor& output, int64_t dim,
                                      at::ScalarType input_dtype) {
  return backward_along(grad, output, dim,
                        [&](const at::Tensor& g, const at::Tensor& out, int64_t d) {
                          return at::_log_softmax_backward_data(g, out, d, input_dtype);
                        });
}

}  // namespace torchlift
