// File: bindings/_C/module.cc
//
// The extension torchlift._C. torchlift/__init__.py loads it after it has checked torch's version;
// what it holds is private to the Python package.

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "autodiff/forward_mode.h"
#include "batching/fallback.h"
#include "bindings/_C/check_nan.h"
#include "bindings/_C/checkpoint.h"
#include "bindings/_C/compile.h"
#include "bindings/_C/control_flow.h"
#include "bindings/_C/custom_batching.h"
#include "bindings/_C/factory_functions.h"
#include "bindings/_C/forward.h"
#include "bindings/_C/function_route.h"
#include "bindings/_C/functional_call.h"
#include "bindings/_C/jit_guard.h"
#include "bindings/_C/py_util.h"
#include "bindings/_C/reverse.h"
#include "bindings/_C/sparse.h"
#include "bindings/_C/vmap.h"
#include "compile/hollow.h"
#include "core/dump_tensor.h"
#include "core/keys.h"
#include "core/level.h"
#include "core/lifted_tensor.h"
#include "core/recorder.h"
#include "core/registry.h"
#include "core/runtime.h"
#include "nn_functional/buffers.h"

namespace torchlift::python {
namespace {

// torchlift/_load.py searches the file for this mark before it loads it.
constexpr const char kBuiltForMark[] =
    "torchlift extension built for torch=" TORCHLIFT_BUILT_FOR_TORCH ";";

// An entry of the method table.
PyMethodDef fast(const char* name, FastCall f) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f)), METH_FASTCALL,
          nullptr};
}

// traced_values_are(tensor, expected) -> bool | None
//
// Whether all of a tensor's bools are `expected` in this run, in all examples; None if it is not
// being traced. Traced by shapes they are taken to be, since nothing is known of them.
PyObject* traced_values_are(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    at::Tensor t = tensor_of(args[0]);
    bool traced = false;
    while (const LiftedTensorImpl* impl = as_lifted(t)) {
      traced = traced || recorder_of(impl->level()) != nullptr;
      t = at::Tensor(impl->value());
    }
    if (!traced) return py::none();
    if (compile::is_hollow(t)) return py::bool_(true);
    const c10::NoGradGuard no_grad;
    return py::bool_(t.eq(args[1] == Py_True).all().item<bool>());
  });
}

PyObject* is_lifted_tensor(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return PyBool_FromLong(is_tensor(args[0]) && is_lifted(tensor_of(args[0])) ? 1 : 0);
}

PyObject* is_hollow_tensor(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return PyBool_FromLong(is_tensor(args[0]) && compile::is_hollow(tensor_of(args[0])) ? 1 : 0);
}

PyObject* dump_tensor_of(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object { return py::str(dump_tensor(tensor_of(args[0]))); });
}

PyObject* copy_per_row_of(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object { return wrap(copy_per_row(tensor_of(args[0]))); });
}

PyObject* share_over_rows_of(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object { return wrap(share_over_rows(tensor_of(args[0]))); });
}

PyMethodDef methods[] = {
    fast("vmap_call", vmap_call),
    fast("vmap_leaves", vmap_leaves),
    fast("grad_call", grad_call),
    fast("grad_leaves", grad_leaves),
    fast("vjp_leaves", vjp_leaves),
    fast("jvp_leaves", jvp_leaves),
    fast("jet_leaves", jet_leaves),
    fast("trace_leaves", trace_leaves),
    fast("jacobian_leaves", jacobian_leaves),
    fast("second_leaves", second_leaves),
    fast("laplacian_leaves", laplacian_leaves),
    fast("pattern_leaves", pattern_leaves),
    fast("color_pattern", color_pattern),
    fast("sparse_leaves", sparse_leaves),
    fast("run_backward", run_backward),
    fast("checkpoint_leaves", checkpoint_leaves),
    fast("checkpoint_name", checkpoint_name_of),
    fast("custom_batching_leaves", custom_batching_leaves),
    fast("cond_leaves", cond_leaves),
    fast("while_leaves", while_leaves),
    fast("scan_leaves", scan_leaves),
    fast("functional_call", functional_call),
    fast("function_route", function_route),
    fast("function_lift", function_lift),
    fast("function_forward", function_forward),
    fast("function_forward_seen", function_forward_seen),
    fast("function_outside", function_outside),
    fast("lower_lifted", lower_lifted),
    fast("replace_value", replace_value),
    fast("is_lifted", is_lifted_tensor),
    fast("is_hollow", is_hollow_tensor),
    fast("traced_values_are", traced_values_are),
    fast("dump_tensor", dump_tensor_of),
    fast("copy_per_row", copy_per_row_of),
    fast("share_over_rows", share_over_rows_of),
    {nullptr, nullptr, 0, nullptr},
};

