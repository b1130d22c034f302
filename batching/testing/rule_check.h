#ifndef TORCHLIFT_BATCHING_TESTING_RULE_CHECK_H_
#define TORCHLIFT_BATCHING_TESTING_RULE_CHECK_H_

// File: batching/testing/rule_check.h
//
// Tests of batching rules against an oracle that knows nothing of them: a loop over the examples,
// and a stack. One case is a function of tensors and a generator of examples:
//
//   TEST(MatmulRules, Mm) {
//     check_rule({.name = "mm",
//                 .f = [](const Tensors& in) { return Tensors{at::mm(in[0], in[1])}; },
//                 .make = [](int64_t) { return Tensors{randn({3, 5}), randn({5, 2})}; }});
//   }
//
// check_rule runs it, in strict mode (the loop fallback is an error), over
//   - every choice of batched arguments, every batch dim of each (first, last, mixed), batches of
//   3, 1 and 0;
//   - two nested levels, the arguments batched at the outer, the inner, or both;
//   - backward: vector-Jacobian products inside the level (derivative formulas on batched tensors),
//   through
//     the level (autograd outside), and, if .second_order, of a gradient inside the level;
// and compares values, shapes and dtypes with the loop.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace torchlift::testing {

using Tensors = std::vector<at::Tensor>;

struct RuleCase {
  std::string name;
  // The operator under test. May write its inputs in place: it is handed copies.
  std::function<Tensors(const Tensors&)> f;
  // The inputs of example number i. Shapes and dtypes must not depend on i.
  std::function<Tensors(int64_t i)> make;
  // Inputs that are never batched (running statistics, an index shared by all).
  std::vector<size_t> unbatched = {};
  // Inputs that are always batched: an in-place target.
  std::vector<size_t> always_batched = {};
  bool differentiable = true;
  bool second_order = false;
  double tolerance = 1e-9;  // relative and absolute, in float64
};

// Reports differences as GoogleTest failures.
void check_rule(const RuleCase& c);

// Seeded float64 normal numbers.
at::Tensor randn(at::IntArrayRef sizes);
at::Tensor positive(at::IntArrayRef sizes);                             // in [0.5, 1.5]
at::Tensor integers(int64_t low, int64_t high, at::IntArrayRef sizes);  // int64

}  // namespace torchlift::testing

#endif  // TORCHLIFT_BATCHING_TESTING_RULE_CHECK_H_
