#include "autodiff/sparse_values.h"

#include <ATen/ops/_sparse_coo_tensor_unsafe.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/sparse_compressed_tensor.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <utility>

#include "autodiff/jacobian_rows.h"
#include "autodiff/reverse.h"
#include "autodiff/scalar_gradient.h"
#include "core/error.h"
#include "core/lifted_tensor.h"

namespace torchlift {
namespace {

using Tensors = std::vector<at::Tensor>;

[[noreturn]] void throw_other_shape(const char* transform, const Coloring& coloring, int64_t rows,
                                    int64_t columns) {
  transform_error(transform, "the colouring was made for a matrix of shape [", coloring.rows, ", ",
                  coloring.columns, "], but that of the function at these inputs has shape [", rows,
                  ", ", columns,
                  "]: a row for each number it returns, a column for each number of its inputs. "
                  "Make one from its own pattern.");
}

void check_columns(const char* transform, const Coloring& coloring, int64_t rows,
                   const Tensors& inputs) {
  const int64_t columns = total_numel(inputs, inputs.size());
  if (columns != coloring.columns) throw_other_shape(transform, coloring, rows, columns);
}

// For colours [start, start + count), the sums of the basis vectors of each: [count, numel].
at::Tensor seeds(const at::Tensor& colors, int64_t start, int64_t count) {
  return colors.unsqueeze(0).eq(at::arange(start, start + count, at::kLong).unsqueeze(1));
}

// Cut to the shapes of the tensors: [count, ...].
Tensors cut(const at::Tensor& seeds, const Tensors& like, size_t total) {
  Tensors parts;
  int64_t offset = 0;
  for (const at::Tensor& t : like) {
    const at::Tensor part = seeds.narrow(1, offset, t.numel());
    parts.push_back(part.to(t.options()).reshape(joined({seeds.size(0)}, t.sizes())));
    offset += t.numel();
  }
  parts.resize(total);
  return parts;
}

// [count, all numbers]
at::Tensor laid_end_to_end(const Tensors& rows, int64_t count) {
  Tensors flat;
  for (const at::Tensor& each : rows) flat.push_back(each.reshape({count, -1}));
  return flat.size() == 1 ? flat[0] : at::cat(flat, 1);
}

// Products with the Jacobian from the right: [coloring.forward, rows].
at::Tensor push_colors(const char* transform, LeafFunction f, const Tensors& inputs,
                       const Coloring& coloring, const ChunkOptions& chunks, Tensors& outputs) {
  ChunkPlan plan({.transform = transform, .item = "colour"}, chunks, coloring.forward,
                 device_of(inputs));
  RowJoiner joiner(coloring.forward);
  while (plan.next()) {
    Tensors tangents =
        cut(seeds(coloring.column_colors, plan.start(), plan.length()), inputs, inputs.size());
    LeafOutputs out;
    Tensors products = push_tangents(transform, f, inputs, std::move(tangents), plan.length(), out);
    plan.measure();
    const int64_t rows = total_numel(out.leaves, out.values);
    if (rows != coloring.rows) throw_other_shape(transform, coloring, rows, coloring.columns);
    joiner.add(plan.start(), laid_end_to_end(products, plan.length()));
    if (plan.start() == 0) outputs = std::move(out.leaves);
  }
  at::Tensor whole = joiner.join();
  plan.finish();
  return whole;
}

// Products from the left: [coloring.reverse, columns].
at::Tensor pull_colors(const char* transform, LeafFunction f, const Tensors& inputs,
                       const Coloring& coloring, const ChunkOptions& chunks, Tensors& outputs) {
  ReverseScope scope;
  Tensors primals;
  for (const at::Tensor& input : inputs) primals.push_back(scope.primal(input));
  const LeafOutputs out = f(primals);
  check_differentiable(transform, out, inputs);
  const int64_t rows = total_numel(out.leaves, out.values);
  if (rows != coloring.rows) throw_other_shape(transform, coloring, rows, coloring.columns);
  const Pullback pullback = scope.finish(out.leaves);
  outputs = pullback.outputs();
  const Tensors values(outputs.begin(), outputs.begin() + static_cast<int64_t>(out.values));
  ChunkPlan plan({.transform = transform, .item = "colour"}, chunks, coloring.reverse,
                 device_of(inputs));
  RowJoiner joiner(coloring.reverse);
  while (plan.next()) {
    Tensors cotangents =
        cut(seeds(coloring.row_colors, plan.start(), plan.length()), values, outputs.size());
    const Tensors products =
        pull_cotangents(pullback, std::move(cotangents), plan.length(), plan.is_last());
    plan.measure();
    joiner.add(plan.start(), laid_end_to_end(products, plan.length()));
  }
  at::Tensor whole = joiner.join();
  plan.finish();
  return whole;
}

// A matrix without nonzeros takes no product; what f returns is still to be checked.
void run_unproduced(const char* transform, LeafFunction f, const Tensors& inputs,
                    const Coloring& coloring, Tensors& outputs) {
  LeafOutputs out = f(inputs);
  check_differentiable(transform, out, inputs);
  const int64_t rows = total_numel(out.leaves, out.values);
  if (rows != coloring.rows) throw_other_shape(transform, coloring, rows, coloring.columns);
  outputs = std::move(out.leaves);
}

SparseValues values_of(const char* transform, LeafFunction f, const Tensors& inputs,
                       const Coloring& coloring, const ChunkOptions& chunks) {
  ChunkPlan::check({.transform = transform, .item = "colour"}, chunks);
  check_columns(transform, coloring, coloring.rows, inputs);
  SparseValues result;
  Tensors products;
  if (coloring.forward > 0) {
    products.push_back(push_colors(transform, f, inputs, coloring, chunks, result.outputs));
  }
  if (coloring.reverse > 0) {
    products.push_back(pull_colors(transform, f, inputs, coloring, chunks, result.outputs));
  }
  if (products.empty()) {
    run_unproduced(transform, f, inputs, coloring, result.outputs);
    const auto like = result.outputs.empty() ? at::TensorOptions() : result.outputs[0].options();
    result.values = at::zeros({0}, like);
    return result;
  }
  for (at::Tensor& each : products) each = each.reshape({-1});
  const at::Tensor flat = products.size() == 1 ? products[0] : at::cat(products);
  result.values = flat.index_select(0, coloring.sources.to(flat.device()));
  return result;
}

bool is_lifted_anywhere(const at::Tensor& t) { return depth_of(t) > 0; }

}  // namespace

SparseValues sparse_jacobian_values(LeafFunction f, const Tensors& inputs, const Coloring& coloring,
                                    const ChunkOptions& chunks) {
  return values_of("sparse_jacobian", f, inputs, coloring, chunks);
}

SparseValues sparse_hessian_values(LeafFunction f, const Tensors& inputs, const Coloring& coloring,
                                   const ChunkOptions& chunks) {
  const auto gradients = [&](const Tensors& leaves) {
    LeafOutputs out;
    LeafOutputs all{scalar_gradient("sparse_hessian", f, leaves, out), inputs.size()};
    all.leaves.insert(all.leaves.end(), out.leaves.begin(), out.leaves.end());
    return all;
  };
  SparseValues result = values_of("sparse_hessian", gradients, inputs, coloring, chunks);
  result.outputs.erase(result.outputs.begin(),
                       result.outputs.begin() + static_cast<int64_t>(inputs.size()));
  return result;
}

at::Tensor in_layout(const char* transform, const at::Tensor& values, const Coloring& coloring,
                     SparseLayout layout) {
  if (layout == SparseLayout::kValues) return values;
  if (is_lifted_anywhere(values)) {
    unsupported_error(transform,
                      "the nonzeros are tensors of an outer transform (vmap, jvp inside another), "
                      "which cannot lift a sparse tensor. Ask for the nonzeros alone, "
                      "layout=\"values\", and put them into a sparse tensor outside: they are in "
                      "the order of coloring.col_indices.");
  }
  const at::Tensor columns = coloring.col_indices.to(values.device());
  const at::Tensor starts = coloring.crow_indices.to(values.device());
  const std::vector<int64_t> sizes{coloring.rows, coloring.columns};
  if (layout == SparseLayout::kCsr) {
    return at::sparse_compressed_tensor(starts, columns, values, sizes,
                                        values.options().layout(at::kSparseCsr));
  }
  const at::Tensor counts = starts.slice(0, 1).sub(starts.slice(0, 0, -1));
  const at::Tensor rows =
      at::arange(coloring.rows, starts.options()).repeat_interleave(counts, /*dim=*/0);
  return at::_sparse_coo_tensor_unsafe(at::stack({rows, columns}), values, sizes,
                                       values.options().layout(at::kSparse),
                                       /*is_coalesced=*/true);
}

}  // namespace torchlift
