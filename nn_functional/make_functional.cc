#include "nn_functional/make_functional.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/clone_ops.h>
#include <ATen/ops/stack_ops.h>
#include <torch/nn/module.h>

#include <string>
#include <typeinfo>

#include "core/error.h"

namespace torchlift::functional_internal {
namespace {

constexpr const char* kStack = "stack_module_state";

at::Tensor stack_one(const std::string& name, const TensorVector& tensors) {
  const at::Tensor& first = tensors[0];
  for (size_t i = 1; i < tensors.size(); ++i) {
    const at::Tensor& t = tensors[i];
    if (t.sizes() != first.sizes() || t.scalar_type() != first.scalar_type()) {
      transform_error(kStack, "'", name, "' is a tensor of shape ", first.sizes(), ", ",
                      first.scalar_type(), " in model 0, and of shape ", t.sizes(), ", ",
                      t.scalar_type(), " in model ", i, ". They must be built alike.");
    }
    if (t.requires_grad() != first.requires_grad()) {
      transform_error(kStack, "'", name, "' requires grad in some models and not in others.");
    }
  }
  const c10::AutoGradMode no_grad(false);
  return at::_ops::stack::call(tensors, 0).set_requires_grad(first.requires_grad());
}

ModuleState stack_kind(const std::vector<const torch::nn::Module*>& modules, StateKind kind) {
  std::vector<ModuleState> states;
  for (const auto* module : modules) states.push_back(extract_state(*module, kind));
  ModuleState stacked;
  for (size_t i = 1; i < states.size(); ++i) {
    if (states[i].size() == states[0].size()) continue;
    transform_error(kStack, "model 0 has ", states[0].size(), " tensors and model ", i, " has ",
                    states[i].size(), ". They must be built alike.");
  }
  for (const auto& [name, first] : states[0]) {
    TensorVector tensors;
    for (size_t i = 0; i < states.size(); ++i) {
      const auto found = states[i].find(name);
      if (found == states[i].end()) {
        transform_error(kStack, "model ", i, " has no '", name, "', which model 0 has.");
      }
      tensors.push_back(found->second);
    }
    stacked.emplace(name, stack_one(name, tensors));
  }
  return stacked;
}

}  // namespace

TensorVector copies(const TensorVector& tensors, const MakeFunctionalOptions& options) {
  const c10::AutoGradMode no_grad(false);
  TensorVector copied;
  for (const at::Tensor& t : tensors) {
    const bool tracked = t.requires_grad() && !options.disable_autograd_tracking;
    copied.push_back(at::_ops::clone::call(t, std::nullopt).set_requires_grad(tracked));
  }
  return copied;
}

void check_no_buffers(const StateSlots& slots) {
  if (slots.buffer_names().empty()) return;
  transform_error("make_functional", slots.module_name(), " has buffers, such as '",
                  slots.buffer_names().front(), "'. Use make_functional_with_buffers instead.");
}

std::pair<ModuleState, ModuleState> stack_states(
    const std::vector<const torch::nn::Module*>& modules) {
  if (modules.empty()) transform_error(kStack, "expected at least one model, got none.");
  for (const auto* module : modules) {
    const torch::nn::Module& first = *modules[0];
    if (typeid(*module) != typeid(first)) {
      transform_error(kStack, "expected models of one class, got ", StateSlots(first).module_name(),
                      " and ", StateSlots(*module).module_name(), ".");
    }
    if (module->is_training() != first.is_training()) {
      transform_error(kStack,
                      "expected all models in training mode or all in eval mode. Call train() or "
                      "eval() on each.");
    }
  }
  return {stack_kind(modules, StateKind::kParameters), stack_kind(modules, StateKind::kBuffers)};
}

TensorVector in_order(const ModuleState& state, const std::vector<std::string>& names) {
  TensorVector tensors;
  for (const std::string& name : names) tensors.push_back(state.at(name));
  return tensors;
}

}  // namespace torchlift::functional_internal
