#ifndef TORCHLIFT_CORE_TREE_H_
#define TORCHLIFT_CORE_TREE_H_

// File: core/tree.h
//
// Pytrees: how transforms see the arguments and results of a C++ function. A tree is any of
//
//   at::Tensor                                                     a leaf
//   numbers, bool, enums, strings, at::Scalar, vectors of these    constants, carried along
//   unchanged std::tuple, pair, array, vector, optional                      of trees std::map,
//   std::unordered_map                                   of trees, visited in the order of the keys
//   a struct of yours, registered with TORCHLIFT_PYTREE            of trees
//
// nested to any depth. For example:
//
//   struct Params {
//     at::Tensor w, b;
//     std::vector<at::Tensor> hidden;
//     double scale = 1.0;
//   };
//   TORCHLIFT_PYTREE(Params, w, b, hidden, scale);
//
//   Params twice = tree_map(params, [](const at::Tensor& t) { return t * 2; });
//   for_each_leaf(params, [](const at::Tensor& t, const Path& path) { log(path.str(), t.sizes());
//   }); std::vector<at::Tensor> flat = tree_flatten(params);      // w, b, hidden[0], hidden[1]...
//   Params back = tree_unflatten(params, flat);
//
// Everything is resolved at compile time; there are no virtual calls. A type that is no tree is a
// compile-time error that says so.

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include "core/tree/fields.h"
#include "core/tree/path.h"

namespace torchlift {

enum class TreeKind : uint8_t { kTensor, kConstant, kNode, kUnsupported };

// How to walk a T. A node has two static functions:
//
//   children(f, tree, others...)   calls f(step, child, other_children...) for every child
//   mismatch(expected, got)        what differs between the two at this node itself; "" for nothing
//
// Users extend it with TORCHLIFT_PYTREE.
template <class T>
struct Tree {
  static constexpr TreeKind kKind = TreeKind::kUnsupported;
};

template <class T>
inline constexpr bool is_tree_v = Tree<T>::kKind != TreeKind::kUnsupported;

namespace tree_internal {

template <class T>
struct IsConstant
    : std::bool_constant<std::is_arithmetic_v<T> || std::is_enum_v<T> ||
                         std::is_same_v<T, std::string> || std::is_same_v<T, std::string_view> ||
                         std::is_same_v<T, const char*> || std::is_same_v<T, c10::Scalar> ||
                         std::is_same_v<T, c10::Device> || std::is_same_v<T, std::monostate>> {};

// One constant: a vector of sizes has no structure of interest (and vector<bool> no elements).
template <class T, class A>
struct IsConstant<std::vector<T, A>> : IsConstant<T> {};

// std::tuple, pair and array.
template <class T>
struct TupleTree {
  static constexpr TreeKind kKind = TreeKind::kNode;

  template <class F, class... Trees>
  static void children(F&& f, Trees&... trees) {
    each(f, std::make_index_sequence<std::tuple_size_v<T>>(), trees...);
  }

  static std::string mismatch(const T&, const T&) { return {}; }

 private:
  template <class F, size_t... I, class... Trees>
  static void each(F& f, std::index_sequence<I...>, Trees&... trees) {
    (child<I>(f, trees...), ...);
  }

  template <size_t I, class F, class... Trees>
  static void child(F& f, Trees&... trees) {
    f(PathStep::element(I, std::tuple_size_v<T>), std::get<I>(trees)...);
  }
};

// The keys of a map, ordered.
template <class Map>
std::vector<const typename Map::key_type*> sorted_keys(const Map& map) {
  std::vector<const typename Map::key_type*> keys;
  keys.reserve(map.size());
  for (const auto& item : map) keys.push_back(&item.first);
  std::sort(keys.begin(), keys.end(), [](const auto* a, const auto* b) { return *a < *b; });
  return keys;
}

template <class Map>
std::string keys_text(const Map& map) {
  std::string text;
  for (const auto* key : sorted_keys(map)) {
    if (!text.empty()) text += ", ";
    text += key_text(*key);
  }
  return text.empty() ? "no keys" : "the keys " + text;
}

template <class Map>
struct MapTree {
  static constexpr TreeKind kKind = TreeKind::kNode;

