#ifndef TORCHLIFT_BATCHING_OUT_FORMS_H_
#define TORCHLIFT_BATCHING_OUT_FORMS_H_

// File: batching/out_forms.h
//
// torch.add(x, 1, out=z): the functional operator, whose result is then written into z.

#include <ATen/core/dispatch/Dispatcher.h>

#include "core/level.h"

namespace torchlift {

// If op only writes its results into keyword arguments (out), and an operator returns the same:
// runs that, and writes. Else does nothing and returns false. A target without elements takes the
// shape of the result, as in libtorch; throws where another target has not the result's shape, or a
// type that the result cannot be cast to.
bool run_out_form(const c10::OperatorHandle& op, const LevelPtr& level, torch::jit::Stack* stack);

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_OUT_FORMS_H_
