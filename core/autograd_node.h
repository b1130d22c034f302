#ifndef TORCHLIFT_CORE_AUTOGRAD_NODE_H_
#define TORCHLIFT_CORE_AUTOGRAD_NODE_H_

// File: core/autograd_node.h
//
// Making nodes of libtorch's graphs, in every version of it.

#include <c10/util/intrusive_ptr.h>

#include <memory>
#include <type_traits>

namespace torch::autograd {
struct Edge;
struct Node;
}  // namespace torch::autograd

namespace torchlift {

// A new node of class T, for set_history. libtorch 2.15 counts references to nodes by itself,
// earlier ones by shared_ptr. Who calls it includes torch/csrc/autograd/function.h, which takes
// long to compile.
//
//   auto node = make_node<GatherRowsBackward>();
//   torch::autograd::set_history(result, node);
template <class T, class Base = torch::autograd::Node, class EdgeType = torch::autograd::Edge>
auto make_node() {
  if constexpr (std::is_same_v<decltype(EdgeType::function), std::shared_ptr<Base>>) {
    return std::shared_ptr<T>(new T(), [](Base* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>();
  }
}

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_AUTOGRAD_NODE_H_
