#include "bindings/_C/functional_call.h"

#include <condition_variable>
#include <mutex>
#include <string_view>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "core/error.h"

namespace torchlift::python {
namespace {

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

// The dict that a torch.nn.Module keeps its parameters (buffers, children) in; null for modules
// that have something else there.
py::object state_dict_of(PyObject* module, PyObject* attribute) {
  py::object dict = steal(PyObject_GetAttr(module, attribute));
  if (!dict) PyErr_Clear();
  return dict && PyDict_Check(dict.ptr()) ? dict : py::object();
}

struct ModuleDicts {
  explicit ModuleDicts(PyObject* module) {
    static PyObject* const names[] = {interned("_parameters"), interned("_buffers"),
                                      interned("_modules")};
    parameters = state_dict_of(module, names[0]);
    buffers = state_dict_of(module, names[1]);
    children = state_dict_of(module, names[2]);
  }
  bool complete() const { return parameters && buffers && children; }

  py::object parameters, buffers, children;
};

// A tensor of the module that is replaced during the call.
struct Slot {
  py::object dict;   // of the submodule
  py::object key;    // in dict
  py::object own;    // the module's tensor
  py::object given;  // the caller's
  // Where the caller's came from; none for a weight tied to one the caller gave.
  py::object source, name;
};

class Swap {
 public:
  Swap() = default;
  ~Swap() { restore(); }
  Swap(const Swap&) = delete;
  Swap& operator=(const Swap&) = delete;

  void find(PyObject* module, PyObject* source) {
    PyObject *name, *tensor;
    Py_ssize_t position = 0;
    while (PyDict_Next(source, &position, &name, &tensor)) {
      check_value(name, tensor);
      find_slot(module, source, name, tensor);
    }
  }

  // Tensors that the module has in several places are replaced in all of them.
  void tie(PyObject* module) {
    std::unordered_map<PyObject*, size_t> replaced;
    for (size_t i = 0; i < slots_.size(); ++i) {
      const auto [first, inserted] = replaced.emplace(slots_[i].own.ptr(), i);
      if (!inserted && !slots_[i].given.is(slots_[first->second].given))
        fail_tied(slots_[first->second], slots_[i]);
    }
    replaced.erase(Py_None);
    std::unordered_set<PyObject*> seen;
    tie_in(module, replaced, seen);
  }

  void apply() {
    active_ = true;
    for (const Slot& slot : slots_) set(slot.dict, slot.key, slot.given);
  }

  // Buffers that the module assigned anew (self.steps = self.steps + 1) are handed to the caller.
  void write_back() {
    for (const Slot& slot : slots_) {
      PyObject* now = PyDict_GetItem(slot.dict.ptr(), slot.key.ptr());
      if (!slot.source || now == nullptr || slot.given.is(py::handle(now))) continue;
      if (PyObject_SetItem(slot.source.ptr(), slot.name.ptr(), now) != 0) throw_python_error();
    }
  }

 private:
  static void set(const py::object& dict, const py::object& key, const py::object& value) {
    if (PyDict_SetItem(dict.ptr(), key.ptr(), value.ptr()) != 0) throw_python_error();
  }

  static void check_value(PyObject* name, PyObject* tensor) {
    if (!PyUnicode_Check(name)) {
      throw py::type_error("functional_call: the names of parameters and buffers are strings");
    }
    if (tensor == Py_None || THPVariable_Check(tensor)) return;
    PyErr_Format(PyExc_TypeError, "functional_call: %R must be a tensor or None, got %s", name,
                 Py_TYPE(tensor)->tp_name);
    throw_python_error();
  }

  void find_slot(PyObject* root, PyObject* source, PyObject* name, PyObject* tensor) {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(name, &size);
    if (text == nullptr) throw_python_error();
    std::string_view rest(text, static_cast<size_t>(size));
    py::object module = borrow(root);
    for (size_t dot = rest.find('.'); dot != rest.npos; dot = rest.find('.')) {
      const py::object key =
          checked(PyUnicode_FromStringAndSize(rest.data(), static_cast<Py_ssize_t>(dot)));
      const ModuleDicts dicts(module.ptr());
      PyObject* child = dicts.children ? PyDict_GetItem(dicts.children.ptr(), key.ptr()) : nullptr;
      if (child == nullptr || child == Py_None) fail_unknown(root, name);
      module = borrow(child);
      rest.remove_prefix(dot + 1);
    }
    const py::object key =
        checked(PyUnicode_FromStringAndSize(rest.data(), static_cast<Py_ssize_t>(rest.size())));
    if (!add_slot(module.ptr(), key, source, name, tensor)) fail_unknown(root, name);
    keep_flat_weights(module.ptr());
  }

  [[noreturn]] static void fail_unknown(PyObject* root, PyObject* name) {
    transform_error("functional_call", Py_TYPE(root)->tp_name, " has no parameter or buffer '",
                    PyUnicode_AsUTF8(name),
                    "'. Give names that named_parameters() or named_buffers() has.");
  }

  // Whether there is one of that name.
  bool add_slot(PyObject* module, const py::object& key, PyObject* source, PyObject* name,
                PyObject* tensor) {
    const ModuleDicts dicts(module);
    if (!dicts.complete()) return false;
    for (const py::object& dict : {dicts.parameters, dicts.buffers, plain_attributes(module)}) {
      PyObject* own = dict ? PyDict_GetItem(dict.ptr(), key.ptr()) : nullptr;
      if (own == nullptr || (own != Py_None && !is_tensor(own))) continue;
      slots_.push_back({dict, key, borrow(own), borrow(tensor), borrow(source), borrow(name)});
      return true;
    }
    return false;
  }

