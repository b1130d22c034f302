// What is asked of the results of rules (custom_rules.h).

#include <string>

#include "autodiff/custom_rules.h"
#include "autodiff/stages.h"
#include "core/error.h"

namespace torchlift::custom_internal {

using at::Tensor;

namespace {

std::string named(const char* what, const Path& path) {
  const std::string at = path.str();
  return std::string(what) + (at.empty() ? "" : " ") + at;
}

}  // namespace

Tensor checked(const char* transform, const char* what, const Path& path, const Tensor& primal,
               const Tensor& derivative) {
  if (!derivative.defined()) return derivative;
  if (!primal.defined()) {
    transform_error(transform, named(what, path), " has shape ", derivative.sizes(),
                    ", but there is an undefined tensor. Leave it undefined too.");
  }
  if (!is_differentiable(primal)) {
    transform_error(transform, named(what, path), " is a tensor of shape ", derivative.sizes(),
                    ", but what it belongs to has dtype ", primal.scalar_type(),
                    ", which is a constant. Return an undefined at::Tensor there.");
  }
  if (derivative.sizes() != primal.sizes()) {
    transform_error(transform, named(what, path), " has shape ", derivative.sizes(),
                    ", but what it belongs to has shape ", primal.sizes(),
                    ". The two must be the same; reduce broadcast dims by .sum(dim).");
  }
  if (derivative.device() != primal.device()) {
    transform_error(transform, named(what, path), " is on ", derivative.device(),
                    ", but what it belongs to is on ", primal.device(),
                    ". Move it, as in derivative.to(primal.device()).");
  }
  if (derivative.scalar_type() == primal.scalar_type()) return derivative;
  if (!is_differentiable(derivative) || derivative.is_complex() != primal.is_complex()) {
    transform_error(transform, named(what, path), " has dtype ", derivative.scalar_type(),
                    ", but what it belongs to has dtype ", primal.scalar_type(),
                    ". Convert it, as in derivative.to(primal.scalar_type()).");
  }
  return derivative.to(primal.scalar_type());
}

void throw_structure(const char* transform, const char* what, const char* like,
                     const std::string& mismatch) {
  transform_error(transform, what, " must have the structure of ", like,
                  ", but does not: ", mismatch, ".");
}

}  // namespace torchlift::custom_internal
