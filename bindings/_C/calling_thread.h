#ifndef TORCHLIFT_BINDINGS_C_CALLING_THREAD_H_
#define TORCHLIFT_BINDINGS_C_CALLING_THREAD_H_

// File: bindings/_C/calling_thread.h
//
// Values that hold for one thread while it is in a functional_call: what it sees, and nobody else.
//
//   CallingThread thread;                      // a call begins
//   ThreadValue<py::object> value{thread.id(), tensor};
//   values.push(value);                        // what the thread sees from now on
//   ...
//   values.remove(value);
//
// Everything here needs the GIL.

#include <cstdint>
#include <memory>

#include "bindings/_C/py_util.h"

namespace c10 {
struct SafePyObject;
}  // namespace c10

namespace torchlift::python {

// NOTE [threads of autograd]
// A backward pass that is run inside of a call goes on in autograd's threads for the device, and
// so does the Python code in it: a checkpoint calls the module again there. To them the values of
// the thread that waits for them are visible. The id of that thread travels with libtorch's
// thread-local state, as everything does that a backward pass takes over from its caller.
//
// A thread that the user's code starts takes over nothing: it sees what all others see.
class CallingThread {
 public:
  CallingThread();
  ~CallingThread();
  CallingThread(const CallingThread&) = delete;
  CallingThread& operator=(const CallingThread&) = delete;

  uint64_t id() const { return id_; }

 private:
  const uint64_t id_;
  bool outermost_ = false;
  std::shared_ptr<c10::SafePyObject> outer_;  // of the thread that this one works for
};

// Asks for the calling thread what it sees. Cheap where the answer is yes.
class Viewer {
 public:
  Viewer();
  bool sees(uint64_t thread) const { return thread == self_ || works_for(thread); }

 private:
  static bool works_for(uint64_t thread);

  uint64_t self_;
};

template <class T>
struct ThreadValue {
  uint64_t thread = 0;
  T value{};
  ThreadValue* older = nullptr;
};

// The values of all threads, the newest first. It does not own them.
template <class T>
class ThreadValues {
 public:
  using Node = ThreadValue<T>;

  bool empty() const { return newest_ == nullptr; }

  void push(Node& node) {
    node.older = newest_;
    newest_ = &node;
  }

  void remove(const Node& node) {
    for (Node** at = &newest_; *at != nullptr; at = &(*at)->older) {
      if (*at != &node) continue;
      *at = node.older;
      return;
    }
  }

  // The newest value that the thread sees and f accepts (f returns true); null if there is none.
  // f must not run Python code.
  template <class F>
  Node* find(F&& f) const {
    if (newest_ == nullptr) return nullptr;
    const Viewer viewer;
    for (Node* node = newest_; node != nullptr; node = node->older) {
      if (viewer.sees(node->thread) && f(*node)) return node;
    }
    return nullptr;
  }
  Node* find() const {
    return find([](const Node&) { return true; });
  }

 private:
  Node* newest_ = nullptr;
};

}  // namespace torchlift::python

#endif  // TORCHLIFT_BINDINGS_C_CALLING_THREAD_H_
