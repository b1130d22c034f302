#include "autodiff/kept_products.h"

#include <ATen/ops/addmm_ops.h>
#include <ATen/ops/addmv_ops.h>
#include <ATen/ops/baddbmm_ops.h>
#include <ATen/ops/bmm_ops.h>
#include <ATen/ops/convolution_ops.h>
#include <ATen/ops/mm_ops.h>
#include <ATen/ops/mv_ops.h>
#include <torch/library.h>

#include <string_view>
#include <utility>

#include "core/error.h"
#include "core/lifted_tensor.h"

namespace torchlift {
namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;

KeptProducts::Scope*& current_scope() {
  static thread_local KeptProducts::Scope* scope = nullptr;
  return scope;
}

// While it lives, products are as always.
class Pause {
 public:
  Pause() : scope_(std::exchange(current_scope(), nullptr)) {}
  ~Pause() { current_scope() = scope_; }
  Pause(const Pause&) = delete;
  Pause& operator=(const Pause&) = delete;

 private:
  KeptProducts::Scope* scope_;
};

template <class Op, class Schema>
struct Kernel;

// BackendSelect comes last before the backends; for these operators nobody else uses it.
template <class Op, class... Args>
struct Kernel<Op, at::Tensor(Args...)> {
  static at::Tensor call(DispatchKeySet keys, Args... args) {
    const DispatchKeySet below =
        keys & DispatchKeySet(DispatchKeySet::FULL_AFTER, DispatchKey::BackendSelect);
    const auto compute = [&] { return Op::redispatch(below, args...); };
    return current_scope() == nullptr ? compute() : KeptProducts::product(Op::name, compute);
  }
};

template <class... Ops>
void add_kernels(torch::Library& library) {
  const auto add = [&]<class Op>(Op*) {
    const std::string name = *Op::overload_name == '\0'
                                 ? std::string(Op::name)
                                 : std::string(Op::name) + "." + Op::overload_name;
    library.impl(name.c_str(), torch::CppFunction::makeFromUnboxedFunction(
                                   &Kernel<Op, typename Op::schema>::call));
  };
  (add(static_cast<Ops*>(nullptr)), ...);
}

// Once, when a policy is first used: until then products cost what they did.
void install_kernels() {
  static const bool installed = [] {
    auto* library = new torch::Library(torch::Library::IMPL, "aten", DispatchKey::BackendSelect,
                                       __FILE__, __LINE__);
    namespace ops = at::_ops;
    add_kernels<ops::mm, ops::bmm, ops::addmm, ops::baddbmm, ops::mv, ops::addmv, ops::convolution>(
        *library);
    return true;
  }();
  (void)installed;
}

uint32_t version_of(const at::Tensor& t) {
  return t.is_inference() ? 0 : t.unsafeGetTensorImpl()->version_counter().current_version();
}

// The same memory without history. A write into either is seen by both.
at::Tensor without_history(const at::Tensor& t) {
  c10::TensorImpl* impl = t.unsafeGetTensorImpl();
  return at::Tensor(impl->shallow_copy_and_detach(impl->version_counter(),
                                                  /*allow_tensor_metadata_change=*/true));
}

const at::Tensor& bottom(const at::Tensor& t) {
  const LiftedTensorImpl* impl = as_lifted(t);
  return impl == nullptr ? t : bottom(impl->value());
}

}  // namespace

KeptProducts::KeptProducts(Which which, std::set<std::string> names)
    : which_(which), names_(std::move(names)) {
  if (which_ != Which::kNone) install_kernels();
}

KeptProducts::Scope::Scope(KeptProducts* products, bool first)
    : products_(products), first_(first), outer_(current_scope()) {
  // Those of a function inside are its own, and none are written down where none are kept.
  current_scope() = products_->which_ == Which::kNone ? nullptr : this;
}

KeptProducts::Scope::~Scope() {
  current_scope() = outer_;
  // What no name asked for was kept until now only.
  if (!first_ || products_->which_ != Which::kNamed) return;
  for (Entry& entry : products_->entries_) {
    if (!entry.named) entry.result = at::Tensor();
  }
}

at::Tensor KeptProducts::product(const char* op, c10::function_ref<at::Tensor()> compute) {
  Scope& scope = *current_scope();
  // What a product is made of (a convolution, of others) belongs to it.
  const Pause pause;
  KeptProducts& products = *scope.products_;
  if (scope.first_) return products.first(op, compute);
  const size_t index = scope.next_++;
  if (index >= products.entries_.size()) {
    unsupported_error("checkpoint", "the function computed ", products.entries_.size(),
                      " matrix products when it ran first, and more when it ran again. It must do "
                      "the same each time.");
  }
  return products.again(products.entries_[index], op, compute);
}

at::Tensor KeptProducts::first(const char* op, c10::function_ref<at::Tensor()> compute) {
  const at::Tensor result = compute();
  const bool keep = result.layout() == c10::kStrided;
  entries_.push_back({op, keep ? without_history(result) : at::Tensor(), version_of(result),
                      /*named=*/false});
  return result;
}

at::Tensor KeptProducts::again(Entry& entry, const char* op,
                               c10::function_ref<at::Tensor()> compute) {
  if (std::string_view(entry.op) != op) {
    unsupported_error("checkpoint", "where the function called ", entry.op, " when it ran first, ",
                      "it called ", op, " when it ran again. It must do the same each time.");
  }
  // The function may have written into it since.
  if (!entry.result.defined() || version_of(entry.result) != entry.version) return compute();
  return without_history(entry.result);
}

void KeptProducts::name(const at::Tensor& value, const std::string& name) {
  const Scope* scope = current_scope();
  if (scope == nullptr || !scope->first_) return;
  KeptProducts& products = *scope->products_;
  if (products.which_ != Which::kNamed || products.names_.count(name) == 0) return;
  const at::Tensor& named = bottom(value);
  if (!named.has_storage()) return;
  for (Entry& entry : products.entries_) {
    const bool same = entry.result.defined() && entry.result.is_alias_of(named) &&
                      entry.result.numel() == named.numel();
    entry.named = entry.named || same;
  }
}

}  // namespace torchlift
