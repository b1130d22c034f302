#ifndef TORCHLIFT_NN_FUNCTIONAL_ENSEMBLE_H_
#define TORCHLIFT_NN_FUNCTIONAL_ENSEMBLE_H_

// File: nn_functional/ensemble.h
//
// Ensemble: several models as one module, which runs them in one vmap for each architecture among
// them. (torchlift.h does not include this header, because it needs torch/nn/module.h.)
//
//   auto make = [] {
//     return torch::nn::Sequential(torch::nn::Linear(3, 8), torch::nn::Tanh(),
//                                  torch::nn::Linear(8, 2));
//   };
//   tl::Ensemble ensemble = tl::make_ensemble(make, 10, {.init = tl::EnsembleInit::kVmap});
//   torch::optim::Adam optimizer(ensemble->parameters(), 1e-2);
//   at::Tensor losses = ensemble->train_step(optimizer, loss, x, y);     // loss(output, y): [10]
//   at::Tensor out = ensemble->forward(x);                               // [10, batch, 2]
//   torch::save(ensemble, "ensemble.pt");
//
// Its parameters are those of the members, stacked along a new first dim: give them to any
// optimizer that works elementwise (SGD, Adam), save and load them, move them by to(). Members are
// modules of any class whose forward takes tensors and returns one, given by holders, shared_ptrs
// or torch::nn::AnyModules. Their tensors are copied. The first of each group is kept as the code
// to run, and trains or evaluates as the ensemble does.
//
// Members form a group where nothing that can be seen tells them apart but the values of their
// tensors: class, submodules and their printed options, names, shapes, dtypes and requires_grad.
// Not to be seen are a function in torch::nn::Functional and members of a class of yours that its
// pretty_print does not print (an int, a double). Where members differ in such, say so by
// EnsembleOptions::signature.
//
// Throws TransformError for no members, for members some of which train and some of which evaluate.

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <iosfwd>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "batching/vmap.h"
#include "nn_functional/functional_call.h"
#include "nn_functional/module_state.h"
#include "nn_functional/substitution.h"

namespace torch::nn {
class AnyModule;
}

namespace torchlift {

// How make_ensemble gives members different initial values.
enum class EnsembleInit : uint8_t {
  // The factory makes each member.
  kFactory,
  // It makes one; the members are initialised together, by their modules' reset_parameters() under
  // vmap. For models whose initial values all come from there, as those of torch::nn do.
  kVmap,
};

struct EnsembleOptions {
  // kDifferent lets every member draw its own dropout; kSame and kError as in vmap.
  Randomness randomness = Randomness::kDifferent;
  EnsembleInit init = EnsembleInit::kFactory;
  // What tells members apart beside what the top of this file lists.
  std::function<std::string(const torch::nn::Module&)> signature = nullptr;
};

// What a module is called with: a tensor, or several of them in braces.
struct EnsembleInputs {
  EnsembleInputs(const at::Tensor& input) : tensors{input} {}  // NOLINT: meant to convert
  EnsembleInputs(std::initializer_list<at::Tensor> inputs) : tensors(inputs) {}
  explicit EnsembleInputs(std::vector<at::Tensor> inputs) : tensors(std::move(inputs)) {}

  std::vector<at::Tensor> tensors;
};

namespace ensemble_internal {

using Inputs = std::vector<at::Tensor>;

// A module of any class, and its forward for tensors.
struct Member {
  std::shared_ptr<torch::nn::Module> module;
  std::function<at::Tensor(const Inputs&)> forward;
};

[[noreturn]] void throw_arguments(const torch::nn::Module& module, size_t given);

template <class Impl, size_t... I>
constexpr bool takes(std::index_sequence<I...>) {
  return requires(Impl & impl, const Inputs& inputs) {
    { impl.forward(inputs[I]...) } -> std::convertible_to<at::Tensor>;
  };
}

template <class Impl, size_t kCount = 0>
at::Tensor call_forward(Impl& impl, const Inputs& inputs) {
  if constexpr (kCount > 6) {
    throw_arguments(impl, inputs.size());
  } else {
    if (inputs.size() != kCount) return call_forward<Impl, kCount + 1>(impl, inputs);
    constexpr auto kIndices = std::make_index_sequence<kCount>();
    if constexpr (takes<Impl>(kIndices)) {
      return [&]<size_t... I>(std::index_sequence<I...>)->at::Tensor {
        return impl.forward(inputs[I]...);
      }
      (kIndices);
    }
    throw_arguments(impl, inputs.size());
  }
}

template <class M>
Member member_of(const M& model) {
  auto module = functional_internal::pointer_to(model);
  return {module, [module](const Inputs& inputs) { return call_forward(*module, inputs); }};
}
// AnyModules know forward for the classes of arguments that it declares.
Member member_of(const torch::nn::AnyModule& model);

template <class Models>
std::vector<Member> members_of(const Models& models) {
  std::vector<Member> members;
  for (const auto& model : models) members.push_back(member_of(model));
  return members;
}

// Members of one signature.
struct Group {
  Member code;
  StateSlots slots;                          // of the code's module
  std::vector<int64_t> places;               // of the members in the ensemble
  std::shared_ptr<torch::nn::Module> state;  // the stacked tensors, registered
};

// Throws TransformError unless the losses are one number each.
at::Tensor stack_losses(const std::vector<at::Tensor>& losses);

}  // namespace ensemble_internal

class EnsembleImpl : public torch::nn::Module {
 public:
  explicit EnsembleImpl(std::vector<ensemble_internal::Member> members,
                        EnsembleOptions options = {});

