#include "bindings/_C/call_dict.h"

#include <new>
#include <vector>

namespace torchlift::python {

namespace {

struct CallDict {
  PyDictObject base;  // stays empty
  PyObject* own;
  ThreadValues<py::object> values;
};

PyTypeObject call_dict_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

CallDict* as_call_dict(PyObject* object) { return reinterpret_cast<CallDict*>(object); }

// --- the module's own dict, which may be of a subclass (OrderedDict) ---

// A new reference; null without an error where there is none.
PyObject* get_own(PyObject* own, PyObject* key) {
  if (PyDict_CheckExact(own)) {
    PyObject* value = PyDict_GetItemWithError(own, key);
    Py_XINCREF(value);
    return value;
  }
  PyObject* value = PyObject_GetItem(own, key);
  if (value == nullptr && PyErr_ExceptionMatches(PyExc_KeyError)) PyErr_Clear();
  return value;
}

int set_own(PyObject* own, PyObject* key, PyObject* value) {
  if (value == nullptr) return PyObject_DelItem(own, key);
  return PyDict_CheckExact(own) ? PyDict_SetItem(own, key, value)
                                : PyObject_SetItem(own, key, value);
}

// --- what the calling thread sees ---

// Names of tensors are exactly str, so that looking for them runs no code of the user's. Null for
// a key that can be no name.
py::object name_of(PyObject* key) {
  if (PyUnicode_CheckExact(key)) return borrow(key);
  py::object name = PyUnicode_Check(key) ? steal(PyUnicode_FromObject(key)) : py::object();
  if (!name) PyErr_Clear();
  return name;
}

struct Replaced {
  PyObject* value = nullptr;  // borrowed; null if no call of this thread replaces the key
  CallValues* call = nullptr;
};

// What the newest call of this thread that replaces the key has for it.
Replaced replaced(CallDict* self, PyObject* key) {
  Replaced result;
  if (self->values.empty()) return result;
  const py::object name = name_of(key);
  if (!name) return result;
  result.call = self->values.find([&](const CallValues& call) {
    result.value = PyDict_GetItemWithError(call.value.ptr(), name.ptr());
    return result.value != nullptr;
  });
  return result;
}

// A new reference; null without an error where there is none.
PyObject* get_item(CallDict* self, PyObject* key) {
  PyObject* value = replaced(self, key).value;
  if (value == nullptr) return get_own(self->own, key);
  return value == deleted_mark() ? nullptr : Py_NewRef(value);
}

// value may be null, to delete.
int set_item(CallDict* self, PyObject* key, PyObject* value) {
  const Replaced found = replaced(self, key);
  if (found.call == nullptr) return set_own(self->own, key, value);
  if (value == nullptr && found.value == deleted_mark()) {
    PyErr_SetObject(PyExc_KeyError, key);
    return -1;
  }
  const py::object values = found.call->value;
  return PyDict_SetItem(values.ptr(), key, value == nullptr ? deleted_mark() : value);
}

py::object copy_of(PyObject* mapping) {
  py::object copy = checked(PyDict_New());
  if (PyDict_Update(copy.ptr(), mapping) != 0) throw_python_error();
  return copy;
}

void put_over(const py::object& dict, PyObject* values) {
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(values, &position, &key, &value)) {
    if (value != deleted_mark()) {
      if (PyDict_SetItem(dict.ptr(), key, value) != 0) throw_python_error();
    } else if (PyDict_Contains(dict.ptr(), key) == 1) {
      if (PyDict_DelItem(dict.ptr(), key) != 0) throw_python_error();
    }
  }
}

py::object seen(CallDict* self) {
  std::vector<py::object> calls;
  self->values.find([&](const CallValues& node) { return calls.push_back(node.value), false; });
  if (calls.empty()) return borrow(self->own);
  py::object result = copy_of(self->own);
  for (auto values = calls.rbegin(); values != calls.rend(); ++values) {
    put_over(result, values->ptr());
  }
  return result;
}

py::object update(CallDict* self, PyObject* items) {
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(items, &position, &key, &value)) {
    if (set_item(self, key, value) != 0) throw_python_error();
  }
  return py::none();
}

// --- the protocols ---

PyObject* subscript(PyObject* self, PyObject* key) {
  PyObject* value = get_item(as_call_dict(self), key);
  if (value == nullptr && !PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, key);
  return value;
}

int assign(PyObject* self, PyObject* key, PyObject* value) {
  return set_item(as_call_dict(self), key, value);
}

int contains(PyObject* self, PyObject* key) {
  PyObject* value = get_item(as_call_dict(self), key);
  if (value == nullptr) return PyErr_Occurred() ? -1 : 0;
  Py_DECREF(value);
  return 1;
}

