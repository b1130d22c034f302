#ifndef TORCHLIFT_COMPILE_DYNAMIC_H_
#define TORCHLIFT_COMPILE_DYNAMIC_H_

// File: compile/dynamic.h
//
// One graph for inputs of any size along some dims.
//
//   const auto traced = [&](const std::vector<at::Tensor>& inputs) { return trace(f, inputs...); };
//   Graph graph = trace_dynamic(traced, {xs, w}, {{.name = "batch", .places = {{0, 0}}}});
//   // def graph(x: f32[batch, 3], w: f32[3]):
//
// NOTE [dynamic dims]
// The function is traced several times, at different sizes of the dynamic dims, and the graphs are
// compared. They must be the same operators in the same order. A number that differs between them
// (a size to view as, a stride, the divisor of a mean) becomes an expression in the sizes: a
// polynomial of degree 2 for integers, a multiple or a fraction of one for others. One trace more
// than the expressions have coefficients checks them. So nothing has to be known of how a function
// comes by its numbers, rules and derivative formulas work on plain ints, and what does specialise
// shows as a difference: it is an error that names the operator.
//
// The graphs of branches and loops are compared in the same way; each has the dynamic dims of the
// graph around as sizes of its own inputs.
//
// Sizes of 0 and 1 are tried, too: if the graph is not the same there, it refuses them when run.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "compile/graph.h"

namespace torchlift::compile {

// A size that may differ from call to call.
struct DynamicDim {
  struct Place {
    int32_t input;
    int32_t dim;
  };
  std::string name;
  std::vector<Place> places;  // which dims have this size; the same in all of them
};

using TraceFunction = std::function<Graph(const std::vector<at::Tensor>& inputs)>;

// `traced` gives the graph of a function for given inputs. Throws TransformError if the places do
// not exist or differ in size; UnsupportedError if the function specialises.
Graph trace_dynamic(const TraceFunction& traced, const std::vector<at::Tensor>& examples,
                    const std::vector<DynamicDim>& dims);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_DYNAMIC_H_
