#ifndef TORCHLIFT_COMPILE_ELEMENTARY_H_
#define TORCHLIFT_COMPILE_ELEMENTARY_H_

// File: compile/elementary.h
//
// exp, tanh, gelu and their like on many floats, for replays: two to six times as fast as
// libtorch's kernels where these call a mathematical library for each vector (docs/compile.md has
// figures).
//
//   const ElementaryFunction* tanh = elementary_function("aten::tanh");
//   if (tanh != nullptr && tanh->serves(stack)) tanh->write(stack, out);
//
// Results are within 3 units in the last place of the exact ones, as libtorch's are, but not the
// same bits (compile/vector_math.h says how much each errs).

#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>

#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

namespace torchlift::compile {

// An operator of tensors of one shape, element by element.
class ElementaryFunction {
 public:
  // Writes y, of `count` numbers; inputs are as many. y may be one of them.
  using Kernel = void (*)(const float* const* inputs, float* y, int64_t count);

  ElementaryFunction(std::string_view name, size_t arity, std::vector<Kernel> kernels)
      : name_(name), arity_(arity), kernels_(std::move(kernels)) {}

  // "aten::tanh"
  std::string_view name() const { return name_; }

  // Those that the processor can run: for its widest vectors, which write() uses, and narrower
  // ones.
  const std::vector<Kernel>& kernels() const { return kernels_; }

  // Whether the operator's arguments are ones for write(): dense float tensors of one layout on a
  // CPU, of which neither levels nor autograd know, and options as the function has them.
  bool serves(const torch::jit::Stack& arguments) const;
  // And whether `out` is one, too.
  bool serves(const torch::jit::Stack& arguments, const at::Tensor& out) const;

  // Into `out`: of the same dtype, shape and strides, perhaps one of the arguments.
  void write(const torch::jit::Stack& arguments, const at::Tensor& out) const;

 private:
  std::string_view name_;
  size_t arity_;
  std::vector<Kernel> kernels_;
};

// The one of that name, or null: also where the processor has no vectors of the kind they need.
const ElementaryFunction* elementary_function(std::string_view name);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_ELEMENTARY_H_
