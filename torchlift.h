#ifndef TORCHLIFT_TORCHLIFT_H_
#define TORCHLIFT_TORCHLIFT_H_

// File: torchlift.h
//
// Everything of torchlift's C++ API:
//
//   #include "torchlift/torchlift.h"
//   namespace tl = torchlift;
//
//   auto per_sample = tl::vmap(tl::grad(loss), {.in_dims = tl::in(tl::kNone, 0, 0)});
//
// It includes little of libtorch: at::Tensor with its methods and operators. Functions such as
// at::softmax are in libtorch's headers of their own, ATen/ops/softmax.h. Not included is
// nn_functional/ensemble.h, which needs torch/nn/module.h.

#include "autodiff/check_grads.h"
#include "autodiff/check_nan.h"
#include "autodiff/checkpoint.h"
#include "autodiff/coloring.h"
#include "autodiff/curvature.h"
#include "autodiff/custom_batching.h"
#include "autodiff/custom_rules.h"
#include "autodiff/grad.h"
#include "autodiff/implicit.h"
#include "autodiff/jacobian.h"
#include "autodiff/jet.h"
#include "autodiff/jvp.h"
#include "autodiff/linear_solvers.h"
#include "autodiff/sparse_jacobian.h"
#include "autodiff/sparsity.h"
#include "autodiff/stop_gradient.h"
#include "autodiff/vjp.h"
#include "batching/batch_dims.h"
#include "batching/chunks.h"
#include "batching/control_flow.h"
#include "batching/fallback.h"
#include "batching/padded.h"
#include "batching/random_rows.h"
#include "batching/vmap.h"
#include "compile/import/exported_program.h"
#include "compile/import/imported_module.h"
#include "compile/import/torchscript.h"
#include "compile/jit.h"
#include "compile/save.h"
#include "compile/trace.h"
#include "core/error.h"
#include "core/level.h"
#include "core/tensor_operators.h"
#include "core/tree.h"
#include "nn_functional/batch_norm.h"
#include "nn_functional/functional_call.h"
#include "nn_functional/linearized.h"
#include "nn_functional/make_functional.h"
#include "nn_functional/meta.h"
#include "nn_functional/optim.h"
#include "nn_functional/per_sample.h"

#endif  // TORCHLIFT_TORCHLIFT_H_