// F(what the thread sees), for functions that return a new reference.
template <auto F>
PyObject* of_seen(PyObject* self) {
  return guarded([&] { return checked(F(seen(as_call_dict(self)).ptr())); });
}

Py_ssize_t length(PyObject* self) {
  PyObject* size =
      of_seen<[](PyObject* dict) { return PyLong_FromSsize_t(PyObject_Size(dict)); }>(self);
  if (size == nullptr) return -1;
  const Py_ssize_t result = PyLong_AsSsize_t(size);
  Py_DECREF(size);
  return result;
}

py::object seen_or_itself(PyObject* object) {
  return is_call_dict(object) ? seen(as_call_dict(object)) : borrow(object);
}

PyObject* compare(PyObject* left, PyObject* right, int op) {
  return guarded([&] {
    return checked(
        PyObject_RichCompare(seen_or_itself(left).ptr(), seen_or_itself(right).ptr(), op));
  });
}

PyObject* united(PyObject* left, PyObject* right) {
  return guarded([&] {
    return checked(PyNumber_Or(seen_or_itself(left).ptr(), seen_or_itself(right).ptr()));
  });
}

PyObject* united_inplace(PyObject* self, PyObject* other) {
  return guarded([&] {
    update(as_call_dict(self), copy_of(other).ptr());
    return borrow(self);
  });
}

// --- the methods ---

// A method that only reads: dict's own, of what the thread sees. keys() and its kin are of a
// snapshot then, which is more than a thread that registers something meanwhile could ask for.
template <const char* const* name>
PyObject* reading_method(PyObject* self, PyObject* args, PyObject* kwargs) {
  return guarded([&] {
    const py::object method =
        checked(PyObject_GetAttrString(seen(as_call_dict(self)).ptr(), *name));
    return checked(PyObject_Call(method.ptr(), args, kwargs));
  });
}

PyObject* get(PyObject* self, PyObject* args) {
  PyObject *key, *fallback = Py_None;
  if (!PyArg_UnpackTuple(args, "get", 1, 2, &key, &fallback)) return nullptr;
  PyObject* value = get_item(as_call_dict(self), key);
  if (value == nullptr && !PyErr_Occurred()) value = Py_NewRef(fallback);
  return value;
}

PyObject* pop(PyObject* self, PyObject* args) {
  PyObject *key, *fallback = nullptr;
  if (!PyArg_UnpackTuple(args, "pop", 1, 2, &key, &fallback)) return nullptr;
  PyObject* value = get_item(as_call_dict(self), key);
  if (value == nullptr) {
    if (PyErr_Occurred()) return nullptr;
    if (fallback == nullptr) PyErr_SetObject(PyExc_KeyError, key);
    return Py_XNewRef(fallback);
  }
  if (set_item(as_call_dict(self), key, nullptr) == 0) return value;
  Py_DECREF(value);
  return nullptr;
}

PyObject* popitem(PyObject* self, PyObject* /*no arguments*/) {
  return guarded([&] {
    py::object item =
        checked(PyObject_CallMethod(copy_of(seen(as_call_dict(self)).ptr()).ptr(), "popitem", ""));
    if (set_item(as_call_dict(self), PyTuple_GET_ITEM(item.ptr(), 0), nullptr) != 0) {
      throw_python_error();
    }
    return item;
  });
}

PyObject* setdefault(PyObject* self, PyObject* args) {
  PyObject *key, *fallback = Py_None;
  if (!PyArg_UnpackTuple(args, "setdefault", 1, 2, &key, &fallback)) return nullptr;
  PyObject* value = get_item(as_call_dict(self), key);
  if (value != nullptr || PyErr_Occurred()) return value;
  return set_item(as_call_dict(self), key, fallback) == 0 ? Py_NewRef(fallback) : nullptr;
}

PyObject* update_method(PyObject* self, PyObject* args, PyObject* kwargs) {
  return guarded([&] {
    const py::object items =
        checked(PyObject_Call(reinterpret_cast<PyObject*>(&PyDict_Type), args, kwargs));
    return update(as_call_dict(self), items.ptr());
  });
}

PyObject* clear(PyObject* self, PyObject* /*no arguments*/) {
  return guarded([&]() -> py::object {
    const py::object keys = checked(PySequence_List(seen(as_call_dict(self)).ptr()));
    all_children(keys.ptr(), [&](PyObject* key) {
      if (set_item(as_call_dict(self), key, nullptr) != 0) throw_python_error();
      return true;
    });
    return py::none();
  });
}

// Copies and pickles are plain dicts.
PyObject* reduce(PyObject* self, PyObject* /*protocol*/) {
  return guarded([&] {
    return py::object(py::make_tuple(py::handle(reinterpret_cast<PyObject*>(&PyDict_Type)),
                                     py::make_tuple(copy_of(seen(as_call_dict(self)).ptr()))));
  });
}

