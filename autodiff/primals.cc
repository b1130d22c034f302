#include "autodiff/primals.h"

#include "core/error.h"

namespace torchlift::autodiff_internal {

void check_differentiable(const char* transform, const Path& path, const at::Tensor& leaf) {
  if (leaf.is_floating_point() || leaf.is_complex()) return;
  transform_error(
      transform, path.str(), " is a tensor of dtype ", leaf.scalar_type(), " (shape ", leaf.sizes(),
      "), but only floating-point and complex tensors can be differentiated. Convert it, as "
      "in x.to(at::kFloat), or keep it out of what is differentiated: grad<...> names the "
      "arguments to differentiate, and a lambda can capture the rest.");
}

void throw_nothing_to_differentiate(const char* transform, const std::string& arguments) {
  transform_error(
      transform, arguments,
      arguments.rfind("arguments", 0) == 0 ? " have no tensor" : " has no tensor",
      " to differentiate. Pass numbers as tensors, as in at::scalar_tensor(2.0), or name the "
      "argument that has tensors: grad<1>(f).");
}

}  // namespace torchlift::autodiff_internal
