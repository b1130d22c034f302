#ifndef TORCHLIFT_AUTODIFF_STAGE_NODE_H_
#define TORCHLIFT_AUTODIFF_STAGE_NODE_H_

// File: autodiff/stage_node.h
//
// The node that one call of a function with rules of its own leaves in the graph of a stage
// (autodiff/stages.h): what such nodes have in common. Not for users.

#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <cstdint>
#include <vector>

#include "autodiff/stages.h"

namespace torchlift {

class StageNode : public torch::autograd::Node {
 public:
  // Saves the arguments of the call, and adds an edge for each: to its node where the domain
  // differentiates it.
  void save_arguments(const Stage& stage);

  void release_variables() override;

 protected:
  size_t argument_count() const { return arguments_.size(); }
  TensorList arguments() const { return unpacked(arguments_); }
  // A cotangent for each output of the call, from the gradients that came for those with a history:
  // zeros where none came; undefined for outputs that do not exist, and, unless `of_all`, for those
  // that have no derivative.
  TensorList cotangents(const torch::autograd::variable_list& gradients, bool of_all) const;

  static TensorList unpacked(const std::vector<torch::autograd::SavedVariable>& saved);

 private:
  template <class NodePtr>
  friend void set_histories(const NodePtr& node, const TensorList& outputs);

  struct Output {
    bool exists = false;
    bool differentiable = false;
    std::vector<int64_t> sizes;
    at::TensorOptions options;
  };

  void note_output(const at::Tensor& output);

  std::vector<torch::autograd::SavedVariable> arguments_;
  std::vector<Output> outputs_;
};

// Makes the outputs of a call, those that have derivatives, outputs of its node.
template <class NodePtr>
void set_histories(const NodePtr& node, const TensorList& outputs) {
  for (const at::Tensor& output : outputs) {
    node->note_output(output);
    if (is_differentiable(output)) torch::autograd::set_history(output, node);
  }
}

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_STAGE_NODE_H_
