#include "bindings/_C/check_nan.h"

#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <vector>

#include "autodiff/check_nan.h"
#include "bindings/_C/source_line.h"

namespace torchlift::python {
namespace {

using check_nan_internal::Watch;

std::unique_ptr<Watch> make_watch(bool inf, std::vector<std::string> skipped) {
  return std::make_unique<Watch>(CheckNanOptions{.inf = inf},
                                 [skipped = std::move(skipped)] { return line_now(skipped); });
}

}  // namespace

void define_check_nan(py::module_& m) {
  py::class_<Watch>(m, "NanWatch")
      .def(py::init(&make_watch), py::arg("inf"), py::arg("skipped"))
      .def("close", &Watch::close);
}

}  // namespace torchlift::python
