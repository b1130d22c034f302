#ifndef TORCHLIFT_BINDINGS_C_CALL_ATTRIBUTE_H_
#define TORCHLIFT_BINDINGS_C_CALL_ATTRIBUTE_H_

// File: bindings/_C/call_attribute.h
//
// NOTE [an attribute for each thread]
// Some modules keep tensors in plain attributes: recurrent ones a list of their weights, those with
// a hook of weight_norm, spectral_norm or pruning the weight that the hook computes. For the
// duration of a call such an attribute has a value for each thread too. Python looks a plain
// attribute up in the instance's dict without asking anybody, but a data descriptor of its class
// comes first. So the module's class is, meanwhile, a subclass of its class (of the same name, as
// torch.nn.utils.parametrize makes one) with a descriptor for each such attribute; in the
// instance's dict lies a CallAttribute that has the values. Both are exchanged while no other
// Python code can run: what a thread reads or writes goes either all the old way or all the new
// one.

#include "bindings/_C/calling_thread.h"

namespace torchlift::python {

// What the attribute is for one call; an empty object once it is deleted.
using AttributeValue = ThreadValue<py::object>;

// Makes the types ready; throws if Python refuses.
void define_call_attribute();

// An attribute of a module that has a value of its own for the thread, from install() to remove().
class AttributeUse {
 public:
  AttributeUse(py::object module, py::object name);
  AttributeUse(const AttributeUse&) = delete;
  AttributeUse& operator=(const AttributeUse&) = delete;

  // What the attribute is for the calling thread. Null if there is none in the instance's dict.
  static py::object seen(PyObject* attributes, PyObject* name);

  void install(uint64_t thread, py::object value);
  void remove();  // must not throw
  const py::object& value() const { return node_.value; }

 private:
  py::object module_, name_;
  py::object attributes_;  // module.__dict__
  py::object holder_;      // the CallAttribute; null until installed
  AttributeValue node_;
};

}  // namespace torchlift::python

#endif  // TORCHLIFT_BINDINGS_C_CALL_ATTRIBUTE_H_
