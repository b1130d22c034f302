#ifndef TORCHLIFT_NN_FUNCTIONAL_GHOST_RULES_H_
#define TORCHLIFT_NN_FUNCTIONAL_GHOST_RULES_H_

// File: nn_functional/ghost_rules.h
//
// The operators whose weights' gradients have norms without being made, and those norms. See NOTE
// [ghost norms] in nn_functional/ghost.h. Not for users.

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace c10 {
class OperatorHandle;
}

namespace torchlift::ghost_internal {

struct Rule;

// A call of an operator that has a rule, for one example.
struct LayerCall {
  const Rule* rule = nullptr;
  std::vector<c10::IValue> arguments;  // none for tensors
  std::vector<int64_t> weight_sizes, bias_sizes;
};

// The squared norm of a parameter's gradient, from the input a of the operator and the gradient g
// of its output.
using OfParameter = at::Tensor (*)(const LayerCall& call, const at::Tensor& a, const at::Tensor& g);

inline constexpr size_t kNoArgument = SIZE_MAX;

struct Rule {
  std::string_view op;
  size_t input, weight, bias;  // positions among the arguments; bias may be kNoArgument
  size_t features;             // the dim of the weight that is one position of the output
  OfParameter of_weight, of_bias;
  bool (*accepts)(const std::vector<c10::IValue>& arguments) = nullptr;
};

// Null where there is none.
const Rule* rule_of(const c10::OperatorHandle& op);

// Whether two matrices of positions by positions are no larger than the gradient of the weight (Z.
// Bu et al. 2022, arXiv:2205.10683).
bool is_worth_it(const LayerCall& call, int64_t output_numel);

}  // namespace torchlift::ghost_internal

#endif  // TORCHLIFT_NN_FUNCTIONAL_GHOST_RULES_H_
