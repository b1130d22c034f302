#include "autodiff/scalar_gradient.h"

#include <ATen/ops/ones.h>

#include <string>
#include <utility>

#include "autodiff/reverse.h"
#include "core/error.h"

namespace torchlift {

std::vector<at::Tensor> scalar_gradient(const char* transform, LeafFunction f,
                                        const std::vector<at::Tensor>& inputs, LeafOutputs& out) {
  ReverseScope scope;
  std::vector<at::Tensor> primals;
  for (const at::Tensor& input : inputs) primals.push_back(scope.primal(input));
  out = f(primals);
  if (out.values != 1 || !out.leaves[0].defined() || out.leaves[0].dim() != 0 ||
      !out.leaves[0].is_floating_point()) {
    transform_error(transform,
                    "the function must return one real number, a floating-point tensor of shape "
                    "[], but it returned ",
                    out.values, " tensors",
                    out.values == 1 && out.leaves[0].defined()
                        ? c10::str(", of shape ", out.leaves[0].sizes(), " and dtype ",
                                   out.leaves[0].scalar_type())
                        : std::string(),
                    ". Reduce it, as in loss.sum().");
  }
  const Pullback pullback = scope.finish(out.leaves);
  std::vector<at::Tensor> cotangents(out.leaves.size());
  cotangents[0] = at::ones({}, out.leaves[0].options());
  out.leaves = pullback.outputs();
  return pullback(std::move(cotangents), /*free_graph=*/true);
}

}  // namespace torchlift
