#ifndef TORCHLIFT_AUTODIFF_JET_PRODUCTS_H_
#define TORCHLIFT_AUTODIFF_JET_PRODUCTS_H_

// File: autodiff/jet_products.h
//
// NOTE [products as a batch]
// A bilinear operator of two series has (K + 1)(K + 2) / 2 products of coefficients a_i b_j with
// i + j <= K. They are the examples of one batch: the operator runs once, by its batching rule, and
// its results are summed by order. Where only one factor is a series, there are K + 1. Series in
// many directions (autodiff/jet_series.h) have their own pairs.

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

namespace torchlift::jet_internal {

// The series of f(a, b, addend), where f is bilinear in a and b. a and b are tensors of a jet's
// level, at least one of them a series; addend, which is what is added to the product, may be
// undefined. What else f uses must be values of the level.
at::Tensor product(
    const at::Tensor& a, const at::Tensor& b, const at::Tensor& addend,
    c10::function_ref<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&)> f);

}  // namespace torchlift::jet_internal

#endif  // TORCHLIFT_AUTODIFF_JET_PRODUCTS_H_
