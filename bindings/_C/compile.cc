#include "bindings/_C/compile.h"

#include <pybind11/complex.h>
#include <pybind11/stl.h>
#include <torch/csrc/Device.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/utils/tensor_memoryformats.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "bindings/_C/returned.h"
#include "bindings/_C/source_line.h"
#include "compile/artifact/artifact.h"
#include "compile/artifact/loaded_program.h"
#include "compile/artifact/native_code.h"
#include "compile/artifact/native_plan.h"
#include "compile/artifact/signature.h"
#include "compile/assumptions.h"
#include "compile/captured_state.h"
#include "compile/dynamic.h"
#include "compile/executable.h"
#include "compile/graph.h"
#include "compile/passes/functionalize.h"
#include "compile/passes/optimize.h"
#include "compile/passes/written_memory.h"
#include "compile/replay.h"
#include "compile/size_expr.h"
#include "compile/trace_scope.h"
#include "core/random_state.h"

namespace torchlift::python {
namespace {

using compile::Argument;
using compile::Executable;
using compile::Graph;
using compile::kNoValue;
using compile::LoadedProgram;
using compile::Node;
using compile::Program;
using compile::ValueId;
using compile::ValueRef;
using Tensors = std::vector<at::Tensor>;
using GraphPtr = std::shared_ptr<Graph>;

// A value of a graph, for Python.
struct NamedValue {
  std::string name;
};

// A size that depends on dynamic dims, and a number that does.
struct NamedSize {
  compile::SizeExpr size;
};
struct NamedRatio {
  compile::SizeRatio ratio;
};

py::object object_of(PyObject* borrowed) { return borrow(borrowed); }

// An int where it is one.
py::object size_object(const compile::SizeExpr& size) {
  const auto constant = size.constant();
  return constant.has_value() ? py::object(py::int_(*constant)) : py::cast(NamedSize{size});
}

py::list sizes_object(const std::vector<compile::SizeExpr>& sizes) {
  py::list list;
  for (const compile::SizeExpr& each : sizes) list.append(size_object(each));
  return list;
}

// An integer of a schema that stands for something else.
py::object int_object(int64_t number, const c10::Type& type) {
  switch (type.kind()) {
    case c10::TypeKind::ScalarTypeType:
      return object_of(
          reinterpret_cast<PyObject*>(torch::getTHPDtype(static_cast<at::ScalarType>(number))));
    case c10::TypeKind::LayoutType:
      return object_of(
          reinterpret_cast<PyObject*>(torch::getTHPLayout(static_cast<at::Layout>(number))));
    case c10::TypeKind::MemoryFormatType:
      return object_of(torch::utils::getTHPMemoryFormat(static_cast<at::MemoryFormat>(number)));
    default:
      return py::int_(number);
  }
}

py::object constant_object(const c10::IValue& value, const c10::Type& type) {
  if (type.kind() == c10::TypeKind::OptionalType) {
    return constant_object(value, *type.castRaw<c10::OptionalType>()->getElementType());
  }
  if (value.isInt()) return int_object(value.toInt(), type);
  if (value.isBool()) return py::bool_(value.toBool());
  if (value.isDouble()) return py::float_(value.toDouble());
  if (value.isComplexDouble()) {
    return py::cast(static_cast<std::complex<double>>(value.toComplexDouble()));
  }
  if (value.isString()) return py::str(value.toStringRef());
  if (value.isDevice()) return checked(THPDevice_New(value.toDevice()));
  if (value.isIntList()) return py::cast(value.toIntVector());
  if (value.isDoubleList()) return py::cast(value.toDoubleVector());
  if (value.isList()) {
    py::list list;
    for (const c10::IValue& each : value.toListRef()) {
      list.append(constant_object(each, *c10::NumberType::get()));
    }
    return py::object(list);
  }
  unsupported_error("compile", "an argument of the kind ", value.tagKind(),
                    " has no form in Python.");
}

class Exporter {
 public:
  // dynamic: sizes that depend on dynamic dims are GraphSizes and GraphRatios; else they are an
  // error.
  explicit Exporter(const Graph& graph, bool dynamic = false) : graph_(graph), dynamic_(dynamic) {}

  py::object value(ValueId id) const {
    if (id == kNoValue) return py::none();
    return py::cast(NamedValue{graph_.value(id).name});
  }

  py::list values(const std::vector<ValueId>& ids) const {
    py::list list;
    for (const ValueId id : ids) list.append(value(id));
    return list;
  }

