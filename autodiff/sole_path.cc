#include "autodiff/sole_path.h"

#include <torch/csrc/autograd/variable.h>

#include <vector>

namespace torchlift {

using torch::autograd::Edge;
using torch::autograd::Node;

SolePaths::SolePaths(const at::Tensor& output) {
  if (!output.requires_grad()) return;
  root_ = torch::autograd::impl::gradient_edge(output);
  std::vector<const Node*> todo{root_.function.get()};
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

}  // namespace torchlift
