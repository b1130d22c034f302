#ifndef TORCHLIFT_NN_FUNCTIONAL_MAKE_FUNCTIONAL_H_
#define TORCHLIFT_NN_FUNCTIONAL_MAKE_FUNCTIONAL_H_

// File: nn_functional/make_functional.h
//
// Modules taken apart into a function and lists of tensors, and several modules stacked into one
// state. The names and results are functorch's; with names of parameters see
// nn_functional/functional_call.h.
//
//   auto [f, params] = tl::make_functional(net);
//   at::Tensor y = f(params, x);
//
//   auto [f, params, buffers] = tl::make_functional_with_buffers(net);
//   at::Tensor y = f(params, buffers, x);
//
//   auto [f, params, buffers] = tl::combine_state_for_ensemble(nets);     // a std::vector of them
//   at::Tensor ys = tl::vmap(f, {.in_dims = tl::in(0, 0, tl::kNone)})(params, buffers, x);
//
//   auto [params, buffers] = tl::stack_module_state(nets);                // ModuleStates
//   auto f = tl::functional(nets[0]);
//   auto one = [&](const tl::ModuleState& p, const tl::ModuleState& b, const at::Tensor& x) {
//     return f(std::tie(p, b), x);
//   };
//
// The tensors are copies; the function calls the module that it was made of (of the first, for
// several), which it keeps alive if it was given by a holder or shared_ptr.

#include <ATen/core/Tensor.h>

#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "nn_functional/functional_call.h"
#include "nn_functional/module_state.h"
#include "nn_functional/substitution.h"

namespace torch::nn {
class Module;
}

namespace torchlift {

using TensorVector = std::vector<at::Tensor>;

struct MakeFunctionalOptions {
  // The parameters returned do not require grad. Transforms do not need it.
  bool disable_autograd_tracking = false;
};

// f(params, buffers, args...): the module's forward with these in the order of module.parameters()
// and buffers(), each tensor once.
template <class Impl>
class FunctionalModuleWithBuffers {
 public:
  explicit FunctionalModuleWithBuffers(FunctionalModule<Impl> module)
      : module_(std::move(module)) {}

  template <class... Args>
  auto operator()(const TensorVector& params, const TensorVector& buffers, Args&&... args) const {
    const SubstitutionScope scope(module_.slots().bind(params, buffers));
    return module_.module()->forward(std::forward<Args>(args)...);
  }

 private:
  FunctionalModule<Impl> module_;
};

// f(params, args...), for a module without buffers.
template <class Impl>
class FunctionalModuleOfParams {
 public:
  explicit FunctionalModuleOfParams(FunctionalModule<Impl> module) : f_(std::move(module)) {}

  template <class... Args>
  auto operator()(const TensorVector& params, Args&&... args) const {
    return f_(params, TensorVector(), std::forward<Args>(args)...);
  }

 private:
  FunctionalModuleWithBuffers<Impl> f_;
};

namespace functional_internal {

// Copies that require grad where the originals do, unless told not to.
TensorVector copies(const TensorVector& tensors, const MakeFunctionalOptions& options);

// Throws TransformError if the module has buffers.
void check_no_buffers(const StateSlots& slots);

// {parameters, buffers} of the modules, stacked along a new first dim.
std::pair<ModuleState, ModuleState> stack_states(
    const std::vector<const torch::nn::Module*>& modules);

// The tensors of a state in the order of names.
TensorVector in_order(const ModuleState& state, const std::vector<std::string>& names);

template <class Models>
std::vector<const torch::nn::Module*> pointers_to(Models& models) {
  std::vector<const torch::nn::Module*> pointers;
  for (auto& model : models) pointers.push_back(&*pointer_to(model));
  return pointers;
}

}  // namespace functional_internal

// {f, params}. Throws TransformError for a module with buffers.
template <class M>
auto make_functional(M&& module, MakeFunctionalOptions options = {}) {
  auto f = functional(module);
  functional_internal::check_no_buffers(f.slots());
  TensorVector params = functional_internal::copies(f.slots().parameters(), options);
  return std::pair(FunctionalModuleOfParams(std::move(f)), std::move(params));
}

// {f, params, buffers}.
template <class M>
auto make_functional_with_buffers(M&& module, MakeFunctionalOptions options = {}) {
  auto f = functional(module);
  TensorVector params = functional_internal::copies(f.slots().parameters(), options);
  TensorVector buffers = functional_internal::copies(f.slots().buffers(), {});
  return std::tuple(FunctionalModuleWithBuffers(std::move(f)), std::move(params),
                    std::move(buffers));
}

// The parameters and buffers of a vector (or array) of modules of one kind, stacked along a new
// first dim: {params, buffers}. Parameters require grad where the modules' do. Throws
// TransformError if there is no module, or if they differ in class, mode (train, eval), names,
// shapes, dtypes or requires_grad.
template <class Models>
std::pair<ModuleState, ModuleState> stack_module_state(Models& models) {
  return functional_internal::stack_states(functional_internal::pointers_to(models));
}

// {f, params, buffers} of such modules, stacked. They do not require grad, as in functorch.
template <class Models>
auto combine_state_for_ensemble(Models& models) {
  const auto [params, buffers] = stack_module_state(models);
  auto f = functional(*std::begin(models));
  const auto detached = [](TensorVector tensors) {
    for (at::Tensor& t : tensors) t = t.detach();
    return tensors;
  };
  TensorVector stacked =
      detached(functional_internal::in_order(params, f.slots().parameter_names()));
  TensorVector stacked_buffers =
      detached(functional_internal::in_order(buffers, f.slots().buffer_names()));
  return std::tuple(FunctionalModuleWithBuffers(std::move(f)), std::move(stacked),
                    std::move(stacked_buffers));
}

}  // namespace torchlift

#endif  // TORCHLIFT_NN_FUNCTIONAL_MAKE_FUNCTIONAL_H_
