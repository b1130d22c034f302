#include "autodiff/jacobian_blocks.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/conj_physical.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/view_as_complex.h>
#include <ATen/ops/view_as_real.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <utility>

#include "autodiff/forward.h"
#include "autodiff/jacobian_rows.h"
#include "autodiff/reverse.h"
#include "core/error.h"
#include "core/lifted_tensor.h"

namespace torchlift {
namespace {

using Tensors = std::vector<at::Tensor>;

void check_value(const char* transform, size_t index, const at::Tensor& value,
                 ComplexNumbers numbers) {
  if (!value.defined()) {
    transform_error(transform, "output ", index,
                    " of the function is an undefined tensor, which has no Jacobian. Return a "
                    "tensor, or return it as auxiliary output.");
  }
  if (numbers == ComplexNumbers::kHolomorphic) {
    if (value.is_complex()) return;
    transform_error(transform, "holomorphic: output ", index, " of the function has dtype ",
                    value.scalar_type(), " (shape ", value.sizes(),
                    "), but what a holomorphic function returns is complex. Use real_view, which "
                    "is for any function.");
  }
  if (value.is_complex()) {
    unsupported_error(transform, "output ", index, " of the function is complex (",
                      value.scalar_type(), ", shape ", value.sizes(),
                      "), and what its Jacobian is depends on a convention. Say holomorphic if the "
                      "function is, or real_view for the derivatives of real and imaginary parts.");
  }
  if (!value.is_floating_point()) {
    transform_error(transform, "output ", index, " of the function has dtype ", value.scalar_type(),
                    " (shape ", value.sizes(),
                    "), but only floating-point tensors have a Jacobian. Return it as auxiliary "
                    "output.");
  }
}

void check_input(const char* transform, size_t index, const at::Tensor& input,
                 ComplexNumbers numbers) {
  const bool holomorphic = numbers == ComplexNumbers::kHolomorphic;
  if (input.is_complex() == holomorphic) return;
  if (holomorphic) {
    transform_error(transform, "holomorphic: input ", index, " has dtype ", input.scalar_type(),
                    " (shape ", input.sizes(),
                    "), but what a holomorphic function is differentiated by is complex. Convert "
                    "it, as in x.to(at::kComplexDouble), or leave it out of argnums.");
  }
  unsupported_error(transform, "input ", index, " is complex (", input.scalar_type(), ", shape ",
                    input.sizes(),
                    "), and what the Jacobian is depends on a convention. Say holomorphic if the "
                    "function is, or real_view for the derivatives by real and imaginary parts.");
}

void check(const char* transform, const LeafOutputs& out, const Tensors& inputs,
           ComplexNumbers numbers) {
  if (out.values == 0) {
    transform_error(transform,
                    "the function returned no tensor to differentiate. Return a tensor, or a tree "
                    "with at least one.");
  }
  for (size_t i = 0; i < out.values; ++i) check_value(transform, i, out.leaves[i], numbers);
  for (size_t i = 0; i < inputs.size(); ++i) check_input(transform, i, inputs[i], numbers);
}

// --- real views ----------------------------------------------------------------------------------

at::Tensor real_view(const at::Tensor& t) {
  return t.is_complex() ? at::view_as_real(t.resolve_conj()) : t;
}

// The Jacobian of the function of the real views that returns real views.
using JacobianOf = JacobianBlocks (*)(LeafFunction, const Tensors&, const ChunkOptions&,
                                      ComplexNumbers);
JacobianBlocks of_real_views(JacobianOf jacobian, LeafFunction f, const Tensors& inputs,
                             const ChunkOptions& chunks) {
  Tensors views;
  for (const at::Tensor& input : inputs) views.push_back(real_view(input));
  std::vector<bool> complex;  // of the values
  const auto on_views = [&](const Tensors& leaves) {
    Tensors arguments = leaves;
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (inputs[i].is_complex()) arguments[i] = at::view_as_complex(leaves[i]);
    }
    LeafOutputs out = f(arguments);
    complex.assign(out.values, false);
    for (size_t i = 0; i < out.values; ++i) {
      at::Tensor& value = out.leaves[i];
      if (!value.defined() || !value.is_complex()) continue;
      complex[i] = true;
      value = real_view(value);
    }
    return out;
  };
  JacobianBlocks result = jacobian(on_views, views, chunks, ComplexNumbers::kRefuse);
  for (size_t i = 0; i < complex.size(); ++i) {
    if (complex[i]) result.outputs[i] = at::view_as_complex(result.outputs[i]);
  }
  return result;
}

// --- blocks --------------------------------------------------------------------------------------

// Each of these calls costs a view, and one more for each tangent: none is made that says nothing.

at::Tensor shaped(const at::Tensor& t, const std::vector<int64_t>& sizes) {
  return t.sizes() == at::IntArrayRef(sizes) ? t : t.reshape(sizes);
}

at::Tensor part(const at::Tensor& rows, int64_t start, int64_t count) {
  return count == rows.size(0) ? rows : rows.narrow(0, start, count);
}

at::Tensor first_dim_last(const at::Tensor& t) { return t.dim() == 1 ? t : t.movedim(0, -1); }

// --- reverse -------------------------------------------------------------------------------------

// The gradients of rows [start, start + count), each [count, ...].
Tensors pull_rows(const Pullback& pullback, const Tensors& values, size_t outputs, int64_t start,
                  int64_t count, bool last) {
  Tensors cotangents = basis_rows_of(values, start, count);
  cotangents.resize(outputs);
  return pull_cotangents(pullback, std::move(cotangents), count, last);
}

}  // namespace