  // (operator, overload, [arguments], [results], [subgraphs])
  py::object node(const Node& node) const {
    py::list args, results, subgraphs;
    const auto op = compile::find_operator(node);
    for (size_t i = 0; i < node.args.size(); ++i) {
      const c10::Type& type =
          op.has_value() ? *op->schema().arguments()[i].real_type() : *c10::NumberType::get();
      args.append(argument(node.args[i], type));
    }
    for (const compile::Result& result : node.results) {
      results.append(result.is_list ? py::object(values(result.ids)) : value(result.ids[0]));
    }
    for (const auto& subgraph : node.subgraphs) {
      subgraphs.append(py::cast(std::make_shared<Graph>(*subgraph)));
    }
    return py::make_tuple(node.op, node.overload, args, results, subgraphs);
  }

 private:
  py::object argument(const Argument& argument, const c10::Type& type) const {
    if (const auto* ref = std::get_if<ValueRef>(&argument)) return value(ref->id);
    if (const auto* refs = std::get_if<std::vector<ValueRef>>(&argument)) {
      py::list list;
      for (const ValueRef& ref : *refs) list.append(value(ref.id));
      return py::object(list);
    }
    if (const auto* constant = std::get_if<c10::IValue>(&argument)) {
      return constant_object(*constant, type);
    }
    if (std::holds_alternative<std::monostate>(argument)) return py::none();
    if (dynamic_) return dynamic_argument(argument);
    unsupported_error("compile",
                      "the graph has sizes that depend on dynamic dims, which an fx "
                      "graph of this kind cannot say. Trace it without dynamic dims.");
  }

  static py::object dynamic_argument(const Argument& argument) {
    if (const auto* size = std::get_if<compile::SizeExpr>(&argument)) return size_object(*size);
    if (const auto* sizes = std::get_if<std::vector<compile::SizeExpr>>(&argument)) {
      return sizes_object(*sizes);
    }
    return py::cast(NamedRatio{std::get<compile::SizeRatio>(argument)});
  }

