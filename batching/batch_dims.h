#ifndef TORCHLIFT_BATCHING_BATCH_DIMS_H_
#define TORCHLIFT_BATCHING_BATCH_DIMS_H_

// File: batching/batch_dims.h
//
// in_dims and out_dims of vmap: which dim of which tensor holds the examples. A Dims value is a
// prefix of the tree it describes: an int or kNone stands for everything below it.
//
//   0, -1                          this dim of every tensor
//   kNone                          not batched: every example sees the same tensor
//   in(kNone, 0, in(0, 1))         one entry for each argument, or for each element of a tuple,
//   pair, array
//                                  or vector, or for each field of a struct, in their order
//   named({{"w", 0}, {"b", kNone}})  by the names of a struct's fields or the keys of a map
//
// Dims of a tensor count as the function's caller sees it (in_dims: the argument; out_dims: the
// result).

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/lifted_tensor.h"
#include "core/tree/path.h"

namespace torchlift {

// "Not batched" in in_dims and out_dims.
struct NoDim {};
inline constexpr NoDim kNone{};

class Dims {
 public:
  enum class Kind : uint8_t { kDim, kNone, kList, kNamed };

  Dims() : kind_(Kind::kNone) {}
  Dims(NoDim) : kind_(Kind::kNone) {}           // NOLINT(google-explicit-constructor)
  Dims(std::nullopt_t) : kind_(Kind::kNone) {}  // NOLINT(google-explicit-constructor)
  template <class Int,
            std::enable_if_t<std::is_integral_v<Int> && !std::is_same_v<Int, bool>, int> = 0>
  Dims(Int dim) : kind_(Kind::kDim), dim_(dim) {}  // NOLINT(google-explicit-constructor)

  static Dims list(std::vector<Dims> children);
  static Dims named(std::vector<std::pair<std::string, Dims>> children);

  Kind kind() const { return kind_; }
  bool is_prefix() const { return kind_ == Kind::kDim || kind_ == Kind::kNone; }
  // The dim, of a kDim; nullopt of a kNone.
  std::optional<int64_t> dim() const {
    return kind_ == Kind::kDim ? std::optional<int64_t>(dim_) : std::nullopt;
  }
  const std::vector<Dims>& children() const { return children_; }
  const std::vector<std::string>& names() const { return names_; }

  // "0", "None", "(None, 0, {w: 0, b: None})".
  std::string str() const;

 private:
  Kind kind_;
  int64_t dim_ = 0;
  std::vector<Dims> children_;
  std::vector<std::string> names_;  // of the children, of a kNamed
};

// One entry for each argument, element or field.
template <class... Entries>
Dims in(Entries&&... entries) {
  return Dims::list({Dims(std::forward<Entries>(entries))...});
}

// The same, to be read in out_dims.
template <class... Entries>
Dims out(Entries&&... entries) {
  return Dims::list({Dims(std::forward<Entries>(entries))...});
}

// One entry for each field of a struct or key of a map, by name.
Dims named(std::initializer_list<std::pair<std::string, Dims>> entries);

// What a Dims says about one leaf.
struct LeafDim {
  std::optional<int64_t> dim;
  bool exact;  // the entry is for this leaf alone, not for a tree around it
};

// Looks up a leaf by its path. Throws TransformError naming `what` ("in_dims", "out_dims") if the
// structure of `dims` is not a prefix of the tree's.
LeafDim find_dim(const Dims& dims, const Path& path, const char* what);

// Collects the leaves of vmap's arguments, checks them, lifts them. The leaves must stay where they
// are.
//
//   MappedInputs inputs(in_dims, axis_size);
//   walk_trees(inputs, path, argument)...
//   if (inputs.inconsistent()) { inputs.start_report(); walk once more; inputs.throw_report(); }
class MappedInputs {
 public:
  MappedInputs(const Dims& in_dims, std::optional<int64_t> axis_size)
      : in_dims_(in_dims), axis_size_(axis_size), size_(axis_size.value_or(-1)) {}

  // Visitor of walk_trees.
  void operator()(const Path& path, at::Tensor& leaf) { add(path, leaf); }
  template <class Constant>
  void operator()(const Path& path, const Constant& /*constant*/) const {
    if (!in_dims_.is_prefix()) check_constant(path);
  }

  // Whether the batched dims do not all have the same size. If so, one more walk collects what is
  // reported: names cost too much to have them ready on every call.
  bool inconsistent() const { return inconsistent_; }
  void start_report() { reporting_ = true; }
  [[noreturn]] void throw_report() const;

  // The number of examples. Throws if nothing is batched and no axis_size was given.
  int64_t batch_size() const;

  // Replaces every batched leaf by a tensor of `level`.
  void lift(const LevelPtr& level);
  // The same, for the examples from `start` on, as many as the level has. Can be called again.
  void lift_slice(int64_t start, const LevelPtr& level);

  // The device of the examples; CPU where nothing is batched.
  c10::Device device() const;

 private:
  struct Leaf {
    at::Tensor* slot;
    at::Tensor value;
    int64_t dim;
  };

  void add(const Path& path, at::Tensor& leaf);
  void check_constant(const Path& path) const;

  const Dims& in_dims_;
  std::optional<int64_t> axis_size_;
  int64_t size_;
  c10::SmallVector<Leaf, 4> leaves_;
  bool inconsistent_ = false;
  bool reporting_ = false;
  std::string report_;
};

// Takes results out of a level: the visitor that replaces each leaf by its value, the examples in
// the dim that out_dims asks for. A result that does not depend on the example is repeated (as a
// view).
class MappedOutputs {
 public:
  MappedOutputs(const Dims& out_dims, const Level& level) : out_dims_(out_dims), level_(level) {}

  // Visitor of walk_trees.
  void operator()(const Path& path, at::Tensor& leaf) { take_out(path, leaf); }
  template <class Constant>
  void operator()(const Path& path, const Constant& /*constant*/) {
    if (!out_dims_.is_prefix()) check_constant(path);
  }

 private:
  void take_out(const Path& path, at::Tensor& leaf) const;
  void check_constant(const Path& path) const;

  const Dims& out_dims_;
  const Level& level_;
};

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_BATCH_DIMS_H_
