#include "bindings/_C/function_route.h"

#include <deque>

#include "autodiff/forward_mode.h"
#include "core/domain.h"
#include "core/grad_mode.h"
#include "core/lifted_tensor.h"

namespace torchlift::python {
namespace {

// The deepest lifted tensor among the arguments, or null.
LiftedTensorImpl* deepest(PyObject* arguments) {
  LiftedTensorImpl* found = nullptr;
  all_children(arguments, [&](PyObject* arg) {
    LiftedTensorImpl* impl = is_tensor(arg) ? as_lifted(tensor_of(arg)) : nullptr;
    if (impl != nullptr && (found == nullptr || impl->level().depth() > found->level().depth())) {
      found = impl;
    }
    return true;
  });
  return found;
}

// GradMode as the domains around `level` see it, where GradMode is `grad` in the level's own.
bool outer_grad(const Level& level, bool grad) {
  const OuterGradMode mode = level.outer_grad_mode();
  return mode == OuterGradMode::kInherit ? grad : mode == OuterGradMode::kOn;
}

bool has_tangent(const at::Tensor& t) {
  return t.unsafeGetTensorImpl()->_fw_grad(/*level=*/0, t).defined();
}

// What the domains outside do with an argument.
struct Outside {
  bool tracked = false;  // in reverse mode
  bool dual = false;     // it has a tangent there
};

void look_at(at::Tensor t, bool grad, Outside& outside) {
  while (true) {
    outside.dual = outside.dual || has_tangent(t);
    outside.tracked = outside.tracked || (grad && t.requires_grad());
    const LiftedTensorImpl* impl = as_lifted(t);
    if (impl == nullptr) return;
    grad = outer_grad(impl->level(), grad);
    t = at::Tensor(impl->value());
  }
}

[[noreturn]] void throw_batched_with_tangent() {
  unsupported_error(
      "torchlift",
      "a torch.autograd.Function under vmap got a tensor with a forward-mode tangent "
      "from outside of the vmap. Take the tangent inside: vmap of jvp, not jvp of vmap.");
}

}  // namespace

PyObject* function_route(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    if (C10_UNLIKELY(forward_mode_cut())) return py::int_(3);
    const LiftedTensorImpl* lifted = deepest(args[0]);
    if (C10_LIKELY(lifted == nullptr)) return py::none();
    const Level& level = lifted->level();
    const bool grad = outer_grad(level, c10::GradMode::is_enabled());
    Outside outside;
    bool batched = false;
    all_children(args[0], [&](PyObject* arg) {
      if (!is_tensor(arg)) return true;
      const at::Tensor& t = tensor_of(arg);
      const LiftedTensorImpl* impl = as_lifted(t);
      const bool own = impl != nullptr && &impl->level() == &level;
      batched = batched || (own && impl->bdim().has_value());
      look_at(own ? impl->value() : t, grad, outside);
      return true;
    });
    if (outside.dual) {
      if (batched) throw_batched_with_tangent();
      return py::int_(2);
    }
    return outside.tracked ? py::object(py::bool_(grad)) : py::object(py::none());
  });
}

PyObject* function_lift(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    const LevelPtr level = deepest(args[0])->level_ptr();
    return map_children(args[0], [&](PyObject* arg) {
      if (!is_tensor(arg)) return borrow(arg);
      const at::Tensor& t = tensor_of(arg);
      check_alive(t);
      const LiftedTensorImpl* impl = as_lifted(t);
      const bool own = impl != nullptr && &impl->level() == level.get();
      return own ? borrow(arg) : wrap(lift_alias(t, std::nullopt, level));
    });
  });
}

PyObject* function_forward(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    std::deque<OuterGradModeGuard> hidden;
    for (const LevelPtr& level : level_stack())
      hidden.emplace_back(level.get(), OuterGradMode::kOff);
    return checked(PyObject_Call(args[0], args[1], nullptr));
  });
}

PyObject* function_forward_seen(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    const LiftedTensorImpl* lifted = deepest(args[1]);
    const OuterGradModeGuard seen(lifted == nullptr ? nullptr : &lifted->level(),
                                  OuterGradMode::kOn);
    return checked(PyObject_Call(args[0], args[1], nullptr));
  });
}

PyObject* function_outside(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    const LiftedTensorImpl* lifted = deepest(args[1]);
    const DomainScope domain(lifted == nullptr ? 0 : lifted->level().depth() - 1);
    return checked(PyObject_CallNoArgs(args[0]));
  });
}

PyObject* lower_lifted(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    const LiftedTensorImpl* impl = as_lifted(tensor_of(args[0]));
    if (impl == nullptr) return py::none();
    const py::object bdim = impl->bdim() ? py::object(py::int_(*impl->bdim())) : py::none();
    return py::make_tuple(wrap(impl->value()), bdim, impl->level().size(),
                          static_cast<int>(impl->level().randomness()));
  });
}

PyObject* replace_value(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    LiftedTensorImpl* impl = as_lifted(tensor_of(args[0]));
    impl->replace_value(tensor_of(args[1]), impl->bdim());
    return py::none();
  });
}

}  // namespace torchlift::python
