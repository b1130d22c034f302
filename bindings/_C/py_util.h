#ifndef TORCHLIFT_BINDINGS_C_PY_UTIL_H_
#define TORCHLIFT_BINDINGS_C_PY_UTIL_H_

// File: bindings/_C/py_util.h
//
// What the functions of the extension share: owned references, errors, the GIL, tensors in and out.
// The functions that lie on a hot path are plain METH_FASTCALL functions, a few hundred nanoseconds
// cheaper a call than those pybind11 makes.

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <utility>
#include <vector>

#include "batching/rules/assumptions.h"
#include "core/error.h"

namespace torchlift::python {

namespace py = pybind11;

using FastCall = PyObject* (*)(PyObject* self, PyObject* const* args, Py_ssize_t count);

inline py::object steal(PyObject* object) { return py::reinterpret_steal<py::object>(object); }
inline py::object borrow(PyObject* object) { return py::reinterpret_borrow<py::object>(object); }

// Throws the Python error that is set.
[[noreturn]] void throw_python_error();

// A new reference, checked: what nearly every C-API call returns.
inline py::object checked(PyObject* object) {
  if (C10_UNLIKELY(object == nullptr)) throw_python_error();
  return steal(object);
}

// dict[key] without a default of a subclass; null where there is none. An error of the key's is
// thrown.
inline py::object dict_item(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && PyErr_Occurred()) throw_python_error();
  return value == nullptr ? py::object() : borrow(value);
}

// Sets torchlift.TransformError, UnsupportedError or AssumptionError (see set_error_types).
void set_python_error(const TransformError& error);
void set_python_error(const UnsupportedError& error);
void set_python_error(const AssumptionError& error);

// NOTE [errors of operators]
// An error of ours that is thrown under one of torch's own Python functions (x.item(), say) was
// turned into a plain RuntimeError by it. Where it leaves a transform it becomes
// torchlift.UnsupportedError, with its traceback. To be called with an error set.
void retag_python_error();

// Forgets an error of Python if it is torchlift.UnsupportedError, or to become it; else throws it
// on.
void forget_if_unsupported(python_error& error);

// The exception classes, made by torchlift/_errors.py.
void set_error_types(py::object transform_error, py::object unsupported_error,
                     py::object assumption_error);

// Runs a function body, turning C++ exceptions into Python ones.
template <class F>
PyObject* guarded(F&& body) {
  const auto run = [&]() -> PyObject* {
    HANDLE_TH_ERRORS
    try {
      return body().release().ptr();
    } catch (const TransformError& error) {
      set_python_error(error);
      return nullptr;
    } catch (const UnsupportedError& error) {
      set_python_error(error);
      return nullptr;
    } catch (const AssumptionError& error) {
      set_python_error(error);
      return nullptr;
    }
    END_HANDLE_TH_ERRORS
  };
  PyObject* result = run();
  if (C10_UNLIKELY(result == nullptr)) retag_python_error();
  return result;
}

// The same for functions that pybind11 calls.
template <class F>
py::object guarded_object(F&& body) {
  PyObject* result = guarded(std::forward<F>(body));
  if (C10_UNLIKELY(result == nullptr)) throw py::error_already_set();
  return steal(result);
}

// The GIL is not held while it lives.
class ReleaseGil {
 public:
  ReleaseGil() : state_(PyEval_SaveThread()) {}
  ~ReleaseGil() { PyEval_RestoreThread(state_); }
  ReleaseGil(const ReleaseGil&) = delete;
  ReleaseGil& operator=(const ReleaseGil&) = delete;

 private:
  PyThreadState* state_;
};

inline const at::Tensor& tensor_of(PyObject* object) { return THPVariable_Unpack(object); }

inline py::object wrap(const at::Tensor& t) { return checked(THPVariable_Wrap(t)); }

// A value that can be no tensor and holds none; exact types, so that the test is a few comparisons.
inline bool is_plain_scalar(PyObject* object) {
  return object == Py_None || PyLong_CheckExact(object) || PyFloat_CheckExact(object) ||
         PyBool_Check(object) || PyUnicode_CheckExact(object) || PyComplex_CheckExact(object);
}

// The three containers that are taken apart here; all others are left to optree, in Python.
inline bool is_plain_container(PyObject* object) {
  return PyTuple_CheckExact(object) || PyList_CheckExact(object) || PyDict_CheckExact(object);
}

inline bool is_tensor(PyObject* object) {
  if (THPVariable_CheckExact(object)) return true;
  return !is_plain_container(object) && !is_plain_scalar(object) && THPVariable_Check(object);
}

// Calls f on each child of a plain container; stops and returns false when f does.
template <class F>
bool all_children(PyObject* container, F&& f) {
  if (PyDict_CheckExact(container)) {
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (PyDict_Next(container, &position, &key, &value)) {
      if (!f(value)) return false;
    }
    return true;
  }
  // Lists and tuples alike.
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(container);
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!f(PySequence_Fast_GET_ITEM(container, i))) return false;
  }
  return true;
}

// A container of the same type and keys, with f(child) for each child. An empty result of f stops
// it.
template <class F>
py::object map_children(PyObject* container, F&& f) {
  if (PyDict_CheckExact(container)) {
    py::object result = checked(PyDict_New());
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (PyDict_Next(container, &position, &key, &value)) {
      const py::object mapped = f(value);
      if (!mapped) return {};
      if (PyDict_SetItem(result.ptr(), key, mapped.ptr()) != 0) throw_python_error();
    }
    return result;
  }
  const bool is_list = PyList_CheckExact(container);
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(container);
  py::object result = checked(is_list ? PyList_New(count) : PyTuple_New(count));
  for (Py_ssize_t i = 0; i < count; ++i) {
    py::object mapped = f(PySequence_Fast_GET_ITEM(container, i));
    if (!mapped) return {};
    if (is_list) {
      PyList_SET_ITEM(result.ptr(), i, mapped.release().ptr());
    } else {
      PyTuple_SET_ITEM(result.ptr(), i, mapped.release().ptr());
    }
  }
  return result;
}

// func(*args, **kwargs) with `replace(i, args[i])` in place of each argument. kwargs may be null or
// None.
template <class F>
py::object call_with(PyObject* func, PyObject* args, PyObject* kwargs, F&& replace) {
  const py::object replaced = map_children(
      args, [&, i = Py_ssize_t{0}](PyObject* arg) mutable { return replace(i++, arg); });
  return checked(PyObject_Call(func, replaced.ptr(),
                               kwargs == nullptr || kwargs == Py_None ? nullptr : kwargs));
}

// A Python list of tensors, None for undefined ones; and back, from a list or a tuple.
py::object list_of(const std::vector<at::Tensor>& tensors);
std::vector<at::Tensor> tensors_of(PyObject* sequence);

inline py::object not_implemented() { return borrow(Py_NotImplemented); }

}  // namespace torchlift::python

#endif  // TORCHLIFT_BINDINGS_C_PY_UTIL_H_
