#include "bindings/_C/calling_thread.h"

#include <ATen/ThreadLocalPythonObjects.h>
#include <c10/core/SafePyObject.h>
#include <torch/csrc/PyInterpreter.h>

#include <atomic>
#include <string>

namespace torchlift::python {
namespace {

using at::impl::ThreadLocalPythonObjects;

// Under this key lies the id of the thread, or a tuple of the ids of all whose values it sees.
const std::string& key() {
  static const auto* key = new std::string("functional_call");  // short: not on the heap
  return *key;
}

uint64_t this_thread() {
  static std::atomic<uint64_t> count{0};
  thread_local const uint64_t id = ++count;
  return id;
}

thread_local int64_t open_calls = 0;

std::shared_ptr<c10::SafePyObject> inherited() {
  return ThreadLocalPythonObjects::contains(key()) ? ThreadLocalPythonObjects::get(key()) : nullptr;
}

// Torch 2.11 cannot erase a key; null stands for nothing there.
template <class Objects>
void forget() {
  if constexpr (requires { Objects::erase(key()); }) {
    Objects::erase(key());
  } else {
    Objects::set(key(), nullptr);
  }
}

PyObject* ids_of(const c10::SafePyObject& threads) { return threads.ptr(getPyInterpreter()); }

py::object ids_with(uint64_t id, const c10::SafePyObject* threads) {
  py::object own = checked(PyLong_FromUnsignedLongLong(id));
  if (threads == nullptr) return own;
  const py::object others = borrow(ids_of(*threads));
  const py::object tuple = PyTuple_Check(others.ptr()) ? others : py::make_tuple(others);
  return checked(PySequence_Concat(py::make_tuple(own).ptr(), tuple.ptr()));
}

bool is_id(PyObject* number, uint64_t id) { return PyLong_AsUnsignedLongLong(number) == id; }

}  // namespace

CallingThread::CallingThread() : id_(this_thread()), outermost_(open_calls == 0) {
  if (outermost_) {
    outer_ = inherited();
    py::object ids = ids_with(id_, outer_.get());
    ThreadLocalPythonObjects::set(
        key(), std::make_shared<c10::SafePyObject>(ids.release().ptr(), getPyInterpreter()));
  }
  ++open_calls;
}

CallingThread::~CallingThread() {
  --open_calls;
  if (!outermost_) return;
  if (outer_) {
    ThreadLocalPythonObjects::set(key(), std::move(outer_));
  } else {
    forget<ThreadLocalPythonObjects>();
  }
}

Viewer::Viewer() : self_(this_thread()) {}

bool Viewer::works_for(uint64_t thread) {
  const std::shared_ptr<c10::SafePyObject> threads = inherited();
  if (!threads) return false;
  PyObject* ids = ids_of(*threads);
  if (!PyTuple_Check(ids)) return is_id(ids, thread);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(ids); ++i) {
    if (is_id(PyTuple_GET_ITEM(ids, i), thread)) return true;
  }
  return false;
}

}  // namespace torchlift::python
