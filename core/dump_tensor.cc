#include "core/dump_tensor.h"

#include <torch/csrc/autograd/function.h>

#include <sstream>

#include "core/dispatch.h"
#include "core/lifted_tensor.h"

namespace torchlift {
namespace {

std::string autograd_state(const at::Tensor& t) {
  std::ostringstream out;
  if (const auto& node = t.grad_fn()) {
    out << "grad_fn " << node->name();
  } else if (t.requires_grad()) {
    out << "leaf, requires grad";
  } else {
    out << "no autograd";
  }
  if (t.unsafeGetTensorImpl()->_fw_grad(/*level=*/0, t).defined()) out << ", has a tangent";
  return out.str();
}

void dump_head(std::ostream& out, const at::Tensor& t, const LiftedTensorImpl* impl) {
  if (impl == nullptr) {
    out << "plain tensor: shape " << t.sizes();
    if (t.layout() == at::kStrided) out << ", strides " << t.strides();
    return;
  }
  out << impl->level().describe() << (impl->level().alive() ? "" : ", ENDED") << ": shape "
      << t.sizes() << ", batch dim ";
  if (impl->bdim()) {
    out << *impl->bdim();
  } else {
    out << "none";
  }
}

}  // namespace

std::string dump_tensor(const at::Tensor& t) {
  std::ostringstream out;
  at::Tensor at_level = t;
  for (std::string indent;; indent += "  ") {
    if (!at_level.defined()) {
      out << indent << "undefined tensor\n";
      break;
    }
    const LiftedTensorImpl* impl = as_lifted(at_level);
    out << indent;
    dump_head(out, at_level, impl);
    out << ", " << toString(at_level.scalar_type()) << " " << at_level.device() << "; "
        << autograd_state(at_level) << "; keys "
        << toString(at_level.unsafeGetTensorImpl()->key_set()) << "\n";
    if (impl == nullptr) break;
    at_level = at::Tensor(impl->value());
  }
  return out.str();
}

}  // namespace torchlift
