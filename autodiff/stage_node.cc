#include "autodiff/stage_node.h"

#include <ATen/ops/zeros.h>

namespace torchlift {

using torch::autograd::Edge;
using torch::autograd::SavedVariable;

void StageNode::save_arguments(const Stage& stage) {
  for (const at::Tensor& argument : stage.tensors) {
    arguments_.emplace_back(argument, /*is_output=*/false);
    const bool tracked = stage.owns(argument) && argument.requires_grad();
    add_next_edge(tracked ? torch::autograd::impl::gradient_edge(argument) : Edge());
  }
}

void StageNode::release_variables() {
  for (SavedVariable& saved : arguments_) saved.reset_data();
}

TensorList StageNode::cotangents(const torch::autograd::variable_list& gradients,
                                 bool of_all) const {
  const RuleDepthScope nobodys(1);
  TensorList found;
  size_t next = 0;
  for (const Output& output : outputs_) {
    const at::Tensor given = output.differentiable ? gradients[next++] : at::Tensor();
    const bool zeros = !given.defined() && (of_all ? output.exists : output.differentiable);
    found.push_back(zeros ? at::zeros(output.sizes, output.options) : given);
  }
  return found;
}

TensorList StageNode::unpacked(const std::vector<SavedVariable>& saved) {
  TensorList tensors;
  for (const SavedVariable& each : saved) tensors.push_back(each.unpack());
  return tensors;
}

void StageNode::note_output(const at::Tensor& output) {
  outputs_.emplace_back();
  if (!output.defined()) return;
  outputs_.back() = {true, is_differentiable(output), output.sizes().vec(), output.options()};
}

}  // namespace torchlift
