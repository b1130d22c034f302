#include "bindings/_C/functional_call.h"

#include <deque>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "bindings/_C/call_attribute.h"
#include "bindings/_C/call_dict.h"
#include "bindings/_C/calling_thread.h"
#include "core/error.h"

namespace torchlift::python {
namespace {

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

// Names in a module's __dict__.
PyObject* parameters_name() {
  static PyObject* const name = interned("_parameters");
  return name;
}
PyObject* buffers_name() {
  static PyObject* const name = interned("_buffers");
  return name;
}
PyObject* children_name() {
  static PyObject* const name = interned("_modules");
  return name;
}

void set_item(const py::object& dict, PyObject* key, const py::object& value) {
  if (PyDict_SetItem(dict.ptr(), key, value.ptr()) != 0) throw_python_error();
}

// Where a torch.nn.Module keeps what it has. A null object for what it does not keep in a dict.
class ModuleDicts {
 public:
  explicit ModuleDicts(PyObject* module)
      : attributes(steal(PyObject_GenericGetDict(module, nullptr))) {
    if (!attributes) PyErr_Clear();
  }

  py::object parameters() const { return dict(parameters_name()); }
  py::object buffers() const { return dict(buffers_name()); }
  py::object children() const { return dict(children_name()); }
  bool complete() const { return parameters() && buffers() && children(); }

  py::object attributes;  // module.__dict__

 private:
  py::object dict(PyObject* name) const {
    py::object found = attributes ? dict_item(attributes.ptr(), name) : py::object();
    return found && PyDict_Check(found.ptr()) ? found : py::object();
  }
};

// The entry of a submodule's __dict__, _parameters or _buffers, that is exchanged for the duration
// of the call: see NOTE [a dict for each thread].
class DictUse {
 public:
  DictUse(py::object attributes, PyObject* name)
      : attributes_(std::move(attributes)), name_(name), node_{0, checked(PyDict_New())} {}
  DictUse(const DictUse&) = delete;
  DictUse& operator=(const DictUse&) = delete;

  void give(PyObject* key, const py::object& value) { set_item(node_.value, key, value); }

  void install(uint64_t thread) {
    node_.thread = thread;
    // Made first: that may start Python's garbage collection and with it any Python code. From then
    // on nothing does, so that no other thread's CallDict can be lost.
    py::object fresh = new_call_dict();
    const py::object now = dict_item(attributes_.ptr(), name_);
    if (!now || !PyDict_Check(now.ptr())) return;  // another thread has taken it away
    call_dict_ = is_call_dict(now.ptr()) ? now : std::move(fresh);
    if (!call_dict_.is(now)) {
      set_own_dict(call_dict_, now);
      set_item(attributes_, name_, call_dict_);
    }
    values_of(call_dict_.ptr()).push(node_);
  }

  // Must not throw.
  void remove() {
    if (!call_dict_) return;
    values_of(call_dict_.ptr()).remove(node_);
    const bool last = values_of(call_dict_.ptr()).empty();
    if (last && PyDict_GetItem(attributes_.ptr(), name_) == call_dict_.ptr()) {
      const py::object own = own_dict(call_dict_);
      if (PyDict_SetItem(attributes_.ptr(), name_, own.ptr()) != 0) PyErr_Clear();
    }
    call_dict_ = {};
  }

  // What became of what was given; null if it was deleted.
  py::object value(PyObject* key) const {
    py::object now = dict_item(node_.value.ptr(), key);
    return now && now.ptr() != deleted_mark() ? now : py::object();
  }

 private:
  py::object attributes_;
  PyObject* name_;
  CallValues node_;
  py::object call_dict_;  // null until installed
};

// A tensor of the module that is replaced during the call.
struct Slot {
  DictUse* dict;            // null for a plain attribute
  AttributeUse* attribute;  // null for a parameter or a buffer
  py::object holder;        // the submodule's own dict, or its __dict__
  py::object key;           // in holder
  py::object own;           // the module's tensor
  py::object given;         // the caller's
  // Where the caller's came from; none for a weight tied to one the caller gave.
  py::object source, name;

