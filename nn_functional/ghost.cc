#include "nn_functional/ghost.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/stack.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <typeinfo>
#include <utility>

#include "autodiff/grad.h"
#include "autodiff/reverse.h"
#include "autodiff/sole_path.h"
#include "core/autograd_node.h"
#include "core/grad_mode.h"
#include "core/level.h"
#include "core/lifted_tensor.h"
#include "core/tensor_operators.h"
#include "nn_functional/ghost_rules.h"
#include "nn_functional/substitution.h"

namespace torchlift::ghost_internal {
namespace {

using c10::IValue;
using c10::OperatorHandle;
using torch::autograd::Edge;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::jit::Stack;

constexpr const char* kTransform = "per_sample_grad_norms";

// --- the node of a call --------------------------------------------------------------------------

// A call that takes a parameter as its weight: what its node is to do, and what it found.
struct Layer {
  LayerCall call;
  std::string weight, bias;  // names; bias may be ""
  // Of which of them a norm is wanted: of none, while the forward pass runs.
  bool of_weight = false, of_bias = false;
  std::vector<at::Tensor> squares;

  // a: the call's input; g: the gradient of its output.
  void add_squares(const at::Tensor& a, const at::Tensor& g) {
    if (of_weight) squares.push_back(call.rule->of_weight(call, a, g));
    if (of_bias) squares.push_back(call.rule->of_bias(call, a, g));
  }
};

// Its edges are the call's output and the number that all such nodes depend on.
struct GhostNormBackward final : public Node {
  variable_list apply(variable_list&& grads) override {
    at::Tensor g = std::move(grads[0]);
    if (g.defined() && (layer->of_weight || layer->of_bias)) layer->add_squares(input.unpack(), g);
    return {std::move(g), at::Tensor()};
  }
  std::string name() const override { return "GhostNormBackward"; }
  void release_variables() override { input.reset_data(); }

  std::shared_ptr<Layer> layer;
  SavedVariable input;  // checks, as autograd would, that nobody writes into it meanwhile
};

bool is_ghost_norm(const Node& node) { return typeid(node) == typeid(GhostNormBackward); }

// t without its graph in its domain.
at::Tensor without_graph(const at::Tensor& t) {
  const LiftedTensorImpl* impl = as_lifted(t);
  return impl != nullptr ? lift_alias(impl->value(), impl->bdim(), impl->level_ptr()) : t.detach();
}

// --- the forward pass ----------------------------------------------------------------------------

bool is_transposition(const OperatorHandle& op) { return op.operator_name().name == "aten::t"; }

// Puts nodes behind the calls that take parameters as weights, in the domain of the code at work.
class LayerObserver : public OperatorObserver {
 public:
  // tracked: the parameters, and a number, as primals.
  LayerObserver(const StateSlots& slots, const ModuleState& tracked, const at::Tensor& number)
      : number_(number), level_(current_level()) {
    const std::vector<std::string> names = slots.parameter_names();
    const std::vector<at::Tensor> own = slots.parameters();
    for (size_t i = 0; i < own.size(); ++i) {
      const auto found = tracked.find(names[i]);
      if (found != tracked.end()) {
        parameters_.emplace(own[i].unsafeGetTensorImpl(), Parameter{names[i], found->second});
      }
    }
  }

  void call(const OperatorHandle& op, Stack* stack) override {
    const Rule* rule = rule_of(op);
    if (rule != nullptr) return call_layer(*rule, op, stack);
    if (is_transposition(op)) return call_transposition(op, stack);
    run_substituted(op, stack);
  }

 private:
  struct Parameter {
    std::string name;
    at::Tensor value;  // in place of it, or of its transpose
  };

  // The parameter that an argument is; null where it is none, or somebody else put another value in
  // its place.
  const Parameter* find(const IValue& argument) const {
    if (!argument.isTensor() || !argument.toTensor().defined()) return nullptr;
    const at::Tensor& given = argument.toTensor();
    const auto found = parameters_.find(given.unsafeGetTensorImpl());
    if (found == parameters_.end()) return nullptr;
    const at::Tensor* value = SubstitutionScope::find_anywhere(given);
    return found->second.value.is_same(value == nullptr ? given : *value) ? &found->second
                                                                          : nullptr;
  }

  // A norm does not care about the transposition of a weight. (Under no_grad it is a constant.)
  void call_transposition(const OperatorHandle& op, Stack* stack) {
    const Parameter* parameter = find(stack->back());
    run_substituted(op, stack);
    if (parameter == nullptr || !c10::GradMode::is_enabled()) return;
    // Held, so that its address stays its own.
    const at::Tensor& transpose = stack->back().toTensor();
    parameters_.emplace(transpose.unsafeGetTensorImpl(), Parameter{parameter->name, transpose});
  }

  void call_layer(const Rule& rule, const OperatorHandle& op, Stack* stack) {
    const auto count = static_cast<std::ptrdiff_t>(op.schema().arguments().size());
    std::vector<IValue> arguments(stack->end() - count, stack->end());
    run_substituted(op, stack);
    const at::Tensor& output = stack->back().toTensor();
    if (!is_of_domain(output)) return;
    const std::shared_ptr<Layer> layer = layer_of(rule, arguments);
    if (layer == nullptr || !is_worth_it(layer->call, output.numel())) return;
    const at::Tensor& given = arguments[rule.input].toTensor();
    const at::Tensor* input = SubstitutionScope::find_anywhere(given);
    stack->back() = behind_node(output, layer, input == nullptr ? given : *input);
  }

