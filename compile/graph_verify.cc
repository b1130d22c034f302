#include <ATen/core/function_schema.h>
#include <ATen/core/jit_type.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <string>
#include <unordered_set>
#include <vector>

#include "compile/graph.h"
#include "core/boxed.h"
#include "core/error.h"

// What makes a graph well formed. A graph from a file is checked by the same function, so nothing
// is taken for granted here: numbers of values may be out of range, for one.

namespace torchlift::compile {
namespace {

using c10::TypeKind;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  transform_error("compile", "the graph is not well formed: ", parts...);
}

// --- arguments against types of a schema ---------------------------------------------------------

bool is_number(const c10::IValue& value) {
  return value.isInt() || value.isDouble() || value.isBool() || value.isComplexDouble();
}

bool fits_list(const c10::ListType& type, const Argument& argument) {
  const auto element = type.getElementType();
  const bool tensors =
      element->kind() == TypeKind::TensorType ||
      (element->kind() == TypeKind::OptionalType &&
       element->castRaw<c10::OptionalType>()->getElementType()->kind() == TypeKind::TensorType);
  if (tensors) {
    const auto* refs = std::get_if<std::vector<ValueRef>>(&argument);
    return refs != nullptr && (element->kind() == TypeKind::OptionalType ||
                               std::all_of(refs->begin(), refs->end(),
                                           [](const ValueRef& ref) { return ref.id != kNoValue; }));
  }
  if (std::holds_alternative<std::vector<SizeExpr>>(argument)) {
    return element->kind() == TypeKind::IntType || element->kind() == TypeKind::SymIntType;
  }
  const auto* value = std::get_if<c10::IValue>(&argument);
  if (value == nullptr) return false;
  switch (element->kind()) {
    case TypeKind::IntType:
    case TypeKind::SymIntType:
      return value->isIntList();
    case TypeKind::FloatType:
      return value->isDoubleList();
    case TypeKind::BoolType:
      return value->isBoolList();
    case TypeKind::NumberType: {
      if (!value->isList()) return value->isIntList() || value->isDoubleList();
      const auto list = value->toListRef();
      return std::all_of(list.begin(), list.end(), is_number);
    }
    default:
      return value->isList();
  }
}

// Of the schema's own type and of the one that makes memory formats and dtypes integers.
bool fits_constant(const c10::Type& type, const c10::IValue& value) {
  switch (type.kind()) {
    case TypeKind::IntType:
    case TypeKind::SymIntType:
    case TypeKind::ScalarTypeType:
    case TypeKind::LayoutType:
    case TypeKind::MemoryFormatType:
      return value.isInt();
    case TypeKind::FloatType:
      return value.isDouble();
    case TypeKind::BoolType:
      return value.isBool();
    case TypeKind::TensorType:  // x + 2.0: a number as a tensor
    case TypeKind::NumberType:
      return is_number(value);
    case TypeKind::StringType:
      return value.isString();
    case TypeKind::DeviceObjType:
      return value.isDevice();
    default:
      return false;
  }
}

bool fits(const c10::Type& type, const Argument& argument) {
  if (type.kind() == TypeKind::OptionalType) {
    return std::holds_alternative<std::monostate>(argument) ||
           fits(*type.castRaw<c10::OptionalType>()->getElementType(), argument);
  }
  if (const auto* ref = std::get_if<ValueRef>(&argument)) {
    return type.kind() == TypeKind::TensorType && ref->id != kNoValue;
  }
  if (type.kind() == TypeKind::ListType) {
    return fits_list(*type.castRaw<c10::ListType>(), argument);
  }
  if (std::holds_alternative<std::monostate>(argument)) {
    // Formulas pass undefined tensors, where a schema says "Tensor".
    return type.kind() == TypeKind::TensorType;
  }
  // x * x.size(0): a number as a tensor, too
  if (std::holds_alternative<SizeExpr>(argument)) {
    return type.kind() == TypeKind::IntType || type.kind() == TypeKind::SymIntType ||
           type.kind() == TypeKind::NumberType || type.kind() == TypeKind::TensorType;
  }
  if (std::holds_alternative<SizeRatio>(argument)) {
    return type.kind() == TypeKind::FloatType || type.kind() == TypeKind::NumberType ||
           type.kind() == TypeKind::TensorType;
  }
  const auto* value = std::get_if<c10::IValue>(&argument);
  return value != nullptr && fits_constant(type, *value);
}

bool is_tensor_list(const c10::Type& type) {
  return type.kind() == TypeKind::ListType &&
         type.castRaw<c10::ListType>()->getElementType()->kind() == TypeKind::TensorType;
}

// --- the graph -----------------------------------------------------------------------------------

class Verifier {
 public:
  explicit Verifier(const Graph& graph) : graph_(graph), defined_(graph.values.size(), false) {}

