#include "compile/artifact/sample_artifacts.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>

namespace torchlift::compile {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

TensorType type(std::vector<int64_t> sizes, at::ScalarType dtype = at::kFloat) {
  return type_of(at::empty(sizes, dtype));
}

ValueId add(Graph& graph, const std::string& op, const std::string& overload,
            std::vector<Argument> args, TensorType result, const std::string& name) {
  const ValueId id = graph.add_value(std::move(result), name);
  graph.nodes.push_back({.op = op,
                         .overload = overload,
                         .args = std::move(args),
                         .results = {{.ids = {id}}},
                         .subgraphs = {},
                         .source = "model.py:" + std::to_string(graph.nodes.size() + 1)});
  return id;
}

Argument none_given() { return std::monostate{}; }

// x * number, for each kind of number.
void add_products(Graph& graph, ValueId x, const std::vector<c10::IValue>& numbers) {
  for (const c10::IValue& number : numbers) {
    add(graph, "aten::mul", "Scalar", {ValueRef{x}, number}, type({2, 3}), "mul");
  }
}

std::shared_ptr<const Graph> doubling(const at::Tensor& two) {
  auto graph = std::make_shared<Graph>();
  const ValueId x = graph->add_input(type({3}), "x");
  const ValueId c = graph->add_constant(two, "two");
  graph->outputs = {
      add(*graph, "aten::mul", "Tensor", {ValueRef{x}, ValueRef{c}}, type({3}), "doubled")};
  return graph;
}

std::shared_ptr<const Graph> identity() {
  auto graph = std::make_shared<Graph>();
  graph->outputs = {graph->add_input(type({3}), "x")};
  return graph;
}

// Of (sum, row): (sum + row, row).
std::shared_ptr<const Graph> running_sum() {
  auto graph = std::make_shared<Graph>();
  const ValueId sum = graph->add_input(type({3}), "sum");
  const ValueId row = graph->add_input(type({3}), "row");
  const ValueId next = add(*graph, "aten::add", "Tensor",
                           {ValueRef{sum}, ValueRef{row}, c10::IValue(1)}, type({3}), "next");
  graph->outputs = {next, row};
  return graph;
}

bool same_numbers(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor x = a.contiguous();
  const at::Tensor y = b.contiguous();
  return x.nbytes() == y.nbytes() &&
         (x.nbytes() == 0 || std::memcmp(x.const_data_ptr(), y.const_data_ptr(), x.nbytes()) == 0);
}

// IValues are compared as what they are made of, by bits.
bool same_constant(const c10::IValue& a, const c10::IValue& b) {
  if (a.tagKind() != b.tagKind()) return false;
  if (a.isDouble()) {
    return std::bit_cast<uint64_t>(a.toDouble()) == std::bit_cast<uint64_t>(b.toDouble());
  }
  if (a.isComplexDouble()) {
    const auto bits = [](const c10::IValue& value) {
      return std::bit_cast<std::array<uint64_t, 2>>(value.toComplexDouble());
    };
    return bits(a) == bits(b);
  }
  if (!a.isList()) return a == b;
  const auto x = a.toListRef().vec();
  const auto y = b.toListRef().vec();
  if (x.size() != y.size() || *a.type() != *b.type()) return false;
  for (size_t i = 0; i < x.size(); ++i) {
    if (!same_constant(x[i], y[i])) return false;
  }
  return true;
}

bool same_argument(const Argument& a, const Argument& b) {
  if (a.index() != b.index()) return false;
  const auto* constant = std::get_if<c10::IValue>(&a);
  if (constant != nullptr) return same_constant(*constant, std::get<c10::IValue>(b));
  return std::visit(
      [&](const auto& x) {
        using T = std::decay_t<decltype(x)>;
        if constexpr (std::is_same_v<T, c10::IValue>) {
          return false;
        } else {
          return x == std::get<T>(b);
        }
      },
      a);
}

std::string node_difference(const Node& a, const Node& b) {
  const std::string name = a.full_name();
  if (name != b.full_name()) return name + " is " + b.full_name();
  if (a.source != b.source) return name + ": source";
  if (a.args.size() != b.args.size()) return name + ": number of arguments";
  for (size_t i = 0; i < a.args.size(); ++i) {
    if (!same_argument(a.args[i], b.args[i])) return name + ": argument " + std::to_string(i);
  }
  if (a.results.size() != b.results.size()) return name + ": number of results";
  for (size_t i = 0; i < a.results.size(); ++i) {
    if (a.results[i].ids != b.results[i].ids || a.results[i].is_list != b.results[i].is_list) {
      return name + ": result " + std::to_string(i);
    }
  }
  if (a.subgraphs.size() != b.subgraphs.size()) return name + ": number of subgraphs";
  for (size_t i = 0; i < a.subgraphs.size(); ++i) {
    const std::string inner = difference(*a.subgraphs[i], *b.subgraphs[i]);
    if (!inner.empty()) return name + ": subgraph: " + inner;
  }
  return "";
}

std::string constant_difference(const Graph& graph, const Constant& a, const Constant& b) {
  const std::string name = "constant " + graph.value(a.id).name;
  if (a.id != b.id) return name + ": its value";
  if (type_of(a.tensor) != type_of(b.tensor)) return name + ": its type or strides";
  const auto is_number = [](const at::Tensor& tensor) {
    return tensor.unsafeGetTensorImpl()->is_wrapped_number();
  };
  if (is_number(a.tensor) != is_number(b.tensor)) return name + ": whether it is a wrapped number";
  return same_numbers(a.tensor, b.tensor) ? "" : name + ": its numbers";
}

}  // namespace

