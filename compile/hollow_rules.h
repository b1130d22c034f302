#ifndef TORCHLIFT_COMPILE_HOLLOW_RULES_H_
#define TORCHLIFT_COMPILE_HOLLOW_RULES_H_

// File: compile/hollow_rules.h
//
// NOTE [shapes by device]
// A kernel of the meta device does not know which device the result is for, and a few operators
// give other strides on each, or other shapes: a convolution is channels-last where its backend is,
// and a batch norm in eval mode saves no statistics on the CPU. For these there is a rule here,
// which asks libtorch what it would do with the hollow arguments.

#include <ATen/core/stack.h>

namespace c10 {
class OperatorHandle;
}

namespace torchlift::compile {

// From an operator's arguments, which may be hollow, and what its meta kernel gives of them
// (hollow, too; null where there is none), to its results, in the order of the schema; hollow.
struct HollowRule {
  // Whether it needs no meta kernel.
  bool complete = false;
  torch::jit::Stack (*apply)(const torch::jit::Stack& arguments,
                             torch::jit::Stack results) = nullptr;
};

// Null if what the meta kernel gives is right.
const HollowRule* find_hollow_rule(const c10::OperatorHandle& op);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_HOLLOW_RULES_H_