  template <class F, class First, class... Rest>
  static void children(F&& f, First& first, Rest&... rest) {
    size_t index = 0;
    for (const auto* key : sorted_keys(first)) {
      f(PathStep::keyed(*key, index++, first.size()), first.find(*key)->second,
        rest.find(*key)->second...);
    }
  }

  static std::string mismatch(const Map& expected, const Map& got) {
    bool same = expected.size() == got.size();
    for (const auto& item : expected) same = same && got.count(item.first) > 0;
    return same ? std::string() : "expected " + keys_text(expected) + ", got " + keys_text(got);
  }
};

}  // namespace tree_internal

template <>
struct Tree<at::Tensor> {
  static constexpr TreeKind kKind = TreeKind::kTensor;
};

template <class T>
requires tree_internal::IsConstant<T>::value struct Tree<T> {
  static constexpr TreeKind kKind = TreeKind::kConstant;
};

template <class... Ts>
struct Tree<std::tuple<Ts...>> : tree_internal::TupleTree<std::tuple<Ts...>> {};

template <class A, class B>
struct Tree<std::pair<A, B>> : tree_internal::TupleTree<std::pair<A, B>> {};

template <class T, size_t N>
struct Tree<std::array<T, N>> : tree_internal::TupleTree<std::array<T, N>> {};

template <class T, class A>
requires(!tree_internal::IsConstant<T>::value) struct Tree<std::vector<T, A>> {
  static constexpr TreeKind kKind = TreeKind::kNode;

  template <class F, class First, class... Rest>
  static void children(F&& f, First& first, Rest&... rest) {
    for (size_t i = 0; i < first.size(); ++i) {
      f(PathStep::element(i, first.size()), first[i], rest[i]...);
    }
  }

  static std::string mismatch(const std::vector<T, A>& expected, const std::vector<T, A>& got) {
    if (expected.size() == got.size()) return {};
    return "expected " + std::to_string(expected.size()) + " elements, got " +
           std::to_string(got.size());
  }
};

// An optional is its value, or nothing: it adds no step to a path.
template <class T>
struct Tree<std::optional<T>> {
  static constexpr TreeKind kKind = TreeKind::kNode;

  template <class F, class First, class... Rest>
  static void children(F&& f, First& first, Rest&... rest) {
    if (first.has_value()) f(PathStep::none(), *first, *rest...);
  }

  static std::string mismatch(const std::optional<T>& expected, const std::optional<T>& got) {
    if (expected.has_value() == got.has_value()) return {};
    return expected.has_value() ? "expected a value, got an empty optional"
                                : "expected an empty optional, got a value";
  }
};

template <class K, class V, class C, class A>
struct Tree<std::map<K, V, C, A>> : tree_internal::MapTree<std::map<K, V, C, A>> {};

template <class K, class V, class H, class E, class A>
struct Tree<std::unordered_map<K, V, H, E, A>>
    : tree_internal::MapTree<std::unordered_map<K, V, H, E, A>> {};

template <class T>
requires tree_internal::HasFields<T>
struct Tree<T> {
  static constexpr TreeKind kKind = TreeKind::kNode;

  template <class F, class... Trees>
  static void children(F&& f, Trees&... trees) {
    size_t index = 0;
    const auto child = [&](const auto& field, size_t count) {
      f(PathStep::field(field.name, index++, count), (trees.*field.pointer)...);
    };
    std::apply([&](const auto&... field) { (child(field, sizeof...(field)), ...); },
               tree_internal::fields_of<T>());
  }

  static std::string mismatch(const T&, const T&) { return {}; }
};

template <class Visitor, class First, class... Rest>
void walk_trees(Visitor& visit, const Path& path, First& first, Rest&... rest);

namespace tree_internal {

// What walk_trees does with the children of a node.
template <class Visitor>
struct Descent {
  Visitor& visit;
  const Path& path;