PyObject* deep_copy(PyObject* self, PyObject* memo) {
  return guarded([&] {
    const py::object module = checked(PyImport_ImportModule("copy"));
    return checked(PyObject_CallMethod(module.ptr(), "deepcopy", "NO",
                                       copy_of(seen(as_call_dict(self)).ptr()).release().ptr(),
                                       memo));
  });
}

constexpr const char* kKeys = "keys";
constexpr const char* kValues = "values";
constexpr const char* kItems = "items";
constexpr const char* kCopy = "copy";
constexpr const char* kReversed = "__reversed__";

template <const char* const* name>
PyMethodDef reading() {
  return {*name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&reading_method<name>)),
          METH_VARARGS | METH_KEYWORDS, nullptr};
}

PyMethodDef methods[] = {
    reading<&kKeys>(),
    reading<&kValues>(),
    reading<&kItems>(),
    reading<&kCopy>(),
    reading<&kReversed>(),
    {"get", get, METH_VARARGS, nullptr},
    {"pop", pop, METH_VARARGS, nullptr},
    {"popitem", popitem, METH_NOARGS, nullptr},
    {"setdefault", setdefault, METH_VARARGS, nullptr},
    {"update", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&update_method)),
     METH_VARARGS | METH_KEYWORDS, nullptr},
    {"clear", clear, METH_NOARGS, nullptr},
    {"__reduce__", reduce, METH_VARARGS, nullptr},
    {"__reduce_ex__", reduce, METH_VARARGS, nullptr},
    {"__copy__",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&reading_method<&kCopy>)),
     METH_VARARGS | METH_KEYWORDS, nullptr},
    {"__deepcopy__", deep_copy, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PySequenceMethods as_sequence = {};
PyMappingMethods as_mapping = {};
PyNumberMethods as_number = {};

// --- life and death ---

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(as_call_dict(self)->own);
  return PyDict_Type.tp_traverse(self, visit, arg);
}

void deallocate(PyObject* self) {
  PyObject_GC_UnTrack(self);
  Py_CLEAR(as_call_dict(self)->own);
  PyDict_Type.tp_dealloc(self);
}

}  // namespace

void define_call_dict() {
  as_sequence.sq_contains = contains;
  as_sequence.sq_length = length;
  as_mapping = {length, subscript, assign};
  as_number.nb_or = united;
  as_number.nb_inplace_or = united_inplace;

  PyTypeObject& type = call_dict_type;
  type.tp_name = "torchlift._C.CallDict";
  type.tp_doc = "The parameters or buffers of a module while functional_call calls it.";
  type.tp_base = &PyDict_Type;
  type.tp_basicsize = sizeof(CallDict);
  type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION;
  type.tp_dealloc = deallocate;
  type.tp_traverse = traverse;
  type.tp_clear = PyDict_Type.tp_clear;
  type.tp_iter = of_seen<PyObject_GetIter>;
  type.tp_repr = of_seen<PyObject_Repr>;
  type.tp_richcompare = compare;
  type.tp_hash = PyObject_HashNotImplemented;
  type.tp_as_sequence = &as_sequence;
  type.tp_as_mapping = &as_mapping;
  type.tp_as_number = &as_number;
  type.tp_methods = methods;
  if (PyType_Ready(&type) != 0) throw_python_error();
}

bool is_call_dict(PyObject* object) { return Py_IS_TYPE(object, &call_dict_type); }

py::object new_call_dict() {
  py::object result = checked(PyDict_Type.tp_new(&call_dict_type, nullptr, nullptr));
  as_call_dict(result.ptr())->own = nullptr;
  new (&as_call_dict(result.ptr())->values) ThreadValues<py::object>();
  return result;
}

void set_own_dict(const py::object& call_dict, const py::object& own) {
  as_call_dict(call_dict.ptr())->own = Py_NewRef(own.ptr());
}

py::object own_dict(const py::object& dict) {
  return is_call_dict(dict.ptr()) ? borrow(as_call_dict(dict.ptr())->own) : dict;
}

py::object get_seen(const py::object& dict, PyObject* key) {
  PyObject* value =
      is_call_dict(dict.ptr()) ? get_item(as_call_dict(dict.ptr()), key) : get_own(dict.ptr(), key);
  if (value == nullptr && PyErr_Occurred()) throw_python_error();
  return steal(value);
}

py::object all_seen(const py::object& dict) { return seen_or_itself(dict.ptr()); }

ThreadValues<py::object>& values_of(PyObject* call_dict) { return as_call_dict(call_dict)->values; }

PyObject* deleted_mark() {
  static PyObject* const mark = PyBaseObject_Type.tp_alloc(&PyBaseObject_Type, 0);
  return mark;
}

}  // namespace torchlift::python
