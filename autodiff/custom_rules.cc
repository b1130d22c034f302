#include "autodiff/custom_rules.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "autodiff/dependence.h"
#include "autodiff/forward_mode.h"
#include "autodiff/interpreted_arguments.h"
#include "autodiff/leaf_pullback.h"
#include "autodiff/stage_node.h"
#include "autodiff/stages.h"
#include "core/autograd_node.h"
#include "core/error.h"
#include "core/grad_mode.h"
#include "core/lifted_tensor.h"
#include "core/random_state.h"

// NOTE [custom rules]
// The function runs once, in the levels that are open, on constants: arguments that no domain
// differentiates. What it returns is taken apart, level by level (autodiff/stages.h), and put
// together again from the plain values upwards. On the way each domain that differentiates an
// argument gets what it asks for: a node in its graph, a tangent. A level has no part in that but
// one: to a domain outside of a vmap, the function is one of whole batches. So there a rule runs in
// a vmap of its own for each level inside (pull, push), which stands for that level; it may have
// ended by then.
//
// The missing mode is the transpose of the other: a vjp in the tangents, at zero, of the jvp rule;
// a vjp in the cotangents of bwd.
//
// A backward pass that nobody differentiates uses the residuals of the first run, which are
// constants. For any other they have to be functions of the arguments, so that fwd runs again.

namespace torchlift::custom_internal {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// What a vmap that stands for a level has to know.
struct Inner {
  Level::Options options;
  int64_t calls = 0;
  bool mapped = false;  // whether an argument has a batch dim
  BatchDims arguments;
  BatchDims outputs;
  BatchDims residuals;
};

[[noreturn]] void throw_closes_over(const char* transform) {
  unsupported_error(
      transform,
      "the function or its rule closes over a tensor of a vmap, or draws random numbers in it, "
      "that "
      "none of its arguments belongs to; or it is differentiated outside of that vmap. The rule "
      "cannot run outside with a tensor from inside. Pass the tensor as an argument.");
}

// t as a tensor of a domain of at most this depth, which it is unless it differs between examples
// of a level inside. (What all of them share may have been made there.)
Tensor seen_at(const char* transform, Tensor t, int64_t depth) {
  while (t.defined() && depth_of(t) > depth) {
    const LiftedTensorImpl* impl = as_lifted(t);
    if (impl->bdim().has_value()) throw_closes_over(transform);
    t = Tensor(impl->value());
  }
  return t;
}

Lowered lower_to(const char* transform, const Tensor& t, const Level& level, int64_t bound) {
  const Lowered lowered = lower(t, level);
  return {seen_at(transform, lowered.value, bound), lowered.bdim};
}

TensorList lifted(const TensorList& values, const BatchDims& bdims, const LevelPtr& level) {
  TensorList tensors;
  for (size_t i = 0; i < values.size(); ++i) {
    const bool batched = values[i].defined() && bdims[i].has_value();
    tensors.push_back(batched ? lift(values[i], bdims[i], level) : values[i]);
  }
  return tensors;
}

// A value with its batch dim at `bdim`, which it may not have.
Tensor batched_at(const Lowered& lowered, int64_t bdim, int64_t size) {
  if (lowered.bdim.has_value()) return lowered.value.movedim(*lowered.bdim, bdim);
  const Tensor value = lowered.value.unsqueeze(bdim);
  std::vector<int64_t> sizes = value.sizes().vec();
  sizes[bdim] = size;
  return value.expand(sizes);
}

// One call, as its rules see it later.
struct Call {
  Rules rules;
  std::vector<Inner> levels;          // of the stages, the deepest first
  std::optional<RandomState> random;  // if the function draws random numbers

  // The gradients of the arguments at a stage. Residuals, if there are any, are those of the first
  // run.
  Leaves pull(size_t stage, const Leaves& arguments, const std::optional<Leaves>& residuals,
              const Leaves& cotangents) const;
  // The tangents of the outputs at a stage.
  Leaves push(size_t stage, const Leaves& arguments, const Leaves& tangents) const;

