#ifndef TORCHLIFT_COMPILE_OWN_COPY_H_
#define TORCHLIFT_COMPILE_OWN_COPY_H_

// File: compile/own_copy.h
//
// A tensor with memory of its own.
//
//   at::Tensor mine = own_copy(constant.expand({1000, 3}));   // of 3 numbers, with strides {0, 1}
//
// NOTE [outputs that are constants]
// A function may give what does not depend on its arguments: torch.ones(3), the gradient of a
// parameter that it does not use, a buffer. Called, it makes the first two anew each time. In its
// graph they are constants, which all runs share; and a caller may write into what he gets. So an
// output that is a constant, or a view of one, is copied in each run. That goes for captured
// tensors too, which a graph does not tell from others. State (NOTE [state] in
// compile/captured_state.h) is given as the function gives it: the tensor itself.

#include <ATen/core/Tensor.h>

namespace torchlift::compile {

// The numbers of t, with its strides, in memory that nobody else has; what repeats along a dim is
// stored once, as in t. Tensors of a level, and those without strides, are cloned. Differentiable.
at::Tensor own_copy(const at::Tensor& t);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_OWN_COPY_H_
