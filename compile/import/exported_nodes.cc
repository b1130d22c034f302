#include "compile/import/exported_nodes.h"

#include <ATen/core/jit_type.h>

#include <algorithm>
#include <cctype>
#include <map>
#include <set>

#include "compile/artifact/format_error.h"

namespace torchlift::compile {
namespace {

using c10::IValue;

constexpr const char* kOps = "torch.ops.";
constexpr const char* kHigherOrder = "torch.ops.higher_order.";

// Tests of what a program of fixed dtypes and devices always fulfils, and bounds of sizes that a
// graph does not have.
const std::set<std::string> kDropped = {"aten::_assert_tensor_metadata",
                                        "aten::sym_constrain_range",
                                        "aten::sym_constrain_range_for_size"};

bool begins_with(const std::string& text, const std::string& prefix) {
  return text.rfind(prefix, 0) == 0;
}

// "torch.ops.aten.add.Tensor"
c10::OperatorName operator_name(const std::string& target) {
  const std::string path = target.substr(std::string(kOps).size());
  const size_t first = path.find('.');
  const size_t second = first == std::string::npos ? first : path.find('.', first + 1);
  if (second == std::string::npos) format_error("the program calls '", target, "', no operator.");
  std::string overload = path.substr(second + 1);
  if (overload == "default") overload.clear();
  return {path.substr(0, first) + "::" + path.substr(first + 1, second - first - 1), overload};
}

// Operators that are called by others of the same meaning. What is made by empty could have no
// values that differ from example to example written into it (docs/limits.md); and a tensor that is
// detached in place need not forget its past under its other names.
c10::OperatorName replaced(c10::OperatorName name) {
  if (name.name == "aten::empty" && name.overload_name == "memory_format")
    return {"aten::zeros", ""};
  if (name.name == "aten::detach_") return {"aten::detach", ""};
  return name;
}

bool is_tensor_list(const c10::Type& type) {
  return type.kind() == c10::TypeKind::ListType &&
         type.castRaw<c10::ListType>()->getElementType()->kind() == c10::TypeKind::TensorType;
}

// The argument that an operator writes and then returns as this result.
std::optional<size_t> written_argument(const c10::FunctionSchema& schema, size_t result) {
  const auto* alias = schema.returns()[result].alias_info();
  if (alias == nullptr || !alias->isWrite()) return std::nullopt;
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const auto* other = schema.arguments()[i].alias_info();
    if (other != nullptr && other->isWrite() && other->beforeSets() == alias->beforeSets())
      return i;
  }
  return std::nullopt;
}

// The arguments of a node by name; those of a higher-order operator have none.
std::vector<std::pair<std::string, const Json*>> inputs_of(const Json& node) {
  std::vector<std::pair<std::string, const Json*>> inputs;
  for (const Json& input : array_at(node, "inputs", "a node")) {
    inputs.emplace_back(string_at(input, "name", "an argument"), &at(input, "arg", "an argument"));
  }
  return inputs;
}

// The names of the tensors in an argument, one or a list.
std::vector<std::string> tensor_names(const Json& argument, const std::string& where) {
  const auto [kind, value] = as_union(argument, where);
  if (kind == "as_tensor") return {string_at(value, "name", where)};
  if (kind != "as_tensors") {
    unsupported_error("import", where, " is ", kind, "; only tensors can stand there.");
  }
  std::vector<std::string> names;
  for (const Json& each : as_array(value, where)) names.push_back(string_at(each, "name", where));
  return names;
}

// Those of a list of arguments.
std::vector<std::string> all_tensor_names(const Json& arguments, const std::string& where) {
  std::vector<std::string> names;
  for (const Json& each : arguments) {
    const std::vector<std::string> found = tensor_names(each, where);
    names.insert(names.end(), found.begin(), found.end());
  }
  return names;
}

// Whether all that a node gives are numbers, of which the file says what they are.
bool gives_numbers(const Json& node) {
  const Json& outputs = array_at(node, "outputs", "a node");
  return !outputs.empty() && std::all_of(outputs.begin(), outputs.end(), [](const Json& output) {
    const std::string kind = as_union(output, "a result").first;
    return begins_with(kind, "as_sym_") || kind == "as_int" || kind == "as_bool" ||
           kind == "as_float";
  });
}

Node node_of(const char* op, std::vector<Argument> arguments) {
  return {.op = op,
          .overload = "",
          .args = std::move(arguments),
          .results = {},
          .subgraphs = {},
          .source = ""};
}

std::vector<ValueRef> refs_of(const std::vector<ValueId>& ids) {
  std::vector<ValueRef> refs;
  for (const ValueId id : ids) refs.push_back({id});
  return refs;
}

}  // namespace

