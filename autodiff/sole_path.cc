#include "autodiff/sole_path.h"

#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include <vector>

namespace torchlift {

using torch::autograd::Edge;
using torch::autograd::Node;

SolePaths::SolePaths(const at::Tensor& output) {
  if (!output.requires_grad()) return;
  root_ = std::make_unique<Edge>(torch::autograd::impl::gradient_edge(output));
  std::vector<const Node*> todo{node_of(*root_)};
  takers_.emplace(todo.back(), Takers());
  while (!todo.empty()) {
    const Node* node = todo.back();
    todo.pop_back();
    for (const Edge& edge : node->next_edges()) {
      if (edge.function == nullptr) continue;
      const auto [found, is_new] = takers_.try_emplace(edge.function.get());
      ++found->second.count;
      found->second.last = node;
      if (is_new) todo.push_back(edge.function.get());
    }
  }
}

SolePaths::~SolePaths() = default;

bool SolePaths::contains(const Edge& edge) const { return takers_.count(node_of(edge)) > 0; }

const Node* SolePaths::node_of(const Edge& edge) { return edge.function.get(); }

const Node* SolePaths::only_taker(const Node* node) const {
  const auto found = takers_.find(node);
  return found != takers_.end() && found->second.count == 1 ? found->second.last : nullptr;
}

}  // namespace torchlift
