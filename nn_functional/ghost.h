#ifndef TORCHLIFT_NN_FUNCTIONAL_GHOST_H_
#define TORCHLIFT_NN_FUNCTIONAL_GHOST_H_

// File: nn_functional/ghost.h
//
// What per_sample_grad_norms (nn_functional/per_sample.h) rests on. Not for users.
//
// NOTE [ghost norms]
// The gradient of a linear layer's weight is a sum of outer products g_t a_t^T, of the gradient g
// of its output and its input a, over positions t. Its squared norm is sum_{t,s}
// (g_t.g_s)(a_t.a_s), which needs no matrix of the weight's size (Goodfellow 2015,
// arXiv:1510.01799; for sequences Li et al. 2021, arXiv:2110.05679). Convolutions are the same over
// unfolded patches; for embeddings a_t.a_s is whether two indices agree.
//
// Where the two matrices of positions by positions would be larger than the gradient, as in a
// convolution with few channels, and for parameters that are used otherwise (those of norm layers,
// say), the gradient is made: autograd does that best.
//
// libtorch's modules have no hooks. But their parameters are substituted where operators take them
// (NOTE [substitution] in nn_functional/substitution.h), and there an observer sees which operator
// uses which parameter. So modules written by anybody are covered, as far as they call these
// operators. The result of such an operator gets a node of ours in the graph, which passes g on in
// the backward pass, and computes the norm there: no more than one layer's g and a are needed at a
// time.
//
// Which parameters are covered, the graph of the forward pass tells: those from which every path to
// the loss goes through that node. It is so where each node from the parameter to ours is taken
// once by a single other one. (Weights that are tied or used twice, also as one transpose or one
// cast of autocast, fork on the way; calls whose result is dropped, or that are part of a gradient
// taken in the forward pass or of a checkpoint, have no node in the graph.) The backward pass is
// then asked for the gradients of all other parameters alone; and for that of a number, which
// each of our nodes claims to depend on, so that it comes by them all.

#include <ATen/core/Tensor.h>

#include <functional>
#include <string>
#include <vector>

#include "nn_functional/module_state.h"

namespace torchlift::ghost_internal {

struct SquaredNorm {
  at::Tensor value;                  // of shape []
  std::vector<std::string> covered;  // names of the parameters whose gradients were not made
};

// The squared norm of the gradient of `loss` by params, some of the parameters of the module that
// the slots belong to. loss(params) calls the module with them, for one example, and returns a
// number; it is called once.
//
// Throws TransformError, in the name of per_sample_grad_norms, if that is no real floating-point
// tensor of shape [].
SquaredNorm squared_norm_of_gradient(const StateSlots& slots, const ModuleState& params,
                                     const std::function<at::Tensor(const ModuleState&)>& loss);

}  // namespace torchlift::ghost_internal

#endif  // TORCHLIFT_NN_FUNCTIONAL_GHOST_H_
