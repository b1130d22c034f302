#ifndef TORCHLIFT_COMPILE_PASSES_FUNCTIONALIZE_H_
#define TORCHLIFT_COMPILE_PASSES_FUNCTIONALIZE_H_

// File: compile/passes/functionalize.h
//
// Makes a graph without writes: in-place operators, out= forms, writes through views and changes of
// shape in place become operators that give new values.
//
//   def graph(x):                          def graph(x):
//       row = aten.select.int(x, 0, 1)         row = aten.select.int(x, 0, 1)
//       aten.mul_.Scalar(row, 2)               mul = aten.mul.Scalar(row, 2)
//       s = aten.sum(x)                        x_1 = aten.select_scatter(x, mul, 0, 1)
//       return s                               s = aten.sum(x_1)
//                                              return (s, x_1)
//
// What the program wrote into its inputs is given as further outputs, which the caller copies:
//
//   const Functionalized done = functionalize(graph);
//   auto outputs = program.run(inputs);
//   for (const InputUpdate& u : done.updates) inputs[u.input].copy_(outputs[u.output]);
//   outputs.resize(done.outputs);
//
// That order matters only if inputs share memory, which they must not. An output that was a view of
// an input is a tensor of its own, of the numbers after the last write.
//
// Constants that the program writes into are the state that one run leaves to the next. They become
// inputs, after those that there were, and have updates as all inputs have:
//
//   inputs.insert(inputs.end(), done.state.begin(), done.state.end());

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "compile/graph.h"

namespace torchlift::compile {

struct InputUpdate {
  int32_t input = 0;   // index in Graph::inputs
  int32_t output = 0;  // index in Graph::outputs
};

struct Functionalized {
  size_t outputs = 0;  // those that the graph had before
  std::vector<InputUpdate> updates;
  int64_t writes = 0;             // nodes that wrote
  std::vector<at::Tensor> state;  // what the last inputs are, which were constants
};

// Throws UnsupportedError, naming the operator and the fix, where a write has no functional form:
// the operator has no functional variant (functional_variant.h), writes into a constant that shares
// memory with another one, gives storage another size, or changes the shape of an input. The graph
// is as it was then.
Functionalized functionalize(Graph& graph);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_PASSES_FUNCTIONALIZE_H_