  template <class... Trees>
  void operator()(const PathStep& step, Trees&... child) const {
    if (step.kind == PathStep::Kind::kNone) {
      walk_trees(visit, path, child...);
    } else {
      walk_trees(visit, Path{&path, step}, child...);
    }
  }
};

}  // namespace tree_internal

// Calls visit(path, leaf, other_leaves...) on every leaf, constants included, of one tree or of
// several of the same structure (see structure_mismatch). What everything below is made of.
template <class Visitor, class First, class... Rest>
void walk_trees(Visitor& visit, const Path& path, First& first, Rest&... rest) {
  using T = std::remove_const_t<First>;
  static_assert(
      is_tree_v<T>,
      "torchlift: this type is not a pytree. A function that is transformed takes and returns "
      "at::Tensor, numbers, strings, std::tuple, pair, array, vector, map, unordered_map, "
      "optional of such, and structs registered by TORCHLIFT_PYTREE(Type, fields...), right "
      "after their definition and in their namespace.");
  if constexpr (Tree<T>::kKind == TreeKind::kNode) {
    Tree<T>::children(tree_internal::Descent<Visitor>{visit, path}, first, rest...);
  } else if constexpr (is_tree_v<T>) {
    visit(path, first, rest...);
  }
}

namespace tree_internal {

template <class T>
inline constexpr bool is_tensor_v = std::is_same_v<std::remove_const_t<T>, at::Tensor>;

template <class T>
void find_mismatch(const T& expected, const T& got, const Path& path, std::string& found);

struct MismatchDescent {
  const Path& path;
  std::string& found;

  template <class T>
  void operator()(const PathStep& step, const T& expected, const T& got) const {
    if (!found.empty()) return;
    if (step.kind == PathStep::Kind::kNone) {
      find_mismatch(expected, got, path, found);
    } else {
      find_mismatch(expected, got, Path{&path, step}, found);
    }
  }
};

template <class T>
void find_mismatch(const T& expected, const T& got, const Path& path, std::string& found) {
  if constexpr (Tree<T>::kKind == TreeKind::kNode) {
    const std::string here = Tree<T>::mismatch(expected, got);
    if (here.empty()) {
      Tree<T>::children(MismatchDescent{path, found}, expected, got);
    } else {
      found = path.parent == nullptr ? here : "at " + path.str() + ": " + here;
    }
  }
}

// Calls f on tensors, with the path if it wants one.
template <class F>
struct LeafVisitor {
  F& f;

  template <class T>
  void operator()(const Path& path, T& leaf) const {
    if constexpr (!is_tensor_v<T>) {
      return;
    } else if constexpr (std::is_invocable_v<F&, T&, const Path&>) {
      f(leaf, path);
    } else {
      f(leaf);
    }
  }
};

}  // namespace tree_internal

// Calls f(tensor) or f(tensor, path) on every tensor, undefined ones included. A tree that is not
// const hands out at::Tensor&, to be replaced if f likes.
template <class T, class F>
void for_each_leaf(T& tree, F&& f) {
  tree_internal::LeafVisitor<std::remove_reference_t<F>> visit{f};
  walk_trees(visit, Path{}, tree);
}

// The tree with every tensor t replaced by f(t) or f(t, path). Constants are copied.
template <class T, class F>
T tree_map(T tree, F&& f) {
  for_each_leaf(tree, [&f](at::Tensor& leaf, const Path& path) {
    if constexpr (std::is_invocable_v<F&, at::Tensor&, const Path&>) {
      leaf = f(leaf, path);
    } else {
      (void)path;
      leaf = f(leaf);
    }
  });
  return tree;
}

// The tensors of a tree, in the order of for_each_leaf.
template <class T>
std::vector<at::Tensor> tree_flatten(const T& tree) {
  std::vector<at::Tensor> leaves;
  for_each_leaf(tree, [&leaves](const at::Tensor& leaf) { leaves.push_back(leaf); });
  return leaves;
}

// A tree with the structure and the constants of `like`, and these tensors. Throws TransformError
// unless there are as many as `like` has.
template <class T>
T tree_unflatten(T like, const std::vector<at::Tensor>& leaves) {
  size_t next = 0;
  for_each_leaf(like, [&](at::Tensor& leaf) {
    if (next < leaves.size()) leaf = leaves[next];
    ++next;
  });
  if (next != leaves.size()) tree_internal::throw_leaf_count(next, leaves.size());
  return like;
}

// What distinguishes the structures of two trees, as in "at .hidden: expected 2 elements, got 3";
// the empty string when they are the same. Shapes and constants are not compared.
template <class T>
std::string structure_mismatch(const T& expected, const T& got) {
  std::string found;
  tree_internal::find_mismatch(expected, got, Path{}, found);
  return found;
}

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_TREE_H_