 private:
  Leaves pull_here(const Leaves& arguments, const std::optional<Leaves>& residuals,
                   const Leaves& cotangents) const;
  Leaves push_here(const Leaves& arguments, const Leaves& tangents) const;
};

// Draws the random numbers of the first run again, while it lives.
class Rewound {
 public:
  explicit Rewound(const std::optional<RandomState>& random) {
    if (!random.has_value()) return;
    now_ = random->now();
    random->restore();
  }
  ~Rewound() {
    if (now_.has_value()) now_->restore();
  }
  Rewound(const Rewound&) = delete;
  Rewound& operator=(const Rewound&) = delete;

 private:
  std::optional<RandomState> now_;
};

void lower_gradients(const char* transform, Leaves& gradients, const Inner& inner,
                     const Level& level, int64_t bound) {
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (!gradients[i].defined()) continue;
    const Lowered lowered = lower_to(transform, gradients[i], level, bound);
    if (inner.arguments[i].has_value()) {
      gradients[i] = batched_at(lowered, *inner.arguments[i], level.size());
    } else {
      // Of what all examples share: the sum of theirs.
      gradients[i] = lowered.bdim ? lowered.value.sum(*lowered.bdim)
                                  : lowered.value.mul(c10::Scalar(level.size()));
    }
  }
}

void lower_tangents(const char* transform, Leaves& tangents, const Inner& inner, const Level& level,
                    int64_t bound) {
  for (size_t i = 0; i < tangents.size(); ++i) {
    if (!tangents[i].defined()) continue;
    const Lowered lowered = lower_to(transform, tangents[i], level, bound);
    tangents[i] =
        inner.outputs[i] ? batched_at(lowered, *inner.outputs[i], level.size()) : lowered.value;
  }
}

Leaves Call::pull(size_t stage, const Leaves& arguments, const std::optional<Leaves>& residuals,
                  const Leaves& cotangents) const {
  if (stage == 0) return pull_here(arguments, residuals, cotangents);
  const Inner& inner = levels[stage - 1];
  if (!inner.mapped) return pull(stage - 1, arguments, residuals, cotangents);
  const int64_t bound = std::max(deepest_of(arguments), deepest_of(cotangents));
  const LevelScope scope(inner.options);
  scope.level()->set_calls(inner.calls);
  std::optional<Leaves> kept;
  if (residuals.has_value()) kept = lifted(*residuals, inner.residuals, scope.level());
  Leaves gradients = pull(stage - 1, lifted(arguments, inner.arguments, scope.level()), kept,
                          lifted(cotangents, inner.outputs, scope.level()));
  lower_gradients(rules.transform, gradients, inner, *scope.level(), bound);
  return gradients;
}

Leaves Call::push(size_t stage, const Leaves& arguments, const Leaves& tangents) const {
  if (stage == 0) return push_here(arguments, tangents);
  const Inner& inner = levels[stage - 1];
  if (!inner.mapped) return push(stage - 1, arguments, tangents);
  const int64_t bound = std::max(deepest_of(arguments), deepest_of(tangents));
  const LevelScope scope(inner.options);
  scope.level()->set_calls(inner.calls);
  Leaves pushed = push(stage - 1, lifted(arguments, inner.arguments, scope.level()),
                       lifted(tangents, inner.arguments, scope.level()));
  lower_tangents(rules.transform, pushed, inner, *scope.level(), bound);
  return pushed;
}

Leaves zeros_like(const Leaves& tensors) {
  Leaves zeros;
  for (const Tensor& t : tensors) zeros.push_back(t.defined() ? at::zeros_like(t) : t);
  return zeros;
}

Leaves Call::pull_here(const Leaves& arguments, const std::optional<Leaves>& residuals,
                       const Leaves& cotangents) const {
  if (rules.bwd) {
    return rules.bwd(arguments, residuals ? *residuals : rules.fwd(arguments).second, cotangents);
  }
  const LeafPullback transpose(zeros_like(arguments), [&](const Leaves& tangents) {
    return rules.jvp(arguments, tangents);
  });
  return transpose(cotangents);
}

