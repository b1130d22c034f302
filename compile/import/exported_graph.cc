#include "compile/import/exported_graph.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/function_schema.h>
#include <ATen/core/jit_type.h>

#include <algorithm>
#include <cctype>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <unordered_map>
#include <utility>

#include "compile/artifact/format_error.h"
#include "compile/import/export_schema.h"
#include "compile/import/exported_arguments.h"

namespace torchlift::compile {
namespace {

using c10::IValue;

constexpr const char* kOps = "torch.ops.";
constexpr const char* kHigherOrder = "torch.ops.higher_order.";

bool begins_with(const std::string& text, const std::string& prefix) {
  return text.rfind(prefix, 0) == 0;
}

// Names are printed as Python.
std::string identifier(std::string name) {
  for (char& c : name) {
    if (std::isalnum(static_cast<unsigned char>(c)) == 0) c = '_';
  }
  if (name.empty() || std::isdigit(static_cast<unsigned char>(name[0])) != 0) name.insert(0, "v");
  return name;
}

// --- operators -----------------------------------------------------------------------------------

// Tests of what a program of fixed dtypes and devices always fulfils, and bounds of sizes that a
// graph does not have.
const std::set<std::string> kDropped = {"aten::_assert_tensor_metadata",
                                        "aten::sym_constrain_range",
                                        "aten::sym_constrain_range_for_size"};

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

// --- nodes ---------------------------------------------------------------------------------------

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

// Whether all that a node gives are numbers, of which the file says what they are.
bool gives_numbers(const Json& node) {
  const Json& outputs = array_at(node, "outputs", "a node");
  return !outputs.empty() && std::all_of(outputs.begin(), outputs.end(), [](const Json& output) {
    const std::string kind = as_union(output, "a result").first;
    return begins_with(kind, "as_sym_") || kind == "as_int" || kind == "as_bool" ||
           kind == "as_float";
  });
}

// Reads the nodes of one graph of the file into one of ours.
class NodeReader {
 public:
  // conditions: null in the graphs of control flow.
  NodeReader(const Json& json, Graph& graph, SymbolLookup symbols,
             std::vector<SizeCondition>* conditions)
      : json_(json),
        graph_(graph),
        symbols_(symbols),
        scope_(json, std::move(symbols)),
        conditions_(conditions) {}

  NameScope& scope() { return scope_; }

  void run() {
    for (const Json& node : array_at(json_, "nodes", "a graph")) read(node);
  }

  // In the graph of a higher-order operator: its inputs and outputs, which are all tensors.
  std::vector<std::string> input_names() const { return names_in("inputs"); }
  std::vector<std::string> output_names() const { return names_in("outputs"); }

 private:
  std::vector<std::string> names_in(const char* field) const {
    std::vector<std::string> names;
    for (const Json& each : array_at(json_, field, "a graph")) {
      const std::vector<std::string> found =
          tensor_names(each, "one of a graph's " + std::string(field));
      names.insert(names.end(), found.begin(), found.end());
    }
    return names;
  }