  const Graph& graph_;
  bool dynamic_;
};

py::list constants_of(const Graph& graph) {
  py::list list;
  for (const compile::Constant& constant : graph.constants) {
    list.append(py::make_tuple(graph.value(constant.id).name, wrap(constant.tensor)));
  }
  return list;
}

// (sizes, strides, dtype, device) of each input; dynamic dims have these sizes, or 2.
py::list input_types(const Graph& graph, std::optional<std::vector<int64_t>> given) {
  const std::vector<int64_t> symbols =
      given.value_or(std::vector<int64_t>(graph.symbols.size(), 2));
  py::list list;
  for (const ValueId id : graph.inputs) {
    const compile::TensorType& type = graph.type(id);
    list.append(
        py::make_tuple(type.concrete_sizes(symbols), type.concrete_strides(symbols),
                       int_object(static_cast<int64_t>(type.dtype), *c10::ScalarTypeType::get()),
                       checked(THPDevice_New(type.device))));
  }
  return list;
}

// (name, dtype, sizes, strides) of each value.
py::list value_types(const Graph& graph) {
  py::list list;
  for (const compile::Value& value : graph.values) {
    list.append(py::make_tuple(
        value.name, int_object(static_cast<int64_t>(value.type.dtype), *c10::ScalarTypeType::get()),
        sizes_object(value.type.sizes), sizes_object(value.type.strides)));
  }
  return list;
}

py::list input_sizes(const Graph& graph) {
  py::list list;
  for (const ValueId id : graph.inputs) list.append(sizes_object(graph.type(id).sizes));
  return list;
}

// (index of an input, dim, the least size) of each dynamic dim.
py::list symbols_of(const Graph& graph) {
  py::list list;
  for (const compile::Symbol& symbol : graph.symbols) {
    list.append(py::make_tuple(symbol.input, symbol.dim, symbol.least));
  }
  return list;
}

void define_sizes(py::module_& m) {
  py::class_<NamedSize>(m, "GraphSize")
      .def("__str__", [](const NamedSize& self) { return self.size.str(); })
      .def_property_readonly("denominator",
                             [](const NamedSize& self) { return self.size.denominator(); })
      // [(powers of the dynamic dims, coefficient)]
      .def_property_readonly("terms", [](const NamedSize& self) {
        py::list terms;
        for (const auto& [powers, coefficient] : self.size.terms()) {
          terms.append(py::make_tuple(powers, coefficient));
        }
        return terms;
      });
  py::class_<NamedRatio>(m, "GraphRatio")
      .def_property_readonly("factor", [](const NamedRatio& self) { return self.ratio.factor; })
      .def_property_readonly(
          "numerator", [](const NamedRatio& self) { return size_object(self.ratio.numerator); })
      .def_property_readonly("denominator", [](const NamedRatio& self) {
        return size_object(self.ratio.denominator);
      });
}

template <class P>
py::object run(const P& program, const py::list& leaves, std::optional<uint64_t> seed) {
  return guarded_object([&]() -> py::object {
    const Tensors inputs = tensors_of(leaves.ptr());
    Tensors outputs;
    {
      const ReleaseGil release;
      outputs = program.run(inputs, {.seed = seed});
    }
    return list_of(outputs);
  });
}

// How many outputs the graph had before, (input, output) of what goes back into the inputs, and the
// captured tensors that its last inputs stand for.
py::object functionalize_graph(Graph& graph) {
  return guarded_object([&]() -> py::object {
    const compile::Functionalized done = compile::functionalize(graph);
    py::list updates;
    for (const compile::InputUpdate& update : done.updates) {
      updates.append(py::make_tuple(update.input, update.output));
    }
    return py::make_tuple(done.outputs, updates, list_of(done.state));
  });
}

// What a compiler of machine code is to compute of the graph: compile/artifact/native_plan.h.
GraphPtr natively_computed(const Graph& graph) {
  GraphPtr computed;
  guarded_object([&]() -> py::object {
    computed = std::make_shared<Graph>(compile::native_plan(graph).computed);
    compile::optimize(*computed, compile::options_for_compilers());
    return py::none();
  });
  return computed;
}

// The names of constants that are wrapped numbers, which have no say in type promotion.
std::vector<std::string> number_constants(const Graph& graph) {
  std::vector<std::string> names;
  for (const compile::Constant& constant : graph.constants) {
    if (!constant.tensor.unsafeGetTensorImpl()->is_wrapped_number()) continue;
    names.push_back(graph.value(constant.id).name);
  }
  return names;
}

py::list answers(const Graph& graph) {
  py::list all;
  for (const std::vector<int64_t>& each : compile::answers_of(graph)) {
    py::list numbers;
    for (const int64_t number : each) numbers.append(number);
    all.append(std::move(numbers));
  }
  return all;
}

void define_graph(py::module_& m) {
  py::class_<NamedValue>(m, "GraphValue")
      .def_readonly("name", &NamedValue::name)
      .def("__repr__", [](const NamedValue& self) { return "%" + self.name; });
  py::class_<Graph, GraphPtr>(m, "Graph")
      .def("__str__", [](const Graph& self) { return self.str(); })
      .def("code", &Graph::str, py::arg("sources"))
      .def("copy", [](const Graph& self) { return std::make_shared<Graph>(self); })
      .def("verify",
           [](const Graph& self) {
             guarded_object([&]() -> py::object {
               compile::verify(self);
               return py::none();
             });
           })
      .def("inputs", [](const Graph& self) { return Exporter(self).values(self.inputs); })
      .def("outputs", [](const Graph& self) { return Exporter(self).values(self.outputs); })
      .def("input_types", &input_types, py::arg("dims") = py::none())
      .def("input_sizes", &input_sizes)
      .def("value_types", &value_types)
      .def("symbols", &symbols_of)
      .def("constants", &constants_of)
      .def("number_constants", &number_constants)
      .def("answers", &answers)
      .def("functionalize", &functionalize_graph)
      .def("constant_outputs", [](const Graph& self) { return compile::constant_outputs(self); })
      .def("simplify_for_compiler",
           [](Graph& self) {
             return guarded_object([&]() -> py::object {
               compile::optimize(self, compile::options_for_compilers());
               return py::none();
             });
           })
      .def("natively_computed", &natively_computed)
      .def("sources",
           [](const Graph& self) {
             std::vector<std::string> sources;
             for (const Node& node : self.nodes) sources.push_back(node.source);
             return sources;
           })
      .def(
          "nodes",
          [](const Graph& self, bool dynamic) {
            return guarded_object([&]() -> py::object {
              const Exporter exporter(self, dynamic);
              py::list nodes;
              for (const Node& node : self.nodes) nodes.append(exporter.node(node));
              return py::object(nodes);
            });
          },
          py::arg("dynamic") = false);
}

}  // namespace

PyObject* trace_leaves(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    const Tensors leaves = tensors_of(args[1]);
    const auto names = borrow(args[2]).cast<std::vector<std::string>>();
    const auto skipped = borrow(args[4]).cast<std::vector<std::string>>();
    const auto devices = borrow(args[5]).cast<std::optional<std::vector<std::string>>>();
    const auto transform = borrow(args[3]).cast<std::string>();
    compile::CapturedState state(devices_of(leaves));
    while (true) {
      // Before the scope, which would take the copy of an argument that is state for the
      // function's.
      Tensors own = leaves;
      if (!devices.has_value()) {
        for (at::Tensor& each : own) each = each.clone();
      }
      compile::TraceScope scope(
          transform, [&skipped] { return line_now(skipped); },
          devices.has_value() ? compile::Known::kShapes : compile::Known::kValues, &state);
      Tensors traced;
      for (size_t i = 0; i < own.size(); ++i) {
        traced.push_back(devices.has_value()
                             ? scope.input(own[i], names[i], c10::Device(devices->at(i)))
                             : scope.input(own[i], names[i]));
      }
      Returned returned;
      const LeafOutputs out = returned(args[0], traced);
      auto graph = std::make_shared<Graph>(scope.finish(out.leaves));
      if (!state.again()) return py::make_tuple(std::move(graph), returned.with(out.leaves));
    }
  });
}

