#include "bindings/_C/jit_guard.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "batching/rules/assumptions.h"
#include "bindings/_C/module_tree.h"
#include "bindings/_C/tensor_facts.h"
#include "compile/executable.h"
#include "compile/replay.h"
#include "core/derivative_code.h"
#include "core/level.h"

namespace torchlift::python {
namespace {

using Tensors = std::vector<at::Tensor>;
// A node of the tree of arguments, which are compared in preorder.
struct Node {
  enum class Kind : uint8_t { kTensor, kContainer, kValue };
  Kind kind = Kind::kValue;
  PyTypeObject* type = nullptr;   // of a container or value; these are Python's own, and stay
  Py_ssize_t size = 0;            // of a container
  std::vector<py::object> items;  // the keys of a dict; the value
  TensorFacts facts;
  size_t input = 0;  // which of the graph's inputs a tensor is
};

// The same number or text. Of numbers, all bits count: the graph of 0.0 is not that of -0.0.
bool is_same_value(PyObject* a, PyObject* b) {
  if (a == b) return true;
  if (Py_TYPE(a) != Py_TYPE(b)) return false;
  if (PyFloat_CheckExact(a)) {
    const double x = PyFloat_AS_DOUBLE(a), y = PyFloat_AS_DOUBLE(b);
    return std::memcmp(&x, &y, sizeof(x)) == 0;
  }
  if (PyComplex_CheckExact(a)) {
    const Py_complex x = PyComplex_AsCComplex(a), y = PyComplex_AsCComplex(b);
    return std::memcmp(&x, &y, sizeof(x)) == 0;
  }
  const int equal = PyObject_RichCompareBool(a, b, Py_EQ);
  if (equal < 0) throw_python_error();
  return equal == 1;
}

bool autocast_is_on() {
  return at::autocast::is_autocast_enabled(at::kCPU) ||
         at::autocast::is_autocast_enabled(at::kCUDA);
}

bool transforms_are_open() { return !level_stack().empty() || forward_mode_open(); }

// Changed with the GIL held.
struct JitHits {
  int64_t count = 0;
};
using HitsPtr = std::shared_ptr<JitHits>;

class JitGuard {
 public:
  using Run = std::function<Tensors(const Tensors&)>;

  static std::optional<JitGuard> of(PyObject* args, PyObject* tensors, PyObject* module, Run run,
                                    HitsPtr all_hits) {
    JitGuard guard(std::move(run), std::move(all_hits));
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(tensors);
    for (Py_ssize_t i = 0; i < count; ++i) {
      const auto [place, is_new] =
          guard.inputs_.emplace(PySequence_Fast_GET_ITEM(tensors, i), static_cast<size_t>(i));
      if (!is_new) return std::nullopt;  // One tensor twice: which input is which cannot be seen.
    }
    if (autocast_is_on() || !guard.add(args)) return std::nullopt;
    if (module != Py_None) {
      guard.module_ = ModuleTree::of(module, guard.inputs_);
      if (!guard.module_.has_value()) return std::nullopt;
      guard.tensors_ += guard.module_->inputs();
    }
    if (guard.tensors_ != guard.inputs_.size()) return std::nullopt;
    guard.inputs_.clear();
    return guard;
  }

  py::object run(PyObject* args) {
    if (transforms_are_open() || at::GradMode::is_enabled() != records_ || autocast_is_on()) {
      return py::none();
    }
    Tensors inputs(tensors_);
    size_t next = 0;
    if (!matches(args, next, inputs)) return py::none();
    if (module_.has_value() && !module_->take(inputs, records_)) return py::none();
    ++hits_;
    ++all_hits_->count;
    Tensors outputs;
    try {
      const ReleaseGil release;
      const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
      outputs = run_(inputs);
    } catch (const AssumptionError&) {
      // Of a number, which is no fact of the arguments. Everything is as it was before.
      --hits_;
      --all_hits_->count;
      return py::none();
    }
    return list_of(outputs);
  }

  int64_t hits() const { return hits_; }

 private:
  JitGuard(Run run, HitsPtr all_hits)
      : run_(std::move(run)),
        all_hits_(std::move(all_hits)),
        records_(at::GradMode::is_enabled()) {}