  py::object now() const { return dict ? dict->value(key.ptr()) : attribute->value(); }
};

class Call {
 public:
  Call() = default;
  ~Call() {
    const py::error_scope keep_error;
    for (auto use = attributes_.rbegin(); use != attributes_.rend(); ++use) use->use.remove();
    for (auto use = dicts_.rbegin(); use != dicts_.rend(); ++use) use->remove();
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

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

  // From here to its end the thread sees the given tensors.
  void begin() {
    for (const Slot& slot : slots_) {
      if (slot.dict != nullptr) slot.dict->give(slot.key.ptr(), slot.given);
    }
    for (DictUse& use : dicts_) use.install(thread_.id());
    for (auto& [use, value] : attributes_) use.install(thread_.id(), std::move(value));
  }

  // Buffers that the module assigned anew (self.steps = self.steps + 1) are handed to the caller.
  void write_back() {
    for (const Slot& slot : slots_) {
      if (!slot.source) continue;
      const py::object now = slot.now();
      if (now && !now.is(slot.given)) set_item(slot.source, slot.name.ptr(), now);
    }
  }

 private:
  struct Attribute {
    Attribute(py::object module, py::object name, py::object first)
        : use(std::move(module), std::move(name)), value(std::move(first)) {}
    AttributeUse use;
    py::object value;  // what it is at first
  };

  static void check_value(PyObject* name, PyObject* tensor) {
    if (!PyUnicode_Check(name)) {
      throw py::type_error("functional_call: the names of parameters and buffers are strings");
    }
    if (tensor == Py_None || THPVariable_Check(tensor)) return;
    PyErr_Format(PyExc_TypeError, "functional_call: %R must be a tensor or None, got %s", name,
                 Py_TYPE(tensor)->tp_name);
    throw_python_error();
  }

  static py::object name_of(std::string_view text) {
    PyObject* name =
        checked(PyUnicode_FromStringAndSize(text.data(), static_cast<Py_ssize_t>(text.size())))
            .release()
            .ptr();
    PyUnicode_InternInPlace(&name);
    return steal(name);
  }

  void find_slot(PyObject* root, PyObject* source, PyObject* name, PyObject* tensor) {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(name, &size);
    if (text == nullptr) throw_python_error();
    std::string_view rest(text, static_cast<size_t>(size));
    py::object module = borrow(root);
    for (size_t dot = rest.find('.'); dot != rest.npos; dot = rest.find('.')) {
      const py::object children = ModuleDicts(module.ptr()).children();
      py::object child =
          children ? dict_item(children.ptr(), name_of(rest.substr(0, dot)).ptr()) : py::object();
      if (!child || child.is_none()) fail_unknown(root, name);
      module = std::move(child);
      rest.remove_prefix(dot + 1);
    }
    if (!add_slot(module, name_of(rest), source, name, tensor)) fail_unknown(root, name);
  }

  [[noreturn]] static void fail_unknown(PyObject* root, PyObject* name) {
    transform_error("functional_call", Py_TYPE(root)->tp_name, " has no parameter or buffer '",
                    PyUnicode_AsUTF8(name),
                    "'. Give names that named_parameters() or named_buffers() has.");
  }

  // Whether there is one of that name.
  bool add_slot(const py::object& module, const py::object& key, PyObject* source, PyObject* name,
                PyObject* tensor) {
    const ModuleDicts dicts(module.ptr());
    if (!dicts.complete()) return false;
    isolate_derived(module, dicts);
    Slot slot{nullptr, nullptr, {}, key, {}, borrow(tensor), borrow(source), borrow(name)};
    for (PyObject* kind : {parameters_name(), buffers_name()}) {
      const py::object dict = dict_item(dicts.attributes.ptr(), kind);
      slot.own = get_seen(dict, key.ptr());
      if (!slot.own || !replaceable(slot.own)) continue;
      slot.holder = own_dict(dict);
      slot.dict = &use_of(dicts.attributes, kind, slot.holder);
      slots_.push_back(std::move(slot));
      return true;
    }
    slot.own = AttributeUse::seen(dicts.attributes.ptr(), key.ptr());
    if (!slot.own || !replaceable(slot.own)) return false;
    slot.holder = dicts.attributes;
    slot.attribute = &attribute(module, key, borrow(tensor));
    slots_.push_back(std::move(slot));
    return true;
  }

  static bool replaceable(const py::object& own) { return own.is_none() || is_tensor(own.ptr()); }

  DictUse& use_of(const py::object& attributes, PyObject* kind, const py::object& own) {
    DictUse*& use = uses_[own.ptr()];
    if (use == nullptr) use = &dicts_.emplace_back(attributes, kind);
    return *use;
  }

  AttributeUse& attribute(const py::object& module, const py::object& name, py::object value) {
    return attributes_.emplace_back(module, name, std::move(value)).use;
  }

  // What a module computes from its parameters and keeps in a plain attribute is the thread's too.
  void isolate_derived(const py::object& module, const ModuleDicts& dicts) {
    if (!modules_.insert(module.ptr()).second) return;
    // A recurrent module makes a list of its parameters when it is called.
    static PyObject* const lists[] = {interned("_flat_weights"), interned("_flat_weight_refs")};
    for (PyObject* const name : lists) {
      const py::object list = AttributeUse::seen(dicts.attributes.ptr(), name);
      if (!list || !PyList_Check(list.ptr())) continue;
      // A copy: `rnn.weight_hh_l0 = w` in the call writes into it.
      attribute(module, borrow(name), checked(PySequence_List(list.ptr())));
    }
    static PyObject* const hooks_name = interned("_forward_pre_hooks");
    const py::object hooks = dict_item(dicts.attributes.ptr(), hooks_name);
    if (!hooks || !PyDict_Check(hooks.ptr()) || PyDict_GET_SIZE(hooks.ptr()) == 0) return;
    all_children(checked(PyDict_Values(hooks.ptr())).ptr(), [&](PyObject* hook) {
      isolate_made_by(hook, module, dicts.attributes);
      return true;
    });
  }

  // The hooks of weight_norm, spectral_norm and of pruning know the name of what they compute.
  void isolate_made_by(PyObject* hook, const py::object& module, const py::object& attributes) {
    if (PyFunction_Check(hook)) return;
    for (const char* where : {"name", "_tensor_name"}) {
      const py::object name = steal(PyObject_GetAttrString(hook, where));
      if (!name) PyErr_Clear();
      if (!name || !PyUnicode_Check(name.ptr())) continue;
      const py::object made = AttributeUse::seen(attributes.ptr(), name.ptr());
      if (made && is_tensor(made.ptr())) attribute(module, name, made);
    }
  }

  void tie_in(PyObject* module, const std::unordered_map<PyObject*, size_t>& replaced,
              std::unordered_set<PyObject*>& seen) {
    if (module == Py_None || !seen.insert(module).second) return;
    const ModuleDicts dicts(module);
    if (!dicts.complete()) return;
    tie_dict(module, dicts, parameters_name(), replaced);
    tie_dict(module, dicts, buffers_name(), replaced);
    PyObject *key, *child;
    Py_ssize_t position = 0;
    const py::object children = dicts.children();
    while (PyDict_Next(children.ptr(), &position, &key, &child)) tie_in(child, replaced, seen);
  }

  void tie_dict(PyObject* module, const ModuleDicts& dicts, PyObject* kind,
                const std::unordered_map<PyObject*, size_t>& replaced) {
    const py::object dict = dict_item(dicts.attributes.ptr(), kind);
    if (!is_call_dict(dict.ptr()) && PyDict_GET_SIZE(dict.ptr()) == 0) return;
    const py::object own = own_dict(dict), all = all_seen(dict);
    PyObject *key, *tensor;
    Py_ssize_t position = 0;
    while (PyDict_Next(all.ptr(), &position, &key, &tensor)) {
      const auto found = replaced.find(tensor);
      if (found == replaced.end()) continue;
      const Slot& first = slots_[found->second];
      // The slot itself, or one that the caller named too, with the same tensor.
      if (first.holder.is(own) && first.key.equal(py::handle(key))) continue;
      isolate_derived(borrow(module), dicts);
      slots_.push_back({&use_of(dicts.attributes, kind, own),
                        nullptr,
                        own,
                        borrow(key),
                        borrow(tensor),
                        first.given,
                        {},
                        {}});
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

  const CallingThread thread_;
  std::vector<Slot> slots_;
  std::unordered_set<PyObject*> modules_;  // that have slots
  std::deque<DictUse> dicts_;
  std::unordered_map<PyObject*, DictUse*> uses_;  // by the submodule's own dict
  std::deque<Attribute> attributes_;
};

}  // namespace

void define_functional_call() {
  define_call_dict();
  define_call_attribute();
}

PyObject* functional_call(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    PyObject* module = args[0];
    if (!ModuleDicts(module).complete()) return not_implemented();
    Call call;
    all_children(args[1], [&](PyObject* dict) { return call.find(module, dict), true; });
    if (args[4] == Py_True) call.tie(module);
    call.begin();
    py::object result =
        checked(PyObject_Call(module, args[2], args[3] == Py_None ? nullptr : args[3]));
    call.write_back();
    return result;
  });
}

}  // namespace torchlift::python