  // A recurrent module makes a list of its parameters when it is called. It shall have its own
  // again afterwards.
  void keep_flat_weights(PyObject* module) {
    static PyObject* const names[] = {interned("_flat_weights"), interned("_flat_weight_refs")};
    const py::object attributes = plain_attributes(module);
    for (PyObject* const name : names) {
      PyObject* value = attributes ? PyDict_GetItem(attributes.ptr(), name) : nullptr;
      if (value != nullptr) kept_.push_back({attributes, borrow(name), borrow(value), {}, {}, {}});
    }
  }

  // Tensors that are attributes of the module without being registered.
  static py::object plain_attributes(PyObject* module) {
    static PyObject* const name = interned("__dict__");
    return state_dict_of(module, name);
  }

  void tie_in(PyObject* module, const std::unordered_map<PyObject*, size_t>& replaced,
              std::unordered_set<PyObject*>& seen) {
    if (module == Py_None || !seen.insert(module).second) return;
    const ModuleDicts dicts(module);
    if (!dicts.complete()) return;
    tie_dict(dicts.parameters, replaced);
    tie_dict(dicts.buffers, replaced);
    PyObject *key, *child;
    Py_ssize_t position = 0;
    while (PyDict_Next(dicts.children.ptr(), &position, &key, &child)) {
      tie_in(child, replaced, seen);
    }
  }

  void tie_dict(const py::object& dict, const std::unordered_map<PyObject*, size_t>& replaced) {
    PyObject *key, *tensor;
    Py_ssize_t position = 0;
    while (PyDict_Next(dict.ptr(), &position, &key, &tensor)) {
      const auto found = replaced.find(tensor);
      if (found == replaced.end()) continue;
      const Slot& first = slots_[found->second];
      // The slot itself, or one that the caller named too, with the same tensor.
      if (first.dict.is(dict) && first.key.equal(py::handle(key))) continue;
      slots_.push_back({dict, borrow(key), borrow(tensor), first.given, {}, {}});
    }
  }

  [[noreturn]] static void fail_tied(const Slot& a, const Slot& b) {
    PyErr_Format(
        PyExc_ValueError,
        "functional_call got different tensors for %S and %S, which are one tensor in the "
        "module. Give one of them, or the same tensor for both, or pass tie_weights=False.",
        a.name.ptr(), b.name.ptr());
    throw_python_error();
  }

  void restore() {
    if (!active_) return;
    const py::error_scope keep_error;
    for (auto slot = slots_.rbegin(); slot != slots_.rend(); ++slot) {
      if (PyDict_SetItem(slot->dict.ptr(), slot->key.ptr(), slot->own.ptr()) != 0) PyErr_Clear();
    }
    for (auto slot = kept_.rbegin(); slot != kept_.rend(); ++slot) {
      if (PyDict_SetItem(slot->dict.ptr(), slot->key.ptr(), slot->own.ptr()) != 0) PyErr_Clear();
    }
  }

  bool active_ = false;
  std::vector<Slot> slots_;
  std::vector<Slot> kept_;  // what is only put back
};

// NOTE [one caller at a time]
// The module's own tensors are out of place during the call, so a second thread that called the
// module would compute with the first one's. It waits.
class ModuleLock {
 public:
  explicit ModuleLock(PyObject* module) : module_(module) {
    const auto self = std::this_thread::get_id();
    if (try_enter(self)) return;
    const ReleaseGil release;
    std::unique_lock<std::mutex> lock(mutex());
    changed().wait(lock, [&] { return enter(self); });
  }
  ~ModuleLock() {
    const std::lock_guard<std::mutex> lock(mutex());
    const auto use = users().find(module_);
    if (--use->second.depth > 0) return;
    users().erase(use);
    changed().notify_all();
  }
  ModuleLock(const ModuleLock&) = delete;
  ModuleLock& operator=(const ModuleLock&) = delete;

 private:
  struct Use {
    std::thread::id thread;
    int depth = 0;
  };

  bool try_enter(std::thread::id self) {
    const std::lock_guard<std::mutex> lock(mutex());
    return enter(self);
  }

  bool enter(std::thread::id self) {
    Use& use = users()[module_];
    if (use.depth > 0 && use.thread != self) return false;
    use.thread = self;
    ++use.depth;
    return true;
  }

  static std::mutex& mutex() {
    static auto* mutex = new std::mutex();
    return *mutex;
  }
  static std::condition_variable& changed() {
    static auto* changed = new std::condition_variable();
    return *changed;
  }
  static std::unordered_map<PyObject*, Use>& users() {
    static auto* users = new std::unordered_map<PyObject*, Use>();
    return *users;
  }

  PyObject* module_;
};

}  // namespace

PyObject* functional_call(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    PyObject* module = args[0];
    if (!ModuleDicts(module).complete()) return not_implemented();
    const ModuleLock lock(module);
    Swap swap;
    all_children(args[1], [&](PyObject* dict) { return swap.find(module, dict), true; });
    if (args[4] == Py_True) swap.tie(module);
    swap.apply();
    py::object result =
        checked(PyObject_Call(module, args[2], args[3] == Py_None ? nullptr : args[3]));
    swap.write_back();
    return result;
  });
}

}  // namespace torchlift::python
