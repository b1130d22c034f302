#include "autodiff/custom_batching.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/zeros_like.h>

#include "autodiff/forward.h"
#include "autodiff/forward_mode.h"
#include "autodiff/interpreted_arguments.h"
#include "autodiff/leaf_pullback.h"
#include "autodiff/stage_node.h"
#include "autodiff/stages.h"
#include "core/autograd_node.h"
#include "core/error.h"
#include "core/grad_mode.h"
#include "core/lifted_tensor.h"

// NOTE [rules for batches]
// The rule runs on the values of the arguments at the innermost vmap level that gives one of them a
// batch dim. There it is ordinary code to all domains around. The domains of that level and of
// those inside (of a jvp in the vmap, say) do not see the values; to them, the derivative of the
// function is again a function with a rule for batches, made of the first: the vjp of the function,
// whose rule is the vjp of the rule; and likewise the jvp. So the gradient of such a function is a
// call of another one, on the arguments and the cotangents, and has derivatives in its turn.

namespace torchlift::custom_internal {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

constexpr const char* kTransform = "custom_batching";

using Rules = std::shared_ptr<const BatchRules>;

Tensor expanded(const Tensor& t, int64_t size) {
  std::vector<int64_t> sizes{size};
  sizes.insert(sizes.end(), t.sizes().begin(), t.sizes().end());
  return t.unsqueeze(0).expand(sizes);
}

TensorList concatenated(const TensorList& a, const TensorList& b) {
  TensorList both = a;
  both.insert(both.end(), b.begin(), b.end());
  return both;
}

// --- the rule ------------------------------------------------------------------------------------

void check_result(const Batch& result, int64_t size) {
  if (result.tensors.size() != result.batched.size()) {
    transform_error(kTransform, "the rule says of ", result.batched.size(),
                    " tensors whether they have the batch dim, but returned ",
                    result.tensors.size(), ". Give one flag for each tensor of the result.");
  }
  for (size_t i = 0; i < result.tensors.size(); ++i) {
    const Tensor& t = result.tensors[i];
    if (!result.batched[i]) continue;
    if (!t.defined()) {
      transform_error(kTransform, "the rule says that result ", i,
                      " has the batch dim, but returned an undefined tensor there.");
    }
    if (t.dim() == 0 || t.size(0) != size) {
      transform_error(kTransform, "the rule returned a tensor of shape ", t.sizes(), " for result ",
                      i, ", whose first dim must be the batch dim, of size ", size,
                      ". Move it to the front; or return a BatchedTree that says that the tensor "
                      "has none.");
    }
  }
}

// --- derived rules -------------------------------------------------------------------------------

// The first `count` of a batch of tensors, and the rest.
std::pair<Batch, Batch> split(const Batch& batch, size_t count) {
  Batch first, rest;
  for (size_t i = 0; i < batch.tensors.size(); ++i) {
    Batch& part = i < count ? first : rest;
    part.tensors.push_back(batch.tensors[i]);
    part.batched.push_back(batch.batched[i]);
  }
  return {std::move(first), std::move(rest)};
}

// arguments..., cotangents... -> gradients. Every gradient differs from example to example.
Rules vjp_rules(const Rules& rules, size_t count) {
  auto derived = std::make_shared<BatchRules>();
  derived->value = [rules, count](const TensorList& all) {
    const TensorList arguments(all.begin(), all.begin() + count);
    const LeafPullback pullback(
        arguments, [&](const TensorList& primals) { return call_batched(rules, primals); });
    return pullback(TensorList(all.begin() + count, all.end()));
  };
  derived->rule = [rules, count](int64_t size, const Batch& all) {
    auto [arguments, cotangents] = split(all, count);
    for (size_t i = 0; i < count; ++i) {
      Tensor& t = arguments.tensors[i];
      if (arguments.batched[i] || !is_differentiable(t)) continue;
      t = expanded(t, size);
      arguments.batched[i] = true;
    }
    for (size_t i = 0; i < cotangents.tensors.size(); ++i) {
      Tensor& t = cotangents.tensors[i];
      if (t.defined() && !cotangents.batched[i]) t = expanded(t, size);
    }
    Batch gradients;
    const LeafPullback pullback(arguments.tensors, [&](const TensorList& primals) {
      Batch outputs = rules->rule(size, {primals, arguments.batched});
      check_result(outputs, size);
      for (size_t i = 0; i < outputs.tensors.size(); ++i) {
        Tensor& t = outputs.tensors[i];
        if (t.defined() && !outputs.batched[i]) t = expanded(t, size);
      }
      return outputs.tensors;
    });
    gradients.tensors = pullback(cotangents.tensors);
    for (const Tensor& t : gradients.tensors) gradients.batched.push_back(t.defined());
    return gradients;
  };
  return derived;
}

// The tangents of what run(arguments) returns; undefined where there is none.
template <class Run>
TensorList pushed(const TensorList& arguments, const TensorList& tangents, const Run& run) {
  ForwardScope scope;
  TensorList duals = arguments;
  for (size_t i = 0; i < duals.size(); ++i) {
    Tensor& t = duals[i];
    if (!t.defined()) continue;
    if (!tangents[i].defined()) {
      t = scope.constant(t);
      continue;
    }
    // libtorch cannot give a tangent to an expanded tensor.
    if (!t.is_non_overlapping_and_dense()) t = t.contiguous();
    t = scope.dual(t, tangents[i].clone());
  }
  TensorList found;
  for (ForwardOutput& output : scope.finish(run(duals))) {
    Tensor tangent = std::move(output.tangent);
    if (!tangent.defined() && is_differentiable(output.primal)) {
      tangent = at::zeros_like(output.primal);
    }
    found.push_back(std::move(tangent));
  }
  return found;
}

// arguments..., tangents... -> tangents of the outputs.
Rules jvp_rules(const Rules& rules, size_t count) {
  auto derived = std::make_shared<BatchRules>();
  derived->value = [rules, count](const TensorList& all) {
    const TensorList arguments(all.begin(), all.begin() + count);
    return pushed(arguments, TensorList(all.begin() + count, all.end()),
                  [&](const TensorList& duals) { return call_batched(rules, duals); });
  };
  derived->rule = [rules, count](int64_t size, const Batch& all) {
    auto [arguments, tangents] = split(all, count);
    for (size_t i = 0; i < count; ++i) {
      if (!tangents.tensors[i].defined()) continue;
      if (tangents.batched[i] && !arguments.batched[i]) {
        arguments.tensors[i] = expanded(arguments.tensors[i], size);
        arguments.batched[i] = true;
      } else if (arguments.batched[i] && !tangents.batched[i]) {
        tangents.tensors[i] = expanded(tangents.tensors[i], size);
      }
    }
    Batch result;
    result.tensors = pushed(arguments.tensors, tangents.tensors, [&](const TensorList& duals) {
      const Batch outputs = rules->rule(size, {duals, arguments.batched});
      check_result(outputs, size);
      result.batched = outputs.batched;
      return outputs.tensors;
    });
    for (size_t i = 0; i < result.tensors.size(); ++i) {
      if (!result.tensors[i].defined()) result.batched[i] = false;
    }
    return result;
  };
  return derived;
}

// --- domains of the level and inside -------------------------------------------------------------

struct CustomBatchingBackward final : public StageNode {
  variable_list apply(variable_list&& grads) override;
  std::string name() const override { return "CustomBatchingBackward"; }

