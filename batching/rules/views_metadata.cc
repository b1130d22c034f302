// Strided views of storage, operators that change what a tensor shows, and questions about its
// memory. All of them speak of one example.

#include <ATen/TensorUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/as_strided_ops.h>
#include <ATen/ops/as_strided_scatter_ops.h>
#include <ATen/ops/full.h>
#include <ATen/ops/is_pinned_ops.h>
#include <ATen/ops/is_same_size_ops.h>
#include <ATen/ops/resize_as_ops.h>
#include <ATen/ops/resize_ops.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "batching/rules/dims.h"
#include "batching/rules/strides.h"
#include "core/boxed.h"
#include "core/error.h"
#include "core/registry.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;

// NOTE [as_strided of an example]
// The strides and the offset are those of one example's memory, as x.strides() and
// x.storage_offset() show them; example i is the same, i batch strides on. That is right as long as
// no example reaches into the memory of another, which reachable() decides; else the operator is
// refused.
void check_reachable(const Strided& example, const Strided& request, int64_t batch_stride,
                     int64_t batch_size) {
  if (batch_size <= 1 || reachable(example, request, batch_stride)) return;
  unsupported_error(
      "vmap", "as_strided(size ", request.sizes, ", stride ", request.strides, ", offset ",
      request.offset, ") of a tensor of shape ", example.sizes, ", strides ", example.strides,
      ", offset ", example.offset, " would reach the memory of other examples: they lie ",
      batch_stride,
      " elements apart. Call .contiguous() first, or use indexing, unfold or diagonal.");
}

Strided strided_of_example(BatchedArg self) {
  Strided example;
  for (int64_t dim = 0; dim < self.value.dim(); ++dim) {
    if (dim == self.bdim.value_or(-1)) continue;
    example.sizes.push_back(self.value.size(dim));
    example.strides.push_back(self.value.stride(dim));
  }
  example.offset = self.value.storage_offset();
  return example;
}

Strided strided_of_request(at::IntArrayRef size, at::IntArrayRef stride, int64_t offset) {
  TORCH_CHECK(size.size() == stride.size(), "mismatch in length of strides and shape");
  Strided request;
  request.sizes.assign(size.begin(), size.end());
  request.strides.assign(stride.begin(), stride.end());
  request.offset = offset;
  return request;
}

Batched as_strided_rule(BatchedArg self, at::IntArrayRef size, at::IntArrayRef stride,
                        std::optional<int64_t> offset) {
  Strided request = strided_of_request(size, stride, offset.value_or(self.value.storage_offset()));
  const int64_t batch_size = self.value.size(*self.bdim);
  const int64_t batch_stride = self.value.stride(*self.bdim);
  check_reachable(strided_of_example(self), request, batch_stride, batch_size);
  request.sizes.insert(request.sizes.begin(), batch_size);
  request.strides.insert(request.strides.begin(), batch_stride);
  return {self.value.as_strided(request.sizes, request.strides, request.offset), 0};
}

// For every element of `example`, in order: which element of `request` lies at its address, or -1.
at::Tensor overlap(const Strided& example, const Strided& request, int64_t extent,
                   c10::Device device) {
  const auto options = at::TensorOptions().dtype(at::kLong).device(device);
  at::Tensor at_address = at::full({extent}, -1, options);
  const int64_t count = c10::multiply_integers(request.sizes);
  at_address.as_strided(request.sizes, request.strides, request.offset)
      .copy_(at::arange(count, options).view(request.sizes));
  return at_address.as_strided(example.sizes, example.strides, 0);
}

// Which elements are replaced is known from strides alone; then it is a where() of self and src:
//   result[b, i] = src[b, overlap[i]] where that is >= 0, else self[b, i]
Batched as_strided_scatter_rule(const Level& level, BatchedArg self, BatchedArg src,
                                at::IntArrayRef size, at::IntArrayRef stride,
                                std::optional<int64_t> offset) {
  const Strided example = strided_of_example(self);
  const Strided request = strided_of_request(
      size, stride, offset.value_or(self.value.storage_offset()) - self.value.storage_offset());
  const int64_t extent = extent_of(example.sizes, example.strides);
  TORCH_CHECK(at::IntArrayRef(logical_sizes(src)).equals(size),
              "expected src to have a size equal to the view of self. src size = ",
              logical_sizes(src), ", view size = ", size);
  if (request.offset < 0 || request.offset + extent_of(size, stride) > extent) {
    unsupported_error("vmap", "as_strided_scatter(size ", size, ", stride ", stride,
                      ") reaches outside of the tensor it writes to, of shape ", example.sizes,
                      " and strides ", example.strides, ". Call .contiguous() on that one first.");
  }
  const at::Tensor self_all = expanded(self, level.size());
  if (c10::multiply_integers(size) == 0) return {self_all.clone(), 0};
  const at::Tensor from = overlap(example, request, extent, self.value.device());
  c10::SmallVector<int64_t, 6> all{level.size()};
  all.append(example.sizes.begin(), example.sizes.end());
  const at::Tensor flat_src =
      expanded(src, level.size()).reshape({level.size(), c10::multiply_integers(size)});
  const at::Tensor written = flat_src.index_select(1, from.clamp_min(0).flatten()).view(all);
  return {at::where(from.ge(0), written, self_all), 0};
}

// --- questions that autograd asks --------------------------------------------------------------

bool is_same_size_rule(BatchedArg self, BatchedArg other) {
  return logical_sizes(self) == logical_sizes(other);
}

bool is_pinned_rule(BatchedArg self, std::optional<at::Device> device) {
  return self.value.is_pinned(device);
}

// --- in place, by their schema -----------------------------------------------------------------

