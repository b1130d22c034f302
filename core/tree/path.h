#ifndef TORCHLIFT_CORE_TREE_PATH_H_
#define TORCHLIFT_CORE_TREE_PATH_H_

// File: core/tree/path.h
//
// Where a leaf is in a tree: "[0].w", ".hidden[2]", "['key']". A path is a list of steps on the
// stack of whoever walks the tree, so that walking costs no allocation; str() is for messages.

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>

namespace torchlift {

namespace tree_internal {

// "'w'" for a string, "3" for a number.
template <class Key>
std::string key_text(const Key& key) {
  if constexpr (std::is_convertible_v<const Key&, std::string_view>) {
    return "'" + std::string(std::string_view(key)) + "'";
  } else if constexpr (std::is_enum_v<Key>) {
    return std::to_string(static_cast<std::underlying_type_t<Key>>(key));
  } else if constexpr (std::is_arithmetic_v<Key>) {
    return std::to_string(key);
  } else {
    return "key";
  }
}

[[noreturn]] void throw_leaf_count(size_t expected, size_t got);

}  // namespace tree_internal

// From a node to one of its children.
struct PathStep {
  enum class Kind : uint8_t { kNone, kArgument, kElement, kField, kKey };

  Kind kind = Kind::kNone;
  size_t index = 0;            // of the child among its siblings
  size_t count = 0;            // how many siblings there are, itself included
  const char* name = nullptr;  // of a field
  const void* key = nullptr;   // of a map's item
  std::string (*key_to_text)(const void*) = nullptr;

  static PathStep none() { return {}; }
  // One of a function's arguments.
  static PathStep argument(size_t index, size_t count) { return {Kind::kArgument, index, count}; }
  static PathStep element(size_t index, size_t count) { return {Kind::kElement, index, count}; }
  static PathStep field(const char* name, size_t index, size_t count) {
    return {Kind::kField, index, count, name};
  }
  template <class Key>
  static PathStep keyed(const Key& key, size_t index, size_t count) {
    return {Kind::kKey,
            index,
            count,
            nullptr,
            &key,
            [](const void* k) {
              return tree_internal::key_text(*static_cast<const Key*>(k)); }};
  }

  // "[0]", ".w", "['key']", "argument 0".
  std::string str() const;
  // The name by which a user refers to the child: "w", "key"; empty for an element.
  std::string label() const;
};

struct Path {
  const Path* parent = nullptr;
  PathStep step;

  // Empty for the root.
  std::string str() const;
};

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_TREE_PATH_H_