Artifact loss_artifact() {
  Artifact artifact;
  Graph& graph = artifact.graph;
  const ValueId w = graph.add_input(type({3}), "params_w");
  const ValueId b = graph.add_input(type({}), "params_b");
  const ValueId x = graph.add_input(type({3}), "x");
  const ValueId dot = add(graph, "aten::dot", "", {ValueRef{x}, ValueRef{w}}, type({}), "dot");
  const ValueId y = add(graph, "aten::add", "Tensor", {ValueRef{dot}, ValueRef{b}, c10::IValue(1)},
                        type({}), "add");
  graph.outputs = {add(graph, "aten::mul", "Tensor", {ValueRef{y}, ValueRef{y}}, type({}), "mul")};
  artifact.name = "loss";
  artifact.signature.inputs =
      tuple_of({dict_of({tensor("w"), tensor("b")}, "params"), tensor("x")});
  artifact.signature.outputs = tuple_of({tensor("loss"), none("state")});
  return artifact;
}

Artifact dynamic_artifact() {
  Artifact artifact;
  Graph& graph = artifact.graph;
  const SizeExpr n = SizeExpr::symbol(0);
  TensorType rows = type({1, 3});
  rows.sizes = {n, 3};
  TensorType flat = type({1});
  flat.sizes = {n * 3};
  const ValueId x = graph.add_input(rows, "x");
  graph.symbols.push_back({.name = "n", .input = 0, .dim = 0, .least = 1});
  const ValueId reshaped =
      add(graph, "aten::view", "", {ValueRef{x}, std::vector<SizeExpr>{n * 3}}, flat, "view");
  const ValueId back =
      add(graph, "aten::view", "", {ValueRef{reshaped}, std::vector<SizeExpr>{n, 3}}, rows, "view");
  const ValueId last =
      add(graph, "aten::select", "int", {ValueRef{back}, c10::IValue(0), n - 1}, type({3}), "last");
  const ValueId sum =
      add(graph, "aten::sum", "dim_IntList",
          {ValueRef{back}, c10::IValue(std::vector<int64_t>{0}), c10::IValue(false), none_given()},
          type({3}), "sum");
  const ValueId mean = add(
      graph, "aten::mul", "Scalar",
      {ValueRef{sum}, SizeRatio{.factor = 1, .numerator = 1, .denominator = n}}, type({3}), "mean");
  graph.outputs = {mean, last};
  artifact.name = "rows";
  artifact.signature = flat_signature(graph);
  return artifact;
}

