#include "autodiff/jacobian_rows.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include "core/dispatch.h"

namespace torchlift {

std::vector<int64_t> joined(at::IntArrayRef a, at::IntArrayRef b) {
  std::vector<int64_t> sizes = a.vec();
  sizes.insert(sizes.end(), b.begin(), b.end());
  return sizes;
}

int64_t total_numel(const std::vector<at::Tensor>& tensors, size_t count) {
  int64_t total = 0;
  for (size_t i = 0; i < count; ++i) total += tensors[i].numel();
  return total;
}

c10::Device device_of(const std::vector<at::Tensor>& inputs) {
  return inputs.empty() ? c10::Device(c10::kCPU) : inputs[0].device();
}

at::Tensor basis_rows(const at::Tensor& like, int64_t offset, int64_t start, int64_t count) {
  const int64_t numel = like.numel();
  if (start >= offset + numel || start + count <= offset) return {};
  const auto options = like.options();
  const std::vector<int64_t> shape = joined({count}, like.sizes());
  if (numel == 1 && count == 1) return at::ones(shape, options);
  at::Tensor rows;
  if (start == offset && count == numel) {
    rows = at::eye(numel, options);
  } else {
    rows = at::zeros({count, numel}, options);
    rows.diagonal(start - offset).fill_(1);
  }
  return like.dim() == 1 ? rows : rows.view(shape);
}

std::vector<at::Tensor> basis_rows_of(const std::vector<at::Tensor>& tensors, int64_t start,
                                      int64_t count) {
  std::vector<at::Tensor> rows;
  int64_t offset = 0;
  for (const at::Tensor& tensor : tensors) {
    rows.push_back(basis_rows(tensor, offset, start, count));
    offset += tensor.numel();
  }
  return rows;
}

void RowJoiner::add(int64_t start, at::Tensor rows) {
  if (rows.size(0) == total_) {
    whole_ = std::move(rows);
  } else if (start == 0 && depth_of(rows) == 0 && !is_tracked(rows)) {
    whole_ = at::empty(joined({total_}, rows.sizes().slice(1)), rows.options());
    whole_.narrow(0, 0, rows.size(0)).copy_(rows);
  } else if (whole_.defined()) {
    whole_.narrow(0, start, rows.size(0)).copy_(rows);
  } else {
    pieces_.push_back(std::move(rows));
  }
}

at::Tensor RowJoiner::join() { return pieces_.empty() ? std::move(whole_) : at::cat(pieces_); }

at::Tensor rows_of(const Lowered& lowered, int64_t size) {
  if (lowered.bdim == 0) return lowered.value;
  if (lowered.bdim.has_value()) return lowered.value.movedim(*lowered.bdim, 0);
  return lowered.value.unsqueeze(0).expand(joined({size}, lowered.value.sizes()));
}

}  // namespace torchlift
