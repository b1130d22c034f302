#include "autodiff/vjp.h"

#include "core/error.h"

namespace torchlift::autodiff_internal {
namespace {

constexpr const char* kVjp = "vjp";

// "the cotangent[0].w".
std::string named(const Path& path) { return "the cotangent" + path.str(); }

}  // namespace

void check_value(const std::vector<at::Tensor>& outputs) {
  for (const at::Tensor& output : outputs) {
    if (output.defined()) return;
  }
  transform_error(
      kVjp,
      "the function returned no tensor, so there is nothing to pull back. Return a tensor, "
      "or a tree with at least one.");
}

void throw_cotangent_structure(const std::string& mismatch) {
  transform_error(kVjp,
                  "the cotangents must have the structure of the function's value, but do not: ",
                  mismatch, ". Give one cotangent for each tensor of the value.");
}

void check_cotangent(const Path& path, const at::Tensor& value, const at::Tensor& cotangent) {
  if (!cotangent.defined()) return;
  if (!value.defined()) {
    transform_error(
        kVjp, named(path), " has shape ", cotangent.sizes(),
        ", but the value there is an undefined tensor. Leave the cotangent undefined too.");
  }
  if (cotangent.sizes() != value.sizes()) {
    transform_error(kVjp, named(path), " has shape ", cotangent.sizes(),
                    ", but the value there has shape ", value.sizes(),
                    ". A cotangent has the shape of the value it belongs to",
                    value.dim() == 0 ? "; for a gradient pass at::ones_like(value)."
                                     : "; to pull back many at once use vmap(pullback).");
  }
  if (cotangent.scalar_type() != value.scalar_type()) {
    transform_error(kVjp, named(path), " has dtype ", cotangent.scalar_type(),
                    ", but the value there has dtype ", value.scalar_type(),
                    ". Convert it, as in cotangent.to(value.scalar_type()).");
  }
  if (cotangent.device() != value.device()) {
    transform_error(kVjp, named(path), " is on ", cotangent.device(),
                    ", but the value there is on ", value.device(),
                    ". Move it, as in cotangent.to(value.device()).");
  }
}

}  // namespace torchlift::autodiff_internal
