#include "bindings/_C/factory_functions.h"

#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <array>
#include <utility>

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

// x.new() and x.new_tensor() ask x for its backend, of which a lifted tensor has none: a plain
// tensor of the same dtype and device.
py::object plain_like(PyObject* self) {
  at::Tensor value = tensor_of(self);
  while (const LiftedTensorImpl* impl = as_lifted(value)) value = at::Tensor(impl->value());
  return wrap(at::empty({0}, value.options().requires_grad(false)));
}

enum class Owner : uint8_t { kTorch, kFft, kTensor };

struct Place {
  Owner owner;
  const char* name;
};
constexpr std::array kPlaces{Place{Owner::kTorch, "arange"},
                             Place{Owner::kTorch, "bartlett_window"},
                             Place{Owner::kTorch, "blackman_window"},
                             Place{Owner::kTorch, "empty"},
                             Place{Owner::kTorch, "empty_like"},
                             Place{Owner::kTorch, "empty_strided"},
                             Place{Owner::kTorch, "eye"},
                             Place{Owner::kTorch, "full"},
                             Place{Owner::kTorch, "full_like"},
                             Place{Owner::kTorch, "hamming_window"},
                             Place{Owner::kTorch, "hann_window"},
                             Place{Owner::kTorch, "kaiser_window"},
                             Place{Owner::kTorch, "linspace"},
                             Place{Owner::kTorch, "logspace"},
                             Place{Owner::kTorch, "ones"},
                             Place{Owner::kTorch, "ones_like"},
                             Place{Owner::kTorch, "range"},
                             Place{Owner::kTorch, "scalar_tensor"},
                             Place{Owner::kTorch, "tensor"},
                             Place{Owner::kTorch, "tril_indices"},
                             Place{Owner::kTorch, "triu_indices"},
                             Place{Owner::kTorch, "zeros"},
                             Place{Owner::kTorch, "zeros_like"},
                             Place{Owner::kFft, "fftfreq"},
                             Place{Owner::kFft, "rfftfreq"},
                             Place{Owner::kTensor, "new"},
                             Place{Owner::kTensor, "new_tensor"}};

// The old bodies, and the methods with the new ones, in the order of kPlaces.
std::array<PyCFunctionWithKeywords, kPlaces.size()> old_bodies{};
std::array<PyMethodDef, kPlaces.size()> methods{};

// Not so in a kernel of torch.library, which may be at work on plain tensors.
bool in_user_code() {
  return !c10::impl::tls_local_dispatch_key_set().excluded_.has(
      c10::DispatchKey::AutogradFunctionality);
}

template <size_t kIndex>
PyObject* call_and_lift(PyObject* self, PyObject* args, PyObject* keywords) {
  if (C10_LIKELY(level_stack().empty()) || !in_user_code()) {
    return old_bodies[kIndex](self, args, keywords);
  }
  py::object asked = borrow(self);
  if (kPlaces[kIndex].owner == Owner::kTensor && is_lifted(tensor_of(self))) {
    asked = steal(guarded([&] { return plain_like(self); }));
    if (!asked) return nullptr;
  }
  PyObject* made = old_bodies[kIndex](asked.ptr(), args, keywords);
  if (made == nullptr || !THPVariable_CheckExact(made) || gives_out(keywords)) return made;
  return lifted(made);
}

PyMethodDef** definition_of(PyObject* function) {
  if (PyCFunction_CheckExact(function)) {
    return &reinterpret_cast<PyCFunctionObject*>(function)->m_ml;
  }
  if (Py_TYPE(function) == &PyMethodDescr_Type) {
    return &reinterpret_cast<PyMethodDescrObject*>(function)->d_method;
  }
  return nullptr;  // what somebody else has put there
}

template <size_t kIndex>
void give_new_body(PyObject* owner) {
  const py::object function = steal(PyObject_GetAttrString(owner, kPlaces[kIndex].name));
  if (!function) return PyErr_Clear();
  // What another libtorch has made differently stays, too.
  PyMethodDef** definition = definition_of(function.ptr());
  constexpr int kConvention = METH_VARARGS | METH_KEYWORDS;
  if (definition == nullptr ||
      ((*definition)->ml_flags & ~(METH_STATIC | METH_CLASS)) != kConvention) {
    return;
  }
  methods[kIndex] = **definition;
  old_bodies[kIndex] = reinterpret_cast<PyCFunctionWithKeywords>(
      reinterpret_cast<void (*)()>((*definition)->ml_meth));
  methods[kIndex].ml_meth =
      reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call_and_lift<kIndex>));
  *definition = &methods[kIndex];
}

template <size_t... kIndex>
void give_new_bodies(std::index_sequence<kIndex...> /*all*/) {
  const py::object module = steal(PyImport_ImportModule("torch"));
  if (!module) throw_python_error();
  const std::array<py::object, 3> owners{module, module.attr("fft"), module.attr("Tensor")};
  (give_new_body<kIndex>(owners[static_cast<size_t>(kPlaces[kIndex].owner)].ptr()), ...);
}

}  // namespace

void lift_in_factory_functions() { give_new_bodies(std::make_index_sequence<kPlaces.size()>()); }

}  // namespace torchlift::python
