#ifndef TORCHLIFT_AUTODIFF_JET_RULES_H_
#define TORCHLIFT_AUTODIFF_JET_RULES_H_

// File: autodiff/jet_rules.h
//
// What jet does to each operator: the tables are in autodiff/jet_*.cc, and
// autodiff/jet_interpreter.cc reads them. Not for users.
//
// NOTE [rules of series]
// An operator whose row says nothing of the arguments at hand, or that has no row, is done by its
// derivative formula (autodiff/jet_interpreter.cc, NOTE [formulas as series]): that is exact for
// whatever libtorch can differentiate, and slower. So a row only ever says what is known:
//
//   linear_in    groups of arguments. The operator is linear in all tensors of a group together as
//                long as the others are constants. Where every series among the arguments belongs
//                to one group, the batching rule does all coefficients at once; constants of the
//                group are spread first: (value, 0, 0, ...).
//                  add: {self, other}.  mul: {self}, {other}.  addmm: {self, mat1}, {self, mat2}.
//   selectors    arguments that only select which linear function of the others applies (the sign
//                of self in threshold_backward): their coefficient 0 does that.
//   otherwise    what to do where no group holds all series:
//     kFormula     the formula
//     kConstant    the result does not depend on t: that of coefficients 0. Comparisons, rounding.
//     kPiecewise   the operator is affine in a neighborhood of coefficients 0 (max, clamp, sort):
//                  one forward-mode derivative there maps all the other coefficients, in one run
//     kProduct     bilinear in two arguments, plus a third (`addend`) if that is given
//     kFunction    a function of the operator's own type, on tensors of the level: series and
//                  constants, which no domain of the level tracks
//
// An operator that writes in place has the row of the one that does not: mul_ that of mul.

#include <ATen/core/Tensor.h>
#include <ATen/core/boxing/KernelFunction.h>
#include <c10/core/CompileTimeFunctionPointer.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace torchlift::jet_internal {

enum class Otherwise : uint8_t { kFormula, kConstant, kPiecewise, kProduct, kFunction };

// Positions of arguments.
using Group = std::vector<size_t>;

struct JetRule {
  std::string name;  // "aten::mul.Tensor"
  std::vector<Group> linear_in = {};
  Otherwise otherwise = Otherwise::kFormula;
  std::pair<size_t, size_t> factors = {};    // of a kProduct
  std::optional<size_t> addend = {};         // of a kProduct: addmm's self
  c10::KernelFunction constant_addend = {};  // of a kProduct: does it where that is a constant
  Group selectors = {};
  c10::KernelFunction function = {};  // of a kFunction
};

// A static one in each file of rules.
class JetRules {
 public:
  JetRules(std::initializer_list<std::vector<JetRule>> rules);
};

// All of them.
const std::vector<JetRule>& jet_rules();

// The operators of these names (of "aten::"), each linear in the group.
inline std::vector<JetRule> linear_rules(Group group, std::initializer_list<const char*> names) {
  std::vector<JetRule> rules;
  for (const char* name : names) {
    rules.push_back({.name = std::string("aten::") + name, .linear_in = {group}});
  }
  return rules;
}

// The operators of these names, for which `otherwise` holds whatever the arguments.
inline std::vector<JetRule> rules_of(Otherwise otherwise,
                                     std::initializer_list<const char*> names) {
  std::vector<JetRule> rules;
  for (const char* name : names) {
    rules.push_back({.name = std::string("aten::") + name, .otherwise = otherwise});
  }
  return rules;
}

template <class Op>
std::string operator_name() {
  const std::string overload = Op::overload_name;
  return overload.empty() ? Op::name : std::string(Op::name) + "." + overload;
}

// `Function` has the C++ type of the operator.
template <class Op, auto Function>
JetRule function_rule(std::vector<Group> linear_in = {}, Group selectors = {}) {
  return {.name = operator_name<Op>(),
          .linear_in = std::move(linear_in),
          .otherwise = Otherwise::kFunction,
          .selectors = std::move(selectors),
          .function = c10::KernelFunction::makeFromUnboxedFunction(TORCH_FN(Function))};
}

}  // namespace torchlift::jet_internal

#endif  // TORCHLIFT_AUTODIFF_JET_RULES_H_
