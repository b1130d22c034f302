#include <ATen/core/Formatting.h>
#include <ATen/core/jit_type.h>
#include <c10/core/Layout.h>
#include <c10/core/MemoryFormat.h>
#include <c10/core/ScalarType.h>

#include <sstream>
#include <string>
#include <vector>

#include "compile/graph.h"

// Graphs as readable code.

namespace torchlift::compile {
namespace {

using Names = std::vector<std::string>;

// "f32", "i64", "bool".
std::string dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "f32";
    case at::kDouble:
      return "f64";
    case at::kHalf:
      return "f16";
    case at::kBFloat16:
      return "bf16";
    case at::kComplexFloat:
      return "c64";
    case at::kComplexDouble:
      return "c128";
    case at::kLong:
      return "i64";
    case at::kInt:
      return "i32";
    case at::kShort:
      return "i16";
    case at::kChar:
      return "i8";
    case at::kByte:
      return "u8";
    case at::kBool:
      return "bool";
    default:
      return c10::toString(dtype);
  }
}

template <class Range, class F>
std::string joined(const Range& range, F&& f) {
  std::string result;
  const char* comma = "";
  for (const auto& each : range) {
    result += comma + f(each);
    comma = ", ";
  }
  return result;
}

std::string sizes_str(const std::vector<SizeExpr>& sizes, const Names& symbols) {
  return "[" + joined(sizes, [&](const SizeExpr& s) { return s.str(symbols); }) + "]";
}

// Types that the schema gives as integers: what they mean is known by the argument's name.
std::string int_str(int64_t number, const std::string& argument) {
  if (argument == "dtype") return dtype_name(static_cast<at::ScalarType>(number));
  if (argument == "layout") return c10::str(static_cast<c10::Layout>(number));
  if (argument == "memory_format") return c10::str(static_cast<c10::MemoryFormat>(number));
  return std::to_string(number);
}

std::string constant_str(const c10::IValue& value, const std::string& argument) {
  if (value.isInt()) return int_str(value.toInt(), argument);
  if (value.isBool()) return value.toBool() ? "True" : "False";
  if (value.isString()) return "'" + value.toStringRef() + "'";
  if (value.isDevice()) return value.toDevice().str();
  if (value.isIntList()) {
    return "[" + joined(value.toIntVector(), [](int64_t n) { return std::to_string(n); }) + "]";
  }
  return c10::str(value);
}

class Printer {
 public:
  Printer(const Graph& graph, bool sources)
      : graph_(graph), symbols_(graph.symbol_names()), sources_(sources) {}

  std::string run(const std::string& name, const std::string& indent) {
    out_ << indent << "def " << name << "("
         << joined(graph_.inputs, [&](ValueId id) { return value_name(id) + ": " + type_str(id); })
         << "):\n";
    const std::string inner = indent + "    ";
    for (const Constant& constant : graph_.constants) {
      out_ << inner << value_name(constant.id) << " = constant()  # " << type_str(constant.id)
           << "\n";
    }
    for (const Node& node : graph_.nodes) {
      print_source(node, inner);
      print(node, inner);
    }
    out_ << inner << "return " << (graph_.outputs.size() == 1 ? "" : "(")
         << joined(graph_.outputs, [&](ValueId id) { return value_name(id); })
         << (graph_.outputs.size() == 1 ? "" : ")") << "\n";
    return out_.str();
  }

 private:
  std::string value_name(ValueId id) const {
    return id == kNoValue ? "None" : graph_.value(id).name;
  }
  std::string type_str(ValueId id) const { return graph_.type(id).str(symbols_); }