  // Whether the call is recorded in the domain of the primals, and by it alone. What an inner vmap,
  // a part of the examples (NOTE [narrowed levels] in core/narrow.h) or forward mode makes of it is
  // left to autograd.
  bool is_of_domain(const at::Tensor& output) const {
    const LiftedTensorImpl* impl = as_lifted(output);
    return (impl == nullptr ? nullptr : &impl->level()) == level_ && output.requires_grad() &&
           output.is_floating_point() && !output._fw_grad(/*level=*/0).defined();
  }

  // Null where the weight is no parameter.
  std::shared_ptr<Layer> layer_of(const Rule& rule, const std::vector<IValue>& arguments) const {
    const Parameter* weight = find(arguments[rule.weight]);
    if (weight == nullptr || (rule.accepts != nullptr && !rule.accepts(arguments))) return nullptr;
    const Parameter* bias = rule.bias == kNoArgument ? nullptr : find(arguments[rule.bias]);
    auto layer = std::make_shared<Layer>();
    layer->weight = weight->name;
    layer->call.rule = &rule;
    layer->call.weight_sizes = weight->value.sizes().vec();
    if (bias != nullptr) {
      layer->bias = bias->name;
      layer->call.bias_sizes = bias->value.sizes().vec();
    }
    for (const IValue& argument : arguments) {
      layer->call.arguments.push_back(argument.isTensor() ? IValue() : argument);
    }
    return layer;
  }

  at::Tensor behind_node(const at::Tensor& output, const std::shared_ptr<Layer>& layer,
                         const at::Tensor& input) const {
    auto node = make_node<GhostNormBackward>();
    node->layer = layer;
    node->input = SavedVariable(input, /*is_output=*/false);
    node->add_next_edge(torch::autograd::impl::gradient_edge(output));
    node->add_next_edge(torch::autograd::impl::gradient_edge(number_));
    at::Tensor result = without_graph(output);
    torch::autograd::set_history(result, node);
    note_nodes();
    return result;
  }

  const at::Tensor& number_;
  const Level* level_;
  std::map<const c10::TensorImpl*, Parameter> parameters_;  // and their transposes
};

// --- the backward pass ---------------------------------------------------------------------------

// What is to be done with the parameters.
struct Plan {
  std::vector<std::shared_ptr<Layer>> layers;  // of which norms are wanted
  std::vector<std::string> covered;
  std::vector<size_t> made;  // numbers of those whose gradients are asked for
};

// The loss depends on none of the parameters that are in neither list.
Plan plan_for(const SolePaths& paths, const ModuleState& tracked, const at::Tensor& number) {
  const Edge of_number = torch::autograd::impl::gradient_edge(number);
  Plan plan;
  size_t index = 0;
  for (const auto& [name, t] : tracked) {
    const size_t own_index = index++;
    const Edge edge = torch::autograd::impl::gradient_edge(t);
    if (!paths.contains(edge)) continue;
    const auto* node = static_cast<const GhostNormBackward*>(paths.above(edge, is_ghost_norm));
    const bool is_ours = node != nullptr && node->next_edge(1) == of_number;
    if (is_ours && node->layer->weight == name) {
      node->layer->of_weight = true;
    } else if (is_ours && node->layer->bias == name) {
      node->layer->of_bias = true;
    } else {
      plan.made.push_back(own_index);
      continue;
    }
    plan.covered.push_back(name);
    // The other one of weight and bias may have put it there before.
    if (!(node->layer->of_weight && node->layer->of_bias)) plan.layers.push_back(node->layer);
  }
  return plan;
}

at::Tensor squared(const at::Tensor& g) { return (g.is_complex() ? g.abs() : g).square().sum(); }

}  // namespace

SquaredNorm squared_norm_of_gradient(const StateSlots& slots, const ModuleState& params,
                                     const std::function<at::Tensor(const ModuleState&)>& loss) {
  ReverseScope scope;
  ModuleState tracked;
  for (const auto& [name, t] : params) tracked.emplace(name, scope.primal(t));
  const at::Tensor& like = params.begin()->second;
  const at::Tensor number = scope.primal(at::zeros({}, like.options()));
  LayerObserver observer(slots, tracked, number);
  at::Tensor value = [&] {
    const ObserverScope observed(&observer);
    return loss(tracked);
  }();
  autodiff_internal::check_loss(kTransform, value);
  const Pullback pullback = scope.finish({value});
  Plan plan = plan_for(SolePaths(value), tracked, number);
  plan.made.push_back(tracked.size());
  std::vector<at::Tensor> grads =
      pullback.of_primals(plan.made, {at::ones({}, value.options())}, /*free_graph=*/true);
  grads.pop_back();
  std::vector<at::Tensor> squares;
  for (const std::shared_ptr<Layer>& layer : plan.layers) {
    squares.insert(squares.end(), layer->squares.begin(), layer->squares.end());
  }
  for (const at::Tensor& g : grads) squares.push_back(squared(g));
  at::Tensor sum = squares.empty() ? at::zeros({}, like.options()) : at::stack(squares).sum();
  return {std::move(sum), std::move(plan.covered)};
}

}  // namespace torchlift::ghost_internal