namespace {

// graph_of(leaves) -> Graph; dims: [(name, [(input, dim)])].
GraphPtr trace_dynamic_of(const py::function& graph_of, const py::list& leaves,
                          const py::list& dims) {
  GraphPtr graph;
  guarded_object([&]() -> py::object {
    std::vector<compile::DynamicDim> all;
    for (const py::handle& each : dims) {
      const auto pair = each.cast<std::pair<std::string, std::vector<std::pair<int, int>>>>();
      compile::DynamicDim dim{.name = pair.first, .places = {}};
      for (const auto& [input, place] : pair.second) dim.places.push_back({input, place});
      all.push_back(std::move(dim));
    }
    const auto traced = [&](const Tensors& inputs) {
      return *graph_of(list_of(inputs)).cast<GraphPtr>();
    };
    graph = std::make_shared<Graph>(compile::trace_dynamic(traced, tensors_of(leaves.ptr()), all));
    return py::none();
  });
  return graph;
}

// --- artifacts -----------------------------------------------------------------------------------

using compile::Structure;

const std::vector<std::pair<std::string, Structure::Kind>>& kinds() {
  static const auto* all = new std::vector<std::pair<std::string, Structure::Kind>>{
      {"tensor", Structure::Kind::kTensor},     {"none", Structure::Kind::kNone},
      {"constant", Structure::Kind::kConstant}, {"tuple", Structure::Kind::kTuple},
      {"list", Structure::Kind::kList},         {"dict", Structure::Kind::kDict}};
  return *all;
}

// (kind, name, content), as torchlift/_save.py has it.
Structure structure_of(const py::handle& object) {
  const auto tuple = object.cast<py::tuple>();
  const auto kind = tuple[0].cast<std::string>();
  Structure structure;
  for (const auto& [name, value] : kinds()) {
    if (name == kind) structure.kind = value;
  }
  structure.name = tuple[1].cast<std::string>();
  if (structure.is_container()) {
    for (const py::handle& child : tuple[2].cast<py::list>()) {
      structure.children.push_back(structure_of(child));
    }
  } else if (structure.kind == Structure::Kind::kConstant) {
    const py::object content = tuple[2];
    if (py::isinstance<py::bool_>(content)) {
      structure.constant = content.cast<bool>();
    } else if (py::isinstance<py::int_>(content)) {
      structure.constant = content.cast<int64_t>();
    } else if (py::isinstance<py::float_>(content)) {
      structure.constant = content.cast<double>();
    } else if (py::isinstance<py::str>(content)) {
      structure.constant = content.cast<std::string>();
    } else {
      structure.constant = content.cast<std::complex<double>>();
    }
  }
  return structure;
}

py::tuple object_of(const Structure& structure) {
  std::string kind;
  for (const auto& [name, value] : kinds()) {
    if (value == structure.kind) kind = name;
  }
  py::object content = py::none();
  if (structure.is_container()) {
    py::list children;
    for (const Structure& child : structure.children) children.append(object_of(child));
    content = children;
  } else if (structure.kind == Structure::Kind::kConstant) {
    content = std::visit([](const auto& value) -> py::object { return py::cast(value); },
                         structure.constant);
  }
  return py::make_tuple(kind, structure.name, content);
}

using compile::Artifact;

// Without lines of code: a file does not tell of the machine that it was made on.
std::unique_ptr<Artifact> make_artifact(Graph graph, const py::object& inputs,
                                        const py::object& outputs, const std::string& name,
                                        const py::object& package) {
  for (Node& node : graph.nodes) node.source.clear();
  auto artifact = std::make_unique<Artifact>(
      Artifact{.graph = std::move(graph),
               .signature = {.inputs = structure_of(inputs), .outputs = structure_of(outputs)},
               .name = name,
               .torchlift_version = "",
               .torch_version = "",
               .metadata = {}});
  if (!package.is_none()) {
    artifact->native = compile::native_code_for_here(tensor_of(package.ptr()));
  }
  return artifact;
}

void save_artifact_of(const Artifact& artifact, const std::string& path) {
  guarded_object([&]() -> py::object {
    compile::save_artifact(artifact, path);
    return py::none();
  });
}

std::unique_ptr<Artifact> load_artifact_of(const std::string& path) {
  std::unique_ptr<Artifact> artifact;
  guarded_object([&]() -> py::object {
    artifact = std::make_unique<Artifact>(compile::load_artifact(path));
    return py::none();
  });
  return artifact;
}

std::unique_ptr<LoadedProgram> loaded_program_of(const Artifact& artifact, bool allow_native_code,
                                                 const std::string& backend,
                                                 const std::string& path) {
  std::unique_ptr<LoadedProgram> program;
  guarded_object([&]() -> py::object {
    program = std::make_unique<LoadedProgram>(
        artifact, compile::LoadOptions{.allow_native_code = allow_native_code, .backend = backend},
        path);
    return py::none();
  });
  return program;
}

void define_artifacts(py::module_& module) {
  module.def("make_artifact", &make_artifact);
  module.def("save_artifact", &save_artifact_of);
  module.def("load_artifact", &load_artifact_of);
  py::class_<Artifact>(module, "Artifact")
      .def_readonly("name", &Artifact::name)
      .def_readonly("torchlift_version", &Artifact::torchlift_version)
      .def_readonly("torch_version", &Artifact::torch_version)
      .def_property_readonly(
          "graph", [](const Artifact& self) { return std::make_shared<Graph>(self.graph); })
      .def_property_readonly("signature", [](const Artifact& self) { return self.signature.str(); })
      .def_property_readonly("inputs",
                             [](const Artifact& self) { return object_of(self.signature.inputs); })
      .def_property_readonly(
          "outputs", [](const Artifact& self) { return object_of(self.signature.outputs); });
  py::class_<LoadedProgram>(module, "LoadedProgram")
      .def(py::init(&loaded_program_of))
      .def("run", &run<LoadedProgram>, py::arg("inputs"), py::arg("seed") = py::none())
      .def("try_out",
           [](const LoadedProgram& self, const py::list& inputs) {
             guarded_object([&]() -> py::object {
               self.try_out(tensors_of(inputs.ptr()));
               return py::none();
             });
           })
      .def_property_readonly("backend", &LoadedProgram::backend);
}

}  // namespace