  std::string argument_str(const Argument& argument, const std::string& name) const {
    if (const auto* ref = std::get_if<ValueRef>(&argument)) return value_name(ref->id);
    if (const auto* refs = std::get_if<std::vector<ValueRef>>(&argument)) {
      return "[" + joined(*refs, [&](const ValueRef& ref) { return value_name(ref.id); }) + "]";
    }
    if (const auto* value = std::get_if<c10::IValue>(&argument)) return constant_str(*value, name);
    if (const auto* size = std::get_if<SizeExpr>(&argument)) return size->str(symbols_);
    if (const auto* sizes = std::get_if<std::vector<SizeExpr>>(&argument)) {
      return sizes_str(*sizes, symbols_);
    }
    if (const auto* ratio = std::get_if<SizeRatio>(&argument)) return ratio->str(symbols_);
    return "None";
  }

  std::string arguments_str(const Node& node) const {
    const auto op = c10::Dispatcher::singleton().findSchema({node.op, node.overload});
    std::string result;
    // Trailing arguments that have their defaults say nothing.
    size_t count = node.args.size();
    while (op.has_value() && count > 0 && is_default(*op, node, count - 1)) --count;
    for (size_t i = 0; i < count; ++i) {
      const bool known = op.has_value() && i < op->schema().arguments().size();
      const std::string name = known ? op->schema().arguments()[i].name() : "";
      if (i > 0) result += ", ";
      if (known && op->schema().arguments()[i].kwarg_only()) result += name + "=";
      result += argument_str(node.args[i], name);
    }
    return result;
  }

  static bool is_default(const c10::OperatorHandle& op, const Node& node, size_t i) {
    if (i >= op.schema().arguments().size()) return false;
    const auto& fallback = op.schema().arguments()[i].default_value();
    if (!fallback.has_value()) return false;
    if (std::holds_alternative<std::monostate>(node.args[i])) return fallback->isNone();
    const auto* value = std::get_if<c10::IValue>(&node.args[i]);
    if (value == nullptr || fallback->isTensor() || fallback->tagKind() != value->tagKind()) {
      return false;
    }
    return *value == *fallback;
  }

  std::string results_str(const Node& node) const {
    return joined(node.results, [&](const Result& result) {
      const std::string names = joined(result.ids, [&](ValueId id) { return value_name(id); });
      return result.is_list ? "[" + names + "]" : names;
    });
  }

  // Once for all nodes of a line that follow each other.
  void print_source(const Node& node, const std::string& indent) {
    if (!sources_ || node.source.empty() || node.source == last_source_) return;
    last_source_ = node.source;
    out_ << indent << "# " << node.source << "\n";
  }

  void print(const Node& node, const std::string& indent) {
    for (size_t i = 0; i < node.subgraphs.size(); ++i) {
      out_ << Printer(*node.subgraphs[i], sources_)
                  .run("graph_" + std::to_string(++subgraphs_), indent);
    }
    std::string name = node.full_name();
    if (const size_t colons = name.find("::"); colons != std::string::npos) {
      name.replace(colons, 2, ".");
    }
    out_ << indent;
    if (!node.results.empty()) out_ << results_str(node) << " = ";
    out_ << name << "(";
    for (size_t i = 0; i < node.subgraphs.size(); ++i) {
      out_ << "graph_"
           << subgraphs_ - static_cast<int64_t>(node.subgraphs.size()) + 1 + static_cast<int64_t>(i)
           << ", ";
    }
    out_ << arguments_str(node) << ")";
    const std::vector<ValueId> results = results_of(node);
    const char* separator = "  # ";
    for (const ValueId id : results) {
      out_ << separator << type_str(id);
      separator = ", ";
    }
    out_ << "\n";
  }

  const Graph& graph_;
  const Names symbols_;
  const bool sources_;
  std::string last_source_;
  std::ostringstream out_;
  int64_t subgraphs_ = 0;
};

}  // namespace

std::string TensorType::str(const std::vector<std::string>& symbols) const {
  std::string result = dtype_name(dtype) + sizes_str(sizes, symbols);
  if (layout != c10::kStrided) result += " " + c10::str(layout);
  if (!device.is_cpu()) result += " " + device.str();
  return result;
}

std::string Graph::str(bool sources) const { return Printer(*this, sources).run("graph", ""); }

}  // namespace torchlift::compile