  Rules rules;  // of the gradients
};

variable_list CustomBatchingBackward::apply(variable_list&& grads) {
  const TensorList all = concatenated(arguments(), cotangents(grads, /*of_all=*/false));
  const OpenLevels open(all);
  const DomainWork work(deepest_of(all));
  TensorList gradients = call_batched(rules, all);
  note_nodes();
  variable_list result(argument_count());
  for (size_t i = 0; i < result.size(); ++i) {
    if (task_should_compute_output(i)) result[i] = std::move(gradients[i]);
  }
  return result;
}

void attach_node(const Rules& rules, const Stage& stage, const TensorList& outputs) {
  auto node = make_node<CustomBatchingBackward>();
  node->rules = vjp_rules(rules, stage.tensors.size());
  node->save_arguments(stage);
  set_histories(node, outputs);
  note_nodes();
}

void attach_tangents(const Rules& rules, const Stage& stage, const TensorList& outputs) {
  const c10::AutoGradMode grad(stage.grad);
  const at::AutoFwGradMode forward(true);
  std::optional<DerivativeScope> derivative;
  if (!stage.grad) derivative.emplace();
  TensorList primals;
  TensorList tangents;
  for (const Tensor& argument : stage.tensors) {
    primals.push_back(without_tangent(argument, stage.depth()));
    tangents.push_back(stage.owns(argument) ? argument._fw_grad(kDual) : Tensor());
  }
  const TensorList found = [&] {
    const TensorList all = concatenated(primals, tangents);
    const DomainWork work(deepest_of(all));
    return call_batched(jvp_rules(rules, primals.size()), all);
  }();
  const RuleDepthScope nobodys(1);
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (!found[i].defined() || !is_differentiable(outputs[i])) continue;
    outputs[i]._set_fw_grad(tangent_for(outputs[i], found[i], tangents), kDual,
                            /*is_inplace_op=*/false);
  }
}

