#ifndef TORCHLIFT_NN_FUNCTIONAL_FUNCTIONAL_CALL_H_
#define TORCHLIFT_NN_FUNCTIONAL_FUNCTIONAL_CALL_H_

// File: nn_functional/functional_call.h
//
// functional_call: calls a torch::nn::Module with other parameters and buffers than its own.
//
//   torch::nn::Sequential net(torch::nn::Linear(3, 8), torch::nn::Tanh(), torch::nn::Linear(8, 1));
//   tl::ModuleState params = tl::extract_state(*net);
//
//   auto loss = [&](const tl::ModuleState& p, const at::Tensor& x, const at::Tensor& y) {
//     return (tl::functional_call(net, p, x) - y).square().mean();
//   };
//   auto per_sample = tl::vmap(tl::grad(loss), {.in_dims = tl::in(tl::kNone, 0, 0)});
//   tl::ModuleState grads = per_sample(params, xs, ys);       // grads["0.weight"]: [batch, 8, 3]
//
// Any module works, written by you or by libtorch, Cloneable or not: its source is not changed, and
// neither is it (NOTE [substitution] in nn_functional/substitution.h). Several threads can call one
// module at once, through functional_call or directly.
//
//   module    a module, a std::shared_ptr to one, or a holder (torch::nn::Linear). forward() is
//             called; for another method use with_state.
//   state     a ModuleState, or std::pair or std::tie of several with no name in common. What it
//             does not name is the module's own; a tensor with several names is replaced under all.
//   args      those of forward().
//
// Buffers that the module writes into in place are written in the state. To get them as results
// instead, also where every example has its own, see ReturnBuffers in nn_functional/buffers.h.
//
// Throws TransformError, before the module runs, when a name is unknown or given twice, when two
// names of one tensor are given different values, or when a value's shape, dtype or device is not
// the module's.
//
// What the module does with a parameter besides calling operators on it is not replaced:
// data_ptr(), data(), requires_grad(), grad(), a tensor computed from it earlier. See
// docs/limits.md.

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "nn_functional/buffers.h"
#include "nn_functional/module_state.h"
#include "nn_functional/substitution.h"

namespace torchlift {
namespace functional_internal {

using States = std::vector<const ModuleState*>;

inline States states_of(const ModuleState& state) { return {&state}; }

template <class... S>
States states_of(const std::tuple<S...>& states) {
  return std::apply([](const auto&... each) { return States{&each...}; }, states);
}

template <class A, class B>
States states_of(const std::pair<A, B>& states) {
  return {&states.first, &states.second};
}

template <class M>
concept Holder = requires(const M& m) {
  typename M::ContainedType;
  m.ptr();
};

// A pointer that owns the module where the caller's handle does.
template <Holder M>
auto pointer_to(const M& holder) {
  return holder.ptr();
}

template <class Impl>
std::shared_ptr<Impl> pointer_to(const std::shared_ptr<Impl>& module) {
  return module;
}

template <class T>
inline constexpr bool is_shared_pointer_v = false;
template <class T>
inline constexpr bool is_shared_pointer_v<std::shared_ptr<T>> = true;

template <class Impl>
requires(!Holder<Impl> && !is_shared_pointer_v<std::remove_const_t<Impl>>)
    std::shared_ptr<Impl> pointer_to(Impl& module) {
  return std::shared_ptr<Impl>(std::shared_ptr<Impl>(), &module);
}

template <class... Args>
constexpr bool wants_buffers() {
  if constexpr (sizeof...(Args) == 0) {
    return false;
  } else {
    return std::is_same_v<std::decay_t<std::tuple_element_t<0, std::tuple<Args...>>>,
                          ReturnBuffers>;
  }
}

// Buffers for one call: copies in their places, and afterwards what is returned for them.
class BufferCopies {
 public:
  BufferCopies(const StateSlots& slots, const States& states, const ReturnBuffers& wanted);

  const std::vector<Substitution>& substitutions() const { return substitutions_; }
  ModuleState results() const;

 private:
  struct Buffer {
    std::string name;
    at::Tensor given, copy;
  };

  const ReturnBuffers& wanted_;
  std::vector<Buffer> buffers_;
  std::vector<Substitution> substitutions_;
};

}  // namespace functional_internal

// A module as a pure function of its state: functional(net)(state, args...) is functional_call(net,
// state, args...), with the names looked up once. It shares the ownership of a module that it was
// made of a shared_ptr or holder of; one given by reference must outlive it. Copyable, and callable
// from several threads. Make it anew when the module's structure, dtype or device changes.
template <class Impl>
class FunctionalModule {
 public:
  FunctionalModule(std::shared_ptr<Impl> module, std::shared_ptr<const StateSlots> slots)
      : module_(std::move(module)), slots_(std::move(slots)) {}

  // With a ReturnBuffers before args: {the output, the buffers after the call}.
  template <class State, class... Args>
  auto operator()(const State& state, Args&&... args) const {
    if constexpr (functional_internal::wants_buffers<Args...>()) {
      return call_returning_buffers(state, std::forward<Args>(args)...);
    } else {
      return call(state, [&] { return module_->forward(std::forward<Args>(args)...); });
    }
  }

  // f() with the state in place of the module's.
  template <class State, class F>
  auto call(const State& state, F&& f) const {
    const SubstitutionScope scope(slots_->bind(functional_internal::states_of(state)));
    return std::forward<F>(f)();
  }

  const std::shared_ptr<Impl>& module() const { return module_; }
  const StateSlots& slots() const { return *slots_; }

 private:
  template <class State, class... Args>
  auto call_returning_buffers(const State& state, const ReturnBuffers& wanted,
                              Args&&... args) const {
    const functional_internal::BufferCopies buffers(*slots_, functional_internal::states_of(state),
                                                    wanted);
    const SubstitutionScope scope(buffers.substitutions());
    auto output = module_->forward(std::forward<Args>(args)...);
    return std::pair(std::move(output), buffers.results());
  }

  std::shared_ptr<Impl> module_;
  std::shared_ptr<const StateSlots> slots_;
};

template <class M>
auto functional(M&& module, FunctionalOptions options = {}) {
  auto pointer = functional_internal::pointer_to(module);
  using Impl = typename decltype(pointer)::element_type;
  auto slots = std::make_shared<const StateSlots>(*pointer, options);
  return FunctionalModule<Impl>(std::move(pointer), std::move(slots));
}

// See the top of this file.
template <class M, class State, class... Args>
auto functional_call(M&& module, const State& state, Args&&... args) {
  return functional(module)(state, std::forward<Args>(args)...);
}

// Calls f() with the state in place of the module's, for methods other than forward:
//
//   at::Tensor code = tl::with_state(net, state, [&] { return net->encode(x); });
template <class M, class State, class F>
auto with_state(M&& module, const State& state, F&& f) {
  return functional(module).call(state, std::forward<F>(f));
}

}  // namespace torchlift

#endif  // TORCHLIFT_NN_FUNCTIONAL_FUNCTIONAL_CALL_H_
