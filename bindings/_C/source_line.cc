#include "bindings/_C/source_line.h"

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "bindings/_C/py_util.h"

namespace torchlift::python {
namespace {

// A string of a code object; it lives as long as that.
std::string_view text_of(PyObject* text) {
  Py_ssize_t size = 0;
  const char* data = PyUnicode_AsUTF8AndSize(text, &size);
  if (data == nullptr) {
    PyErr_Clear();
    return {};
  }
  return {data, static_cast<size_t>(size)};
}

// "model.py:12, in loss", of one frame; empty for one of the files that are skipped.
std::string line_of(PyFrameObject* frame, const std::vector<std::string>& skipped) {
  const py::object code = steal(reinterpret_cast<PyObject*>(PyFrame_GetCode(frame)));
  const auto* fields = reinterpret_cast<PyCodeObject*>(code.ptr());
  const std::string_view file = text_of(fields->co_filename);
  const bool skip = std::any_of(skipped.begin(), skipped.end(), [&](const std::string& prefix) {
    return file.substr(0, prefix.size()) == prefix;
  });
  if (skip) return {};
  return std::string(file) + ":" + std::to_string(PyFrame_GetLineNumber(frame)) + ", in " +
         std::string(text_of(fields->co_name));
}

}  // namespace

std::string line_now(const std::vector<std::string>& skipped) {
  const py::gil_scoped_acquire gil;
  py::object frame =
      steal(reinterpret_cast<PyObject*>(PyThreadState_GetFrame(PyThreadState_Get())));
  while (frame) {
    auto* at = reinterpret_cast<PyFrameObject*>(frame.ptr());
    std::string line = line_of(at, skipped);
    if (!line.empty()) return line;
    frame = steal(reinterpret_cast<PyObject*>(PyFrame_GetBack(at)));
  }
  return {};
}

}  // namespace torchlift::python
