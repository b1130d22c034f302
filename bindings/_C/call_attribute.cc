#include "bindings/_C/call_attribute.h"

#include <new>
#include <unordered_map>
#include <utility>

namespace torchlift::python {
namespace {

// --- the values: lies in the instance's dict ---

struct CallAttribute {
  PyObject ob_base;
  PyObject* module;  // only compared: a copy of the module's dict holds it too
  PyObject* own;     // null once it is deleted
  ThreadValues<py::object> values;
};

PyTypeObject attribute_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

CallAttribute* as_attribute(PyObject* object) { return reinterpret_cast<CallAttribute*>(object); }

bool is_attribute(PyObject* object) { return Py_IS_TYPE(object, &attribute_type); }

py::object new_attribute(PyObject* module, PyObject* own) {
  CallAttribute* result = PyObject_GC_New(CallAttribute, &attribute_type);
  if (result == nullptr) throw_python_error();
  result->module = module;
  result->own = Py_XNewRef(own);
  new (&result->values) ThreadValues<py::object>();
  PyObject_GC_Track(reinterpret_cast<PyObject*>(result));
  return steal(reinterpret_cast<PyObject*>(result));
}

py::object value_of(CallAttribute* self) {
  const AttributeValue* found = self->values.find();
  if (found != nullptr) return found->value;
  return self->own == nullptr ? py::object() : borrow(self->own);
}

// What was there is returned, so that it dies after the change is made.
py::object set_value(CallAttribute* self, py::object value) {
  AttributeValue* found = self->values.find();
  if (found != nullptr) return std::exchange(found->value, std::move(value));
  return steal(std::exchange(self->own, value.release().ptr()));
}

int traverse_attribute(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(as_attribute(self)->own);
  return 0;
}

int clear_attribute(PyObject* self) {
  Py_CLEAR(as_attribute(self)->own);
  return 0;
}

void deallocate_attribute(PyObject* self) {
  PyObject_GC_UnTrack(self);
  clear_attribute(self);
  PyObject_GC_Del(self);
}

// Copies and pickles are the value: [value][0].
PyObject* reduce_attribute(PyObject* self, PyObject* /*protocol*/) {
  return guarded([&] {
    const py::object value = value_of(as_attribute(self));
    py::list list;
    list.append(value ? value : py::none());
    return py::object(
        py::make_tuple(py::module_::import("operator").attr("getitem"), py::make_tuple(list, 0)));
  });
}

PyObject* deep_copy_attribute(PyObject* self, PyObject* memo) {
  return guarded([&] {
    const py::object module = checked(PyImport_ImportModule("copy"));
    const py::object value = value_of(as_attribute(self));
    return checked(
        PyObject_CallMethod(module.ptr(), "deepcopy", "OO", value ? value.ptr() : Py_None, memo));
  });
}

PyMethodDef attribute_methods[] = {
    {"__reduce_ex__", reduce_attribute, METH_O, nullptr},
    {"__deepcopy__", deep_copy_attribute, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

// --- the descriptor: lies in the dict of the subclass ---

struct Descriptor {
  PyObject ob_base;
  PyObject* name;
  PyObject* base;  // the class that the subclass was made of; borrowed, the subclass holds it
};

PyTypeObject descriptor_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

Descriptor* as_descriptor(PyObject* object) { return reinterpret_cast<Descriptor*>(object); }

py::object attributes_of(PyObject* module) {
  return checked(PyObject_GenericGetDict(module, nullptr));
}

PyObject* describe_get(PyObject* self, PyObject* module, PyObject* /*type*/) {
  return guarded([&]() -> py::object {
    const Descriptor* descriptor = as_descriptor(self);
    if (module == nullptr) return borrow(self);
    py::object value = dict_item(attributes_of(module).ptr(), descriptor->name);
    if (value && is_attribute(value.ptr())) value = value_of(as_attribute(value.ptr()));
    // Otherwise an attribute of the class, or none: then Python asks the module's __getattr__.
    return value ? value : checked(PyObject_GetAttr(descriptor->base, descriptor->name));
  });
}

int describe_set(PyObject* self, PyObject* module, PyObject* value) {
  PyObject* done = guarded([&]() -> py::object {
    PyObject* name = as_descriptor(self)->name;
    const py::object attributes = attributes_of(module);
    const py::object found = dict_item(attributes.ptr(), name);
    CallAttribute* attribute =
        found && is_attribute(found.ptr()) ? as_attribute(found.ptr()) : nullptr;
    if (attribute == nullptr || attribute->module != module) {
      const int failed = value == nullptr ? PyDict_DelItem(attributes.ptr(), name)
                                          : PyDict_SetItem(attributes.ptr(), name, value);
      if (failed != 0) throw_python_error();
      return py::none();
    }
    if (value == nullptr && !value_of(attribute)) {
      PyErr_SetObject(PyExc_AttributeError, name);
      throw_python_error();
    }
    set_value(attribute, value == nullptr ? py::object() : borrow(value));
    return py::none();
  });
  Py_XDECREF(done);
  return done == nullptr ? -1 : 0;
}

void deallocate_descriptor(PyObject* self) {
  Py_CLEAR(as_descriptor(self)->name);
  PyObject_Free(self);
}

// --- the subclass ---

// A subclass lives as long as its class, as an attribute of it.
constexpr const char* kSubclass = "_torchlift_call_class";

PyObject* as_object(PyTypeObject* type) { return reinterpret_cast<PyObject*>(type); }

// A copy of an instance's dict that has the values in place of what holds them.
py::object without_attributes(PyObject* attributes) {
  py::object result = checked(PyDict_Copy(attributes));
  PyObject *name, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(attributes, &position, &name, &value)) {
    if (!is_attribute(value)) continue;
    const py::object seen = value_of(as_attribute(value));
    const int failed =
        seen ? PyDict_SetItem(result.ptr(), name, seen.ptr()) : PyDict_DelItem(result.ptr(), name);
    if (failed != 0) throw_python_error();
  }
  return result;
}

// __reduce_ex__ of the subclass: copies and pickles of the module are of its own class. pickle
// allows copyreg.__newobj__ for the object's class only, so that it is its older kin here.
PyObject* reduce_module(PyObject* base, PyObject* args) {
  return guarded([&]() -> py::object {
    const py::object reduced =
        py::handle(base).attr("__reduce_ex__")(*py::handle(args).cast<py::args>());
    const py::module_ copyreg = py::module_::import("copyreg");
    if (!PyTuple_Check(reduced.ptr()) || PyTuple_GET_SIZE(reduced.ptr()) < 2 ||
        !py::handle(PyTuple_GET_ITEM(reduced.ptr(), 0)).is(copyreg.attr("__newobj__"))) {
      return reduced;
    }
    py::list parts(reduced);
    parts[0] = copyreg.attr("_reconstructor");
    parts[1] =
        py::make_tuple(py::handle(base), py::handle(as_object(&PyBaseObject_Type)), py::none());
    if (parts.size() > 2 && PyDict_Check(PyList_GET_ITEM(parts.ptr(), 2))) {
      parts[2] = without_attributes(PyList_GET_ITEM(parts.ptr(), 2));
    }
    return py::tuple(parts);
  });
}

PyMethodDef reduce_definition = {"__reduce_ex__", reduce_module, METH_VARARGS, nullptr};

py::object make_subclass(PyObject* base) {
  const py::object members = checked(PyDict_New());
  for (const char* name : {"__module__", "__qualname__", "__doc__"}) {
    const py::object value = checked(PyObject_GetAttrString(base, name));
    if (PyDict_SetItemString(members.ptr(), name, value.ptr()) != 0) throw_python_error();
  }
  // A method that knows the class: a C function is none by itself.
  const py::object reduce = checked(PyCFunction_New(&reduce_definition, base));
  const py::object functools = checked(PyImport_ImportModule("functools"));
  const py::object method =
      checked(PyObject_CallMethod(functools.ptr(), "partialmethod", "O", reduce.ptr()));
  if (PyDict_SetItemString(members.ptr(), "__reduce_ex__", method.ptr()) != 0) throw_python_error();
  const py::object name = checked(PyObject_GetAttrString(base, "__name__"));
  return checked(
      PyObject_CallFunction(as_object(Py_TYPE(base)), "O(O)O", name.ptr(), base, members.ptr()));
}

// The class itself, not what it inherits.
py::object in_class(PyObject* type, const char* name) {
  PyObject* found = PyDict_GetItemString(reinterpret_cast<PyTypeObject*>(type)->tp_dict, name);
  return found == nullptr ? py::object() : borrow(found);
}

// One for each class: while it is made, Python code runs, and another thread may be faster.
py::object subclass_of(PyObject* base) {
  py::object subclass = in_class(base, kSubclass);
  if (subclass) return subclass;
  const py::object made = make_subclass(base);
  subclass = in_class(base, kSubclass);
  if (subclass) return subclass;
  if (PyObject_SetAttrString(base, kSubclass, made.ptr()) != 0) throw_python_error();
  return in_class(base, kSubclass);
}

void describe(PyObject* subclass, PyObject* base, PyObject* name) {
  PyObject* members = reinterpret_cast<PyTypeObject*>(subclass)->tp_dict;
  if (PyDict_Contains(members, name) == 1) return;
  Descriptor* descriptor = PyObject_New(Descriptor, &descriptor_type);
  if (descriptor == nullptr) throw_python_error();
  descriptor->name = Py_NewRef(name);
  descriptor->base = base;
  const py::object owned = steal(reinterpret_cast<PyObject*>(descriptor));
  if (PyObject_SetAttr(subclass, name, owned.ptr()) != 0) throw_python_error();
}

// --- modules whose class is exchanged ---

struct Exchanged {
  py::object own;       // the class
  py::object subclass;  // what is in its place
  int64_t uses = 0;
};

std::unordered_map<PyObject*, Exchanged>& exchanged() {
  static auto* modules = new std::unordered_map<PyObject*, Exchanged>();
  return *modules;
}

PyObject* class_name() {
  static PyObject* const name = PyUnicode_InternFromString("__class__");
  return name;
}

py::object own_class(PyObject* module) {
  const auto found = exchanged().find(module);
  return found == exchanged().end() ? borrow(as_object(Py_TYPE(module))) : found->second.own;
}

void check_describable(PyObject* module, PyObject* base, PyObject* name) {
  PyObject* found = _PyType_Lookup(reinterpret_cast<PyTypeObject*>(base), name);
  if (found == nullptr || Py_TYPE(found)->tp_descr_set == nullptr) return;
  unsupported_error("functional_call", "'", PyUnicode_AsUTF8(name), "' of ",
                    Py_TYPE(module)->tp_name,
                    " is a property of the class and a tensor in the instance's dict. "
                    "Register the tensor as a buffer.");
}

void begin_use(PyObject* module, PyObject* name) {
  const py::object base = own_class(module);
  check_describable(module, base.ptr(), name);
  const py::object subclass = subclass_of(base.ptr());
  describe(subclass.ptr(), base.ptr(), name);
  if (!exchanged().contains(module)) {
    if (PyObject_GenericSetAttr(module, class_name(), subclass.ptr()) != 0) throw_python_error();
    exchanged()[module] = {.own = base, .subclass = subclass};
  }
  ++exchanged()[module].uses;
}

// Must not throw.
void end_use(PyObject* module) {
  const auto found = exchanged().find(module);
  if (--found->second.uses > 0) return;
  const Exchanged ended = std::move(found->second);
  exchanged().erase(found);
  // The module may have got another class meanwhile.
  if (!ended.subclass.is(py::handle(as_object(Py_TYPE(module))))) return;
  if (PyObject_GenericSetAttr(module, class_name(), ended.own.ptr()) != 0) PyErr_Clear();
}

}  // namespace

void define_call_attribute() {
  attribute_type.tp_name = "torchlift._C.CallAttribute";
  attribute_type.tp_doc = "A plain attribute of a module while functional_call calls it.";
  attribute_type.tp_basicsize = sizeof(CallAttribute);
  attribute_type.tp_flags =
      Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION;
  attribute_type.tp_dealloc = deallocate_attribute;
  attribute_type.tp_traverse = traverse_attribute;
  attribute_type.tp_clear = clear_attribute;
  attribute_type.tp_methods = attribute_methods;

  descriptor_type.tp_name = "torchlift._C.CallDescriptor";
  descriptor_type.tp_basicsize = sizeof(Descriptor);
  descriptor_type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION;
  descriptor_type.tp_dealloc = deallocate_descriptor;
  descriptor_type.tp_descr_get = describe_get;
  descriptor_type.tp_descr_set = describe_set;

  for (PyTypeObject* type : {&attribute_type, &descriptor_type}) {
    if (PyType_Ready(type) != 0) throw_python_error();
  }
}

AttributeUse::AttributeUse(py::object module, py::object name)
    : module_(std::move(module)),
      name_(std::move(name)),
      attributes_(attributes_of(module_.ptr())) {}

py::object AttributeUse::seen(PyObject* attributes, PyObject* name) {
  const py::object value = dict_item(attributes, name);
  return value && is_attribute(value.ptr()) ? value_of(as_attribute(value.ptr())) : value;
}

void AttributeUse::install(uint64_t thread, py::object value) {
  node_.thread = thread;
  node_.value = std::move(value);
  py::object holder = new_attribute(module_.ptr(), nullptr);
  begin_use(module_.ptr(), name_.ptr());
  // No other Python code runs from here on.
  const py::object found = dict_item(attributes_.ptr(), name_.ptr());
  const bool in_use =
      found && is_attribute(found.ptr()) && as_attribute(found.ptr())->module == module_.ptr();
  holder_ = in_use ? found : std::move(holder);
  as_attribute(holder_.ptr())->values.push(node_);
  if (in_use) return;
  // What a copy of another module's dict holds, that module's CallAttribute, counts as its value.
  const bool of_another = found && is_attribute(found.ptr());
  const py::object own = of_another ? value_of(as_attribute(found.ptr())) : found;
  as_attribute(holder_.ptr())->own = Py_XNewRef(own.ptr());
  if (PyDict_SetItem(attributes_.ptr(), name_.ptr(), holder_.ptr()) != 0) throw_python_error();
}

void AttributeUse::remove() {
  if (!holder_) return;
  CallAttribute* attribute = as_attribute(holder_.ptr());
  attribute->values.remove(node_);
  PyObject* now = PyDict_GetItem(attributes_.ptr(), name_.ptr());
  if (attribute->values.empty() && now == holder_.ptr()) {
    const int failed = attribute->own == nullptr
                           ? PyDict_DelItem(attributes_.ptr(), name_.ptr())
                           : PyDict_SetItem(attributes_.ptr(), name_.ptr(), attribute->own);
    if (failed != 0) PyErr_Clear();
  }
  holder_ = {};
  end_use(module_.ptr());
}

}  // namespace torchlift::python