std::string identifier(std::string name) {
  for (char& c : name) {
    if (std::isalnum(static_cast<unsigned char>(c)) == 0) c = '_';
  }
  if (name.empty() || std::isdigit(static_cast<unsigned char>(name[0])) != 0) name.insert(0, "v");
  return name;
}

c10::OperatorHandle operator_of(const c10::OperatorName& name) {
  // Operators that reach beyond tensors.
  if (name.name == "aten::from_file") {
    format_error("the program calls ", name, ", which reads and writes files.");
  }
  const auto op = c10::Dispatcher::singleton().findSchema(name);
  if (!op.has_value()) {
    unsupported_error("import", "the program calls ", name,
                      ", an operator that this libtorch does not have. Load the library that "
                      "defines it, or export the program anew with this version.");
  }
  return *op;
}

void relax_views(Graph& graph) {
  const bool writes = std::any_of(graph.nodes.begin(), graph.nodes.end(),
                                  [](const Node& node) { return effects_of(node).writes; });
  if (writes) return;
  for (Node& node : graph.nodes) {
    const bool is_view = node.op == "aten::view" && node.overload.empty();
    if (is_view || node.op == "aten::_unsafe_view") node.op = "aten::reshape";
  }
}

NodeReader::NodeReader(const Json& json, Graph& graph, const SizeMeaning& sizes)
    : json_(json), graph_(graph), sizes_(sizes), scope_(json, sizes) {}

void NodeReader::run() {
  for (const Json& node : array_at(json_, "nodes", "a graph")) read(node);
}

// The inputs or outputs of the graph of a higher-order operator, which are all tensors.
std::vector<std::string> NodeReader::names_in(const char* field) const {
  return all_tensor_names(array_at(json_, field, "a graph"),
                          "one of a graph's " + std::string(field));
}

void NodeReader::read(const Json& node) {
  const std::string target = string_at(node, "target", "a node");
  if (begins_with(target, kHigherOrder)) {
    read_higher_order(node, target.substr(std::string(kHigherOrder).size()));
  } else if (gives_numbers(node)) {
    return;
  } else if (begins_with(target, kOps)) {
    read_operator(node, target);
  } else {
    unsupported_error("import", "the program calls '", target,
                      "', a function of Python that is no operator.");
  }
}

// --- operators -----------------------------------------------------------------------------------

void NodeReader::read_operator(const Json& node, const std::string& target) {
  const c10::OperatorName name = replaced(operator_name(target));
  if (kDropped.count(name.name) > 0) return;
  if (name.name == "aten::_assert_scalar") return read_assertion(node);
  const Inputs inputs = inputs_of(node);
  const Json& outputs = array_at(node, "outputs", "a node");
  c10::OperatorHandle op = operator_of(name);
  if (const auto scalar = with_scalar(op, inputs)) op = *scalar;
  Node result = arguments(op, inputs);
  fix_factory(op.schema(), outputs, result);
  add_results(op.schema(), outputs, result);
  graph_.nodes.push_back(std::move(result));
}