Artifact constants_artifact() {
  Artifact artifact;
  Graph& graph = artifact.graph;
  std::vector<ValueId> all;
  const auto keep = [&](const at::Tensor& tensor, const std::string& name) {
    all.push_back(graph.add_constant(tensor, name));
  };
  const at::Tensor weight = at::arange(12, at::kFloat).reshape({3, 4});
  keep(weight, "weight");
  keep(weight.t(), "weight_transposed");
  keep(weight.select(0, 1), "row");
  keep(at::ones({2, 1}).expand({2, 1000}), "expanded");
  keep(at::arange(1000).slice(0, 10, 20, 2), "slice");
  keep(at::empty({0, 5}), "empty");
  keep(at::ones({}), "scalar");
  keep(at::tensor({kNaN, kInf, -kInf, -0.0, 5e-324}, at::kDouble), "special");
  const at::Tensor number = at::zeros({});
  number.unsafeGetTensorImpl()->set_wrapped_number(true);
  keep(number, "number");
  keep(weight.view(at::kByte).slice(1, 4, 9), "as_bytes");
  for (const at::ScalarType dtype :
       {at::kHalf, at::kBFloat16, at::kInt, at::kShort, at::kChar, at::kByte, at::kBool,
        at::kComplexHalf, at::kComplexFloat, at::kComplexDouble, at::ScalarType::UInt16,
        at::ScalarType::UInt32, at::ScalarType::UInt64, at::kFloat8_e4m3fn, at::kFloat8_e5m2,
        at::kFloat8_e4m3fnuz, at::kFloat8_e5m2fnuz}) {
    keep(at::tensor({0.0, 1.0, 3.0}).to(dtype), "of_dtype");
  }
  graph.outputs = all;
  artifact.name = "constants";
  artifact.signature = flat_signature(graph);
  return artifact;
}

Artifact arguments_artifact() {
  Artifact artifact;
  Graph& graph = artifact.graph;
  const ValueId x = graph.add_input(type({2, 3}), "x");
  const ValueId image = graph.add_input(type({1, 1, 4, 4}), "image");
  const ValueId index = graph.add_input(type({2}, at::kLong), "index");
  add_products(graph, x,
               {kNaN, -0.0, 0.1, int64_t{1} << 62, true, c10::complex<double>(-0.0, kInf)});
  add(graph, "aten::div", "Tensor_mode", {ValueRef{x}, ValueRef{x}, c10::IValue("floor")},
      type({2, 3}), "div");
  add(graph, "aten::index", "Tensor", {ValueRef{x}, std::vector<ValueRef>{{kNoValue}, {index}}},
      type({2, 2}), "index");
  add(graph, "aten::upsample_nearest2d", "vec",
      {ValueRef{image}, none_given(), c10::IValue(std::vector<double>{2.0, 0.5})},
      type({1, 1, 8, 2}), "upsample");
  add(graph, "aten::zeros", "",
      {c10::IValue(std::vector<int64_t>{2, 3}), c10::IValue(static_cast<int64_t>(at::kDouble)),
       c10::IValue(static_cast<int64_t>(c10::kStrided)), c10::IValue(c10::Device("cpu")),
       c10::IValue(false)},
      type({2, 3}, at::kDouble), "zeros");

  c10::impl::GenericList scalars(c10::NumberType::get());
  scalars.push_back(c10::IValue(2));
  scalars.push_back(c10::IValue(-0.0));
  const ValueId p = graph.add_value(type({2, 3}), "foreach");
  const ValueId q = graph.add_value(type({2, 3}), "foreach");
  graph.nodes.push_back({.op = "aten::_foreach_add",
                         .overload = "ScalarList",
                         .args = {std::vector<ValueRef>{{x}, {x}}, c10::IValue(scalars)},
                         .results = {{.ids = {p, q}, .is_list = true}},
                         .subgraphs = {},
                         .source = ""});
  // Of two gradients that are not asked for.
  const ValueId gradient = graph.add_value(type({1, 1, 4, 4}), "gradient");
  const auto ints = [](std::vector<int64_t> list) { return c10::IValue(std::move(list)); };
  c10::List<bool> mask;
  for (const bool wanted : {true, false, false}) mask.push_back(wanted);
  graph.nodes.push_back({.op = "aten::convolution_backward",
                         .overload = "",
                         .args = {ValueRef{image}, ValueRef{image}, ValueRef{image}, none_given(),
                                  ints({1, 1}), ints({0, 0}), ints({1, 1}), c10::IValue(false),
                                  ints({0, 0}), c10::IValue(int64_t{1}), c10::IValue(mask)},
                         .results = {{.ids = {gradient}}, {.ids = {kNoValue}}, {.ids = {kNoValue}}},
                         .subgraphs = {},
                         .source = ""});
  graph.outputs = {p, kNoValue, q, p};
  artifact.name = "arguments";
  artifact.metadata = {{"note", "two\nlines"}, {"", ""}};
  artifact.signature.inputs = tuple_of(
      {tensor("x"), list_of({tensor(), tensor()}, "others"), constant(true, "flag"),
       constant(int64_t{-3}, "count"), constant(-0.0, "zero"),
       constant(std::complex<double>(kNaN, 1), "z"), constant(std::string("mean"), "mode")});
  artifact.signature.outputs = dict_of(
      {tensor("p"), list_of({tensor(), tuple_of({})}, "rest"), tensor("again"), tensor("q")});
  return artifact;
}

