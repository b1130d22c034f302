#include "bindings/_C/control_flow.h"

#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "batching/control_flow.h"
#include "batching/padded.h"

namespace torchlift::python {
namespace {

using control_flow_internal::Leaves;

py::object call(PyObject* f, const Leaves& leaves) {
  return checked(PyObject_CallOneArg(f, list_of(leaves).ptr()));
}

control_flow_internal::Step step(PyObject* f) {
  return [f](const Leaves& leaves) { return tensors_of(call(f, leaves).ptr()); };
}

at::Scalar scalar_of(const py::object& number) {
  if (PyBool_Check(number.ptr())) return at::Scalar(number.ptr() == Py_True);
  if (PyLong_Check(number.ptr())) return at::Scalar(number.cast<int64_t>());
  if (PyComplex_Check(number.ptr())) return at::Scalar(number.cast<c10::complex<double>>());
  return at::Scalar(number.cast<double>());
}

py::object padded_nonzero(const py::object& x, int64_t size, int64_t fill) {
  return guarded_object([&]() -> py::object {
    const auto found = nonzero(tensor_of(x.ptr()), {.size = size, .fill_value = fill});
    return py::make_tuple(wrap(found.indices), wrap(found.count));
  });
}

py::object padded_select(const py::object& x, const py::object& mask, int64_t size,
                         const py::object& fill) {
  return guarded_object([&]() -> py::object {
    const auto found = masked_select(tensor_of(x.ptr()), tensor_of(mask.ptr()),
                                     {.size = size, .fill_value = scalar_of(fill)});
    return py::make_tuple(wrap(found.values), wrap(found.count));
  });
}

py::object padded_unique(const py::object& x, int64_t size, const py::object& fill) {
  return guarded_object([&]() -> py::object {
    const auto found = unique(
        tensor_of(x.ptr()),
        {.size = size,
         .fill_value = fill.is_none() ? std::nullopt : std::optional<at::Scalar>(scalar_of(fill))});
    return py::make_tuple(wrap(found.values), wrap(found.count), wrap(found.counts),
                          wrap(found.inverse));
  });
}

}  // namespace

PyObject* cond_leaves(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    return list_of(control_flow_internal::cond_leaves("cond", tensor_of(args[0]), step(args[1]),
                                                      step(args[2]), tensors_of(args[3])));
  });
}

PyObject* while_leaves(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    const char* transform = PyUnicode_AsUTF8(args[0]);
    if (transform == nullptr) throw_python_error();
    PyObject* test_call = args[1];
    const auto test = [&](const Leaves& leaves) -> at::Tensor {
      return tensor_of(call(test_call, leaves).ptr());
    };
    return list_of(
        control_flow_internal::while_leaves(transform, test, step(args[2]), tensors_of(args[3])));
  });
}

PyObject* scan_leaves(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    const auto length = borrow(args[3]).cast<int64_t>();
    const auto scanned = control_flow_internal::scan_leaves(
        step(args[0]), tensors_of(args[1]), tensors_of(args[2]), length, args[4] == Py_True);
    return py::make_tuple(list_of(scanned.carry), list_of(scanned.ys));
  });
}

void define_padded(py::module_& module) {
  module.def("nonzero", &padded_nonzero);
  module.def("masked_select", &padded_select);
  module.def("unique", &padded_unique);
}

}  // namespace torchlift::python
