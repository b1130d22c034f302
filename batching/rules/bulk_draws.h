#ifndef TORCHLIFT_BATCHING_RULES_BULK_DRAWS_H_
#define TORCHLIFT_BATCHING_RULES_BULK_DRAWS_H_

// File: batching/rules/bulk_draws.h
//
// Random numbers of libtorch's CPU generator, the same ones that its operators draw and in the same
// order, made many at a time: a mask of dropout takes libtorch 7 ns an element where it asks its
// generator for one word after another, and about 1 ns here.

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>

namespace torchlift {

// target.bernoulli_(p, generator): ones with probability p. False, with nothing done, where that is
// not what libtorch would do here, and the operator is to be called: on other devices, of tensors
// that autograd or a level follows, with gaps or elements that share memory, for a p outside of
// [0, 1], and in builds of libtorch that draw masks with another generator (MKL's, on Intel's
// processors). Moves the generator on as the operator does.
bool draw_bernoulli(const at::Tensor& target, double p,
                    const std::optional<at::Generator>& generator);

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_RULES_BULK_DRAWS_H_
