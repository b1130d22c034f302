#include "bindings/_C/reverse.h"

#include <ATen/ops/ones.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "autodiff/reverse.h"
#include "autodiff/sole_path.h"
#include "core/autograd_node.h"
#include "core/grad_mode.h"
#include "core/lifted_tensor.h"

namespace torchlift::python {
namespace {

using Tensors = std::vector<at::Tensor>;

// What grad returns, in torch.func's order and in JAX's.
enum class Order { kGrads = 0, kValueAndGrads = 1, kGradsAndValue = 2 };

bool is_differentiable(const at::Tensor& t) {
  return at::isFloatingType(t.scalar_type()) || at::isComplexType(t.scalar_type());
}

bool is_scalar_loss(PyObject* object) {
  if (!THPVariable_Check(object)) return false;
  const at::Tensor& t = tensor_of(object);
  return t.dim() == 0 && at::isFloatingType(t.scalar_type());
}

// Whether a tree of plain containers has only leaves that are tensors with a derivative; counts
// them.
bool is_plain_primal(PyObject* object, size_t& count) {
  if (is_plain_container(object)) {
    return all_children(object, [&](PyObject* child) { return is_plain_primal(child, count); });
  }
  ++count;
  return is_tensor(object) && is_differentiable(tensor_of(object));
}

bool is_plain_aux(PyObject* object) {
  if (is_plain_container(object)) return all_children(object, is_plain_aux);
  return is_tensor(object) || is_plain_scalar(object);
}

void collect_tensors(PyObject* object, Tensors& tensors) {
  if (is_plain_container(object)) {
    all_children(object, [&](PyObject* child) { return collect_tensors(child, tensors), true; });
  } else if (is_tensor(object)) {
    tensors.push_back(tensor_of(object));
  }
}

// The tree with its tensors replaced by tensors[next], tensors[next + 1]...
py::object replace_tensors(PyObject* object, const Tensors& tensors, size_t& next) {
  if (is_plain_container(object)) {
    return map_children(object,
                        [&](PyObject* child) { return replace_tensors(child, tensors, next); });
  }
  return is_tensor(object) ? wrap(tensors[next++]) : borrow(object);
}

// The tree with every tensor as scope.primal made it.
py::object make_primals(PyObject* object, ReverseScope& scope, size_t& count) {
  if (is_plain_container(object)) {
    return map_children(object, [&](PyObject* child) { return make_primals(child, scope, count); });
  }
  ++count;
  return wrap(scope.primal(tensor_of(object)));
}

// Which arguments are differentiated. Empty when argnums asks for what only Python can sort out.
std::vector<Py_ssize_t> plain_argnums(PyObject* argnums, PyObject* args) {
  std::vector<Py_ssize_t> result;
  const auto add = [&](PyObject* number) {
    if (!PyLong_CheckExact(number)) return false;
    Py_ssize_t i = PyLong_AsSsize_t(number);
    if (i == -1 && PyErr_Occurred() != nullptr) throw_python_error();
    if (i < 0) i += PyTuple_GET_SIZE(args);
    if (i < 0 || i >= PyTuple_GET_SIZE(args)) return false;
    if (std::find(result.begin(), result.end(), i) != result.end()) return false;
    result.push_back(i);
    size_t count = 0;
    return is_plain_primal(PyTuple_GET_ITEM(args, i), count) && count > 0;
  };
  const bool plain = PyTuple_CheckExact(argnums) ? all_children(argnums, add) : add(argnums);
  return plain ? result : std::vector<Py_ssize_t>();
}

// The gradient of the scalar outputs()[0], which nobody will ask for again.
Tensors pull_scalar(const Pullback& pullback, size_t outputs) {
  const ReleaseGil release;
  Tensors cotangents(outputs);
  cotangents[0] = at::ones({}, pullback.outputs()[0].options());
  return pullback(std::move(cotangents), /*free_graph=*/true);
}

// The auxiliary output: its tensors, and how to put others in their place.
class Aux {
 public:
  Aux(PyObject* aux, PyObject* help) : tree_(borrow(aux)) {
    if (is_plain_aux(aux)) {
      collect_tensors(aux, tensors_);
      return;
    }
    const py::object flat = checked(PyObject_CallFunction(help, "sO", "aux", aux));
    tree_ = borrow(PyTuple_GetItem(flat.ptr(), 0));
    unflatten_ = borrow(PyTuple_GetItem(flat.ptr(), 1));
    collect_tensors(tree_.ptr(), tensors_);
  }

