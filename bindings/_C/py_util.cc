#include "bindings/_C/py_util.h"

#include <string_view>

namespace torchlift::python {
namespace {

// Held for the life of the process: they may be needed while the interpreter shuts down.
PyObject* transform_error_type = PyExc_ValueError;
PyObject* unsupported_error_type = PyExc_RuntimeError;
PyObject* assumption_error_type = PyExc_RuntimeError;

void set_python_error(PyObject* type, const c10::Error& error) {
  PyErr_SetString(
      type, torch::get_cpp_stacktraces_enabled() ? error.what() : error.what_without_backtrace());
}

// Whether a message starts with the name of a transform in brackets, as ours do: see core/error.h.
bool has_tag(std::string_view message) {
  const size_t end = message.find_first_not_of("abcdefghijklmnopqrstuvwxyz_", 1);
  return message.substr(0, 1) == "[" && end != std::string_view::npos && end > 1 &&
         message.substr(end, 2) == "] ";
}

bool is_untagged_error_of_ours(PyObject* value) {
  if (value == nullptr || Py_TYPE(value) != reinterpret_cast<PyTypeObject*>(PyExc_RuntimeError)) {
    return false;
  }
  const py::object text = steal(PyObject_Str(value));
  const char* message = text ? PyUnicode_AsUTF8(text.ptr()) : nullptr;
  if (message == nullptr) PyErr_Clear();
  return message != nullptr && has_tag(message);
}

}  // namespace

void throw_python_error() {
  python_error error;
  error.persist();
  throw error;
}

void set_python_error(const TransformError& error) {
  set_python_error(transform_error_type, error);
}

void set_python_error(const UnsupportedError& error) {
  set_python_error(unsupported_error_type, error);
}

// Made of (message, number, found).
void set_python_error(const AssumptionError& error) {
  py::list found;
  for (const int64_t number : error.found()) found.append(number);
  const py::tuple args = py::make_tuple(error.what_without_backtrace(), error.number(), found);
  PyErr_SetObject(assumption_error_type, args.ptr());
}

void retag_python_error() {
  if (!PyErr_ExceptionMatches(PyExc_RuntimeError)) return;
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  PyErr_NormalizeException(&type, &value, &traceback);
  if (is_untagged_error_of_ours(value)) {
    const py::object args = steal(PyObject_GetAttrString(value, "args"));
    PyObject* ours = args ? PyObject_CallObject(unsupported_error_type, args.ptr()) : nullptr;
    if (ours == nullptr) {
      PyErr_Clear();
    } else {
      Py_SETREF(value, ours);
      Py_INCREF(unsupported_error_type);
      Py_SETREF(type, unsupported_error_type);
    }
  }
  PyErr_Restore(type, value, traceback);
}

void forget_if_unsupported(python_error& error) {
  error.restore();
  retag_python_error();
  if (PyErr_ExceptionMatches(unsupported_error_type) == 0) throw_python_error();
  PyErr_Clear();
}

void set_error_types(py::object transform_error, py::object unsupported_error,
                     py::object assumption_error) {
  transform_error_type = transform_error.release().ptr();
  unsupported_error_type = unsupported_error.release().ptr();
  assumption_error_type = assumption_error.release().ptr();
}

py::object list_of(const std::vector<at::Tensor>& tensors) {
  py::object list = checked(PyList_New(static_cast<Py_ssize_t>(tensors.size())));
  for (size_t i = 0; i < tensors.size(); ++i) {
    PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i), wrap(tensors[i]).release().ptr());
  }
  return list;
}

std::vector<at::Tensor> tensors_of(PyObject* sequence) {
  std::vector<at::Tensor> tensors;
  all_children(sequence, [&](PyObject* item) {
    tensors.push_back(item == Py_None ? at::Tensor() : tensor_of(item));
    return true;
  });
  return tensors;
}

}  // namespace torchlift::python
