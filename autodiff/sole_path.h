#ifndef TORCHLIFT_AUTODIFF_SOLE_PATH_H_
#define TORCHLIFT_AUTODIFF_SOLE_PATH_H_

// File: autodiff/sole_path.h
//
// Where all of a gradient passes. Not for users.
//
//   const SolePaths paths(loss);
//   const Node* node = paths.above(gradient_edge(weight), [&](const Node& n) { return &n == layer;
//   });
//
// That a graph takes a tensor once says little: what takes it (a transpose, a cast by autocast, the
// view that a formula of a second derivative has saved) may itself be taken twice.

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>

#include <cstdint>
#include <unordered_map>

namespace torchlift {

// Of the graph of `output`, which must not change meanwhile.
class SolePaths {
 public:
  explicit SolePaths(const at::Tensor& output);

  bool contains(const torch::autograd::Edge& edge) const {
    return takers_.count(edge.function.get()) > 0;
  }

  // The first node above the edge's own that is_wanted(node) accepts, if the edge's own and each
  // node on the way is taken once: then every path from there to the output goes through it. Null
  // otherwise.
  template <class F>
  const torch::autograd::Node* above(const torch::autograd::Edge& edge, const F& is_wanted) const {
    const torch::autograd::Node* node = edge.function.get();
    while (true) {
      const auto found = takers_.find(node);
      if (found == takers_.end() || found->second.count != 1) return nullptr;
      node = found->second.last;
      if (is_wanted(*node)) return node;
    }
  }

 private:
  // Those that take results of a node.
  struct Takers {
    int64_t count = 0;
    const torch::autograd::Node* last = nullptr;
  };

  torch::autograd::Edge root_;  // held: the node of a leaf belongs to nobody else
  std::unordered_map<const torch::autograd::Node*, Takers> takers_;
};

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_SOLE_PATH_H_