Leaves Call::push_here(const Leaves& arguments, const Leaves& tangents) const {
  if (rules.jvp) return rules.jvp(arguments, tangents);
  const auto fwd = rules.fwd(arguments);
  const LeafPullback transpose(zeros_like(fwd.first), [&](const Leaves& cotangents) {
    return rules.bwd(arguments, fwd.second, cotangents);
  });
  return transpose(tangents);
}

// --- reverse mode --------------------------------------------------------------------------------

struct CustomRuleBackward final : public StageNode {
  variable_list apply(variable_list&& grads) override;
  std::string name() const override { return "CustomRuleBackward"; }
  void release_variables() override {
    StageNode::release_variables();
    for (SavedVariable& saved : residuals) saved.reset_data();
  }

  std::shared_ptr<const Call> call;
  size_t stage = 0;
  std::vector<SavedVariable> residuals;
};

variable_list CustomRuleBackward::apply(variable_list&& grads) {
  variable_list result(argument_count());
  if (std::none_of(grads.begin(), grads.end(), [](const Tensor& t) { return t.defined(); })) {
    return result;
  }
  const Leaves primals = arguments();
  const OpenLevels open_primals(primals);
  const OpenLevels open_cotangents(grads);
  const int64_t depth = std::max(deepest_of(primals), deepest_of(grads));
  const DomainWork work(depth);
  const bool again = c10::GradMode::is_enabled() || forward_mode_open() ||
                     std::any_of(primals.begin(), primals.end(),
                                 [](const Tensor& t) { return t.defined() && tracked_outside(t); });
  std::optional<Leaves> kept;
  if (!again && call->rules.bwd) kept = unpacked(residuals);
  const Rewound rewound(kept.has_value() ? std::nullopt : call->random);
  Leaves gradients = call->pull(stage, primals, kept, cotangents(grads, /*of_all=*/true));
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (!gradients[i].defined() || !task_should_compute_output(i)) continue;
    result[i] = seen_at(call->rules.transform, std::move(gradients[i]), depth);
  }
  note_nodes();
  return result;
}

// Records the outputs in the domain of a stage.
void attach_node(const std::shared_ptr<const Call>& call, size_t number, const Stage& stage,
                 const Leaves& residuals, const Leaves& outputs) {
  auto node = make_node<CustomRuleBackward>();
  node->call = call;
  node->stage = number;
  node->save_arguments(stage);
  for (const Tensor& residual : residuals) {
    node->residuals.emplace_back(residual, /*is_output=*/false);
  }
  set_histories(node, outputs);
  note_nodes();
}

// --- forward mode --------------------------------------------------------------------------------

// NOTE [a batch of tangents]
// In jacfwd the tangents are those of several directions, of a level that the function does not see
// (LevelKind::kTangents). The rule may look at their values, so it runs in a vmap over them.
const LiftedTensorImpl* tangent_batch(const Leaves& tangents) {
  for (const Tensor& t : tangents) {
    const LiftedTensorImpl* impl = t.defined() ? as_lifted(t) : nullptr;
    if (impl != nullptr && impl->level().kind() == LevelKind::kTangents) return impl;
  }
  return nullptr;
}

Leaves push_each(const Call& call, size_t number, const Leaves& primals, const Leaves& tangents) {
  const LiftedTensorImpl* batch = tangent_batch(tangents);
  if (batch == nullptr) {
    const DomainWork work(std::max(deepest_of(primals), deepest_of(tangents)));
    return call.push(number, primals, tangents);
  }
  const LevelPtr directions = batch->level_ptr();
  const LoweredList each = lower_all(tangents, *directions);
  const int64_t depth = std::max(deepest_of(primals), deepest_of(each.values));
  const DomainWork work(depth);
  const LevelScope scope({.size = directions->size(), .randomness = Randomness::kSame});
  Leaves pushed = call.push(number, primals, lifted(each.values, each.bdims, scope.level()));
  for (Tensor& t : pushed) {
    if (!t.defined()) continue;
    const Lowered lowered = lower_to(call.rules.transform, t, *scope.level(), depth);
    t = lift(lowered.value, lowered.bdim, directions);
  }
  return pushed;
}