Tensors pull_cotangents(const Pullback& pullback, Tensors cotangents, int64_t count, bool last) {
  // Rows are of the domain that the graph is in: what its formulas write into is made from them.
  Level* domain = current_level();
  for (at::Tensor& rows : cotangents) {
    if (rows.defined() && domain != nullptr && depth_of(rows) < domain->depth()) {
      rows = lift(std::move(rows), std::nullopt, LevelPtr::reclaim_copy(domain));
    }
  }
  // One row needs no level.
  std::optional<LevelScope> scope;
  if (count > 1) scope.emplace(Level::Options{.size = count, .randomness = Randomness::kSame});
  for (at::Tensor& rows : cotangents) {
    if (!rows.defined()) continue;
    rows = count > 1 ? lift(std::move(rows), 0, scope->level()) : rows.squeeze(0);
  }
  Tensors grads = pullback(std::move(cotangents), /*free_graph=*/last);
  for (at::Tensor& grad : grads) {
    grad = count > 1 ? rows_of(lower(grad, *scope->level()), count) : grad.unsqueeze(0);
  }
  return grads;
}

namespace {

// The gradients of the one number that the function returns: its Jacobian has one row.
Tensors pull_one(const Pullback& pullback, const at::Tensor& value, size_t outputs) {
  Tensors cotangents(outputs);
  cotangents[0] = at::ones(value.sizes(), value.options());
  return pullback(std::move(cotangents), /*free_graph=*/true);
}

// A cotangent v of a holomorphic function is pulled back to the conjugate of v* J: libtorch's
// gradients are conjugates.
void conjugate(Tensors& rows) {
  for (at::Tensor& each : rows) each = at::conj_physical(each);
}

JacobianBlocks reverse_blocks(const Pullback& pullback, size_t count, const Tensors& inputs,
                              const ChunkOptions& chunks, ComplexNumbers numbers) {
  JacobianBlocks result;
  result.outputs = pullback.outputs();
  const Tensors values(result.outputs.begin(), result.outputs.begin() + count);
  const int64_t total = total_numel(values, count);
  if (count == 1 && total == 1 && !chunks.memory_budget.has_value()) {
    Tensors row = pull_one(pullback, values[0], result.outputs.size());
    if (numbers == ComplexNumbers::kHolomorphic) conjugate(row);
    for (size_t j = 0; j < inputs.size(); ++j) {
      row[j] = shaped(row[j], joined(values[0].sizes(), inputs[j].sizes()));
    }
    result.blocks.push_back(std::move(row));
    return result;
  }
  ChunkPlan plan({.transform = "jacrev", .item = "row"}, chunks, total, device_of(inputs));
  std::vector<RowJoiner> joiners(inputs.size(), RowJoiner(total));
  while (plan.next()) {
    Tensors grads = pull_rows(pullback, values, result.outputs.size(), plan.start(), plan.length(),
                              plan.is_last());
    if (numbers == ComplexNumbers::kHolomorphic) conjugate(grads);
    plan.measure();
    for (size_t j = 0; j < inputs.size(); ++j) joiners[j].add(plan.start(), std::move(grads[j]));
  }
  Tensors rows;
  for (size_t j = 0; j < inputs.size(); ++j) {
    rows.push_back(total > 0 ? joiners[j].join()
                             : at::zeros(joined({0}, inputs[j].sizes()), inputs[j].options()));
  }
  plan.finish();
  int64_t offset = 0;
  for (const at::Tensor& value : values) {
    Tensors block;
    for (size_t j = 0; j < inputs.size(); ++j) {
      block.push_back(
          shaped(part(rows[j], offset, value.numel()), joined(value.sizes(), inputs[j].sizes())));
    }
    offset += value.numel();
    result.blocks.push_back(std::move(block));
  }
  return result;
}

// --- forward -------------------------------------------------------------------------------------

// Runs f with tangents [start, start + count): the tangents of its values, each [count, ...].
Tensors push_columns(LeafFunction f, const Tensors& inputs, int64_t start, int64_t count,
                     ComplexNumbers numbers, LeafOutputs& out) {
  // Of the levels around, so they are made before the scope opens one.
  Tensors tangents = basis_rows_of(inputs, start, count);
  return push_tangents("jacfwd", f, inputs, std::move(tangents), count, out, numbers);
}

}  // namespace