  void run() {
    check_names();
    for (const ValueId id : graph_.inputs) define(id, "an input");
    for (const Constant& constant : graph_.constants) {
      define(constant.id, "a constant");
      if (!constant.tensor.defined()) fail("constant ", name(constant.id), " has no tensor.");
    }
    check_symbols();
    for (const Node& node : graph_.nodes) check(node);
    for (const ValueId id : graph_.outputs) {
      if (id != kNoValue) read(id, "the outputs");
    }
  }

 private:
  bool in_range(ValueId id) const {
    return id >= 0 && static_cast<size_t>(id) < graph_.values.size();
  }
  std::string name(ValueId id) const {
    return in_range(id) ? graph_.value(id).name : "<value " + std::to_string(id) + ">";
  }

  void define(ValueId id, const std::string& as) {
    if (!in_range(id)) fail(as, " is value ", id, ", and there are ", graph_.values.size(), ".");
    if (defined_[static_cast<size_t>(id)]) fail(name(id), " is defined again as ", as, ".");
    defined_[static_cast<size_t>(id)] = true;
    check_type(id);
  }

  void read(ValueId id, const std::string& by) const {
    if (!in_range(id)) {
      fail(by, " reads value ", id, ", and there are ", graph_.values.size(), ".");
    }
    if (!defined_[static_cast<size_t>(id)]) {
      fail(by, " reads ", name(id), ", which is not defined before.");
    }
  }

  void check_names() const {
    std::unordered_set<std::string> names;
    for (const Value& value : graph_.values) {
      if (!names.insert(value.name).second) fail("two values are named ", value.name, ".");
    }
  }

  void check_type(ValueId id) const {
    const TensorType& type = graph_.type(id);
    const auto symbols = static_cast<int32_t>(graph_.symbols.size());
    const auto known = [&](const std::vector<SizeExpr>& sizes) {
      return std::all_of(sizes.begin(), sizes.end(),
                         [&](const SizeExpr& size) { return size.symbol_count() <= symbols; });
    };
    if (!known(type.sizes) || !known(type.strides)) {
      fail("the shape of ", name(id), " depends on a dynamic dim that no input has.");
    }
    if (type.layout == c10::kStrided && type.strides.size() != type.sizes.size()) {
      fail(name(id), " has ", type.sizes.size(), " sizes and ", type.strides.size(), " strides.");
    }
  }

  void check_symbols() const {
    for (const Symbol& symbol : graph_.symbols) {
      const bool input =
          symbol.input >= 0 && static_cast<size_t>(symbol.input) < graph_.inputs.size();
      if (!input || symbol.dim < 0 ||
          symbol.dim >= graph_.type(graph_.inputs[static_cast<size_t>(symbol.input)]).dim()) {
        fail("the dynamic dim ", symbol.name, " is dim ", symbol.dim, " of input ", symbol.input,
             ", which there is not.");
      }
    }
  }

  void check(const Node& node) {
    const std::string by = node.full_name();
    for (const Argument& argument : node.args) {
      for (const ValueId id : values_in(argument)) read(id, by);
      check_sizes(argument, by);
    }
    const auto op = find_operator(node);
    if (op.has_value()) {
      check_operator(node, *op);
    } else {
      check_control_flow(node);
    }
  }

  void check_sizes(const Argument& argument, const std::string& by) const {
    int32_t count = 0;
    if (const auto* size = std::get_if<SizeExpr>(&argument)) count = size->symbol_count();
    if (const auto* sizes = std::get_if<std::vector<SizeExpr>>(&argument)) {
      for (const SizeExpr& size : *sizes) count = std::max(count, size.symbol_count());
    }
    if (const auto* ratio = std::get_if<SizeRatio>(&argument)) {
      count = std::max(ratio->numerator.symbol_count(), ratio->denominator.symbol_count());
    }
    if (static_cast<size_t>(count) > graph_.symbols.size()) {
      fail("an argument of ", by, " depends on a dynamic dim that no input has.");
    }
  }

