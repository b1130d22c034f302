#include "compile/import/exported_graph.h"

#include <algorithm>
#include <memory>
#include <set>
#include <unordered_map>
#include <utility>

#include "compile/artifact/format_error.h"
#include "compile/import/export_schema.h"
#include "compile/import/exported_arguments.h"

namespace torchlift::compile {
namespace {

using c10::IValue;

bool begins_with(const std::string& text, const std::string& prefix) {
  return text.rfind(prefix, 0) == 0;
}

// One of the signature's specs: what it is, and what belongs to it.
struct Spec {
  std::string kind;
  const Json* fields;

  std::string tensor() const { return string_at(at(*fields, "arg", kind), "name", kind); }
  std::string field(const char* name) const { return string_at(*fields, name, kind); }
  bool is_state() const { return kind == "parameter" || kind == "buffer"; }
  // The name of the tensor that the user gives, if it is one.
  std::optional<std::string> user_tensor() const {
    if (kind != "user_input") return std::nullopt;
    const auto [argument, value] = as_union(at(*fields, "arg", kind), kind);
    if (argument != "as_tensor") return std::nullopt;
    return string_at(value, "name", kind);
  }
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
  ProgramReader(const Json& program, const FindTensor& tensor,
                const std::optional<DynamicSizes>& sizes)
      : program_(program),
        module_(object_at(program, "graph_module", "the program")),
        json_(object_at(module_, "graph", "the program")),
        signature_(object_at(module_, "signature", "the program")),
        tensor_(tensor),
        given_sizes_(sizes),
        sizes_(make_sizes()),
        nodes_(json_, result_.graph, *sizes_) {}

  DynamicSizes exported_sizes() {
    find_symbols(specs_of(signature_, "input_specs"));
    return std::move(example_);
  }

