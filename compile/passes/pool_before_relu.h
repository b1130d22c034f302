#ifndef TORCHLIFT_COMPILE_PASSES_POOL_BEFORE_RELU_H_
#define TORCHLIFT_COMPILE_PASSES_POOL_BEFORE_RELU_H_

// File: compile/passes/pool_before_relu.h
//
// max_pool2d(relu(x)) is relu(max_pool2d(x)): relu works on a quarter of the numbers, or fewer.
//
//   relu = relu(conv); pool, i = max_pool2d_with_indices(relu, [2, 2])
//   ->
//   pool, i = max_pool2d_with_indices(conv, [2, 2]); relu = relu(pool)
//
// So does its gradient, which asks whether the largest number of a window is above zero before it
// goes to that number's place, rather than whether each number there is:
//
//   b = max_pool2d_with_indices_backward(g, relu, ..., i); t = threshold_backward(b, relu, 0)
//   ->
//   m = threshold_backward(g, pooled, 0); t = max_pool2d_with_indices_backward(m, conv, ..., i)
//
// The indices differ where no number of a window is above zero, and there the gradient is zero. So
// nothing else may read them, or the result of relu.

#include <cstdint>

#include "compile/graph.h"

namespace torchlift::compile {

// How many pools changed places with a relu. For functional graphs. What is dead afterwards stays.
int64_t pool_before_relu(Graph& graph);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_PASSES_POOL_BEFORE_RELU_H_
