#include "compile/artifact/signature.h"

#include <bit>
#include <charconv>
#include <cmath>
#include <sstream>
#include <unordered_set>
#include <utility>

#include "core/error.h"

namespace torchlift::compile {
namespace {

using Kind = Structure::Kind;

Structure node(Kind kind, std::string name, std::vector<Structure> children = {}) {
  return {
      .kind = kind, .name = std::move(name), .constant = false, .children = std::move(children)};
}

std::string child_path(const std::string& parent, const std::string& name, size_t index) {
  if (name.empty()) return parent + "[" + std::to_string(index) + "]";
  return parent.empty() ? name : parent + "." + name;
}

void visit_tensors(const Structure& structure, const std::string& path,
                   const std::function<void(const Structure&, const std::string&)>& f) {
  if (structure.kind == Kind::kTensor) f(structure, path);
  for (size_t i = 0; i < structure.children.size(); ++i) {
    const Structure& child = structure.children[i];
    visit_tensors(child, child_path(path, child.name, i), f);
  }
}

// The shortest digits that give the number back.
std::string float_str(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  char digits[64];
  const auto end = std::to_chars(digits, digits + sizeof(digits), value).ptr;
  std::string result(digits, end);
  if (result.find_first_of(".e") == std::string::npos) result += ".0";
  return result;
}

class StructurePrinter {
 public:
  explicit StructurePrinter(const std::function<std::string(size_t)>& leaf) : leaf_(leaf) {}

  void print(const Structure& structure) {
    if (!structure.name.empty()) out_ << structure.name << ": ";
    switch (structure.kind) {
      case Kind::kTensor:
        out_ << leaf_(next_++);
        return;
      case Kind::kNone:
        out_ << "None";
        return;
      case Kind::kConstant:
        out_ << constant_str(structure.constant);
        return;
      case Kind::kTuple:
        print_children(structure, '(', structure.children.size() == 1 ? ",)" : ")");
        return;
      case Kind::kList:
        print_children(structure, '[', "]");
        return;
      case Kind::kDict:
        print_children(structure, '{', "}");
        return;
    }
  }
  std::string str() const { return out_.str(); }

 private:
  void print_children(const Structure& structure, char open, const char* close) {
    out_ << open;
    const char* comma = "";
    for (const Structure& child : structure.children) {
      out_ << comma;
      print(child);
      comma = ", ";
    }
    out_ << close;
  }

  const std::function<std::string(size_t)>& leaf_;
  std::ostringstream out_;
  size_t next_ = 0;
};

// As bits: NaN is itself, and -0.0 is not 0.0.
bool same(const Structure::Constant& a, const Structure::Constant& b) {
  const auto bits = [](double x) { return std::bit_cast<uint64_t>(x); };
  if (a.index() != b.index()) return false;
  if (const auto* x = std::get_if<double>(&a)) return bits(*x) == bits(std::get<double>(b));
  if (const auto* x = std::get_if<std::complex<double>>(&a)) {
    const auto& y = std::get<std::complex<double>>(b);
    return bits(x->real()) == bits(y.real()) && bits(x->imag()) == bits(y.imag());
  }
  return a == b;
}

void check_structure(const Structure& structure, const std::string& where, int depth) {
  if (depth > Structure::kMaxDepth) {
    transform_error("compile", "the ", where, " are nested more than ", Structure::kMaxDepth,
                    " deep.");
  }
  if (!structure.is_container() && !structure.children.empty()) {
    transform_error("compile", "a leaf of the ", where, " has ", structure.children.size(),
                    " children.");
  }
  std::unordered_set<std::string> keys;
  for (const Structure& child : structure.children) {
    if (structure.kind == Kind::kDict && !keys.insert(child.name).second) {
      transform_error("compile", "a dict of the ", where, " has the key '", child.name, "' twice.");
    }
    check_structure(child, where, depth + 1);
  }
}

void check_count(const Structure& structure, const std::string& where, size_t in_graph) {
  if (structure.tensor_count() != in_graph) {
    transform_error("compile", "the signature has ", structure.tensor_count(), " tensors in its ",
                    where, ", and the graph has ", in_graph, ".");
  }
}

Structure flat(const Graph& graph, const std::vector<ValueId>& ids) {
  Structure result = tuple_of({});
  for (const ValueId id : ids) {
    result.children.push_back(tensor(id == kNoValue ? "" : graph.value(id).name));
  }
  return result;
}

}  // namespace

size_t Structure::tensor_count() const {
  size_t count = kind == Kind::kTensor ? 1 : 0;
  for (const Structure& child : children) count += child.tensor_count();
  return count;
}

void Structure::for_each_tensor(
    const std::function<void(const Structure&, const std::string&)>& f) const {
  visit_tensors(*this, name, f);
}

std::vector<std::string> Structure::tensor_paths() const {
  std::vector<std::string> paths;
  for_each_tensor([&](const Structure&, const std::string& path) { paths.push_back(path); });
  return paths;
}

std::string Structure::str() const {
  return str([](size_t) { return std::string("Tensor"); });
}

std::string Structure::str(const std::function<std::string(size_t)>& leaf) const {
  StructurePrinter printer(leaf);
  printer.print(*this);
  return printer.str();
}

bool Structure::operator==(const Structure& other) const {
  return kind == other.kind && name == other.name &&
         (kind != Kind::kConstant || same(constant, other.constant)) && children == other.children;
}

Structure tensor(std::string name) { return node(Kind::kTensor, std::move(name)); }
Structure none(std::string name) { return node(Kind::kNone, std::move(name)); }
Structure constant(Structure::Constant value, std::string name) {
  Structure result = node(Kind::kConstant, std::move(name));
  result.constant = std::move(value);
  return result;
}
Structure tuple_of(std::vector<Structure> children, std::string name) {
  return node(Kind::kTuple, std::move(name), std::move(children));
}
Structure list_of(std::vector<Structure> children, std::string name) {
  return node(Kind::kList, std::move(name), std::move(children));
}
Structure dict_of(std::vector<Structure> children, std::string name) {
  return node(Kind::kDict, std::move(name), std::move(children));
}

std::string constant_str(const Structure::Constant& constant) {
  if (const auto* value = std::get_if<bool>(&constant)) return *value ? "True" : "False";
  if (const auto* value = std::get_if<int64_t>(&constant)) return std::to_string(*value);
  if (const auto* value = std::get_if<double>(&constant)) return float_str(*value);
  if (const auto* value = std::get_if<std::string>(&constant)) return "'" + *value + "'";
  const auto& value = std::get<std::complex<double>>(constant);
  return "(" + float_str(value.real()) + " + " + float_str(value.imag()) + "j)";
}

std::string Signature::str() const { return inputs.str() + " -> " + outputs.str(); }

Signature flat_signature(const Graph& graph) {
  Signature signature{.inputs = flat(graph, graph.inputs), .outputs = flat(graph, graph.outputs)};
  if (graph.outputs.size() == 1) {
    // Taken out first: it is a part of what it is assigned to.
    Structure only = std::move(signature.outputs.children[0]);
    signature.outputs = std::move(only);
  }
  return signature;
}

void check_signature(const Signature& signature, const Graph& graph) {
  check_structure(signature.inputs, "inputs", 1);
  check_structure(signature.outputs, "outputs", 1);
  if (signature.inputs.kind != Kind::kTuple) {
    transform_error("compile", "the inputs of the signature are no tuple of arguments.");
  }
  check_count(signature.inputs, "inputs", graph.inputs.size());
  check_count(signature.outputs, "outputs", graph.outputs.size());
}

}  // namespace torchlift::compile