// --- the call ------------------------------------------------------------------------------------

const Tensor& plain_value(const Tensor& t) {
  const LiftedTensorImpl* impl = as_lifted(t);
  return impl == nullptr ? t : plain_value(impl->value());
}

bool shares_memory(const Tensor& t, const TensorList& others) {
  const Tensor& own = plain_value(t);
  for (const Tensor& each : others) {
    if (!each.defined()) continue;
    const Tensor& other = plain_value(each);
    if (own.is_same(other)) return true;
    if (own.has_storage() && other.has_storage() && own.is_alias_of(other)) return true;
  }
  return false;
}

// The rule, at the level of a stage, on the values that the next one has.
Batch run_rule(const BatchRules& rules, const Stage& stage, const TensorList& values) {
  const Level& level = *stage.level;
  const OuterGradScope outer(level);
  const RandomHandledScope random(level);
  const DomainScope domain(level.depth() - 1);
  Batch arguments;
  for (size_t i = 0; i < values.size(); ++i) {
    const auto& bdim = stage.bdims[i];
    arguments.tensors.push_back(bdim.value_or(0) == 0 ? values[i] : values[i].movedim(*bdim, 0));
    arguments.batched.push_back(bdim.has_value());
  }
  Batch result = rules.rule(level.size(), arguments);
  check_result(result, level.size());
  for (Tensor& t : result.tensors) {
    if (!t.defined()) continue;
    if (depth_of(t) >= level.depth()) {
      unsupported_error(kTransform,
                        "the rule returned a tensor of a level inside of the one it works for (",
                        level.describe(), "): it closes over one. Pass it as an argument.");
    }
    if (shares_memory(t, values)) t = t.clone();
  }
  return result;
}

// The stage whose level the rule is for; the number of stages if there is none.
size_t batched_stage(const std::vector<Stage>& stages) {
  size_t number = 0;
  while (number < stages.size() && !stages[number].batched()) ++number;
  return number;
}

}  // namespace

std::vector<at::Tensor> call_batched(const std::shared_ptr<const BatchRules>& rules,
                                     const std::vector<at::Tensor>& given) {
  for (const at::Tensor& t : given) check_not_interpreted("custom_batching", t);
  const TensorList arguments = narrowed(given);
  const std::vector<Stage> stages = stages_of(arguments);
  const size_t number = batched_stage(stages);
  if (number == stages.size()) return rules->value(arguments);
  const bool cut = forward_mode_cut();
  const Batch result = run_rule(*rules, stages[number], stages[number + 1].tensors);
  TensorList outputs = result.tensors;
  for (size_t i = number + 1; i-- > 0;) {
    const Stage& stage = stages[i];
    for (size_t k = 0; k < outputs.size(); ++k) {
      if (!outputs[k].defined()) continue;
      const bool batched = i == number && result.batched[k];
      outputs[k] =
          lift(outputs[k], batched ? std::optional<int64_t>(0) : std::nullopt, stage.level);
    }
    if (stage.tracked()) attach_node(rules, stage, outputs);
    if (!cut && stage.dual()) attach_tangents(rules, stage, outputs);
  }
  return outputs;
}

void throw_batching_structure(const std::string& mismatch) {
  transform_error(kTransform,
                  "what the rule returned must have the structure of the function's result (of an "
                  "earlier run), but does not: ",
                  mismatch, ".");
}

}  // namespace torchlift::custom_internal