// x * n, where n is a size, calls mul.Tensor; a graph says so by mul.Scalar.
std::optional<c10::OperatorHandle> NodeReader::with_scalar(const c10::OperatorHandle& op,
                                                           const Inputs& inputs) const {
  const auto is_size_as_tensor = [&](const c10::Argument& parameter) {
    if (parameter.type()->kind() != c10::TypeKind::TensorType) return false;
    return std::any_of(inputs.begin(), inputs.end(), [&](const auto& input) {
      if (input.first != parameter.name()) return false;
      const std::string kind = as_union(*input.second, parameter.name()).first;
      return kind == "as_sym_int" || kind == "as_sym_float";
    });
  };
  const auto& parameters = op.schema().arguments();
  if (std::none_of(parameters.begin(), parameters.end(), is_size_as_tensor)) return std::nullopt;
  const auto scalar = c10::Dispatcher::singleton().findSchema({op.schema().name(), "Scalar"});
  if (!scalar.has_value()) {
    unsupported_error("import", op.schema().name(),
                      " is called with a size in the place of a "
                      "tensor. Export the program with fixed sizes there.");
  }
  return scalar;
}

Node NodeReader::arguments(const c10::OperatorHandle& op, const Inputs& inputs) const {
  const c10::FunctionSchema& schema = op.schema();
  std::map<std::string, const Json*> given;
  for (const auto& [name, json] : inputs) {
    if (!given.emplace(name, json).second) {
      format_error("argument ", name, " of ", schema.name(), " is given twice.");
    }
  }
  Node node = node_of(schema.name().c_str(), {});
  node.overload = schema.overload_name();
  for (const c10::Argument& parameter : schema.arguments()) {
    const std::string where = parameter.name() + " of " + node.full_name();
    const auto found = given.find(parameter.name());
    node.args.push_back(found == given.end()
                            ? default_argument(parameter, where)
                            : read_argument(*found->second, parameter, scope_, where));
    given.erase(parameter.name());
  }
  // zeros is called in the place of empty.
  if (node.op == "aten::zeros") given.erase("memory_format");
  if (!given.empty()) {
    unsupported_error("import", node.full_name(), " is called with the argument ",
                      given.begin()->first,
                      ", which this libtorch's does not have. Export the "
                      "program anew with this version.");
  }
  return node;
}

// Without a dtype, an operator that makes a tensor of none takes the default, which is that of
// whoever runs it. The file knows what it was.
void NodeReader::fix_factory(const c10::FunctionSchema& schema, const Json& outputs,
                             Node& node) const {
  const auto dtype = schema.argumentIndexWithName("dtype");
  const bool reads = std::any_of(node.args.begin(), node.args.end(), [](const Argument& argument) {
    return std::holds_alternative<ValueRef>(argument) ||
           std::holds_alternative<std::vector<ValueRef>>(argument);
  });
  if (!dtype.has_value() || reads || outputs.size() != 1 ||
      !std::holds_alternative<std::monostate>(node.args[static_cast<size_t>(*dtype)])) {
    return;
  }
  const std::vector<std::string> names =
      tensor_names(outputs[0], "a result of " + node.full_name());
  if (names.size() != 1) return;
  node.args[static_cast<size_t>(*dtype)] =
      IValue(static_cast<int64_t>(scope_.type(names[0]).dtype));
}

void NodeReader::add_results(const c10::FunctionSchema& schema, const Json& outputs, Node& node) {
  const auto& returns = schema.returns();
  if (returns.empty()) return;
  if (outputs.size() != returns.size()) {
    format_error(node.full_name(), " gives ", returns.size(), " results, and the program names ",
                 outputs.size(), ".");
  }
  for (size_t i = 0; i < returns.size(); ++i) {
    const auto written = written_argument(schema, i);
    if (written.has_value()) {
      node.results.push_back(written_result(node, *written, outputs[i]));
    } else {
      node.results.push_back(new_result(*returns[i].type(), outputs[i], node.full_name()));
    }
  }
}

// NOTE [values] in compile/graph.h: what is written into a value is that value.
Result NodeReader::written_result(const Node& node, size_t written, const Json& output) {
  const auto* target = std::get_if<ValueRef>(&node.args[written]);
  if (target == nullptr) format_error(node.full_name(), " writes into what is no tensor.");
  const std::vector<std::string> names = tensor_names(output, "a result of " + node.full_name());
  if (names.size() != 1) format_error(node.full_name(), " gives one tensor, not a list.");
  scope_.define(names[0], target->id);
  return {{target->id}, false};
}