Tensors push_tangents(const char* transform, LeafFunction f, const Tensors& inputs,
                      Tensors tangents, int64_t count, LeafOutputs& out, ComplexNumbers numbers) {
  if (count == 1) {
    for (at::Tensor& tangent : tangents) {
      if (tangent.defined()) tangent = tangent.squeeze(0);
    }
  }
  ForwardScope scope(count > 1 ? std::optional(count) : std::nullopt);
  Tensors duals;
  for (size_t i = 0; i < inputs.size(); ++i) {
    duals.push_back(tangents[i].defined() ? scope.dual(inputs[i], tangents[i])
                                          : scope.constant(inputs[i]));
  }
  out = f(duals);
  check(transform, out, inputs, numbers);
  Tensors columns;
  std::vector<ForwardOutput> results = scope.finish(out.leaves);
  for (size_t i = 0; i < results.size(); ++i) {
    out.leaves[i] = std::move(results[i].primal);
    if (i >= out.values) continue;
    at::Tensor& tangent = results[i].tangent;
    if (!tangent.defined()) {
      const c10::NoGradGuard no_grad;
      tangent = at::zeros(out.leaves[i].sizes(), out.leaves[i].options());
    }
    columns.push_back(count > 1 ? rows_of({tangent, results[i].bdim}, count)
                                : tangent.unsqueeze(0));
  }
  return columns;
}