// Gives the outputs tangents in the domain of a stage.
void attach_tangents(const Call& call, size_t number, const Stage& stage, const Leaves& outputs) {
  const c10::AutoGradMode grad(stage.grad);
  const at::AutoFwGradMode forward(true);
  // Reverse mode alone is off here: further tangents go on.
  std::optional<DerivativeScope> derivative;
  if (!stage.grad) derivative.emplace();
  Leaves primals;
  Leaves tangents;
  {
    const RuleDepthScope nobodys(1);
    for (const Tensor& argument : stage.tensors) {
      primals.push_back(without_tangent(argument, stage.depth()));
      Tensor tangent = stage.owns(argument) ? argument._fw_grad(kDual) : Tensor();
      // libtorch's tensors that stand for zeros cannot do all that a rule may ask for.
      const bool none = !tangent.defined() || tangent._is_zerotensor();
      if (argument.defined() && none) tangent = at::zeros_like(argument);
      tangents.push_back(std::move(tangent));
    }
  }
  const Leaves pushed = [&] {
    const Rewound rewound(call.random);
    return push_each(call, number, primals, tangents);
  }();
  const RuleDepthScope nobodys(1);
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (!pushed[i].defined() || !is_differentiable(outputs[i])) continue;
    const Tensor& output = outputs[i];
    if (pushed[i].sizes() != output.sizes()) {
      transform_error(call.rules.transform, "the rule returned a tangent of shape ",
                      pushed[i].sizes(), " for result ", i, ", which has shape ", output.sizes(),
                      ". A tangent has the shape of what it belongs to.");
    }
    output._set_fw_grad(tangent_for(output, pushed[i], tangents), kDual, /*is_inplace_op=*/false);
  }
}

// --- the call ------------------------------------------------------------------------------------

// Results come from constants: nothing may differentiate them.
void check_constant(const char* transform, const Leaves& outputs) {
  if (!differentiated_anywhere(outputs)) return;
  transform_error(transform,
                  "the function closes over a tensor that is being differentiated (or makes one "
                  "that requires a gradient), for which there is no rule. Pass the tensor as an "
                  "argument; or, if a constant is meant, use torchlift::stop_gradient on it.");
}

// Tensors of the deepest stage as values of the last; fills in their batch dims.
class Unwrapped {
 public:
  Unwrapped(const std::vector<Stage>& stages, Leaves tensors, const char* transform)
      : values_({std::move(tensors)}) {
    for (size_t i = 0; i < stages.size(); ++i) {
      for (Tensor& t : values_[i]) t = seen_at(transform, std::move(t), stages[i].depth());
      if (stages[i].level) lower_one(*stages[i].level);
    }
  }

  const Leaves& at(size_t stage) const { return values_[stage]; }
  const BatchDims& bdims(size_t stage) const { return bdims_[stage]; }

 private:
  void lower_one(const Level& level) {
    LoweredList lowered = lower_all(values_.back(), level);
    values_.push_back(std::move(lowered.values));
    bdims_.push_back(std::move(lowered.bdims));
  }

  std::vector<Leaves> values_;
  std::vector<BatchDims> bdims_;
};

Inner inner_of(const Stage& stage) {
  Inner inner;
  const Level& level = *stage.level;
  inner.options = {.kind = LevelKind::kVmap,
                   .size = level.size(),
                   .randomness = level.randomness(),
                   .stream = level.stream(),
                   .first_row = level.first_row()};
  inner.calls = level.calls();
  inner.mapped = stage.batched();
  inner.arguments = stage.bdims;
  return inner;
}

