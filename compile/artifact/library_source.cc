#include "compile/artifact/library_source.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <set>
#include <sstream>
#include <string_view>
#include <utility>
#include <vector>

#include "compile/artifact/artifact.h"
#include "core/error.h"

namespace torchlift::compile {
namespace {

using Kind = Structure::Kind;

// A compiler holds a string literal in memory several times over.
constexpr size_t kMostBytes = size_t{64} << 20;

// --- names ---------------------------------------------------------------------------------------

constexpr std::array kKeywords = {
    "alignas",   "alignof",   "and",      "asm",      "auto",      "bool",      "break",
    "case",      "catch",     "char",     "class",    "concept",   "const",     "consteval",
    "constexpr", "constinit", "continue", "co_await", "co_return", "co_yield",  "decltype",
    "default",   "delete",    "do",       "double",   "else",      "enum",      "explicit",
    "export",    "extern",    "false",    "float",    "for",       "friend",    "goto",
    "if",        "inline",    "int",      "long",     "mutable",   "namespace", "new",
    "noexcept",  "not",       "nullptr",  "operator", "or",        "private",   "protected",
    "public",    "register",  "requires", "return",   "short",     "signed",    "sizeof",
    "static",    "struct",    "switch",   "template", "this",      "throw",     "true",
    "try",       "typedef",   "typeid",   "typename", "union",     "unsigned",  "using",
    "virtual",   "void",      "volatile", "while",    "xor",       "at",        "std"};

bool is_keyword(const std::string& name) {
  return std::find(kKeywords.begin(), kKeywords.end(), name) != kKeywords.end();
}

bool is_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_'; }

// A C++ identifier like `name`: "layer1.weight" is layer1_weight.
std::string identifier(const std::string& name) {
  std::string result;
  for (const char c : name) {
    const char next = is_word(c) ? c : '_';
    // Two underscores in a row are the compiler's.
    if (next != '_' || result.empty() || result.back() != '_') result += next;
  }
  if (result.empty() || std::isdigit(static_cast<unsigned char>(result[0])) != 0 ||
      result[0] == '_') {
    result.insert(0, "item_");
    if (const size_t twice = result.find("__"); twice != std::string::npos) result.erase(twice, 1);
  }
  return is_keyword(result) ? result + "_" : result;
}

std::string unique(const std::string& name, std::set<std::string>& taken) {
  std::string result = name;
  for (int i = 1; !taken.insert(result).second; ++i) result = name + "_" + std::to_string(i);
  return result;
}

// layer1_weight is a Layer1Weight.
std::string type_name(const std::string& field) {
  std::string result;
  bool upper = true;
  for (const char c : field) {
    if (c == '_') {
      upper = true;
      continue;
    }
    result += upper ? static_cast<char>(std::toupper(static_cast<unsigned char>(c))) : c;
    upper = false;
  }
  return result;
}

// In a comment of one line, which a backslash at its end would make two.
std::string comment(std::string text) {
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F || c == '\\') c = '/';
  }
  return text;
}

// --- structs -------------------------------------------------------------------------------------

// Writes a struct for a tree of tensors, and lists how its tensors are reached, in order.
class StructWriter {
 public:
  StructWriter(const Graph& graph, const std::vector<ValueId>& ids) : graph_(graph), ids_(ids) {}

  void write(const std::string& name, const std::vector<Structure>& children) {
    write_struct(name, children, "", "");
  }
  std::string text() const { return out_.str(); }
  const std::vector<std::string>& places() const { return places_; }

 private:
  void write_struct(const std::string& name, const std::vector<Structure>& children,
                    const std::string& indent, const std::string& place) {
    std::set<std::string> taken = {name};
    std::vector<std::string> fields;
    for (size_t i = 0; i < children.size(); ++i) {
      const std::string& own = children[i].name;
      fields.push_back(unique(own.empty() ? "item_" + std::to_string(i) : identifier(own), taken));
    }
    out_ << indent << "struct " << name << " {\n";
    for (size_t i = 0; i < children.size(); ++i) {
      write_field(children[i], fields[i], indent + "  ", place + fields[i], taken);
    }
    out_ << indent << "};\n";
  }

