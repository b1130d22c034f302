#include "bindings/_C/sparse.h"

#include <pybind11/stl.h>

#include <utility>
#include <vector>

#include "autodiff/coloring.h"
#include "autodiff/sparse_values.h"
#include "autodiff/sparsity_pattern.h"
#include "bindings/_C/returned.h"

namespace torchlift::python {
namespace {

using Tensors = std::vector<at::Tensor>;

// A function of Python, called with the GIL.
class Function {
 public:
  explicit Function(PyObject* call) : call_(call) {}
  LeafOutputs operator()(const Tensors& leaves) const {
    const py::gil_scoped_acquire acquire;
    Returned returned;
    return returned(call_, leaves);
  }

 private:
  PyObject* call_;
};

bool is_true(PyObject* flag) { return PyObject_IsTrue(flag) == 1; }

py::object tuple_of(const Coloring& c) {
  return py::make_tuple(static_cast<int>(c.mode), c.rows, c.columns, wrap(c.crow_indices),
                        wrap(c.col_indices), wrap(c.column_colors), wrap(c.row_colors), c.forward,
                        c.reverse, wrap(c.sources));
}

Coloring coloring_of(PyObject* tuple) {
  const auto field = [&](Py_ssize_t i) { return PyTuple_GetItem(tuple, i); };
  const auto number = [&](Py_ssize_t i) { return int64_t{PyLong_AsLongLong(field(i))}; };
  return {static_cast<ColoringMode>(number(0)),
          number(1),
          number(2),
          tensor_of(field(3)),
          tensor_of(field(4)),
          tensor_of(field(5)),
          tensor_of(field(6)),
          number(7),
          number(8),
          tensor_of(field(9))};
}

}  // namespace

PyObject* pattern_leaves(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    const Tensors inputs = tensors_of(args[2]);
    const PatternOptions options{optional_int(args[3])};
    const bool second = is_true(args[0]);
    const Function f(args[1]);
    at::Tensor pattern;
    {
      const ReleaseGil release;
      pattern = second ? hessian_pattern(f, inputs, options) : jacobian_pattern(f, inputs, options);
    }
    return py::make_tuple(wrap(pattern), py::cast(dense_operators()));
  });
}

PyObject* color_pattern(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    return tuple_of(
        coloring(tensor_of(args[0]), static_cast<ColoringMode>(PyLong_AsLong(args[1]))));
  });
}

PyObject* sparse_leaves(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    const bool second = is_true(args[0]);
    const Function f(args[1]);
    const Tensors inputs = tensors_of(args[2]);
    const Coloring coloring = coloring_of(args[3]);
    const auto layout = static_cast<SparseLayout>(PyLong_AsLong(args[4]));
    const ChunkOptions chunks{optional_int(args[5]), optional_int(args[6])};
    at::Tensor result;
    {
      const ReleaseGil release;
      const SparseValues found = second ? sparse_hessian_values(f, inputs, coloring, chunks)
                                        : sparse_jacobian_values(f, inputs, coloring, chunks);
      result =
          in_layout(second ? "sparse_hessian" : "sparse_jacobian", found.values, coloring, layout);
    }
    return wrap(result);
  });
}

}  // namespace torchlift::python