  // Appends the tree below the object; false where there is something that a guard does not know.
  bool add(PyObject* object) {
    const size_t place = nodes_.size();
    Node& node = nodes_.emplace_back();
    if (is_tensor(object)) {
      const at::Tensor& t = tensor_of(object);
      const auto input = inputs_.find(object);
      if (!TensorFacts::are_known(t) || input == inputs_.end()) return false;
      node.kind = Node::Kind::kTensor;
      node.facts = TensorFacts::of(t);
      node.input = input->second;
      ++tensors_;
      return true;
    }
    node.type = Py_TYPE(object);
    if (is_plain_scalar(object)) {
      node.items.push_back(borrow(object));
      return true;
    }
    if (!is_plain_container(object)) return false;
    node.kind = Node::Kind::kContainer;
    node.size = PyObject_Size(object);
    if (PyDict_CheckExact(object) && !add_keys(place, object)) return false;
    return all_children(object, [&](PyObject* child) { return add(child); });
  }

  bool add_keys(size_t place, PyObject* dict) {
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (PyDict_Next(dict, &position, &key, &value)) {
      if (!is_plain_scalar(key)) return false;
      nodes_[place].items.push_back(borrow(key));
    }
    return true;
  }

  bool matches(PyObject* object, size_t& next, Tensors& inputs) const {
    const Node& node = nodes_[next++];
    if (node.kind == Node::Kind::kTensor) return takes(node, object, inputs);
    if (Py_TYPE(object) != node.type) return false;
    if (node.kind == Node::Kind::kValue) return is_same_value(node.items[0].ptr(), object);
    if (PyObject_Size(object) != node.size || !has_keys(node, object)) return false;
    return all_children(object, [&](PyObject* child) { return matches(child, next, inputs); });
  }

  bool takes(const Node& node, PyObject* object, Tensors& inputs) const {
    if (!is_tensor(object)) return false;
    const at::Tensor& t = tensor_of(object);
    if (!node.facts.holds(t) || (records_ && t.requires_grad())) return false;
    inputs[node.input] = t;
    return true;
  }

  // In the same order, too: leaves are in the order of their keys.
  static bool has_keys(const Node& node, PyObject* object) {
    if (!PyDict_CheckExact(object)) return true;
    PyObject *key, *value;
    Py_ssize_t position = 0;
    for (const py::object& known : node.items) {
      if (!PyDict_Next(object, &position, &key, &value)) return false;
      if (!is_same_value(known.ptr(), key)) return false;
    }
    return true;
  }

  Run run_;
  HitsPtr all_hits_;
  bool records_;  // GradMode
  std::vector<Node> nodes_;
  std::optional<ModuleTree> module_;
  size_t tensors_ = 0;
  ModuleTree::Inputs inputs_;  // while it is made
  int64_t hits_ = 0;
};

template <class P>
JitGuard::Run runner(const py::object& program) {
  return [copy = program.cast<P>()](const Tensors& inputs) { return copy.run(inputs); };
}

py::object guard_of(const py::tuple& args, const py::list& tensors, const py::object& module,
                    const py::object& program, const HitsPtr& all_hits) {
  JitGuard::Run run;
  if (py::isinstance<compile::Executable>(program)) {
    run = runner<compile::Executable>(program);
  } else if (py::isinstance<compile::Program>(program)) {
    run = runner<compile::Program>(program);
  } else {
    return py::none();
  }
  std::optional<JitGuard> guard =
      JitGuard::of(args.ptr(), tensors.ptr(), module.ptr(), std::move(run), all_hits);
  return guard.has_value() ? py::cast(std::move(*guard)) : py::none();
}

}  // namespace

void define_jit_guard(py::module_& module) {
  py::class_<JitHits, HitsPtr>(module, "JitHits")
      .def(py::init<>())
      .def_readonly("count", &JitHits::count);
  py::class_<JitGuard>(module, "JitGuard")
      .def_static("of", &guard_of)
      .def("run",
           [](JitGuard& self, const py::tuple& args) {
             return guarded_object([&] { return self.run(args.ptr()); });
           })
      .def_property_readonly("hits", &JitGuard::hits);
}

}  // namespace torchlift::python