Artifact control_flow_artifact() {
  Artifact artifact;
  Graph& graph = artifact.graph;
  const at::Tensor two = at::zeros({3}).add_(2);
  const ValueId predicate = graph.add_input(type({}, at::kBool), "predicate");
  const ValueId x = graph.add_input(type({3}), "x");
  const ValueId rows = graph.add_input(type({5, 3}), "rows");
  const ValueId c = graph.add_constant(two, "two");
  const auto doubled = doubling(two);
  ValueId value = x;
  for (int i = 0; i < 2; ++i) {
    const ValueId chosen = graph.add_value(type({3}), "cond");
    graph.nodes.push_back({.op = kCondOp,
                           .overload = "",
                           .args = {ValueRef{predicate}, std::vector<ValueRef>{{value}}},
                           .results = {{.ids = {chosen}, .is_list = true}},
                           .subgraphs = {doubled, i == 0 ? identity() : doubled},
                           .source = ""});
    value = chosen;
  }
  const ValueId sum = graph.add_value(type({3}), "scan");
  const ValueId sums = graph.add_value(type({5, 3}), "scan");
  graph.nodes.push_back({.op = kScanOp,
                         .overload = "",
                         .args = {std::vector<ValueRef>{{value}}, std::vector<ValueRef>{{rows}},
                                  std::vector<ValueRef>{}},
                         .results = {{.ids = {sum, sums}, .is_list = true}},
                         .subgraphs = {running_sum()},
                         .source = "loop.py:3 in step"});
  graph.outputs = {
      add(graph, "aten::mul", "Tensor", {ValueRef{sum}, ValueRef{c}}, type({3}), "mul"), sums};
  artifact.name = "control_flow";
  artifact.signature = flat_signature(graph);
  return artifact;
}

std::vector<Artifact> sample_artifacts() {
  return {loss_artifact(), dynamic_artifact(), constants_artifact(), arguments_artifact(),
          control_flow_artifact()};
}

std::string difference(const Graph& a, const Graph& b) {
  if (a.values.size() != b.values.size()) return "number of values";
  for (size_t i = 0; i < a.values.size(); ++i) {
    if (a.values[i].name != b.values[i].name) return "name of value " + std::to_string(i);
    if (a.values[i].type != b.values[i].type) return "type of " + a.values[i].name;
  }
  if (a.inputs != b.inputs) return "inputs";
  if (a.outputs != b.outputs) return "outputs";
  if (a.constants.size() != b.constants.size()) return "number of constants";
  for (size_t i = 0; i < a.constants.size(); ++i) {
    const std::string found = constant_difference(a, a.constants[i], b.constants[i]);
    if (!found.empty()) return found;
  }
  if (a.nodes.size() != b.nodes.size()) return "number of nodes";
  for (size_t i = 0; i < a.nodes.size(); ++i) {
    const std::string found = node_difference(a.nodes[i], b.nodes[i]);
    if (!found.empty()) return found;
  }
  if (a.symbols.size() != b.symbols.size()) return "number of dynamic dims";
  for (size_t i = 0; i < a.symbols.size(); ++i) {
    if (a.symbols[i].name != b.symbols[i].name || a.symbols[i].input != b.symbols[i].input ||
        a.symbols[i].dim != b.symbols[i].dim || a.symbols[i].least != b.symbols[i].least) {
      return "dynamic dim " + a.symbols[i].name;
    }
  }
  return "";
}

}  // namespace torchlift::compile