  const Tensors& tensors() const { return tensors_; }

  py::object with(const Tensors& tensors) const {
    size_t next = 1;  // after the loss
    py::object replaced = replace_tensors(tree_.ptr(), tensors, next);
    return unflatten_ ? checked(PyObject_CallOneArg(unflatten_.ptr(), replaced.ptr())) : replaced;
  }

 private:
  py::object tree_;
  py::object unflatten_;
  Tensors tensors_;
};

py::object arrange(Order order, bool has_aux, py::object grads, py::object value, py::object aux) {
  if (order == Order::kGrads) return has_aux ? py::make_tuple(grads, aux) : grads;
  if (has_aux) value = py::make_tuple(value, aux);
  return order == Order::kValueAndGrads ? py::make_tuple(value, grads)
                                        : py::make_tuple(grads, value);
}

// What f returned, split into loss and auxiliary output.
std::pair<PyObject*, PyObject*> split_output(PyObject* output, bool has_aux, PyObject* help) {
  const bool is_pair = PyTuple_CheckExact(output) && PyTuple_GET_SIZE(output) == 2;
  PyObject* loss = has_aux && is_pair ? PyTuple_GET_ITEM(output, 0) : output;
  if ((has_aux && !is_pair) || !is_scalar_loss(loss)) {
    checked(PyObject_CallFunction(help, "sO", "loss", output));
  }
  return {loss, has_aux ? PyTuple_GET_ITEM(output, 1) : nullptr};
}

py::object gradient_like(PyObject* argnums, const std::vector<Py_ssize_t>& numbers, PyObject* args,
                         const Tensors& grads) {
  size_t next = 0;
  if (!PyTuple_CheckExact(argnums)) {
    return replace_tensors(PyTuple_GET_ITEM(args, numbers[0]), grads, next);
  }
  py::object result = checked(PyTuple_New(static_cast<Py_ssize_t>(numbers.size())));
  for (size_t i = 0; i < numbers.size(); ++i) {
    py::object grad = replace_tensors(PyTuple_GET_ITEM(args, numbers[i]), grads, next);
    PyTuple_SET_ITEM(result.ptr(), static_cast<Py_ssize_t>(i), grad.release().ptr());
  }
  return result;
}

// In the order of argnums, as gradient_like reads them.
py::object call_with_primals(PyObject* func, const std::vector<Py_ssize_t>& numbers, PyObject* args,
                             PyObject* kwargs, ReverseScope& scope) {
  std::vector<py::object> replaced(PyTuple_GET_SIZE(args));
  size_t count = 0;
  for (const Py_ssize_t i : numbers) {
    replaced[i] = make_primals(PyTuple_GET_ITEM(args, i), scope, count);
  }
  return call_with(func, args, kwargs, [&](Py_ssize_t i, PyObject* arg) {
    return replaced[i] ? std::move(replaced[i]) : borrow(arg);
  });
}

py::object call_leaves(PyObject* call, PyObject* leaves, ReverseScope& scope) {
  size_t count = 0;
  const py::object primals = make_primals(leaves, scope, count);
  return checked(PyObject_CallOneArg(call, primals.ptr()));
}

Pullback finish(ReverseScope& scope, const Tensors& outputs) {
  for (const at::Tensor& output : outputs) check_alive(output);
  return scope.finish(outputs);
}

// The tensors of a Python tuple or list, undefined for None. False if it holds anything else.
bool unpack(PyObject* sequence, Tensors& tensors) {
  return all_children(sequence, [&](PyObject* item) {
    if (item != Py_None && !is_tensor(item)) return false;
    tensors.push_back(item == Py_None ? at::Tensor() : tensor_of(item));
    return true;
  });
}

// The deepest level among the tensors, or null.
LevelPtr deepest_level(const Tensors& tensors) {
  const LiftedTensorImpl* found = nullptr;
  for (const at::Tensor& t : tensors) {
    const LiftedTensorImpl* impl = t.defined() ? as_lifted(t) : nullptr;
    if (impl == nullptr) continue;
    check_alive(t);
    if (found == nullptr || impl->level().depth() > found->level().depth()) found = impl;
  }
  return found == nullptr ? LevelPtr() : found->level_ptr();
}

// The engine, in the domain of `level`. Whether a graph is made is said for all domains, as in a
// loop over the examples.
Tensors run_engine(const LevelPtr& level, const Tensors& outputs, Tensors grads,
                   const Tensors& inputs, bool keep, bool create, bool unused, bool accumulate) {
  for (at::Tensor& grad : grads) {
    if (grad.defined() && depth_of(grad) != level->depth()) {
      grad = lift_alias(grad, std::nullopt, level);
    }
  }
  const bool outer = create && outer_grad_enabled(*level);
  const OuterGradModeGuard guard(level.get(), outer ? OuterGradMode::kOn : OuterGradMode::kOff);
  if (!accumulate) return torch::autograd::grad(outputs, inputs, grads, keep, create, unused);
  torch::autograd::backward(outputs, grads, keep, create, inputs);
  return {};
}

// pull(cotangents: list[Tensor | None], free_graph: bool, numbers: list[int] | None = None)
//   -> list[Tensor]
py::object pull(const Pullback& pullback, const py::list& cotangents, bool free_graph,
                const std::optional<std::vector<size_t>>& numbers) {
  return guarded_object([&] {
    Tensors given = tensors_of(cotangents.ptr());
    const Tensors grads = [&] {
      const ReleaseGil release;
      return numbers.has_value() ? pullback.of_primals(*numbers, std::move(given), free_graph)
                                 : pullback(std::move(given), free_graph);
    }();
    return list_of(grads);
  });
}

// What a tensor is the result of, in its graph.
struct GraphNode {
  decltype(torch::autograd::Edge::function) node;
};

GraphNode node_of(const at::Tensor& t) {
  return {torch::autograd::impl::gradient_edge(t).function};
}

// See behind_node. (Known by this name not to look at GradMode, in autodiff/reverse.cc.)
struct GhostNormBackward final : public torch::autograd::Node {
  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override {
    return {std::move(grads[0]), at::Tensor()};
  }
  std::string name() const override { return "GhostNormBackward"; }
};

// behind_node(output, number): the output as the result of one more node, which passes gradients on
// and claims to depend on the number. Hooks see all of the output's gradient, and are called where
// only the number's is asked for. None for an output with a tangent, which has derivatives besides.
py::object behind_node(const py::handle& output, const py::handle& number) {
  const at::Tensor& given = tensor_of(output.ptr());
  if (given._fw_grad(/*level=*/0).defined()) return py::none();
  auto node = make_node<GhostNormBackward>();
  node->add_next_edge(torch::autograd::impl::gradient_edge(given));
  node->add_next_edge(torch::autograd::impl::gradient_edge(tensor_of(number.ptr())));
  const LiftedTensorImpl* impl = as_lifted(given);
  at::Tensor result =
      impl != nullptr ? lift_alias(impl->value(), impl->bdim(), impl->level_ptr()) : given.detach();
  torch::autograd::set_history(result, node);
  note_nodes();
  return wrap(result);
}

// sole_paths(output, tensors, nodes: list[GraphNode]) -> list[int | None]: for each tensor the
// number of the node through which all of its gradient passes, or -1; None if the output does not
// depend on it
std::vector<std::optional<int64_t>> sole_paths(const py::handle& output, const py::handle& tensors,
                                               const std::vector<GraphNode>& nodes) {
  std::unordered_map<const torch::autograd::Node*, int64_t> numbers;
  for (const GraphNode& each : nodes) {
    numbers.emplace(each.node.get(), static_cast<int64_t>(numbers.size()));
  }
  const SolePaths paths(tensor_of(output.ptr()));
  std::vector<std::optional<int64_t>> found;
  for (const at::Tensor& t : tensors_of(tensors.ptr())) {
    const torch::autograd::Edge edge = torch::autograd::impl::gradient_edge(t);
    if (!paths.contains(edge)) {
      found.emplace_back(std::nullopt);
      continue;
    }
    const auto* node =
        paths.above(edge, [&](const torch::autograd::Node& n) { return numbers.count(&n) > 0; });
    found.emplace_back(node == nullptr ? -1 : numbers.at(node));
  }
  return found;
}

}  // namespace

PyObject* grad_call(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    PyObject *func = args[0], *argnums = args[1], *help = args[4], *arguments = args[5];
    const bool has_aux = args[2] == Py_True;
    const auto order = static_cast<Order>(PyLong_AsLong(args[3]));
    const auto numbers = plain_argnums(argnums, arguments);
    if (numbers.empty()) return not_implemented();
    ReverseScope scope;
    const py::object output = call_with_primals(func, numbers, arguments, args[6], scope);
    const auto [loss, aux_tree] = split_output(output.ptr(), has_aux, help);
    Tensors outputs{tensor_of(loss)};
    std::optional<Aux> aux;
    if (has_aux) {
      aux.emplace(aux_tree, help);
      outputs.insert(outputs.end(), aux->tensors().begin(), aux->tensors().end());
    }
    const Pullback pullback = finish(scope, outputs);
    const Tensors grads = pull_scalar(pullback, outputs.size());
    py::object value = order == Order::kGrads ? py::none() : wrap(pullback.outputs()[0]);
    return arrange(order, has_aux, gradient_like(argnums, numbers, arguments, grads),
                   std::move(value), has_aux ? aux->with(pullback.outputs()) : py::object());
  });
}