namespace {

JacobianBlocks forward_blocks(const LeafOutputs& out, const Tensors& columns,
                              const Tensors& inputs) {
  JacobianBlocks result;
  result.outputs = out.leaves;
  for (size_t i = 0; i < out.values; ++i) {
    Tensors block;
    int64_t offset = 0;
    for (const at::Tensor& input : inputs) {
      block.push_back(shaped(first_dim_last(part(columns[i], offset, input.numel())),
                             joined(out.leaves[i].sizes(), input.sizes())));
      offset += input.numel();
    }
    result.blocks.push_back(std::move(block));
  }
  return result;
}

}  // namespace

void check_differentiable(const char* transform, const LeafOutputs& out, const Tensors& inputs) {
  check(transform, out, inputs, ComplexNumbers::kRefuse);
}

ComplexNumbers complex_numbers(const char* transform, bool holomorphic, bool real_view) {
  if (holomorphic && real_view) {
    transform_error(transform,
                    "holomorphic and real_view were both given: a derivative is either one complex "
                    "number or those of real and imaginary parts. Give one of them.");
  }
  if (holomorphic) return ComplexNumbers::kHolomorphic;
  return real_view ? ComplexNumbers::kRealView : ComplexNumbers::kRefuse;
}

JacobianBlocks reverse_jacobian(LeafFunction f, const Tensors& inputs, const ChunkOptions& chunks,
                                ComplexNumbers numbers) {
  if (numbers == ComplexNumbers::kRealView) {
    return of_real_views(&reverse_jacobian, f, inputs, chunks);
  }
  ChunkPlan::check({.transform = "jacrev", .item = "row"}, chunks);
  ReverseScope scope;
  Tensors primals;
  for (const at::Tensor& input : inputs) primals.push_back(scope.primal(input));
  const LeafOutputs out = f(primals);
  check("jacrev", out, inputs, numbers);
  const Pullback pullback = scope.finish(out.leaves);
  return reverse_blocks(pullback, out.values, inputs, chunks, numbers);
}

JacobianBlocks forward_jacobian(LeafFunction f, const Tensors& inputs, const ChunkOptions& chunks,
                                ComplexNumbers numbers) {
  if (numbers == ComplexNumbers::kRealView) {
    return of_real_views(&forward_jacobian, f, inputs, chunks);
  }
  const int64_t total = total_numel(inputs, inputs.size());
  ChunkPlan plan({.transform = "jacfwd", .item = "column"}, chunks, total, device_of(inputs));
  LeafOutputs out;
  std::vector<RowJoiner> joiners;
  while (plan.next()) {
    LeafOutputs again;
    Tensors columns = push_columns(f, inputs, plan.start(), plan.length(), numbers,
                                   plan.start() == 0 ? out : again);
    plan.measure();
    joiners.resize(columns.size(), RowJoiner(total));
    for (size_t i = 0; i < columns.size(); ++i) joiners[i].add(plan.start(), std::move(columns[i]));
  }
  if (total == 0) {
    out = f(inputs);
    check("jacfwd", out, inputs, numbers);
  }
  Tensors columns;
  for (size_t i = 0; i < out.values; ++i) {
    const at::Tensor& value = out.leaves[i];
    columns.push_back(total > 0 ? joiners[i].join()
                                : at::zeros(joined({0}, value.sizes()), value.options()));
  }
  plan.finish();
  return forward_blocks(out, columns, inputs);
}

JacobianBlocks any_jacobian(LeafFunction f, const Tensors& inputs, const ChunkOptions& chunks,
                            ComplexNumbers numbers) {
  if (numbers == ComplexNumbers::kRealView) {
    return of_real_views(&any_jacobian, f, inputs, chunks);
  }
  int64_t rows = 0;
  {
    const c10::NoGradGuard no_grad;
    const LeafOutputs out = f(inputs);
    check("jacobian", out, inputs, numbers);
    rows = total_numel(out.leaves, out.values);
  }
  return total_numel(inputs, inputs.size()) < rows ? forward_jacobian(f, inputs, chunks, numbers)
                                                   : reverse_jacobian(f, inputs, chunks, numbers);
}

}  // namespace torchlift
