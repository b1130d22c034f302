#ifndef TORCHLIFT_COMPILE_ARTIFACT_NATIVE_PLAN_H_
#define TORCHLIFT_COMPILE_ARTIFACT_NATIVE_PLAN_H_

// File: compile/artifact/native_plan.h
//
// What of a program a compiler of machine code is to compute, and what is done around it.
//
//   const NativePlan plan = native_plan(graph);     // plan.computed goes to the compiler
//   const NativeFrame frame(graph);
//   auto compute = [&](const std::vector<at::Tensor>& inputs) { return library.run(inputs); };
//   std::vector<at::Tensor> outputs = frame.run(inputs, compute);   // as the graph gives them
//
// NOTE [what compiled code computes]
// Compiled code takes tensors and gives new ones. It cannot write into its inputs, and it cannot
// say that an output is an input, or a view of one, or that two outputs share their memory. So it
// computes the tensors that own the memory of the outputs, and the graph `finish` makes the views
// from them, as the program would have. The program's constants are inputs of the compiled code: a
// file holds them once, for it and for the replay.

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "compile/graph.h"
#include "compile/replay.h"
#include "compile/state_gate.h"

namespace torchlift::compile {

struct NativePlan {
  // Without writes. Inputs: those of the program, then `constants`, those that are written into
  // first. Outputs: `results`, then what goes back into the inputs `updates`. The constants that it
  // still has are wrapped numbers.
  Graph computed;
  std::vector<at::Tensor> constants;
  size_t state = 0;  // how many of them are written into
  size_t results = 0;
  std::vector<int32_t> updates;  // indices of inputs
  // Of the program's inputs and the results, in this order. It has no nodes but views.
  Graph finish;
};

// Throws UnsupportedError for writes that have no functional form (compile/passes/functionalize.h),
// and for a program that is not all on the CPU.
NativePlan native_plan(const Graph& graph);

// Runs what computes `computed` in the place of the program.
class NativeFrame {
 public:
  using Compute = std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)>;

  // Throws what native_plan() does.
  explicit NativeFrame(const Graph& graph);

  // Whether `compute` is right for these: no input or constant that is written into shares memory
  // with another one, which it would not notice, and no dynamic dim is smaller than kLeastDim.
  bool can_run(const std::vector<at::Tensor>& inputs) const;
  // torch's exporter takes dims of the sizes 0 and 1 for others than the rest.
  static constexpr int64_t kLeastDim = 2;

  // inputs: Program::prepared, and can_run. Throws, before anything is written, UnsupportedError if
  // what compute gives is not what it was to give.
  std::vector<at::Tensor> run(const std::vector<at::Tensor>& inputs, const Compute& compute) const;

 private:
  std::vector<int64_t> dims(const std::vector<at::Tensor>& inputs) const;
  void check(const std::vector<at::Tensor>& found, const std::vector<int64_t>& dims) const;

  std::vector<at::Tensor> with_constants(const std::vector<at::Tensor>& inputs) const;

  NativePlan plan_;
  Program finish_;
  // Of runs with state.
  std::unique_ptr<StateGate> gate_ = std::make_unique<StateGate>();
};

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_ARTIFACT_NATIVE_PLAN_H_
