#include "autodiff/jvp.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros_like.h>

#include "core/error.h"

namespace torchlift::autodiff_internal {
namespace {

// "the tangent of argument 1.w".
std::string named(const Path& path) { return "the tangent of " + path.str(); }

}  // namespace

void throw_tangent_structure(const char* transform, const std::string& mismatch) {
  transform_error(transform,
                  "the tangents must have the structure of the primals, but do not: ", mismatch,
                  ". Give one tangent for each tensor of the primals; an undefined one is zero.");
}

void check_tangent(const char* transform, const Path& path, const at::Tensor& primal,
                   const at::Tensor& tangent) {
  if (!tangent.defined()) return;
  if (!primal.defined()) {
    transform_error(transform, named(path), " has shape ", tangent.sizes(),
                    ", but the primal is an undefined tensor. Leave the tangent undefined too.");
  }
  if (tangent.sizes() != primal.sizes()) {
    transform_error(transform, named(path), " has shape ", tangent.sizes(),
                    ", but the primal has shape ", primal.sizes(),
                    ". A tangent has the shape of the primal it belongs to; to push many forward "
                    "at once use vmap over the tangents, or jacfwd.");
  }
  if (tangent.scalar_type() != primal.scalar_type()) {
    transform_error(transform, named(path), " has dtype ", tangent.scalar_type(),
                    ", but the primal has dtype ", primal.scalar_type(),
                    ". Convert it, as in tangent.to(primal.scalar_type()).");
  }
  if (tangent.device() != primal.device()) {
    transform_error(transform, named(path), " is on ", tangent.device(), ", but the primal is on ",
                    primal.device(), ". Move it, as in tangent.to(primal.device()).");
  }
}

JvpResult finish_jvp(ForwardScope& scope, const std::vector<at::Tensor>& outputs, size_t count,
                     JvpOptions options) {
  JvpResult result;
  bool any = false;
  for (ForwardOutput& output : scope.finish(outputs)) {
    result.primals.push_back(std::move(output.primal));
    if (result.tangents.size() == count) continue;
    const at::Tensor& value = result.primals.back();
    any = any || value.defined();
    if (value.defined() && !output.tangent.defined()) {
      if (options.strict) {
        transform_error("jvp", "strict: output ", result.tangents.size(),
                        " of the function (shape ", value.sizes(),
                        ") does not depend on any primal. Leave it out, or leave strict out for a "
                        "tangent of zeros.");
      }
      const c10::NoGradGuard no_grad;
      output.tangent = at::zeros_like(value);
    }
    result.tangents.push_back(std::move(output.tangent));
  }
  if (!any) {
    transform_error("jvp",
                    "the function returned no tensor, so there is nothing to differentiate. "
                    "Return a tensor, or a tree with at least one.");
  }
  return result;
}

}  // namespace torchlift::autodiff_internal
