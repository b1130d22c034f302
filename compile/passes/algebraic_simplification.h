#ifndef TORCHLIFT_COMPILE_PASSES_ALGEBRAIC_SIMPLIFICATION_H_
#define TORCHLIFT_COMPILE_PASSES_ALGEBRAIC_SIMPLIFICATION_H_

// File: compile/passes/algebraic_simplification.h
//
// NOTE [exact identities]
// Only what gives the same bits, NaNs, infinities and zeros of either sign included, in the same
// type. So x * 1 is x, but neither x * 0 nor x + 0 is one of these for floating point: the first
// is NaN at infinity, and -0 + 0 is 0 (x + -0 and x - 0 are x). No product of complex numbers is
// simplified: times (1 + 0i), an infinite part makes the other one NaN. A sum over one number is
// none either: libtorch adds it to 0.

#include <cstdint>

#include "compile/graph.h"

namespace torchlift::compile {

// x * 1, x / 1, x - 0, x + -0, integers + 0, x^1; x^2 as x * x; pairs of neg, logical_not,
// bitwise_not, transpose, t and permute; abs, relu, floor, ceil, round, trunc and sign done twice;
// where() of one branch; expand, cat, amax, amin and integer sums that have nothing to do. The 1 or
// 0 may be a number, a constant, or what a factory gives. For graphs without writes. Gives the
// number of nodes that became needless or simpler: the former are dead now.
int64_t algebraic_simplification(Graph& graph);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_PASSES_ALGEBRAIC_SIMPLIFICATION_H_
