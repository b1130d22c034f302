#ifndef TORCHLIFT_AUTODIFF_REVERSE_FORMULAS_H_
#define TORCHLIFT_AUTODIFF_REVERSE_FORMULAS_H_

// File: autodiff/reverse_formulas.h
//
// What torchlift adds to libtorch's reverse mode, operator by operator.
//
// NOTE [reverse formulas]
// Reverse mode is libtorch's autograd, and has no key of its own. The few operators whose formula
// gives a wrong gradient without a word, or cannot be batched, have a kernel of ours in the place
// of autograd's, for the devices and levels that we know. It does what autograd's does, which it
// calls, unless a function that is differentiated is at work on this thread:
//
//  - cholesky_inverse reads one triangle, but libtorch gives the other one a gradient too.
//  - native_batch_norm, native_layer_norm and their relatives return the mean and the reciprocal
//    standard deviation of the input, which to libtorch are constants: a loss that uses them would
//    lose a part of its gradient. Here they have a node of their own, which costs nothing more
//    where the loss does not use them.
//  - index_put with a mask that differs between examples: the gradient of the values is read at the
//    places of the mask, as many as it has. Here it is made of where; for a mask that is computed
//    from the inputs of a trace, and values for each of its places, of masked_scatter.
//  - scatter_reduce and index_reduce by "prod" ask whether there are two zeros at a place whenever
//  a
//    graph of their gradient is made, which is no question for vmap or a trace. Here the second
//    derivative asks (autodiff/reverse_products.cc).
//
// Forward mode has the same formulas in autodiff/forward_formulas.cc and forward_linalg.cc, so that
// both modes agree.

namespace torchlift {

// To be called in pairs on one thread, around the function that is differentiated. The first call
// in a process installs the kernels.
void open_reverse_formulas();
void close_reverse_formulas();
bool reverse_formulas_open();

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_REVERSE_FORMULAS_H_
