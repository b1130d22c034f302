#ifndef TORCHLIFT_AUTODIFF_JET_INTERPRETER_H_
#define TORCHLIFT_AUTODIFF_JET_INTERPRETER_H_

// File: autodiff/jet_interpreter.h
//
// The interpreter of a jet's level: its batch dim holds Taylor coefficients. Not for users; see
// core/interpreter.h for levels with an interpreter, autodiff/jet_rules.h for what it does.

#include <memory>

#include "core/interpreter.h"

namespace torchlift::jet_internal {

std::shared_ptr<const Interpreter> jet_interpreter();

// Of series in D directions (NOTE [series in many directions] in autodiff/jet_series.h), whose
// levels have a size of D + 2, and of 1 + D + D^2.
std::shared_ptr<const Interpreter> laplacian_interpreter();
std::shared_ptr<const Interpreter> hessian_interpreter();

}  // namespace torchlift::jet_internal

#endif  // TORCHLIFT_AUTODIFF_JET_INTERPRETER_H_