// (depth, size, alive) of the level of a lifted tensor
py::object level_of(const py::object& tensor) {
  const LiftedTensorImpl* impl = as_lifted(tensor_of(tensor.ptr()));
  if (impl == nullptr) return py::none();
  return py::make_tuple(impl->level().depth(), impl->level().size(), impl->level().alive());
}

// Whether a tensor holds the tangents of several directions (jacfwd), which the user does not see.
bool is_tangent_batch(const py::object& tensor) {
  const LiftedTensorImpl* impl = as_lifted(tensor_of(tensor.ptr()));
  return impl != nullptr && impl->level().kind() == LevelKind::kTangents;
}

// A tensor of the level of `like`, whose dim 0 holds its examples.
py::object lift_like(const py::object& like, const py::object& value) {
  return wrap(lift(tensor_of(value.ptr()), 0, as_lifted(tensor_of(like.ptr()))->level_ptr()));
}

py::list fallback_records() {
  py::list records;
  for (const FallbackRecord& r : fallback_report()) {
    records.append(py::make_tuple(r.op, r.count, r.examples, r.seconds, r.bytes));
  }
  return records;
}

// `with strict():` in Python; may be entered once.
class Strict {
 public:
  explicit Strict(bool strict) : strict_(strict) {}
  void enter() { scope_.emplace(strict_); }
  void exit() { scope_.reset(); }

 private:
  bool strict_;
  std::optional<StrictScope> scope_;
};

py::dict build_info() {
  py::dict info;
  info["version"] = version();
  info["built_for_torch"] = TORCHLIFT_BUILT_FOR_TORCH;
  info["mark"] = kBuiltForMark;
  info["compiler"] = "g++ " __VERSION__;
  info["keys"] = std::vector<std::string>{toString(kFrontKey), toString(kBackKey),
                                          toString(kMarkerKey), toString(kModeKey)};
  return info;
}

}  // namespace
}  // namespace torchlift::python

PYBIND11_MODULE(_C, m) {
  namespace tp = torchlift::python;
  namespace py = pybind11;
  if (PyModule_AddFunctions(m.ptr(), tp::methods) != 0) throw py::error_already_set();
  tp::lift_in_factory_functions();
  tp::define_pullback(m);
  tp::define_padded(m);
  tp::define_chunks(m);
  tp::define_check_nan(m);
  tp::define_compile(m);
  tp::define_jit_guard(m);
  tp::define_functional_call();
  m.def("set_error_types", &tp::set_error_types);
  m.def("level_of", &tp::level_of);
  m.def("is_tangent_batch", &tp::is_tangent_batch);
  m.def("lift_like", &tp::lift_like);
  m.def("forward_mode_open", [] { return torchlift::forward_mode_open(); });
  m.def("open_levels", [] { return torchlift::level_stack().size(); });
  m.def("fallback_report", &tp::fallback_records);
  m.def("reset_fallback_report", &torchlift::reset_fallback_report);
  m.def("set_fallback_warning_enabled", &torchlift::set_fallback_warning_enabled);
  m.def("is_strict", &torchlift::is_strict);
  m.def("has_rule", &torchlift::has_rule);
  m.def("rule_names", [] {
    std::vector<std::string> names;
    for (const auto& entry : torchlift::announced_rules()) {
      names.push_back(entry.overload.empty() ? entry.name : entry.name + "." + entry.overload);
    }
    return names;
  });
  m.def("build_info", &tp::build_info);
  py::class_<tp::Strict>(m, "Strict")
      .def(py::init<bool>())
      .def("__enter__", &tp::Strict::enter)
      .def("__exit__", [](tp::Strict& self, const py::args&) { self.exit(); });
}