// t with a batch dim wherever an argument has one, since it is a function of that.
Tensor batched_as(const char* transform, const std::vector<Stage>& stages, size_t number,
                  const Tensor& given) {
  const Stage& stage = stages[number];
  const Tensor t = seen_at(transform, given, stage.depth());
  if (!stage.level) return t;
  Lowered lowered = lower(t, *stage.level);
  lowered.value = batched_as(transform, stages, number + 1, lowered.value);
  if (!lowered.bdim.has_value() && stage.batched()) {
    lowered = {batched_at(lowered, 0, stage.level->size()), 0};
  }
  return lift(lowered.value, lowered.bdim, stage.level);
}

struct FirstRun {
  Leaves outputs;
  Leaves residuals;
};

FirstRun run_first(Call& call, const Leaves& constants) {
  const std::vector<uint32_t> versions = versions_of(constants);
  const RandomState random(devices_of(constants));
  FirstRun run;
  {
    const DomainWork work(deepest_of(constants));
    if (call.rules.fwd) {
      std::tie(run.outputs, run.residuals) = call.rules.fwd(constants);
    } else {
      run.outputs = call.rules.value(constants);
    }
  }
  if (versions_of(constants) != versions) {
    unsupported_error(
        call.rules.transform,
        "the function writes into one of its arguments in place. Use the out-of-place "
        "operator.");
  }
  check_constant(call.rules.transform, run.outputs);
  for (Tensor& residual : run.residuals) residual = constant_from(residual, 0);
  if (!(random.now() == random)) call.random = random;
  return run;
}

Leaves call_differentiated(const std::shared_ptr<Call>& call, const std::vector<Stage>& stages) {
  for (const Stage& stage : stages) {
    if (stage.level) call->levels.push_back(inner_of(stage));
  }
  Leaves constants;
  for (const Tensor& t : stages[0].tensors) constants.push_back(constant_from(t, 0));
  FirstRun run = run_first(*call, constants);
  const char* transform = call->rules.transform;
  // Not while a rule runs, which works in a domain.
  std::optional<RuleDepthScope> nobodys(1);
  for (Tensor& output : run.outputs) {
    if (!is_differentiable(output)) continue;
    output = batched_as(transform, stages, 0, output);
  }
  const Unwrapped outputs(stages, std::move(run.outputs), transform);
  const Unwrapped residuals(stages, std::move(run.residuals), transform);
  for (size_t i = 0; i < call->levels.size(); ++i) {
    call->levels[i].outputs = outputs.bdims(i);
    call->levels[i].residuals = residuals.bdims(i);
  }
  const Unwrapped arguments(stages, constants, transform);
  const size_t last = stages.size() - 1;
  Leaves results = outputs.at(last);
  for (Tensor& t : results) {
    if (t.defined()) t = own_value(t, arguments.at(last));
  }
  for (size_t i = stages.size(); i-- > 0;) {
    if (stages[i].level) {
      for (size_t k = 0; k < results.size(); ++k) {
        if (results[k].defined()) {
          results[k] = lift(results[k], outputs.bdims(i)[k], stages[i].level);
        }
      }
    }
    if (stages[i].tracked()) attach_node(call, i, stages[i], residuals.at(i), results);
    if (!stages[i].dual()) continue;
    nobodys.reset();
    attach_tangents(*call, i, stages[i], results);
    nobodys.emplace(1);
  }
  return results;
}

}  // namespace

Leaves call(Rules rules, const Leaves& given) {
  check_no_dependence(given);
  // Under no_grad in a jvp the result is a constant, as that of operators is.
  if (forward_mode_cut()) return rules.value(given);
  for (const Tensor& t : given) check_not_interpreted(rules.transform, t);
  const Leaves arguments = narrowed(given);
  if (!differentiated_anywhere(arguments)) {
    Leaves outputs = rules.value(arguments);
    check_constant(rules.transform, outputs);
    return outputs;
  }
  auto call = std::make_shared<Call>();
  call->rules = std::move(rules);
  return call_differentiated(call, stages_of(arguments));
}

}  // namespace torchlift::custom_internal
