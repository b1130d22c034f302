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

#include <cstdint>
#include <memory>
#include <unordered_map>

namespace torch::autograd {
struct Edge;
struct Node;
}  // namespace torch::autograd

namespace torchlift {

// Of the graph of `output`, which must not change meanwhile.
class SolePaths {
 public:
  explicit SolePaths(const at::Tensor& output);
  ~SolePaths();
  SolePaths(const SolePaths&) = delete;
  SolePaths& operator=(const SolePaths&) = delete;

  bool contains(const torch::autograd::Edge& edge) const;

  // The first node above the edge's own that is_wanted(node) accepts, if the edge's own and each
  // node on the way is taken once: then every path from there to the output goes through it. Null
  // otherwise.
  template <class F>
  const torch::autograd::Node* above(const torch::autograd::Edge& edge, const F& is_wanted) const {
    const torch::autograd::Node* node = only_taker(node_of(edge));
    while (node != nullptr && !is_wanted(*node)) node = only_taker(node);
    return node;
  }

 private:
  // Those that take results of a node.
  struct Takers {
    int64_t count = 0;
    const torch::autograd::Node* last = nullptr;
  };

  static const torch::autograd::Node* node_of(const torch::autograd::Edge& edge);
  // Null unless there is one, which takes one result once.
  const torch::autograd::Node* only_taker(const torch::autograd::Node* node) const;

  std::unique_ptr<torch::autograd::Edge> root_;  // held: the node of a leaf belongs to nobody else
  std::unordered_map<const torch::autograd::Node*, Takers> takers_;
};

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_SOLE_PATH_H_