// as_strided_(self, size, stride, offset): self shows another part of its memory.
void as_strided__rule(const c10::OperatorHandle& /*op*/, const LevelPtr& level,
                      torch::jit::Stack* stack) {
  const std::vector<c10::IValue> args = torch::jit::pop(*stack, 4);
  const at::Tensor& target = args[0].toTensor();
  const auto size = args[1].toIntVector();
  const auto stride = args[2].toIntVector();
  const Lowered lowered = lower(target, *level);
  Batched shown = as_strided_rule(as_arg(lowered), size, stride, args[3].toOptional<int64_t>());
  LiftedTensorImpl* impl = as_lifted(target);
  impl->replace_value(std::move(shown.value), shown.bdim);
  if (!target.is_inference()) impl->bump_version();
  stack->push_back(args[0]);
}

// Whether nothing but `impl` shows the memory of its value.
bool owns_memory(const LiftedTensorImpl& impl) {
  const LiftedTensorImpl* each = &impl;
  while (true) {
    const at::Tensor& value = each->value();
    if (each->group() != nullptr || value.use_count() != 1) return false;
    each = as_lifted(value);
    if (each == nullptr) return value.has_storage() && value.storage().use_count() == 1;
  }
}

int64_t product(at::IntArrayRef sizes) {
  int64_t result = 1;
  for (const int64_t size : sizes) result *= size;
  return result;
}

// The first numbers of each row, B..., in another shape; as a view of them, if that can be.
std::optional<at::Tensor> first_numbers(const at::Tensor& rows, at::IntArrayRef size) {
  const int64_t wanted = product(size), each = product(rows.sizes().slice(1));
  const std::vector<int64_t> flat = {rows.size(0), each};
  if (wanted > each || !at::detail::computeStride(rows.sizes(), rows.strides(), flat)) return {};
  std::vector<int64_t> shape = {rows.size(0)};
  shape.insert(shape.end(), size.begin(), size.end());
  const at::Tensor kept = rows.view(flat).narrow(1, 0, wanted);
  if (!at::detail::computeStride(kept.sizes(), kept.strides(), shape)) return {};
  return kept.view(shape);
}

// Memory of its own for what each row, B..., holds, and for more that has no value yet.
at::Tensor in_more_memory(const at::Tensor& rows, at::IntArrayRef size) {
  std::vector<int64_t> shape = {rows.size(0)};
  shape.insert(shape.end(), size.begin(), size.end());
  at::Tensor result = rows.new_empty(shape);
  const int64_t wanted = product(size), each = product(rows.sizes().slice(1));
  const int64_t kept = std::min(wanted, each), count = rows.size(0);
  if (count * kept > 0) {
    result.view({count, wanted})
        .narrow(1, 0, kept)
        .copy_(rows.reshape({count, each}).narrow(1, 0, kept));
  }
  return result;
}

// resize_(self, size, memory_format): a tensor keeps its first numbers. Where those are no view of
// the batch, it gets other memory, which no other tensor may miss.
void resize__rule(const c10::OperatorHandle& /*op*/, const LevelPtr& level,
                  torch::jit::Stack* stack) {
  const std::vector<c10::IValue> args = torch::jit::pop(*stack, 3);
  const at::Tensor& target = args[0].toTensor();
  const auto size = args[1].toIntVector();
  if (!target.sizes().equals(size)) {
    LiftedTensorImpl* impl = as_lifted(target);
    const bool own = owns_memory(*impl);
    const at::Tensor rows = impl->value().movedim(*impl->bdim(), 0);
    std::optional<at::Tensor> resized = first_numbers(rows, size);
    if (!resized.has_value() && own) resized = in_more_memory(rows, size);
    if (!resized.has_value()) {
      unsupported_error(
          "vmap", "resize_() cannot change the shape of a tensor of ", level->describe(), " from ",
          target.sizes(), " to ", at::IntArrayRef(size),
          ": its memory, which holds all examples, would have to move, and other tensors share it. "
          "Resize a copy (x.clone().resize_(size)), use reshape, or make a new tensor with "
          "new_empty(size).");
    }
    impl->replace_value(std::move(*resized), 0);
    if (!target.is_inference()) impl->bump_version();
  }
  stack->push_back(args[0]);
}

const at::Tensor& resize_as_(const at::Tensor& self, const at::Tensor& like,
                             std::optional<at::MemoryFormat> memory_format) {
  return ops::resize_::call(self, like.sym_sizes(), memory_format);
}

void set__rule(const c10::OperatorHandle& /*op*/, const LevelPtr& level,
               torch::jit::Stack* /*stack*/) {
  unsupported_error(
      "vmap", "set_() cannot give a tensor of ", level->describe(),
      " another storage: its memory is shared by all examples. Use copy_(), or make a new "
      "tensor.");
}

[[maybe_unused]] const RuleSet kRules{
    composite<ops::resize_as_, &resize_as_>(),
    rule<ops::as_strided, &as_strided_rule, OpKind::kView>(),
    rule<ops::as_strided_scatter, &as_strided_scatter_rule>(),
    rule<ops::is_same_size, &is_same_size_rule>(),
    rule<ops::is_pinned, &is_pinned_rule>(),
    boxed_rule("aten::as_strided_", "", &as_strided__rule),
    boxed_rule("aten::resize_", "", &resize__rule),
    boxed_rule("aten::set_", "", &set__rule),
    boxed_rule("aten::set_", "source_Tensor", &set__rule),
    boxed_rule("aten::set_", "source_Storage", &set__rule),
    boxed_rule("aten::set_", "source_Storage_storage_offset", &set__rule),
};

}  // namespace
}  // namespace torchlift