void define_compile(py::module_& module) {
  module.def("trace_dynamic", &trace_dynamic_of);
  define_artifacts(module);
  define_sizes(module);
  define_graph(module);
  py::class_<Program>(module, "Program")
      .def(py::init([](const Graph& graph) {
        std::optional<Program> program;
        guarded_object([&]() -> py::object {
          program.emplace(graph);
          return py::none();
        });
        return *program;
      }))
      .def("run", &run<Program>, py::arg("inputs"), py::arg("seed") = py::none())
      .def("graph", [](const Program& self) { return std::make_shared<Graph>(self.graph()); });
  py::class_<Executable>(module, "Executable")
      .def(py::init([](const Graph& graph) {
        std::optional<Executable> executable;
        guarded_object([&]() -> py::object {
          executable.emplace(graph);
          return py::none();
        });
        return *executable;
      }))
      .def("run", &run<Executable>, py::arg("inputs"), py::arg("seed") = py::none())
      .def("graph", [](const Executable& self) { return std::make_shared<Graph>(self.graph()); })
      .def("updates",
           [](const Executable& self) {
             py::list list;
             for (const compile::InputUpdate& each : self.report().functionalized.updates) {
               list.append(py::make_tuple(each.input, each.output));
             }
             return list;
           })
      .def("state",
           [](const Executable& self) {
             return guarded_object([&] { return list_of(self.report().functionalized.state); });
           })
      .def("report", [](const Executable& self) { return self.report().str(); });
}

}  // namespace torchlift::python
