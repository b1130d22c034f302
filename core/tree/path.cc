#include "core/tree/path.h"

#include "core/error.h"

namespace torchlift {

std::string PathStep::label() const {
  if (kind == Kind::kField) return name;
  if (kind != Kind::kKey) return {};
  std::string text = key_to_text(key);
  const bool quoted = text.size() >= 2 && text.front() == '\'';
  return quoted ? text.substr(1, text.size() - 2) : text;
}

std::string PathStep::str() const {
  switch (kind) {
    case Kind::kNone:
      break;
    case Kind::kArgument:
      return "argument " + std::to_string(index);
    case Kind::kElement:
      return "[" + std::to_string(index) + "]";
    case Kind::kField:
      return std::string(".") + name;
    case Kind::kKey:
      return "[" + key_to_text(key) + "]";
  }
  return {};
}

std::string Path::str() const {
  return parent == nullptr ? step.str() : parent->str() + step.str();
}

namespace tree_internal {

void throw_leaf_count(size_t expected, size_t got) {
  transform_error("tree_unflatten", "got ", got, " tensors for a tree that has ", expected,
                  ". Give one tensor for each leaf of the tree, in the order of tree_flatten.");
}

}  // namespace tree_internal
}  // namespace torchlift