Result NodeReader::new_result(const c10::Type& type, const Json& output, const std::string& by) {
  const std::string where = "a result of " + by;
  Result result;
  result.is_list = is_tensor_list(type);
  const std::string kind = as_union(output, where).first;
  if (kind == "as_tensor" || kind == "as_tensors") {
    for (const std::string& name : tensor_names(output, where)) result.ids.push_back(add(name));
  } else if (!result.is_list) {
    result.ids.push_back(kNoValue);  // None, or a number, of which the file says what it is
  }
  return result;
}

ValueId NodeReader::add(const std::string& name) {
  const ValueId id = graph_.add_value(scope_.type(name), identifier(name));
  scope_.define(name, id);
  return id;
}

ValueId NodeReader::add_unary(const char* op, ValueId id, const char* suffix) {
  const auto schema = operator_of({op, ""});
  Node node = node_of(op, {ValueRef{id}});
  for (size_t i = 1; i < schema.schema().arguments().size(); ++i) {
    node.args.push_back(default_argument(schema.schema().arguments()[i], op));
  }
  const ValueId result = graph_.add_value(graph_.type(id), graph_.value(id).name + suffix);
  node.results.push_back({{result}, false});
  graph_.nodes.push_back(std::move(node));
  return result;
}

void NodeReader::read_assertion(const Json& node) {
  std::string text = "an assertion of the program";
  std::optional<SizeTerm> term;
  for (const auto& [name, json] : inputs_of(node)) {
    const auto [kind, value] = as_union(*json, "an assertion");
    if (name == "assert_msg" && kind == "as_string") text = as_string(value, "an assertion");
    if (name != "self") continue;
    if (kind == "as_bool" && as_bool(value, "an assertion")) return;
    if (kind != "as_sym_bool") {
      unsupported_error("import", "the program asserts something that is no condition of sizes.");
    }
    term = scope_.sym_bool(value, "an assertion");
  }
  if (!term.has_value()) format_error("an assertion asserts nothing.");
  conditions_.push_back({std::move(*term), text});
}

// --- higher-order operators ----------------------------------------------------------------------

void NodeReader::read_higher_order(const Json& node, const std::string& name) {
  if (name == "cond") return read_control_flow(node, kCondOp);
  if (name == "while_loop") return read_control_flow(node, kWhileOp);
  if (name == "scan") return read_control_flow(node, kScanOp);
  if (name == "map_impl") return read_map(node);
  if (name == "wrap_with_set_grad_enabled") return read_grad_mode(node);
  unsupported_error("import", "the program calls the higher-order operator ", name,
                    "; cond, while_loop, scan, map and torch.no_grad() are what graphs can have.");
}

std::vector<ValueId> NodeReader::values_of(const Json& argument, const std::string& where) const {
  std::vector<ValueId> ids;
  for (const std::string& name : tensor_names(argument, where)) ids.push_back(scope_.tensor(name));
  return ids;
}

std::shared_ptr<const Graph> NodeReader::subgraph(const Json& argument, const std::string& by) {
  const auto [kind, value] = as_union(argument, by);
  if (kind != "as_graph") format_error("an argument of ", by, " is ", kind, ", no graph.");
  if (!graph_.symbols.empty()) {
    unsupported_error("import", "the program has ", by, " and dynamic dims.");
  }
  auto inner = std::make_shared<Graph>();
  NodeReader reader(object_at(value, "graph", by), *inner, sizes_);
  for (const std::string& name : reader.names_in("inputs")) {
    reader.scope_.define(name, inner->add_input(reader.scope_.type(name), identifier(name)));
  }
  reader.run();
  relax_views(*inner);
  for (const std::string& name : reader.names_in("outputs")) {
    inner->outputs.push_back(reader.scope_.tensor(name));
  }
  conditions_.insert(conditions_.end(), reader.conditions_.begin(), reader.conditions_.end());
  return inner;
}