  void write_field(const Structure& child, const std::string& field, const std::string& indent,
                   const std::string& place, std::set<std::string>& taken) {
    if (child.kind == Kind::kTensor) {
      places_.push_back(place);
      out_ << indent << "at::Tensor " << field << ";  // " << tensor_comment(child, field) << "\n";
    } else if (!child.is_container()) {
      // Nothing to give or get: the program was traced for this value.
      out_ << indent << "// " << comment(child.str()) << "\n";
    } else if (is_array(child)) {
      write_array(child, field, indent, place);
    } else {
      const std::string type = unique(type_name(field), taken);
      write_struct(type, child.children, indent, place + ".");
      out_ << indent << type << " " << field << ";\n";
    }
  }

  static bool is_array(const Structure& structure) {
    return structure.kind != Kind::kDict && !structure.children.empty() &&
           std::all_of(structure.children.begin(), structure.children.end(),
                       [](const Structure& child) {
                         return child.kind == Kind::kTensor && child.name.empty();
                       });
  }

  void write_array(const Structure& child, const std::string& field, const std::string& indent,
                   const std::string& place) {
    for (size_t i = 0; i < child.children.size(); ++i) {
      out_ << indent << "// [" << i << "]: " << next_type() << "\n";
      places_.push_back(place + "[" + std::to_string(i) + "]");
    }
    out_ << indent << "std::array<at::Tensor, " << child.children.size() << "> " << field << ";\n";
  }

  std::string tensor_comment(const Structure& child, const std::string& field) {
    const bool renamed = !child.name.empty() && child.name != field;
    return next_type() + (renamed ? ", '" + comment(child.name) + "'" : "");
  }

  std::string next_type() {
    const ValueId id = ids_[next_++];
    return id == kNoValue ? "undefined" : comment(graph_.type(id).str(graph_.symbol_names()));
  }

  const Graph& graph_;
  const std::vector<ValueId>& ids_;
  size_t next_ = 0;
  std::ostringstream out_;
  std::vector<std::string> places_;
};

// What stands in struct Outputs: the parts of the result, or the result, if it is one tensor.
std::vector<Structure> output_fields(const Structure& outputs) {
  if (outputs.is_container()) return outputs.children;
  Structure only = outputs;
  if (only.name.empty()) only.name = "output";
  return {only};
}

// --- files ---------------------------------------------------------------------------------------

std::string guard(const std::string& header_path) {
  std::string result;
  for (const char c : header_path) {
    result += is_word(c) ? static_cast<char>(std::toupper(static_cast<unsigned char>(c))) : '_';
  }
  return "TORCHLIFT_LIBRARY_" + result + "_";
}

// Octal, of three digits: a digit that follows is not taken in.
void write_literal(const std::string& bytes, std::ostream& out) {
  constexpr size_t kPerLine = 64;
  for (size_t i = 0; i < bytes.size(); ++i) {
    if (i % kPerLine == 0) out << (i == 0 ? "    \"" : "\"\n    \"");
    const auto byte = static_cast<unsigned char>(bytes[i]);
    const bool plain = byte >= 0x20 && byte < 0x7F && byte != '"' && byte != '\\' && byte != '?';
    if (plain) {
      out << bytes[i];
    } else {
      out << '\\' << static_cast<char>('0' + (byte >> 6))
          << static_cast<char>('0' + ((byte >> 3) & 7)) << static_cast<char>('0' + (byte & 7));
    }
  }
  out << "\"";
}

std::string least_size(const Symbol& symbol) {
  return symbol.least == 0 ? "" : " of at least " + std::to_string(symbol.least);
}

std::string dynamic_dims(const Graph& graph) {
  std::string result;
  for (const Symbol& symbol : graph.symbols) {
    result += "// " + comment(symbol.name) + " may be any size" + least_size(symbol) +
              ": it is dim " + std::to_string(symbol.dim) + " of " +
              comment(graph.value(graph.inputs[static_cast<size_t>(symbol.input)]).name) + ".\n";
  }
  return result;
}