  // A vector (or array) of holders, shared_ptrs or AnyModules.
  template <class Models>
  requires(!std::is_same_v<Models, std::vector<ensemble_internal::Member>>) explicit EnsembleImpl(
      const Models& models, EnsembleOptions options = {})
      : EnsembleImpl(ensemble_internal::members_of(models), std::move(options)) {}

  // The outputs of all members for inputs that they share, stacked: [members, ...]. Throws
  // TransformError if they differ in shape or dtype: see outputs.
  at::Tensor forward(const EnsembleInputs& inputs);

  // The same in a list, in the order of the members.
  std::vector<at::Tensor> outputs(const EnsembleInputs& inputs);

  // The outputs of member i for inputs[i]: the inputs have a first dim of members.
  at::Tensor map_members(const EnsembleInputs& inputs);

  // loss(output, targets...) of each member, [members].
  template <class Loss, class... Targets>
  at::Tensor losses(const Loss& loss, const EnsembleInputs& inputs, const Targets&... targets) {
    std::vector<at::Tensor> each;
    for (const at::Tensor& output : outputs(inputs)) each.push_back(loss(output, targets...));
    return ensemble_internal::stack_losses(each);
  }

  // One step of all members on one batch; returns the loss of each, [members].
  template <class Optimizer, class Loss, class... Targets>
  at::Tensor train_step(Optimizer& optimizer, const Loss& loss, const EnsembleInputs& inputs,
                        const Targets&... targets) {
    optimizer.zero_grad();
    const at::Tensor each = losses(loss, inputs, targets...);
    each.sum().backward();
    optimizer.step();
    return each.detach();
  }

  // The number of members.
  int64_t size() const { return size_; }
  // Of architectures, each of which is one vmap.
  int64_t group_count() const { return static_cast<int64_t>(groups_.size()); }
  // A copy of the parameters and buffers of a member, for load_state or functional_call.
  ModuleState member_state(int64_t member) const;

  using torch::nn::Module::to;
  void train(bool on = true) override;
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Device device, bool non_blocking = false) override;
  void pretty_print(std::ostream& stream) const override;

  // Of so many models like the first, initialised together. See make_ensemble.
  static std::shared_ptr<EnsembleImpl> initialised(ensemble_internal::Member first, int64_t members,
                                                   EnsembleOptions options);

 private:
  explicit EnsembleImpl(Randomness randomness) : randomness_(randomness) {}

  // The outputs [members of the group, ...].
  at::Tensor run_group(const ensemble_internal::Group& group, const Dims& in_dim,
                       const ensemble_internal::Inputs& inputs) const;
  // The rows of run(group) for all groups, in the order of the members.
  std::vector<at::Tensor> in_order(
      const std::function<at::Tensor(const ensemble_internal::Group&)>& run) const;
  void add_group(ensemble_internal::Member code, std::vector<int64_t> places,
                 const ModuleState& stacked_state);

  std::vector<ensemble_internal::Group> groups_;
  int64_t size_ = 0;
  Randomness randomness_;
};

TORCH_MODULE(Ensemble);

namespace ensemble_internal {
void check_size(int64_t members);
}

// An ensemble of models that factory() makes, which differ in their initial values only. The
// numbers come from torch's generator.
template <class Factory>
auto make_ensemble(const Factory& factory, int64_t members, EnsembleOptions options = {}) {
  ensemble_internal::check_size(members);
  if (options.init == EnsembleInit::kVmap) {
    ensemble_internal::Member first = ensemble_internal::member_of(factory());
    return Ensemble(EnsembleImpl::initialised(std::move(first), members, std::move(options)));
  }
  std::vector<ensemble_internal::Member> models;
  for (int64_t i = 0; i < members; ++i) models.push_back(ensemble_internal::member_of(factory()));
  return Ensemble(std::make_shared<EnsembleImpl>(std::move(models), std::move(options)));
}

}  // namespace torchlift

#endif  // TORCHLIFT_NN_FUNCTIONAL_ENSEMBLE_H_
