#include "bindings/_C/checkpoint.h"

#include <memory>
#include <set>
#include <string>

#include "autodiff/checkpoint.h"

namespace torchlift::python {
namespace {

using checkpoint_internal::Leaves;

// A reference that can be dropped on any thread, with or without the GIL.
std::shared_ptr<PyObject> shared(PyObject* object) {
  return {borrow(object).release().ptr(), [](PyObject* owned) {
            const py::gil_scoped_acquire gil;
            Py_DECREF(owned);
          }};
}

std::string text_of(PyObject* object) {
  const char* text = PyUnicode_AsUTF8(object);
  if (text == nullptr) throw_python_error();
  return text;
}

}  // namespace

PyObject* checkpoint_leaves(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    CheckpointPolicy policy;
    policy.keep = static_cast<CheckpointPolicy::Keep>(borrow(args[2]).cast<int>());
    all_children(args[3], [&](PyObject* name) { return policy.names.insert(text_of(name)), true; });
    const auto f = [held = shared(args[0])](const Leaves& leaves) {
      // The engine has released it.
      const py::gil_scoped_acquire gil;
      return tensors_of(checked(PyObject_CallOneArg(held.get(), list_of(leaves).ptr())).ptr());
    };
    return list_of(checkpoint_internal::run(f, tensors_of(args[1]), policy));
  });
}

PyObject* checkpoint_name_of(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    checkpoint_name(tensor_of(args[0]), text_of(args[1]));
    return borrow(args[0]);
  });
}

}  // namespace torchlift::python
