#include "nn_functional/buffers.h"

#include <ATen/ops/amax_ops.h>
#include <ATen/ops/clone_ops.h>
#include <ATen/ops/copy_ops.h>
#include <ATen/ops/mean_ops.h>
#include <ATen/ops/zeros_ops.h>

#include <algorithm>
#include <string_view>
#include <vector>

#include "core/level.h"
#include "core/lifted_tensor.h"

namespace torchlift {
namespace {

// Whether `name` is `module` or lies in it.
bool lies_in(std::string_view name, std::string_view module) {
  return name == module ||
         (name.size() > module.size() && name.starts_with(module) && name[module.size()] == '.');
}

// The outermost open vmap, or null; a trace alone is a level without rows.
const Level* outermost_vmap() {
  const auto found =
      std::find_if(level_stack().begin(), level_stack().end(),
                   [](const LevelPtr& level) { return level->kind() == LevelKind::kVmap; });
  return found == level_stack().end() ? nullptr : found->get();
}

// Of the levels around, so that a trace there writes down what is written into them.
at::Tensor zeros_per_row(const at::Tensor& like, const Level& outermost) {
  std::vector<c10::SymInt> sizes;
  for (const LevelPtr& level : level_stack()) {
    if (level->kind() == LevelKind::kVmap) sizes.emplace_back(level->size());
  }
  for (const int64_t size : like.sizes()) sizes.emplace_back(size);
  const RuleDepthScope around(outermost.depth());
  at::Tensor zeros = at::_ops::zeros::call(sizes, like.scalar_type(), like.layout(), like.device(),
                                           /*pin_memory=*/std::nullopt);
  for (const LevelPtr& level : level_stack()) {
    if (level->kind() == LevelKind::kVmap) zeros = lift(zeros, 0, level);
  }
  return zeros;
}

}  // namespace

BufferMode ReturnBuffers::mode_of(const std::string& buffer) const {
  size_t best = 0;
  BufferMode mode = others;
  for (const auto& [name, of_name] : modes) {
    if (!lies_in(buffer, name) || name.size() < best) continue;
    best = name.size();
    mode = of_name;
  }
  return mode;
}

at::Tensor copy_per_row(const at::Tensor& t) {
  const Level* outermost = outermost_vmap();
  if (outermost == nullptr) return at::_ops::clone::call(t, std::nullopt);
  at::Tensor copy = zeros_per_row(t, *outermost);
  return at::_ops::copy_::call(copy, t, /*non_blocking=*/false);
}

at::Tensor share_over_rows(const at::Tensor& t) {
  Level* level = current_level();
  if (level == nullptr || level->kind() != LevelKind::kVmap) return t;
  const Lowered rows = lower(t, *level);
  if (!rows.bdim) return rows.value;
  const int64_t dim = *rows.bdim;
  if (!rows.value.is_floating_point() && !rows.value.is_complex()) {
    return at::_ops::amax::call(rows.value, dim, /*keepdim=*/false);
  }
  return at::_ops::mean_dim::call(rows.value, dim, /*keepdim=*/false, /*dtype=*/std::nullopt);
}

}  // namespace torchlift
