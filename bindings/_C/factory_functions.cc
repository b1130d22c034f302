#include "bindings/_C/factory_functions.h"

#include <array>

#include "bindings/_C/py_util.h"
#include "core/level.h"
#include "core/lifted_tensor.h"
#include "core/promotion.h"

namespace torchlift::python {
namespace {

bool gives_out(PyObject* keywords) {
  return keywords != nullptr && PyDict_GetItemString(keywords, "out") != nullptr;
}

// Of a tensor that nobody else has seen. A new one, since its Python object holds the value.
PyObject* lifted(PyObject* made) {
  return guarded([&] {
    const py::object owned = steal(made);
    const at::Tensor& plain = tensor_of(made);
    if (is_lifted(plain)) return owned;
    const at::Tensor inside = made_inside(plain.variable_data());
    if (!is_lifted(inside)) return owned;
    if (plain.requires_grad()) inside.requires_grad_(true);
    return wrap(inside);
  });
}

constexpr std::array kNames = {"empty", "empty_like", "empty_strided", "tensor"};

// The old bodies, and the methods with the new ones, in the order of kNames.
std::array<PyCFunctionWithKeywords, kNames.size()> old_bodies{};
std::array<PyMethodDef, kNames.size()> methods{};

template <size_t kIndex>
PyObject* call_and_lift(PyObject* self, PyObject* args, PyObject* keywords) {
  PyObject* made = old_bodies[kIndex](self, args, keywords);
  if (C10_LIKELY(level_stack().empty()) || made == nullptr) return made;
  if (!THPVariable_CheckExact(made) || gives_out(keywords)) return made;
  return lifted(made);
}

template <size_t kIndex>
void give_new_body(PyObject* module) {
  const py::object function = steal(PyObject_GetAttrString(module, kNames[kIndex]));
  if (!function) return PyErr_Clear();
  // What somebody else has put there, or another libtorch has made differently, stays.
  if (!PyCFunction_CheckExact(function.ptr())) return;
  auto* builtin = reinterpret_cast<PyCFunctionObject*>(function.ptr());
  constexpr int kConvention = METH_VARARGS | METH_KEYWORDS;
  if ((builtin->m_ml->ml_flags & ~(METH_STATIC | METH_CLASS)) != kConvention) return;
  methods[kIndex] = *builtin->m_ml;
  old_bodies[kIndex] = reinterpret_cast<PyCFunctionWithKeywords>(
      reinterpret_cast<void (*)()>(builtin->m_ml->ml_meth));
  methods[kIndex].ml_meth =
      reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call_and_lift<kIndex>));
  builtin->m_ml = &methods[kIndex];
}

template <size_t... kIndex>
void give_new_bodies(std::index_sequence<kIndex...> /*all*/) {
  const py::object module = steal(PyImport_ImportModule("torch"));
  if (!module) throw_python_error();
  (give_new_body<kIndex>(module.ptr()), ...);
}

}  // namespace

void lift_in_factory_functions() { give_new_bodies(std::make_index_sequence<kNames.size()>()); }

}  // namespace torchlift::python