PyObject* grad_leaves(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    ReverseScope scope;
    const py::object output = call_leaves(args[0], args[1], scope);
    PyObject* aux = PyTuple_GetItem(output.ptr(), 1);
    Tensors outputs{tensor_of(PyTuple_GetItem(output.ptr(), 0))};
    collect_tensors(aux, outputs);
    const Pullback pullback = finish(scope, outputs);
    const Tensors grads = pull_scalar(pullback, outputs.size());
    size_t next = 1;
    return py::make_tuple(list_of(grads), wrap(pullback.outputs()[0]),
                          replace_tensors(aux, pullback.outputs(), next));
  });
}

PyObject* vjp_leaves(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    ReverseScope scope;
    const py::object leaves = call_leaves(args[0], args[1], scope);
    Tensors outputs;
    collect_tensors(leaves.ptr(), outputs);
    Pullback pullback = finish(scope, outputs);
    size_t next = 0;
    const py::object seen = replace_tensors(leaves.ptr(), pullback.outputs(), next);
    return py::make_tuple(seen, py::cast(std::move(pullback)));
  });
}

PyObject* run_backward(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    Tensors outputs, grads, inputs;
    if (!unpack(args[0], outputs) || !unpack(args[1], grads) || !unpack(args[4], inputs)) {
      return not_implemented();
    }
    const LevelPtr level = deepest_level(outputs);
    if (level == nullptr) return not_implemented();
    const bool accumulate = args[6] == Py_True;
    const bool keep = args[2] == Py_True, create = args[3] == Py_True, unused = args[5] == Py_True;
    const Tensors result = [&] {
      const ReleaseGil release;
      return run_engine(level, outputs, grads, inputs, keep, create, unused, accumulate);
    }();
    if (accumulate) return py::none();
    py::object tuple = checked(PyTuple_New(static_cast<Py_ssize_t>(result.size())));
    for (size_t i = 0; i < result.size(); ++i) {
      py::object grad = result[i].defined() ? wrap(result[i]) : py::none();
      PyTuple_SET_ITEM(tuple.ptr(), static_cast<Py_ssize_t>(i), grad.release().ptr());
    }
    return tuple;
  });
}

void define_pullback(py::module_& m) {
  py::class_<GraphNode>(m, "GraphNode").def(py::init([](const py::handle& tensor) {
    return node_of(tensor_of(tensor.ptr()));
  }));
  py::class_<Pullback>(m, "Pullback")
      .def("pull", &pull, py::arg("cotangents"), py::arg("free_graph"),
           py::arg("numbers") = py::none());
  m.def("behind_node", &behind_node);
  m.def("sole_paths", &sole_paths);
}

}  // namespace torchlift::python