  void read(const Json& node) {
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

  // --- operators ---------------------------------------------------------------------------------

  void read_operator(const Json& node, const std::string& target) {
    c10::OperatorName name = operator_name(target);
    if (kDropped.count(name.name) > 0) return;
    if (name.name == "aten::_assert_scalar") return read_assertion(node);
    // The copies of it that other names have need not forget its past.
    if (name.name == "aten::detach_") name.name = "aten::detach";
    const auto inputs = inputs_of(node);
    c10::OperatorHandle op = operator_of(name);
    if (const auto scalar = with_scalar(op, inputs)) op = *scalar;
    Node result = arguments(op, inputs);
    add_results(op.schema(), array_at(node, "outputs", "a node"), result);
    graph_.nodes.push_back(std::move(result));
  }

  // x * n, where n is a size, calls mul.Tensor; a graph says so by mul.Scalar.
  std::optional<c10::OperatorHandle> with_scalar(
      const c10::OperatorHandle& op,
      const std::vector<std::pair<std::string, const Json*>>& inputs) const {
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

  Node arguments(const c10::OperatorHandle& op,
                 const std::vector<std::pair<std::string, const Json*>>& inputs) const {
    const c10::FunctionSchema& schema = op.schema();
    std::map<std::string, const Json*> given;
    for (const auto& [name, json] : inputs) {
      if (!given.emplace(name, json).second) {
        format_error("argument ", name, " of ", schema.name(), " is given twice.");
      }
    }
    Node node{.op = schema.name(),
              .overload = schema.overload_name(),
              .args = {},
              .results = {},
              .subgraphs = {},
              .source = ""};
    for (const c10::Argument& parameter : schema.arguments()) {
      const std::string where = parameter.name() + " of " + node.full_name();
      const auto found = given.find(parameter.name());
      node.args.push_back(found == given.end()
                              ? default_argument(parameter, where)
                              : read_argument(*found->second, parameter, scope_, where));
      given.erase(parameter.name());
    }
    if (!given.empty()) {
      unsupported_error("import", node.full_name(), " is called with the argument ",
                        given.begin()->first,
                        ", which this libtorch's does not have. Export the "
                        "program anew with this version.");
    }
    return node;
  }

  void add_results(const c10::FunctionSchema& schema, const Json& outputs, Node& node) {
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
  Result written_result(const Node& node, size_t written, const Json& output) {
    const auto* target = std::get_if<ValueRef>(&node.args[written]);
    if (target == nullptr) format_error(node.full_name(), " writes into what is no tensor.");
    const std::vector<std::string> names = tensor_names(output, "a result of " + node.full_name());
    if (names.size() != 1) format_error(node.full_name(), " gives one tensor, not a list.");
    scope_.define(names[0], target->id);
    return {{target->id}, false};
  }

  Result new_result(const c10::Type& type, const Json& output, const std::string& by) {
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

  ValueId add(const std::string& name) {
    const ValueId id = graph_.add_value(scope_.type(name), identifier(name));
    scope_.define(name, id);
    return id;
  }

  void read_assertion(const Json& node) {
    for (const auto& [name, json] : inputs_of(node)) {
      if (name != "self") continue;
      const auto [kind, value] = as_union(*json, "an assertion");
      if (kind == "as_bool" && as_bool(value, "an assertion")) return;
      if (kind != "as_sym_bool" || conditions_ == nullptr) {
        unsupported_error("import", "the program asserts something that is no condition of sizes.");
      }
      SizeTerm term = scope_.sym_bool(value, "an assertion");
      conditions_->push_back({std::move(term), assertion_text(node)});
    }
  }

  static std::string assertion_text(const Json& node) {
    for (const auto& [name, json] : inputs_of(node)) {
      if (name != "assert_msg") continue;
      const auto [kind, value] = as_union(*json, "an assertion");
      if (kind == "as_string") return as_string(value, "an assertion");
    }
    return "an assertion of the program";
  }

  // --- higher-order operators --------------------------------------------------------------------

  void read_higher_order(const Json& node, const std::string& name) {
    if (name == "cond") return read_control_flow(node, kCondOp);
    if (name == "while_loop") return read_control_flow(node, kWhileOp);
    if (name == "scan") return read_control_flow(node, kScanOp);
    if (name == "wrap_with_set_grad_enabled") return read_grad_mode(node);
    unsupported_error("import", "the program calls the higher-order operator ", name,
                      "; cond, while_loop, scan and torch.no_grad() are what graphs can have.");
  }

  std::vector<ValueId> values_of(const Json& argument, const std::string& where) const {
    std::vector<ValueId> ids;
    for (const std::string& name : tensor_names(argument, where))
      ids.push_back(scope_.tensor(name));
    return ids;
  }

  std::shared_ptr<const Graph> subgraph(const Json& argument, const std::string& by) const {
    const auto [kind, value] = as_union(argument, by);
    if (kind != "as_graph") format_error("an argument of ", by, " is ", kind, ", no graph.");
    auto inner = std::make_shared<Graph>();
    const SymbolLookup none = [&](const std::string& name) -> SizeExpr {
      unsupported_error("import", by, " depends on the dynamic size ", name,
                        ". Export the program with fixed sizes there.");
    };
    NodeReader reader(object_at(value, "graph", by), *inner, none, nullptr);
    for (const std::string& name : reader.input_names()) {
      reader.scope().define(name, inner->add_input(reader.scope().type(name), identifier(name)));
    }
    reader.run();
    for (const std::string& name : reader.output_names()) {
      inner->outputs.push_back(reader.scope().tensor(name));
    }
    return inner;
  }

  // Graphs, tensors and lists of tensors, in this order in the file, and in compile/graph.h.
  void read_control_flow(const Json& node, const char* op) {
    Node result{.op = op, .overload = "", .args = {}, .results = {}, .subgraphs = {}, .source = ""};
    for (const auto& [name, argument] : inputs_of(node)) {
      const std::string kind = as_union(*argument, op).first;
      if (kind == "as_graph") {
        result.subgraphs.push_back(subgraph(*argument, op));
      } else if (kind == "as_tensor") {
        result.args.emplace_back(ValueRef{values_of(*argument, op)[0]});
      } else {
        std::vector<ValueRef> refs;
        for (const ValueId id : values_of(*argument, std::string("an operand of ") + op)) {
          refs.push_back({id});
        }
        result.args.emplace_back(std::move(refs));
      }
    }
    Result all;
    all.is_list = true;
    for (const Json& output : array_at(node, "outputs", "a node")) {
      for (const std::string& name : tensor_names(output, op)) all.ids.push_back(add(name));
    }
    result.results.push_back(std::move(all));
    graph_.nodes.push_back(std::move(result));
  }

  ValueId detached(ValueId id) {
    Result result;
    result.ids = {graph_.add_value(graph_.type(id), graph_.value(id).name + "_detached")};
    graph_.nodes.push_back({.op = "aten::detach",
                            .overload = "",
                            .args = {ValueRef{id}},
                            .results = {result},
                            .subgraphs = {},
                            .source = ""});
    return result.ids[0];
  }

  // (enabled, graph, operands...)
  void read_grad_mode(const Json& node) {
    const auto inputs = inputs_of(node);
    const std::string where = "a block of set_grad_enabled";
    if (inputs.size() < 2) format_error(where, " has no graph.");
    const auto [kind, enabled] = as_union(*inputs[0].second, where);
    const auto [graph_kind, graph] = as_union(*inputs[1].second, where);
    if (kind != "as_bool" || graph_kind != "as_graph") format_error(where, " has no graph.");
    const bool records = as_bool(enabled, where);
    if (records && detaches_) {
      unsupported_error("import", "the program has torch.enable_grad() inside of torch.no_grad().");
    }
    NodeReader reader(object_at(graph, "graph", where), graph_, symbols_, conditions_);
    reader.detaches_ = detaches_ || !records;
    std::vector<ValueId> operands;
    for (size_t i = 2; i < inputs.size(); ++i) {
      const std::vector<ValueId> ids = values_of(*inputs[i].second, where);
      operands.insert(operands.end(), ids.begin(), ids.end());
    }
    inline_block(reader, operands, node, !records);
  }

  void inline_block(NodeReader& reader, const std::vector<ValueId>& operands, const Json& node,
                    bool detach) {
    const std::vector<std::string> names = reader.input_names();
    if (names.size() != operands.size()) {
      format_error("a block has ", names.size(), " inputs, and is given ", operands.size(), ".");
    }
    std::map<std::string, ValueId> as_given;
    for (size_t i = 0; i < names.size(); ++i) {
      reader.scope_.define(names[i], detach ? detached(operands[i]) : operands[i]);
      as_given.emplace(names[i], operands[i]);
    }
    reader.run();
    std::vector<std::string> results;
    for (const Json& output : array_at(node, "outputs", "a node")) {
      const std::vector<std::string> found = tensor_names(output, "a result of a block");
      results.insert(results.end(), found.begin(), found.end());
    }
    const std::vector<std::string> outputs = reader.output_names();
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

  const Json& json_;
  Graph& graph_;
  SymbolLookup symbols_;
  NameScope scope_;
  std::vector<SizeCondition>* conditions_;
  bool detaches_ = false;
};

// --- the program ---------------------------------------------------------------------------------

// One of the signature's specs: what it is, and what belongs to it.
struct Spec {
  std::string kind;
  const Json* fields;

  std::string tensor() const { return string_at(at(*fields, "arg", kind), "name", kind); }
  std::string field(const char* name) const { return string_at(*fields, name, kind); }
};

std::vector<Spec> specs_of(const Json& signature, const char* field) {
  std::vector<Spec> specs;
  for (const Json& each : array_at(signature, field, "the signature")) {
    const auto [kind, fields] = as_union(each, "one of the signature's " + std::string(field));
    specs.push_back({kind, &fields});
  }
  return specs;
}

class ProgramReader {
 public:
  ProgramReader(const Json& program, const std::function<at::Tensor(const std::string&)>& tensor)
      : program_(program),
        module_(object_at(program, "graph_module", "the program")),
        json_(object_at(module_, "graph", "the program")),
        signature_(object_at(module_, "signature", "the program")),
        tensor_(tensor),
        nodes_(
            json_, result_.graph, [this](const std::string& name) { return symbol(name); },
            &result_.conditions) {}

  ExportedGraph run() {
    check_version();
    const std::vector<Spec> inputs = specs_of(signature_, "input_specs");
    find_symbols(inputs);
    for (const Spec& spec : inputs) add_state(spec);
    for (const Spec& spec : inputs) add_input(spec);
    nodes_.run();
    const std::vector<Spec> outputs = specs_of(signature_, "output_specs");
    for (const Spec& spec : outputs) add_output(spec);
    for (const Spec& spec : outputs) add_mutation(spec);
    add_ranges();
    add_guards();
    return std::move(result_);
  }

 private:
  void check_version() const {
    constexpr int64_t kMajor = 8;
    const Json& version = object_at(program_, "schema_version", "the program");
    const int64_t major = as_int(at(version, "major", "the version"), "the version");
    if (major != kMajor) {
      unsupported_error("import", "the program has version ", major,
                        " of torch.export's schema; this torchlift reads version ", kMajor,
                        ". Load it in Python and save it anew by torch.export.save.");
    }
  }

  // --- dynamic dims ------------------------------------------------------------------------------

  static bool is_state(const Spec& spec) {
    return spec.kind == "parameter" || spec.kind == "buffer";
  }

  // The name of the tensor that the user gives, if it is one.
  static std::optional<std::string> user_tensor(const Spec& spec) {
    if (spec.kind != "user_input") return std::nullopt;
    const auto [kind, value] = as_union(at(*spec.fields, "arg", spec.kind), spec.kind);
    if (kind != "as_tensor") return std::nullopt;
    return string_at(value, "name", spec.kind);
  }

  void find_symbols(const std::vector<Spec>& specs) {
    auto input = static_cast<int32_t>(std::count_if(specs.begin(), specs.end(), &is_state));
    for (const Spec& spec : specs) {
      const auto name = user_tensor(spec);
      if (!name.has_value()) continue;
      find_symbols_of(*name, input);
      ++input;
    }
  }

  void find_symbols_of(const std::string& name, int32_t input) {
    const Json& meta =
        at(object_at(json_, "tensor_values", "the graph"), name.c_str(), "the graph");
    const Json& sizes = array_at(meta, "sizes", name);
    for (size_t dim = 0; dim < sizes.size(); ++dim) {
      const auto [kind, value] = as_union(sizes[dim], name);
      if (kind != "as_expr") continue;
      const SizeTerm term = parse_size(string_at(value, "expr_str", name));
      if (term.kind != SizeTerm::Kind::kSymbol || symbols_.count(term.name) > 0) continue;
      symbols_.emplace(term.name, static_cast<int32_t>(result_.graph.symbols.size()));
      result_.graph.symbols.push_back({.name = identifier(term.name),
                                       .input = input,
                                       .dim = static_cast<int32_t>(dim),
                                       .least = 0});
    }
  }

  SizeExpr symbol(const std::string& name) const {
    const auto found = symbols_.find(name);
    if (found != symbols_.end()) return SizeExpr::symbol(found->second);
    if (begins_with(name, "u")) {
      unsupported_error("import", "a size of the program, ", name,
                        ", depends on the numbers in its tensors (nonzero, item, a mask as an "
                        "index), which a graph cannot say.");
    }
    unsupported_error("import", "the dynamic size ", name,
                      " is the size of no dim of an input. "
                      "Export the program with dims that are such sizes themselves.");
  }

  void add_ranges() {
    const Json* ranges = find(program_, "range_constraints");
    if (ranges == nullptr) return;
    for (const auto& [name, range] : ranges->items()) {
      const auto found = symbols_.find(name);
      if (found == symbols_.end()) continue;
      if (const Json* least = find(range, "min_val")) {
        result_.graph.symbols[static_cast<size_t>(found->second)].least =
            std::max<int64_t>(0, as_int(*least, name));
      }
      if (const Json* most = find(range, "max_val")) {
        const std::string limit = std::to_string(as_int(*most, name));
        result_.conditions.push_back(
            {parse_size("Symbol('" + name + "') <= " + limit), name + " <= " + limit});
      }
    }
  }

  // What was found of the sizes while the program was exported. With fixed sizes, which are checked
  // anyhow, it says no more.
  void add_guards() {
    const Json* guards = find(program_, "guards_code");
    if (guards == nullptr || symbols_.empty()) return;
    for (const Json& guard : as_array(*guards, "guards_code")) {
      const std::string text = as_string(guard, "a guard");
      SizeTerm term = parse_size(text);
      for_each_leaf(term, [&](const SizeTerm& leaf) { check_leaf(leaf, text); });
      result_.conditions.push_back({std::move(term), text});
    }
  }

  void check_leaf(const SizeTerm& leaf, const std::string& text) const {
    const auto& names = result_.input_names;
    if (std::find(names.begin(), names.end(), leaf.name) == names.end()) {
      unsupported_error("import", "the program says '", text, "' of ", leaf.name,
                        ", which is none of its inputs.");
    }
  }

  // --- inputs ------------------------------------------------------------------------------------

  ValueId declare(const std::string& name, ValueId id) {
    nodes_.scope().define(name, id);
    ids_.emplace(name, id);
    return id;
  }

  void add_state(const Spec& spec) {
    if (!is_state(spec)) return;
    const bool is_parameter = spec.kind == "parameter";
    const std::string name = spec.field(is_parameter ? "parameter_name" : "buffer_name");
    const std::string in_graph = spec.tensor();
    const ValueId id = result_.graph.add_input(nodes_.scope().type(in_graph), identifier(in_graph));
    declare(in_graph, id);
    if (!state_.emplace(name, id).second) format_error("two tensors of the module are ", name, ".");
    result_.state.push_back({name, is_parameter});
  }

  void add_input(const Spec& spec) {
    if (is_state(spec)) return;
    if (spec.kind == "tensor_constant") return add_constant(spec);
    if (spec.kind == "constant_input") return;  // the program was exported for its value
    if (spec.kind != "user_input") {
      unsupported_error("import", "the program has an input of the kind ", spec.kind,
                        "; tensors are what graphs have.");
    }
    const auto name = user_tensor(spec);
    if (!name.has_value()) return check_fixed(spec);
    declare(*name, result_.graph.add_input(nodes_.scope().type(*name), identifier(*name)));
    result_.input_names.push_back(*name);
  }

  // A number or None among the inputs, for which the program was exported.
  static void check_fixed(const Spec& spec) {
    const std::string kind = as_union(at(*spec.fields, "arg", spec.kind), spec.kind).first;
    if (!begins_with(kind, "as_sym_") && kind != "as_custom_obj") return;
    unsupported_error("import", "the program has an input that is ", kind,
                      ". Export it with a tensor, or a fixed number, there.");
  }

  void add_constant(const Spec& spec) {
    const std::string name = spec.field("tensor_constant_name");
    const std::string in_graph = spec.tensor();
    const at::Tensor tensor = tensor_(name);
    if (type_of(tensor) != nodes_.scope().type(in_graph)) {
      format_error("constant ", name, " is ", type_of(tensor).str(), ", and the program says ",
                   nodes_.scope().type(in_graph).str(), ".");
    }
    declare(in_graph, result_.graph.add_constant(tensor, identifier(in_graph)));
  }

  // --- outputs -----------------------------------------------------------------------------------

  void add_output(const Spec& spec) {
    if (spec.kind == "loss_output") return add_output_value(nodes_.scope().tensor(spec.tensor()));
    if (spec.kind != "user_output") return;
    const auto [kind, value] = as_union(at(*spec.fields, "arg", spec.kind), spec.kind);
    if (kind == "as_none") return;
    if (kind == "as_tensor") {
      return add_output_value(nodes_.scope().tensor_of(value, "an output"));
    }
    add_number(kind, value);
  }

  void add_output_value(ValueId id) {
    result_.graph.outputs.push_back(id);
    result_.output_names.push_back(result_.graph.value(id).name);
  }

  // A number becomes a tensor without dims.
  void add_number(const std::string& kind, const Json& value) {
    static const std::map<std::string, at::ScalarType> kNumbers = {{"as_int", at::kLong},
                                                                   {"as_sym_int", at::kLong},
                                                                   {"as_float", at::kDouble},
                                                                   {"as_sym_float", at::kDouble},
                                                                   {"as_bool", at::kBool}};
    const auto number = kNumbers.find(kind);
    if (number == kNumbers.end()) {
      unsupported_error("import", "the program returns something that is ", kind,
                        "; tensors, numbers and None are what graphs have.");
    }
    const c10::OperatorHandle op = operator_of({"aten::scalar_tensor", ""});
    Node node{.op = "aten::scalar_tensor",
              .overload = "",
              .args = {},
              .results = {},
              .subgraphs = {},
              .source = ""};
    for (const c10::Argument& parameter : op.schema().arguments()) {
      if (parameter.name() == "s") {
        node.args.push_back(
            read_argument(Json{{kind, value}}, parameter, nodes_.scope(), "an output"));
      } else if (parameter.name() == "dtype") {
        node.args.emplace_back(IValue(static_cast<int64_t>(number->second)));
      } else {
        node.args.push_back(default_argument(parameter, "an output"));
      }
    }
    TensorType type;
    type.dtype = number->second;
    const ValueId id = result_.graph.add_value(type, "number");
    node.results.push_back({{id}, false});
    result_.graph.nodes.push_back(std::move(node));
    add_output_value(id);
  }

  void add_mutation(const Spec& spec) {
    static const std::set<std::string> kGiven = {"user_output", "loss_output"};
    if (kGiven.count(spec.kind) > 0) return;
    if (spec.kind == "user_input_mutation") {
      const std::string name = spec.field("user_input_name");
      const auto found = ids_.find(name);
      if (found == ids_.end()) format_error("the program writes into ", name, ", no input.");
      return add_copy(found->second, nodes_.scope().tensor(spec.tensor()));
    }
    const bool is_buffer = spec.kind == "buffer_mutation";
    if (!is_buffer && spec.kind != "parameter_mutation") {
      unsupported_error("import", "the program has an output of the kind ", spec.kind,
                        "; export the function itself, not its gradient.");
    }
    const std::string name = spec.field(is_buffer ? "buffer_name" : "parameter_name");
    const auto found = state_.find(name);
    if (found == state_.end()) format_error("the program writes into ", name, ", no buffer.");
    add_copy(found->second, nodes_.scope().tensor(spec.tensor()));
  }

  void add_copy(ValueId to, ValueId from) {
    result_.graph.nodes.push_back({.op = "aten::copy_",
                                   .overload = "",
                                   .args = {ValueRef{to}, ValueRef{from}, IValue(false)},
                                   .results = {{{to}, false}},
                                   .subgraphs = {},
                                   .source = ""});
  }

  const Json& program_;
  const Json& module_;
  const Json& json_;
  const Json& signature_;
  const std::function<at::Tensor(const std::string&)>& tensor_;
  ExportedGraph result_;
  std::unordered_map<std::string, int32_t> symbols_;
  std::unordered_map<std::string, ValueId> ids_;    // by the name in the file
  std::unordered_map<std::string, ValueId> state_;  // by the name in the module
  NodeReader nodes_;
};

}  // namespace

ExportedGraph read_exported_graph(const Json& program,
                                  const std::function<at::Tensor(const std::string&)>& tensor) {
  return ProgramReader(program, tensor).run();
}

}  // namespace torchlift::compile
