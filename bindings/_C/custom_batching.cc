#include "bindings/_C/custom_batching.h"

#include <memory>
#include <vector>

#include "autodiff/custom_batching.h"

namespace torchlift::python {
namespace {

using custom_internal::Batch;
using custom_internal::BatchRules;
using Leaves = std::vector<at::Tensor>;

// A reference that can be dropped on any thread, with or without the GIL.
std::shared_ptr<PyObject> shared(PyObject* object) {
  return {borrow(object).release().ptr(), [](PyObject* owned) {
            const py::gil_scoped_acquire gil;
            Py_DECREF(owned);
          }};
}

Batch run_rule(PyObject* rule, int64_t size, const Batch& arguments) {
  // The engine has released it.
  const py::gil_scoped_acquire gil;
  py::list batched;
  for (const bool flag : arguments.batched) batched.append(py::bool_(flag));
  const auto call = borrow(rule);
  const py::tuple pair = call(size, list_of(arguments.tensors), batched);
  Batch result{tensors_of(pair[0].ptr()), {}};
  for (const py::handle flag : py::list(pair[1])) result.batched.push_back(flag.cast<bool>());
  return result;
}

}  // namespace

PyObject* custom_batching_leaves(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    auto rules = std::make_shared<BatchRules>();
    rules->value = [held = shared(args[0])](const Leaves& leaves) {
      const py::gil_scoped_acquire gil;
      return tensors_of(checked(PyObject_CallOneArg(held.get(), list_of(leaves).ptr())).ptr());
    };
    rules->rule = [held = shared(args[1])](int64_t size, const Batch& arguments) {
      return run_rule(held.get(), size, arguments);
    };
    return list_of(custom_internal::call_batched(rules, tensors_of(args[2])));
  });
}

}  // namespace torchlift::python
