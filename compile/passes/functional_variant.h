#ifndef TORCHLIFT_COMPILE_PASSES_FUNCTIONAL_VARIANT_H_
#define TORCHLIFT_COMPILE_PASSES_FUNCTIONAL_VARIANT_H_

// File: compile/passes/functional_variant.h
//
// The operator that computes what another one writes: aten::mul for aten::mul_ and for mul's out=
// form. Found among the schemas that the dispatcher knows, whoever registered them.

#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <vector>

#include "compile/graph.h"

namespace torchlift::compile {

// NOTE [functional variants]
// For an operator F that writes into arguments w1, w2..., an operator G of the same name (without
// its last underscore; or with "_functional" after it) is its functional variant if
//  - G writes nothing;
//  - its arguments are those of F, by name and type. If F is an out= form, those that it writes are
//    left out, and G may have dtype, layout, device and pin_memory beside them, as factories do;
//  - its results are those of F that are no arguments, then one for each of w1, w2...
struct FunctionalVariant {
  c10::OperatorHandle op;
  std::vector<size_t> written;  // arguments of F
  size_t own_results = 0;       // of F, and of G before those for `written`
  bool out_form = false;
};

std::optional<FunctionalVariant> find_functional_variant(const c10::OperatorHandle& op);

// For an operator that changes the shape of its first argument in place (t_), the one that gives a
// view (t); none for resize_ and others that do more.
std::optional<c10::OperatorHandle> find_view_variant(const c10::OperatorHandle& op);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_PASSES_FUNCTIONAL_VARIANT_H_