// Graphs, tensors and lists of tensors, in this order in the file, and in compile/graph.h.
void NodeReader::read_control_flow(const Json& node, const char* op) {
  Node result = node_of(op, {});
  for (const auto& [name, argument] : inputs_of(node)) {
    const std::string kind = as_union(*argument, op).first;
    if (kind == "as_graph") {
      result.subgraphs.push_back(subgraph(*argument, op));
    } else if (kind == "as_tensor") {
      result.args.emplace_back(ValueRef{values_of(*argument, op)[0]});
    } else {
      result.args.emplace_back(refs_of(values_of(*argument, std::string("an operand of ") + op)));
    }
  }
  add_control_flow(std::move(result), array_at(node, "outputs", "a node"));
}

// (graph, xs, captured): a scan that carries nothing.
void NodeReader::read_map(const Json& node) {
  const Inputs inputs = inputs_of(node);
  if (inputs.size() != 3) format_error("map has ", inputs.size(), " arguments, and needs 3.");
  Node result = node_of(kScanOp, {std::vector<ValueRef>()});
  result.subgraphs.push_back(subgraph(*inputs[0].second, "map"));
  for (size_t i = 1; i < 3; ++i) {
    result.args.emplace_back(refs_of(values_of(*inputs[i].second, "an operand of map")));
  }
  add_control_flow(std::move(result), array_at(node, "outputs", "a node"));
}

void NodeReader::add_control_flow(Node node, const Json& outputs) {
  Result all;
  all.is_list = true;
  for (const std::string& name : all_tensor_names(outputs, "a result of " + node.op)) {
    all.ids.push_back(add(name));
  }
  node.results.push_back(std::move(all));
  graph_.nodes.push_back(std::move(node));
}

// (enabled, graph, operands...)
void NodeReader::read_grad_mode(const Json& node) {
  const Inputs inputs = inputs_of(node);
  const std::string where = "a block of set_grad_enabled";
  if (inputs.size() < 2) format_error(where, " has no graph.");
  const auto [kind, enabled] = as_union(*inputs[0].second, where);
  const auto [graph_kind, graph] = as_union(*inputs[1].second, where);
  if (kind != "as_bool" || graph_kind != "as_graph") format_error(where, " has no graph.");
  const bool records = as_bool(enabled, where);
  if (records && detaches_) {
    unsupported_error("import", "the program has torch.enable_grad() inside of torch.no_grad().");
  }
  NodeReader reader(object_at(graph, "graph", where), graph_, sizes_);
  reader.detaches_ = detaches_ || !records;
  std::vector<ValueId> operands;
  for (size_t i = 2; i < inputs.size(); ++i) {
    const std::vector<ValueId> ids = values_of(*inputs[i].second, where);
    operands.insert(operands.end(), ids.begin(), ids.end());
  }
  inline_block(reader, operands, node, !records);
}

void NodeReader::inline_block(NodeReader& reader, const std::vector<ValueId>& operands,
                              const Json& node, bool detach) {
  const std::vector<std::string> names = reader.names_in("inputs");
  if (names.size() != operands.size()) {
    format_error("a block has ", names.size(), " inputs, and is given ", operands.size(), ".");
  }
  std::map<std::string, ValueId> as_given;
  for (size_t i = 0; i < names.size(); ++i) {
    reader.scope_.define(
        names[i], detach ? add_unary("aten::detach", operands[i], "_detached") : operands[i]);
    as_given.emplace(names[i], operands[i]);
  }
  reader.run();
  conditions_.insert(conditions_.end(), reader.conditions_.begin(), reader.conditions_.end());
  const std::vector<std::string> results =
      all_tensor_names(array_at(node, "outputs", "a node"), "a result of a block");
  const std::vector<std::string> outputs = reader.names_in("outputs");
  if (results.size() != outputs.size()) {
    format_error("a block gives ", outputs.size(), " tensors, and has ", results.size(),
                 " results.");
  }
  for (size_t i = 0; i < results.size(); ++i) {
    // What goes through a block is what it was.
    const auto given = as_given.find(outputs[i]);
    scope_.define(results[i],
                  given != as_given.end() ? given->second : reader.scope_.tensor(outputs[i]));
  }
}

}  // namespace torchlift::compile
