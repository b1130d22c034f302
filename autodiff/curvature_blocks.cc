#include "autodiff/curvature_blocks.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <utility>

#include "autodiff/forward.h"
#include "autodiff/jacobian_rows.h"
#include "autodiff/jet_scope.h"
#include "autodiff/reverse.h"
#include "autodiff/scalar_gradient.h"
#include "core/error.h"
#include "core/lifted_tensor.h"
#include "core/tensor_operators.h"

namespace torchlift {
namespace {

using Tensors = std::vector<at::Tensor>;

at::Tensor or_zeros(at::Tensor t, const at::Tensor& like) {
  if (t.defined()) return t;
  const c10::NoGradGuard no_grad;
  return at::zeros_like(like);
}

Tensors make_duals(ForwardScope& scope, const Tensors& inputs, const Tensors& tangents) {
  Tensors duals;
  for (size_t i = 0; i < inputs.size(); ++i) {
    duals.push_back(tangents[i].defined() ? scope.dual(inputs[i], tangents[i].clone())
                                          : scope.constant(inputs[i]));
  }
  return duals;
}

}  // namespace

Products hessian_vector_product(LeafFunction f, const Tensors& inputs, const Tensors& tangents) {
  ForwardScope scope;
  const Tensors duals = make_duals(scope, inputs, tangents);
  LeafOutputs out;
  Tensors all = scalar_gradient("hvp", f, duals, out);
  all.insert(all.end(), out.leaves.begin(), out.leaves.end());
  std::vector<ForwardOutput> results = scope.finish(all);
  Products result;
  for (size_t i = 0; i < results.size(); ++i) {
    if (i < inputs.size()) {
      result.products.push_back(or_zeros(std::move(results[i].tangent), inputs[i]));
    } else {
      result.outputs.push_back(std::move(results[i].primal));
    }
  }
  return result;
}

Products vector_hessian_product(LeafFunction f, const Tensors& inputs, const Tensors& cotangents) {
  ReverseScope scope;
  Tensors primals;
  for (const at::Tensor& input : inputs) primals.push_back(scope.primal(input));
  LeafOutputs out;
  Tensors all = scalar_gradient("vhp", f, primals, out);
  all.insert(all.end(), out.leaves.begin(), out.leaves.end());
  const Pullback pullback = scope.finish(all);
  Tensors padded = cotangents;
  padded.resize(all.size());
  const Tensors& seen = pullback.outputs();
  return {pullback(std::move(padded), /*free_graph=*/true),
          Tensors(seen.begin() + inputs.size(), seen.end())};
}

Products gauss_newton_product(LeafFunction f, LeafFunction loss, const Tensors& inputs,
                              const Tensors& tangents) {
  ReverseScope reverse;
  Tensors primals;
  for (const at::Tensor& input : inputs) primals.push_back(reverse.primal(input));
  // Both modes in one run. The tangents are outputs too, so that they leave this differentiation.
  Tensors outputs, pushed;
  {
    ForwardScope forward;
    const LeafOutputs out = f(make_duals(forward, primals, tangents));
    for (ForwardOutput& output : forward.finish(out.leaves)) {
      if (pushed.size() < out.values) {
        pushed.push_back(or_zeros(std::move(output.tangent), output.primal));
      }
      outputs.push_back(std::move(output.primal));
    }
  }
  const size_t values = pushed.size(), count = outputs.size();
  outputs.insert(outputs.end(), pushed.begin(), pushed.end());
  const Pullback pullback = reverse.finish(outputs);
  const Tensors& seen = pullback.outputs();
  Tensors curved = hessian_vector_product(loss, Tensors(seen.begin(), seen.begin() + values),
                                          Tensors(seen.begin() + count, seen.end()))
                       .products;
  curved.resize(outputs.size());
  return {pullback(std::move(curved), /*free_graph=*/true),
          Tensors(seen.begin(), seen.begin() + count)};
}

namespace {

int64_t count_of(const Tensors& directions) {
  for (const at::Tensor& direction : directions) {
    if (direction.defined()) return direction.size(0);
  }
  return 0;
}

void check_real(const char* transform, const LeafOutputs& out) {
  for (size_t i = 0; i < out.values; ++i) {
    if (!out.leaves[i].defined() || !out.leaves[i].is_floating_point()) {
      transform_error(transform, "output ", i,
                      " of the function must be a tensor of a real floating-point dtype.");
    }
  }
}

Laplacian taylor_along(LeafFunction f, const Tensors& inputs, const Tensors& directions) {
  JetScope scope(JetScope::kLaplacian, count_of(directions));
  Tensors arguments;
  for (size_t i = 0; i < inputs.size(); ++i) {
    arguments.push_back(directions[i].defined() ? scope.series(inputs[i], directions[i])
                                                : scope.constant(inputs[i]));
  }
  const LeafOutputs out = f(arguments);
  check_real("laplacian", out);
  Laplacian result;
  for (JetOutput& output : scope.finish(out.leaves)) {
    if (result.sums.size() < out.values) {
      result.sums.push_back(or_zeros(std::move(output.series), output.primal));
    }
    result.outputs.push_back(std::move(output.primal));
  }
  return result;
}

}  // namespace

Laplacian taylor_laplacian(LeafFunction f, const Tensors& inputs, const ChunkOptions& chunks,
                           const std::optional<Tensors>& directions) {
  if (directions.has_value()) return taylor_along(f, inputs, *directions);
  const int64_t total = total_numel(inputs, inputs.size());
  ChunkPlan plan({.transform = "laplacian", .item = "direction"}, chunks, total, device_of(inputs));
  Laplacian result;
  if (total == 0) result = taylor_along(f, inputs, Tensors(inputs.size()));
  while (plan.next()) {
    Laplacian part = taylor_along(f, inputs, basis_rows_of(inputs, plan.start(), plan.length()));
    plan.measure();
    if (plan.start() == 0) {
      result = std::move(part);
      continue;
    }
    for (size_t i = 0; i < part.sums.size(); ++i) result.sums[i] = result.sums[i] + part.sums[i];
  }
  plan.finish();
  return result;
}

Laplacian nested_laplacian(LeafFunction f, const Tensors& inputs, const ChunkOptions& chunks,
                           const std::optional<Tensors>& directions) {
  constexpr const char* kName = "laplacian";
  SecondDerivatives second = directions.has_value()
                                 ? second_derivatives_along(kName, f, inputs, *directions)
                                 : second_derivatives(kName, f, inputs, chunks);
  Laplacian result{{}, std::move(second.outputs)};
  for (const at::Tensor& rows : second.rows) result.sums.push_back(rows.sum(0));
  return result;
}

Laplacian laplacian_of(LeafFunction f, const Tensors& inputs, const ChunkOptions& chunks,
                       const std::optional<Tensors>& directions) {
  try {
    return taylor_laplacian(f, inputs, chunks, directions);
  } catch (const UnsupportedError&) {
    return nested_laplacian(f, inputs, chunks, directions);
  }
}

SecondDerivatives second_derivatives_along(const char* transform, LeafFunction f,
                                           const Tensors& inputs, const Tensors& directions) {
  const int64_t count = count_of(directions);
  const LevelScope level({.size = count, .randomness = Randomness::kSame});
  const auto lift_one = [&](const at::Tensor& t) { return lift_alias(t, 0, level.level()); };
  ForwardScope outer;
  std::optional<ForwardScope> inner(std::in_place);
  Tensors duals;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!directions[i].defined()) {
      duals.push_back(inner->constant(outer.constant(inputs[i])));
      continue;
    }
    const at::Tensor tangent = lift_one(directions[i]);
    duals.push_back(inner->dual(outer.dual(inputs[i], tangent), tangent.clone()));
  }
  const LeafOutputs out = f(duals);
  check_real(transform, out);
  // First derivatives, then all outputs: the second derivatives are the tangents of the former.
  Tensors firsts, primals;
  for (ForwardOutput& output : inner->finish(out.leaves)) {
    if (firsts.size() < out.values) {
      firsts.push_back(or_zeros(std::move(output.tangent), output.primal));
    }
    primals.push_back(std::move(output.primal));
  }
  inner.reset();
  firsts.insert(firsts.end(), primals.begin(), primals.end());
  SecondDerivatives result;
  std::vector<ForwardOutput> results = outer.finish(firsts);
  for (size_t i = 0; i < results.size(); ++i) {
    if (i >= out.values) {
      result.outputs.push_back(lower(results[i].primal, *level.level()).value);
      continue;
    }
    const at::Tensor second = or_zeros(std::move(results[i].tangent), results[i].primal);
    result.rows.push_back(rows_of(lower(second, *level.level()), count));
  }
  return result;
}

SecondDerivatives second_derivatives(const char* transform, LeafFunction f, const Tensors& inputs,
                                     const ChunkOptions& chunks) {
  const int64_t total = total_numel(inputs, inputs.size());
  ChunkPlan plan({.transform = transform, .item = "direction"}, chunks, total, device_of(inputs));
  SecondDerivatives result;
  std::vector<RowJoiner> joiners;
  while (plan.next()) {
    const int64_t start = plan.start();
    SecondDerivatives part =
        second_derivatives_along(transform, f, inputs, basis_rows_of(inputs, start, plan.length()));
    plan.measure();
    joiners.resize(part.rows.size(), RowJoiner(total));
    for (size_t i = 0; i < part.rows.size(); ++i) joiners[i].add(start, std::move(part.rows[i]));
    if (start == 0) result.outputs = std::move(part.outputs);
  }
  for (RowJoiner& joiner : joiners) result.rows.push_back(joiner.join());
  plan.finish();
  return result;
}

}  // namespace torchlift