  void check_operator(const Node& node, const c10::OperatorHandle& op) {
    const auto& schema = op.schema();
    if (!node.subgraphs.empty()) fail(node.full_name(), " has subgraphs.");
    if (node.args.size() != schema.arguments().size()) {
      fail(node.full_name(), " has ", node.args.size(), " arguments; ", schema, " needs ",
           schema.arguments().size(), ".");
    }
    for (size_t i = 0; i < node.args.size(); ++i) {
      if (!fits(*schema.arguments()[i].type(), node.args[i])) {
        fail("argument ", schema.arguments()[i].name(), " of ", node.full_name(), " is no ",
             schema.arguments()[i].type()->str(), ".");
      }
    }
    check_results(node, op);
  }

  void check_results(const Node& node, const c10::OperatorHandle& op) {
    const auto& returns = op.schema().returns();
    if (node.results.size() != returns.size()) {
      fail(node.full_name(), " has ", node.results.size(), " results; its operator gives ",
           returns.size(), ".");
    }
    for (size_t i = 0; i < returns.size(); ++i) {
      const Result& result = node.results[i];
      if (result.is_list != is_tensor_list(*returns[i].type())) {
        fail("result ", i, " of ", node.full_name(), " is ", result.is_list ? "a" : "no",
             " list; its operator gives ", returns[i].type()->str(), ".");
      }
      if (!result.is_list && result.ids.size() != 1) {
        fail("result ", i, " of ", node.full_name(), " is ", result.ids.size(), " values.");
      }
      const bool written = returns[i].alias_info() != nullptr && returns[i].alias_info()->isWrite();
      for (const ValueId id : result.ids) {
        if (id == kNoValue) continue;
        const bool target = written && in_range(id) && defined_[static_cast<size_t>(id)] &&
                            is_written(node, op, id);
        if (!target) define(id, "a result of " + node.full_name());
      }
    }
  }

  static bool is_written(const Node& node, const c10::OperatorHandle& op, ValueId id) {
    for (size_t i = 0; i < node.args.size(); ++i) {
      if (!writes_argument(op, i)) continue;
      const std::vector<ValueId> ids = values_in(node.args[i]);
      if (std::find(ids.begin(), ids.end(), id) != ids.end()) return true;
    }
    return false;
  }

  // See the schemas in compile/graph.h.
  void check_control_flow(const Node& node) {
    const size_t graphs = node.op == kScanOp ? 1 : 2;
    if (node.subgraphs.size() != graphs) {
      fail(node.op, " has ", node.subgraphs.size(), " subgraphs, and needs ", graphs, ".");
    }
    size_t operands = 0;
    const size_t lists = node.op == kScanOp ? 3 : node.op == kWhileOp ? 2 : 1;
    const size_t first = node.op == kCondOp ? 1 : 0;
    if (node.args.size() != first + lists) {
      fail(node.op, " has ", node.args.size(), " arguments, and needs ", first + lists, ".");
    }
    if (first == 1 && !std::holds_alternative<ValueRef>(node.args[0])) {
      fail("the predicate of ", node.op, " is no tensor.");
    }
    for (size_t i = first; i < node.args.size(); ++i) {
      const auto* refs = std::get_if<std::vector<ValueRef>>(&node.args[i]);
      if (refs == nullptr) fail("argument ", i, " of ", node.op, " is no list of tensors.");
      operands += refs->size();
    }
    for (const auto& graph : node.subgraphs) {
      if (graph == nullptr) fail("a subgraph of ", node.op, " is missing.");
      verify(*graph);
      if (graph->inputs.size() != operands) {
        fail("a subgraph of ", node.op, " has ", graph->inputs.size(), " inputs, and is given ",
             operands, " operands.");
      }
    }
    check_control_flow_results(node);
  }

  void check_control_flow_results(const Node& node) {
    if (node.results.size() != 1 || !node.results[0].is_list) {
      fail(node.op, " must have one list of results.");
    }
    const std::vector<ValueId>& ids = node.results[0].ids;
    for (const ValueId id : ids) {
      if (id != kNoValue) define(id, "a result of " + node.op);
    }
    const auto outputs = [&](size_t i) { return node.subgraphs[i]->outputs.size(); };
    const bool fit =
        node.op == kCondOp ? outputs(0) == ids.size() && outputs(1) == ids.size()
        : node.op == kWhileOp
            ? outputs(0) == 1 && outputs(1) == ids.size() && carried(node) == ids.size()
            : outputs(0) == ids.size() && carried(node) <= ids.size();
    if (!fit) fail("the subgraphs of ", node.op, " do not give its ", ids.size(), " results.");
  }

  static size_t carried(const Node& node) {
    return std::get<std::vector<ValueRef>>(node.args[0]).size();
  }

  const Graph& graph_;
  std::vector<bool> defined_;
};

}  // namespace

void verify(const Graph& graph) { Verifier(graph).run(); }

}  // namespace torchlift::compile
