#ifndef TORCHLIFT_COMPILE_ARTIFACT_SIGNATURE_H_
#define TORCHLIFT_COMPILE_ARTIFACT_SIGNATURE_H_

// File: compile/artifact/signature.h
//
// How the tensors of a graph are put together: the trees of its inputs and of its outputs.
//
//   // f(params: {"w": Tensor, "b": Tensor}, x: Tensor) -> (Tensor, None)
//   const Signature signature{
//       .inputs = tuple_of({dict_of("params", {tensor("w"), tensor("b")}), tensor("x")}),
//       .outputs = tuple_of({tensor("loss"), none()})};
//   signature.str();   // "(params: {w: Tensor, b: Tensor}, x: Tensor) -> (loss: Tensor, None)"
//
// The leaves of kind kTensor, in order from left to right, are the graph's inputs (outputs).

#include <complex>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <variant>
#include <vector>

#include "compile/graph.h"

namespace torchlift::compile {

struct Structure {
  enum class Kind { kTensor, kNone, kConstant, kTuple, kList, kDict };
  // The deepest nesting that an artifact can have.
  static constexpr int kMaxDepth = 32;

  // What an argument was that is no tensor; the graph was traced for this very value.
  using Constant = std::variant<bool, int64_t, double, std::complex<double>, std::string>;

  Kind kind = Kind::kTensor;
  // The parameter, the field of a struct or named tuple, the key in a dict; may be empty, but in a
  // dict.
  std::string name;
  Constant constant = false;
  std::vector<Structure> children;

  bool is_container() const {
    return kind == Kind::kTuple || kind == Kind::kList || kind == Kind::kDict;
  }
  size_t tensor_count() const;
  // Calls f with each tensor leaf, in order, and with its path: "params.w", "xs[0]", "x".
  void for_each_tensor(
      const std::function<void(const Structure&, const std::string& path)>& f) const;
  std::vector<std::string> tensor_paths() const;
  // "(x: Tensor, {w: Tensor})"; as given by `leaf` for tensors, in order.
  std::string str() const;
  std::string str(const std::function<std::string(size_t)>& leaf) const;

  bool operator==(const Structure& other) const;
  bool operator!=(const Structure& other) const { return !(*this == other); }
};

Structure tensor(std::string name = "");
Structure none(std::string name = "");
Structure constant(Structure::Constant value, std::string name = "");
Structure tuple_of(std::vector<Structure> children, std::string name = "");
Structure list_of(std::vector<Structure> children, std::string name = "");
Structure dict_of(std::vector<Structure> children, std::string name = "");

// kConstant's value as it is printed: True, 3, 0.5, 'mean'.
std::string constant_str(const Structure::Constant& constant);

struct Signature {
  Structure inputs = {
      .kind = Structure::Kind::kTuple, .name = "", .constant = false, .children = {}};
  Structure outputs;

  std::string str() const;
  bool operator==(const Signature& other) const {
    return inputs == other.inputs && outputs == other.outputs;
  }
  bool operator!=(const Signature& other) const { return !(*this == other); }
};

// The flat signature of a graph that has none: a tuple of inputs, and a tuple of outputs or the
// only one, with the names the graph has.
Signature flat_signature(const Graph& graph);

// Throws TransformError unless the trees have as many tensors as the graph has inputs and outputs,
// inputs are a tuple, only containers have children, the keys of each dict differ, and no tree is
// deeper than Structure::kMaxDepth.
void check_signature(const Signature& signature, const Graph& graph);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_ARTIFACT_SIGNATURE_H_
