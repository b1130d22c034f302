#include "bindings/_C/function_route.h"

#include <ATen/core/grad_mode.h>

#include <deque>
#include <optional>

#include "autodiff/forward_mode.h"
#include "autodiff/interpreted_arguments.h"
#include "core/dispatch.h"
#include "core/domain.h"
#include "core/grad_mode.h"
#include "core/lifted_tensor.h"
#include "core/narrow.h"

namespace torchlift::python {
namespace {

// The level that an operator on the arguments belongs to, or null.
LevelPtr deepest(PyObject* arguments) {
  LevelFinder finder;
  bool any = false;
  all_children(arguments, [&](PyObject* arg) {
    if (!is_tensor(arg)) return true;
    any = any || is_lifted(tensor_of(arg));
    finder(tensor_of(arg));
    return true;
  });
  return any ? finder.level() : LevelPtr();
}

// GradMode as the domains around `level` see it, where GradMode is `grad` in the level's own.
bool outer_grad(const Level& level, bool grad) {
  const OuterGradMode mode = level.outer_grad_mode();
  return mode == OuterGradMode::kInherit ? grad : mode == OuterGradMode::kOn;
}

bool has_tangent(const at::Tensor& t) {
  return t.unsafeGetTensorImpl()->_fw_grad(/*level=*/0, t).defined();
}

bool any_tangent(PyObject* arguments) {
  return !all_children(
      arguments, [](PyObject* arg) { return !is_tensor(arg) || !has_tangent(tensor_of(arg)); });
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

}  // namespace

PyObject* function_route(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    if (C10_UNLIKELY(forward_mode_cut())) return py::int_(3);
    const LevelPtr deepest_level = deepest(args[0]);
    if (C10_LIKELY(!deepest_level)) {
      const bool inside = forward_mode_open() && !level_stack().empty();
      return inside && any_tangent(args[0]) ? py::object(py::int_(5)) : py::none();
    }
    all_children(args[0], [&](PyObject* arg) {
      if (is_tensor(arg)) check_not_interpreted("an autograd Function", tensor_of(arg));
      return true;
    });
    const Level& level = *deepest_level;
    const bool grad = outer_grad(level, c10::GradMode::is_enabled());
    // In the jvp of another Function, forward mode is off for this domain, and not for those
    // around.
    std::optional<at::AutoFwGradMode> forward;
    if (level.forward_at_entry()) forward.emplace(true);
    Outside outside;
    bool batched = false;
    bool narrows = false;
    all_children(args[0], [&](PyObject* arg) {
      if (!is_tensor(arg)) return true;
      const at::Tensor& t = tensor_of(arg);
      narrows = narrows || narrows_level_of(level, t);
      const LiftedTensorImpl* impl = as_lifted(t);
      const bool own = impl != nullptr && &impl->level() == &level;
      batched = batched || (own && impl->bdim().has_value());
      look_at(own ? impl->value() : t, grad, outside);
      return true;
    });
    if (narrows) return py::int_(4);
    if (outside.dual && !batched) return py::int_(2);
    const bool seen = outside.tracked || outside.dual;
    return seen ? py::object(py::bool_(grad)) : py::object(py::none());
  });
}

PyObject* function_lift(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    const LevelPtr level = deepest(args[0]);
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
    const LevelPtr level = deepest(args[1]);
    const OuterGradModeGuard seen(level.get(), OuterGradMode::kOn);
    return checked(PyObject_Call(args[0], args[1], nullptr));
  });
}

PyObject* function_outside(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    const LevelPtr level = deepest(args[1]);
    const DomainScope domain(level ? level->depth() - 1 : 0);
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
