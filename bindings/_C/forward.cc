#include "bindings/_C/forward.h"

#include <optional>
#include <utility>
#include <vector>

#include "autodiff/curvature_blocks.h"
#include "autodiff/forward.h"
#include "autodiff/hessian_blocks.h"
#include "autodiff/jacobian_blocks.h"
#include "autodiff/jet_scope.h"
#include "bindings/_C/returned.h"
#include "core/error.h"
#include "core/lifted_tensor.h"

namespace torchlift::python {
namespace {

using Tensors = std::vector<at::Tensor>;

// What `taylor` gives, or `other` where the function calls what has no Taylor series. As
// hessian_blocks and laplacian_of do, which do not see the errors of Python.
template <class Taylor, class Other>
auto by_series(const Taylor& taylor, const Other& other) {
  try {
    return taylor();
  } catch (const UnsupportedError&) {  // NOLINT(bugprone-empty-catch): the other way, below.
  } catch (python_error& error) {
    const py::gil_scoped_acquire acquire;
    forget_if_unsupported(error);
  }
  return other();
}

JacobianBlocks run_jacobian(long mode, PyObject* call, const Tensors& inputs,
                            const ChunkOptions& chunks, ComplexNumbers numbers, Returned& first) {
  // The engine must not hold the GIL, the function must.
  const ReleaseGil release;
  bool called = false;
  const auto f = [&](const Tensors& leaves) {
    const py::gil_scoped_acquire acquire;
    Returned again;
    Returned& returned = called ? again : first;
    called = mode != 2 || called;  // mode 2 runs it once to count
    return returned(call, leaves);
  };
  if (mode == 0) return reverse_jacobian(f, inputs, chunks, numbers);
  if (mode == 1) return forward_jacobian(f, inputs, chunks, numbers);
  const auto by_both_modes = [&] {
    called = false;
    return forward_over_reverse(f, inputs, chunks, numbers);
  };
  if (mode == 3 && takes_taylor_mode(inputs, chunks, numbers)) {
    return by_series([&] { return taylor_hessian(f, inputs); }, by_both_modes);
  }
  if (mode == 3) return by_both_modes();
  return any_jacobian(f, inputs, chunks, numbers);
}

}  // namespace

PyObject* jvp_leaves(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    const Tensors primals = tensors_of(args[1]), tangents = tensors_of(args[2]);
    ForwardScope scope;
    Tensors duals;
    for (size_t i = 0; i < primals.size(); ++i) {
      duals.push_back(tangents[i].defined() ? scope.dual(primals[i], tangents[i].clone())
                                            : scope.constant(primals[i]));
    }
    Returned returned;
    const LeafOutputs out = returned(args[0], duals);
    Tensors values, pushed;
    for (ForwardOutput& output : scope.finish(out.leaves)) {
      values.push_back(std::move(output.primal));
      if (pushed.size() < out.values) pushed.push_back(std::move(output.tangent));
    }
    return py::make_tuple(returned.with(values), list_of(pushed));
  });
}

PyObject* jet_leaves(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    const Tensors primals = tensors_of(args[1]), series = tensors_of(args[2]);
    const int64_t order = optional_int(args[3]).value();
    JetScope scope(order);
    Tensors inputs;
    for (size_t i = 0; i < primals.size(); ++i) {
      inputs.push_back(series[i].defined() ? scope.series(primals[i], series[i])
                                           : scope.constant(primals[i]));
    }
    Returned returned;
    const LeafOutputs out = returned(args[0], inputs);
    Tensors values, expanded;
    for (JetOutput& output : scope.finish(out.leaves)) {
      values.push_back(std::move(output.primal));
      if (expanded.size() < out.values) expanded.push_back(std::move(output.series));
    }
    return py::make_tuple(returned.with(values), list_of(expanded));
  });
}

PyObject* jacobian_leaves(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    const long mode = PyLong_AsLong(args[0]);
    const Tensors inputs = tensors_of(args[2]);
    const ChunkOptions chunks{optional_int(args[3]), optional_int(args[4])};
    const auto numbers = static_cast<ComplexNumbers>(PyLong_AsLong(args[5]));
    Returned returned;
    const JacobianBlocks jacobian = run_jacobian(mode, args[1], inputs, chunks, numbers, returned);
    py::object blocks = checked(PyList_New(static_cast<Py_ssize_t>(jacobian.blocks.size())));
    for (size_t i = 0; i < jacobian.blocks.size(); ++i) {
      PyList_SET_ITEM(blocks.ptr(), static_cast<Py_ssize_t>(i),
                      list_of(jacobian.blocks[i]).release().ptr());
    }
    return py::make_tuple(std::move(blocks), returned.with(jacobian.outputs));
  });
}

PyObject* second_leaves(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    const ChunkOptions chunks{optional_int(args[2]), optional_int(args[3])};
    const auto f = [&](const Tensors& leaves) { return Returned()(args[0], leaves); };
    return list_of(second_derivatives("hessian_diag", f, tensors_of(args[1]), chunks).rows);
  });
}

PyObject* laplacian_leaves(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    const Tensors inputs = tensors_of(args[1]);
    const ChunkOptions chunks{optional_int(args[2]), optional_int(args[3])};
    std::optional<Tensors> directions;
    if (args[4] != Py_None) directions = tensors_of(args[4]);
    const auto f = [&](const Tensors& leaves) { return Returned()(args[0], leaves); };
    return list_of(by_series([&] { return taylor_laplacian(f, inputs, chunks, directions); },
                             [&] { return nested_laplacian(f, inputs, chunks, directions); })
                       .sums);
  });
}

}  // namespace torchlift::python