  ExportedGraph run() {
    check_version();
    const std::vector<Spec> inputs = specs_of(signature_, "input_specs");
    const std::vector<Spec> outputs = specs_of(signature_, "output_specs");
    find_symbols(inputs);
    add_ranges();
    find_written(outputs);
    for (const Spec& spec : inputs) add_state(spec);
    for (const Spec& spec : inputs) add_input(spec);
    add_guards();
    nodes_.run();
    relax_views(result_.graph);
    for (const Spec& spec : outputs) add_output(spec);
    for (const Spec& spec : outputs) add_mutation(spec);
    for (SizeCondition& each : nodes_.conditions()) result_.conditions.push_back(std::move(each));
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

  std::unique_ptr<const SizeMeaning> make_sizes() const {
    if (!given_sizes_.has_value()) {
      return std::make_unique<SymbolicSizes>([this](const std::string& name) {
        return SizeExpr::symbol(static_cast<int32_t>(symbol(name)));
      });
    }
    return std::make_unique<ConcreteSizes>([this](const SizeTerm& leaf) {
      symbol(leaf.name);
      return given_sizes_->at(leaf.name);
    });
  }

  // Its index in symbols.
  size_t symbol(const std::string& name) const {
    const auto& all = result_.symbols;
    const auto found =
        std::find_if(all.begin(), all.end(), [&](const Symbol& each) { return each.name == name; });
    if (found != all.end()) return static_cast<size_t>(found - all.begin());
    if (begins_with(name, "u")) {
      unsupported_error("import", "a size of the program, ", name,
                        ", depends on the numbers in its tensors (nonzero, item, a mask as an "
                        "index), which a graph cannot say.");
    }
    unsupported_error("import", "the dynamic size ", name,
                      " is the size of no dim of an input. "
                      "Export the program with dims that are such sizes themselves.");
  }

  bool has_symbol(const std::string& name) const {
    return std::any_of(result_.symbols.begin(), result_.symbols.end(),
                       [&](const Symbol& each) { return each.name == name; });
  }

  void find_symbols(const std::vector<Spec>& specs) {
    auto input = static_cast<int32_t>(
        std::count_if(specs.begin(), specs.end(), [](const Spec& s) { return s.is_state(); }));
    for (const Spec& spec : specs) {
      const auto name = spec.user_tensor();
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
      if (term.kind != SizeTerm::Kind::kSymbol || has_symbol(term.name)) continue;
      if (identifier(term.name) != term.name) {
        format_error("a dynamic size is named '", term.name, "'.");
      }
      result_.symbols.push_back(
          {.name = term.name, .input = input, .dim = static_cast<int32_t>(dim), .least = 0});
      // A file need not say what it was in the example.
      constexpr int64_t kAnySize = 4;
      const Json* hint = find(value, "hint");
      const Json* size = hint == nullptr ? nullptr : find(*hint, "as_int");
      example_[term.name] = size == nullptr ? kAnySize : as_int(*size, name);
    }
  }

  void add_ranges() {
    const Json* ranges = find(program_, "range_constraints");
    if (ranges != nullptr) {
      for (const auto& [name, range] : ranges->items()) {
        if (has_symbol(name)) add_range(result_.symbols[symbol(name)], range);
      }
    }
    if (!given_sizes_.has_value()) result_.graph.symbols = result_.symbols;
  }

  void add_range(Symbol& symbol, const Json& range) {
    if (const Json* least = find(range, "min_val")) {
      symbol.least = std::max<int64_t>(0, as_int(*least, symbol.name));
    }
    if (const Json* most = find(range, "max_val")) {
      const std::string text = " <= " + std::to_string(as_int(*most, symbol.name));
      result_.conditions.push_back(
          {parse_size("Symbol('" + symbol.name + "')" + text), symbol.name + text});
    }
  }

  // What was found of the sizes while the program was exported. With fixed sizes, which are checked
  // anyhow, it says no more.
  void add_guards() {
    const Json* guards = find(program_, "guards_code");
    if (guards == nullptr || result_.symbols.empty()) return;
    for (const Json& guard : as_array(*guards, "guards_code")) {
      const std::string text = as_string(guard, "a guard");
      SizeTerm term = parse_size(text);
      for_each_leaf(term, [&](const SizeTerm& leaf) { check_leaf(leaf, text); });
      result_.conditions.push_back({std::move(term), text});
    }
  }

  void check_leaf(const SizeTerm& leaf, const std::string& text) const {
    const auto& names = result_.input_names;
    if (leaf.kind == SizeTerm::Kind::kSymbol) {
      symbol(leaf.name);
    } else if (std::find(names.begin(), names.end(), leaf.name) == names.end()) {
      unsupported_error("import", "the program says '", text, "' of ", leaf.name,
                        ", which is none of its inputs.");
    }
  }

  // --- inputs ------------------------------------------------------------------------------------

  // The inputs that are written when the program has run: by their names in the module, and those
  // of the user's inputs.
  void find_written(const std::vector<Spec>& outputs) {
    for (const Spec& spec : outputs) {
      if (const auto name = written_name(spec)) written_.insert(*name);
    }
  }

  static std::optional<std::string> written_name(const Spec& spec) {
    if (spec.kind == "buffer_mutation") return spec.field("buffer_name");
    if (spec.kind == "parameter_mutation") return spec.field("parameter_name");
    if (spec.kind == "user_input_mutation") return spec.field("user_input_name");
    return std::nullopt;
  }

  void declare(const std::string& in_graph, const std::string& name) {
    Graph& graph = result_.graph;
    const ValueId id = graph.add_input(nodes_.scope().type(in_graph), identifier(in_graph));
    if (!inputs_.emplace(name, id).second) format_error("two inputs are named ", name, ".");
    nodes_.scope().define(
        in_graph, written_.count(name) > 0 ? nodes_.add_unary("aten::clone", id, "_before") : id);
  }

  void add_state(const Spec& spec) {
    if (!spec.is_state()) return;
    const bool is_parameter = spec.kind == "parameter";
    const std::string name = spec.field(is_parameter ? "parameter_name" : "buffer_name");
    declare(spec.tensor(), name);
    result_.state.push_back({name, is_parameter});
  }

  void add_input(const Spec& spec) {
    if (spec.is_state()) return;
    if (spec.kind == "tensor_constant") return add_constant(spec);
    if (spec.kind == "constant_input") return;  // the program was exported for its value
    if (spec.kind != "user_input") {
      unsupported_error("import", "the program has an input of the kind ", spec.kind,
                        "; tensors are what graphs have.");
    }
    const auto name = spec.user_tensor();
    if (!name.has_value()) return check_fixed(spec);
    declare(*name, *name);
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
    const TensorType type = nodes_.scope().type(in_graph);
    if (type_of(tensor) != type) {
      format_error("constant ", name, " is ", type_of(tensor).str(), ", and the program says ",
                   type.str(), ".");
    }
    nodes_.scope().define(in_graph, result_.graph.add_constant(tensor, identifier(in_graph)));
  }

  // --- outputs -----------------------------------------------------------------------------------

  void add_output(const Spec& spec) {
    Graph& graph = result_.graph;
    if (spec.kind == "loss_output") {
      graph.outputs.push_back(nodes_.scope().tensor(spec.tensor()));
    }
    if (spec.kind != "user_output") return;
    const auto [kind, value] = as_union(at(*spec.fields, "arg", spec.kind), spec.kind);
    if (kind == "as_none") return;
    graph.outputs.push_back(kind == "as_tensor" ? nodes_.scope().tensor_of(value, "an output")
                                                : number(kind, value));
  }

  // A number becomes a tensor without dims.
  ValueId number(const std::string& kind, const Json& value) {
    static const std::map<std::string, at::ScalarType> kNumbers = {{"as_int", at::kLong},
                                                                   {"as_sym_int", at::kLong},
                                                                   {"as_float", at::kDouble},
                                                                   {"as_sym_float", at::kDouble},
                                                                   {"as_bool", at::kBool}};
    const auto dtype = kNumbers.find(kind);
    if (dtype == kNumbers.end()) {
      unsupported_error("import", "the program returns something that is ", kind,
                        "; tensors, numbers and None are what graphs have.");
    }
    Node node{.op = "aten::scalar_tensor",
              .overload = "",
              .args = {},
              .results = {},
              .subgraphs = {},
              .source = ""};
    const c10::OperatorHandle op = operator_of({node.op, ""});
    for (const c10::Argument& parameter : op.schema().arguments()) {
      if (parameter.name() == "s") {
        node.args.push_back(
            read_argument(Json{{kind, value}}, parameter, nodes_.scope(), "an output"));
      } else if (parameter.name() == "dtype") {
        node.args.emplace_back(IValue(static_cast<int64_t>(dtype->second)));
      } else {
        node.args.push_back(default_argument(parameter, "an output"));
      }
    }
    TensorType type;
    type.dtype = dtype->second;
    const ValueId id = result_.graph.add_value(type, "number");
    node.results.push_back({{id}, false});
    result_.graph.nodes.push_back(std::move(node));
    return id;
  }

  void add_mutation(const Spec& spec) {
    if (spec.kind == "user_output" || spec.kind == "loss_output") return;
    const auto name = written_name(spec);
    if (!name.has_value()) {
      unsupported_error("import", "the program has an output of the kind ", spec.kind,
                        "; export the function itself, not its gradient.");
    }
    const auto found = inputs_.find(*name);
    if (found == inputs_.end()) format_error("the program writes into ", *name, ", no input.");
    const ValueId to = found->second;
    result_.graph.nodes.push_back(
        {.op = "aten::copy_",
         .overload = "",
         .args = {ValueRef{to}, ValueRef{nodes_.scope().tensor(spec.tensor())}, IValue(false)},
         .results = {{{to}, false}},
         .subgraphs = {},
         .source = ""});
  }

  const Json& program_;
  const Json& module_;
  const Json& json_;
  const Json& signature_;
  const FindTensor& tensor_;
  const std::optional<DynamicSizes>& given_sizes_;
  ExportedGraph result_;
  DynamicSizes example_;
  std::set<std::string> written_;
  std::unordered_map<std::string, ValueId> inputs_;
  std::unique_ptr<const SizeMeaning> sizes_;
  NodeReader nodes_;
};

}  // namespace

ExportedGraph read_exported_graph(const Json& program, const FindTensor& tensor,
                                  const std::optional<DynamicSizes>& sizes) {
  return ProgramReader(program, tensor, sizes).run();
}

DynamicSizes exported_sizes(const Json& program) {
  const std::optional<DynamicSizes> none;
  const FindTensor no_tensor;
  return ProgramReader(program, no_tensor, none).exported_sizes();
}

}  // namespace torchlift::compile