std::string header_text(const Artifact& artifact, const LibraryOptions& options,
                        const StructWriter& inputs, const StructWriter& outputs) {
  std::ostringstream out;
  const std::string macro = guard(options.header_path);
  const bool arrays = (inputs.text() + outputs.text()).find("std::array") != std::string::npos;
  out << "// Made from " << comment(options.file) << " by torchlift_library: do not edit.\n\n"
      << "#ifndef " << macro << "\n#define " << macro << "\n\n#include <ATen/core/Tensor.h>\n"
      << (arrays ? "\n#include <array>\n" : "") << "\nnamespace " << options.cpp_namespace
      << " {\n\n// " << comment(artifact.name) << comment(artifact.signature.str()) << "\n"
      << "// Traced by torchlift " << comment(artifact.torchlift_version) << " with torch "
      << comment(artifact.torch_version) << ".\n"
      << dynamic_dims(artifact.graph) << "\n"
      << inputs.text() << "\n"
      << outputs.text() << "\n"
      << "// Throws torchlift::TransformError if an input has another dtype, shape or device than "
         "it\n// says above. Can be called from several threads at once.\n"
      << "Outputs run(const Inputs& inputs);\n\n"
      << "}  // namespace " << options.cpp_namespace << "\n\n#endif  // " << macro << "\n";
  return out.str();
}

std::string source_text(const std::string& bytes, const LibraryOptions& options,
                        const StructWriter& inputs, const StructWriter& outputs) {
  std::ostringstream out;
  out << "// Made from " << comment(options.file) << " by torchlift_library: do not edit.\n\n"
      << "#include \"" << options.header_path << "\"\n\n"
      << "#include <string_view>\n#include <vector>\n\n"
      << "#include \"compile/artifact/artifact.h\"\n#include \"compile/optimized_program.h\"\n\n"
      << "namespace " << options.cpp_namespace << " {\nnamespace {\n\n"
      << "constexpr char kArtifact[] =\n";
  write_literal(bytes, out);
  out << ";\n\n"
      << "const torchlift::compile::OptimizedProgram& program() {\n"
      << "  static const torchlift::compile::OptimizedProgram program(\n"
      << "      torchlift::compile::parse_artifact(\n"
      << "          std::string_view(kArtifact, sizeof(kArtifact) - 1), \"";
  for (const char c : comment(options.file)) out << (c == '"' ? '\'' : c);
  out << "\")\n          .graph);\n"
      << "  return program;\n}\n\n}  // namespace\n\n"
      << "Outputs run(" << (inputs.places().empty() ? "const Inputs&" : "const Inputs& inputs")
      << ") {\n  const std::vector<at::Tensor> tensors = {";
  const char* separator = "\n";
  for (const std::string& place : inputs.places()) {
    out << std::exchange(separator, ",\n") << "      inputs." << place;
  }
  out << "};\n  const std::vector<at::Tensor> results = program().run(tensors);\n"
      << "  Outputs outputs;\n";
  for (size_t i = 0; i < outputs.places().size(); ++i) {
    out << "  outputs." << outputs.places()[i] << " = results[" << i << "];\n";
  }
  out << "  return outputs;\n}\n\n}  // namespace " << options.cpp_namespace << "\n";
  return out.str();
}

void check_namespace(const std::string& name) {
  bool ok = !name.empty();
  for (size_t begin = 0; ok && begin <= name.size();) {
    const size_t end = std::min(name.find("::", begin), name.size());
    const std::string part = name.substr(begin, end - begin);
    ok = !part.empty() && std::all_of(part.begin(), part.end(), is_word) &&
         std::isdigit(static_cast<unsigned char>(part[0])) == 0 && !is_keyword(part);
    begin = end + 2;
  }
  if (!ok) {
    transform_error("torchlift_library", "'", name,
                    "' is no C++ namespace. Give one by namespace =", " \"my_project::loss\".");
  }
}

}  // namespace

LibrarySource library_source(const std::string& bytes, const LibraryOptions& options) {
  check_namespace(options.cpp_namespace);
  if (bytes.size() > kMostBytes) {
    transform_error("torchlift_library", options.file, " has ", bytes.size(),
                    " bytes, and at most ", kMostBytes,
                    " can be embedded. Make the large constants inputs, or load the ",
                    "file at run time by load_artifact.");
  }
  const Artifact artifact = parse_artifact(bytes, options.file);
  if (artifact.native.has_value()) {
    transform_error("torchlift_library", options.file, " holds machine code by ",
                    artifact.native->backend,
                    ", which a library does not run. Save it without a backend.");
  }
  StructWriter inputs(artifact.graph, artifact.graph.inputs);
  inputs.write("Inputs", artifact.signature.inputs.children);
  StructWriter outputs(artifact.graph, artifact.graph.outputs);
  outputs.write("Outputs", output_fields(artifact.signature.outputs));
  return {.header = header_text(artifact, options, inputs, outputs),
          .source = source_text(bytes, options, inputs, outputs)};
}

}  // namespace torchlift::compile
