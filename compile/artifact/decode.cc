#include <ATen/core/function_schema.h>
#include <ATen/core/jit_type.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/set.h>
#include <c10/core/MemoryFormat.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <utility>

#include "compile/artifact/artifact_generated.h"
#include "compile/artifact/dtypes.h"
#include "compile/artifact/encode.h"
#include "compile/artifact/enums.h"
#include "compile/artifact/format_error.h"
#include "compile/artifact/safetensors.h"

// NOTE [what a buffer may hold]
// The flatbuffers library checks that every offset stays inside of the buffer. What it lets
// through:
//   - a string or vector that many tables point to. Copied for each, a small file would fill the
//     memory: Budget counts what is copied.
//   - graphs that share subgraphs: twice at each of n levels is a program of 2^n nodes, and
//   verify(),
//     which follows each use, would not come back: expanded_ counts.
//   - numbers of any size, where ids, sizes, enums are meant.
//   - a union that says what it is and is not there.
//   - vectors of numbers at odd addresses: numbers() copies them byte by byte.
// Subgraphs have smaller indices than the graphs that hold them, so there are no cycles.

namespace torchlift::compile {
namespace {

double number(uint64_t bits) { return std::bit_cast<double>(bits); }

// How much may be copied out of a buffer. A honest file needs less than it has bytes, but for
// strings, which it holds once and nodes repeat.
class Budget {
 public:
  explicit Budget(size_t buffer) : left_(uint64_t{64} * buffer) {}
  void take(uint64_t bytes) {
    if (bytes > left_) format_error("the graph repeats its parts more often than it can need.");
    left_ -= bytes;
  }

 private:
  uint64_t left_;
};

std::string text_of(const flatbuffers::String* string, Budget& budget) {
  if (string == nullptr) return "";
  budget.take(string->size());
  return string->str();
}

bool is_printable(const std::string& text) {
  return std::all_of(text.begin(), text.end(),
                     [](unsigned char c) { return c >= 0x20 && c != 0x7F; });
}

// --- arguments -----------------------------------------------------------------------------------

class ArgumentDecoder {
 public:
  explicit ArgumentDecoder(Budget& budget) : budget_(budget) {}

  // A name, which is printed on terminals.
  std::string name(const flatbuffers::String* string, const char* what) {
    std::string result = text_of(string, budget_);
    if (!is_printable(result)) format_error("the name of ", what, " has control characters.");
    return result;
  }

  template <class T>
  std::vector<T> numbers(const flatbuffers::Vector<T>* vector) {
    if (vector == nullptr) return {};
    budget_.take(uint64_t{vector->size()} * sizeof(T));
    std::vector<T> result(vector->size());
    if (!result.empty()) std::memcpy(result.data(), vector->Data(), result.size() * sizeof(T));
    return result;
  }

  SizeExpr size(const fb::SizeExpr& encoded) {
    std::map<SizeExpr::Monomial, int64_t> terms;
    if (encoded.terms() != nullptr) {
      for (const fb::SizeTerm* term : *encoded.terms()) {
        // Its negative is no number of 64 bits.
        if (term->coefficient() == std::numeric_limits<int64_t>::min()) {
          format_error("a size has the coefficient -2^63.");
        }
        budget_.take(sizeof(*term));
        if (!terms.emplace(numbers(term->powers()), term->coefficient()).second) {
          format_error("a size has two terms of the same powers.");
        }
      }
    }
    return SizeExpr::from_parts(std::move(terms), encoded.denominator());
  }

  std::vector<SizeExpr> sizes(const fb::SizeExprs& encoded) {
    const std::vector<int64_t> constants = numbers(encoded.constants());
    std::vector<SizeExpr> result(constants.begin(), constants.end());
    for (const SizeExpr& size : result) {
      if (size.constant() == std::numeric_limits<int64_t>::min()) {
        format_error("a size is -2^63.");
      }
    }
    if (encoded.dynamic() == nullptr) return result;
    for (const fb::DynamicSize* dynamic : *encoded.dynamic()) {
      if (dynamic->at() >= result.size()) {
        format_error("size ", dynamic->at(), " of ", result.size(), " depends on a dynamic dim.");
      }
      result[dynamic->at()] = size(*dynamic->size());
    }
    return result;
  }

  SizeRatio ratio(const fb::SizeRatio& encoded) {
    return {.factor = number(encoded.factor_bits()),
            .numerator = size(*encoded.numerator()),
            .denominator = size(*encoded.denominator())};
  }

  c10::Device device(const flatbuffers::String* string) {
    const std::string text = name(string, "a device");
    try {
      // Indices that are too large for libtorch come out as others.
      const c10::Device device(text);
      if (device.str() == text) return device;
    } catch (const std::exception&) {
      // As below.
    }
    format_error("there is no device '", text, "'.");
  }

  // A union whose kind is given has a value, which the library's verifier does not ask for.
  static fb::ArgumentValue kind_of(const fb::Argument& encoded) {
    const fb::ArgumentValue kind = encoded.value_type();
    if (kind != fb::ArgumentValue::NONE && encoded.value() == nullptr) {
      format_error("an argument has a kind and no value.");
    }
    return kind;
  }

  Argument argument(const fb::Argument& encoded) {
    using Kind = fb::ArgumentValue;
    switch (kind_of(encoded)) {
      case Kind::NONE:
        return std::monostate{};
      case Kind::TensorRef:
        return ValueRef{encoded.value_as_TensorRef()->value()};
      case Kind::TensorRefs: {
        std::vector<ValueRef> refs;
        for (const int32_t id : numbers(encoded.value_as_TensorRefs()->values()))
          refs.push_back({id});
        return refs;
      }
      case Kind::SizeExpr:
        return size(*encoded.value_as_SizeExpr());
      case Kind::SizeExprs:
        return sizes(*encoded.value_as_SizeExprs());
      case Kind::SizeRatio:
        return ratio(*encoded.value_as_SizeRatio());
      default:
        return constant(encoded);
    }
  }

  // A value without tensors.
  c10::IValue constant(const fb::Argument& encoded) {
    using Kind = fb::ArgumentValue;
    switch (kind_of(encoded)) {
      case Kind::Ints:
        return numbers(encoded.value_as_Ints()->values());
      case Kind::Floats: {
        std::vector<double> list;
        for (const uint64_t each : numbers(encoded.value_as_Floats()->bits())) {
          list.push_back(number(each));
        }
        return list;
      }
      case Kind::Bools: {
        c10::List<bool> list;
        for (const uint8_t each : numbers(encoded.value_as_Bools()->values())) {
          list.push_back(each != 0);
        }
        return list;
      }
      case Kind::Constants:
        return mixed_list(*encoded.value_as_Constants());
      default:
        return scalar(encoded);
    }
  }

  c10::IValue scalar(const fb::Argument& encoded) {
    using Kind = fb::ArgumentValue;
    switch (kind_of(encoded)) {
      case Kind::Int:
        return encoded.value_as_Int()->value();
      case Kind::Float:
        return number(encoded.value_as_Float()->bits());
      case Kind::Bool:
        return encoded.value_as_Bool()->value();
      case Kind::Complex: {
        const fb::Complex* parts = encoded.value_as_Complex();
        return c10::complex<double>(number(parts->real_bits()), number(parts->imag_bits()));
      }
      case Kind::Text:
        return text_of(encoded.value_as_Text()->value(), budget_);
      case Kind::Device:
        return device(encoded.value_as_Device()->value());
      default:
        format_error("an argument is of kind ", static_cast<int>(encoded.value_type()),
                     ", which cannot stand there, or which this torchlift does not know.");
    }
  }

 private:
  c10::IValue mixed_list(const fb::Constants& encoded) {
    budget_.take(uint64_t{encoded.items()->size()} * sizeof(c10::IValue));
    const bool numbers = encoded.element() == fb::ElementType::Number;
    if (!numbers && encoded.element() != fb::ElementType::String) {
      format_error("a list is of element type ", static_cast<int>(encoded.element()),
                   ", which there is not.");
    }
    c10::TypePtr element = c10::NumberType::get();
    if (!numbers) element = c10::StringType::get();
    c10::impl::GenericList list(element);
    for (const fb::Argument* item : *encoded.items()) {
      c10::IValue value = scalar(*item);
      if (numbers ? !value.isScalar() : !value.isString()) {
        format_error("a list of ", element->str(), "s has another thing in it.");
      }
      list.push_back(std::move(value));
    }
    return list;
  }

  Budget& budget_;
};

// --- what verify() does not check ----------------------------------------------------------------

void check_static_size(const TensorType& type, const std::string& name) {
  std::vector<int64_t> sizes;
  for (const SizeExpr& size : type.sizes) sizes.push_back(size.constant().value_or(0));
  for (const SizeExpr& stride : type.strides) {
    if (stride.constant().value_or(0) < 0) format_error("value ", name, " has a negative stride.");
  }
  try {
    checked_bytes(sizes, c10::elementSize(type.dtype));
  } catch (const FormatError& error) {
    format_error("value ", name, ": ", error.what());
  }
}

const c10::Type& without_optional(const c10::Type& type) {
  return type.kind() == c10::TypeKind::OptionalType
             ? *type.castRaw<c10::OptionalType>()->getElementType()
             : type;
}

// Enums are integers to libtorch's schemas, which it turns into enums without a look at them.
int64_t enum_options(const c10::Type& type) {
  switch (type.kind()) {
    case c10::TypeKind::ScalarTypeType:
      return static_cast<int64_t>(c10::ScalarType::NumOptions);
    case c10::TypeKind::LayoutType:
      return static_cast<int64_t>(c10::Layout::NumOptions);
    case c10::TypeKind::MemoryFormatType:
      return static_cast<int64_t>(c10::MemoryFormat::NumOptions);
    default:
      return std::numeric_limits<int64_t>::max();
  }
}

void check_enums(const Node& node, const c10::OperatorHandle& op) {
  const auto& parameters = op.schema().arguments();
  for (size_t i = 0; i < std::min(parameters.size(), node.args.size()); ++i) {
    const auto* value = std::get_if<c10::IValue>(&node.args[i]);
    const int64_t options = enum_options(without_optional(*parameters[i].real_type()));
    if (value == nullptr || !value->isInt() || options == std::numeric_limits<int64_t>::max()) {
      continue;
    }
    if (value->toInt() < 0 || value->toInt() >= options) {
      format_error("argument ", parameters[i].name(), " of ", node.full_name(), " is the number ",
                   value->toInt(), ", which stands for nothing.");
    }
  }
}

// Operators that reach beyond tensors.
void check_operator(const Node& node) {
  if (node.op == "aten::from_file") {
    format_error("the graph calls ", node.full_name(), ", which reads and writes files.");
  }
  const auto op = find_operator(node);
  if (op.has_value()) check_enums(node, *op);
}

// --- constants -----------------------------------------------------------------------------------

class StorageLoader {
 public:
  StorageLoader(std::vector<StorageRecord> records,
                const std::function<at::Tensor(const StorageRecord&)>& load)
      : records_(std::move(records)), load_(load), loaded_(records_.size()) {}

  // All of a storage that no constant sees.
  at::Tensor load(size_t index, const char* what) {
    if (index >= records_.size()) {
      format_error(what, " is storage ", index, " of ", records_.size(), ".");
    }
    return load_(records_[index]);
  }

  at::Tensor view(const fb::Constant& encoded, const Value& value, ArgumentDecoder& decoder) {
    if (encoded.storage() >= records_.size()) {
      format_error("constant ", value.name, " is in storage ", encoded.storage(), " of ",
                   records_.size(), ".");
    }
    const std::vector<int64_t> sizes = decoder.numbers(encoded.sizes());
    const std::vector<int64_t> strides = decoder.numbers(encoded.strides());
    const TensorType& type = value.type;
    const auto element = static_cast<uint64_t>(c10::elementSize(type.dtype));
    check_place(encoded, sizes, strides, element, value.name);
    if (type.layout != c10::kStrided || !type.is_static()) {
      format_error("constant ", value.name, " is no strided tensor of known size.");
    }
    const at::Tensor& bytes = storage(encoded.storage(), type.device);
    if (type.dtype == at::kBool) check_bools_of(encoded.storage(), value.name);
    at::Tensor tensor = at::empty({0}, bytes.options().dtype(type.dtype));
    tensor.set_(bytes.storage(), static_cast<int64_t>(encoded.offset() / element), sizes, strides);
    if (type_of(tensor) != type) {
      format_error("constant ", value.name, " is ", type_of(tensor).str(),
                   ", and its value is said to be ", type.str(), ", or its strides differ.");
    }
    if (encoded.is_wrapped_number()) {
      if (tensor.dim() != 0) format_error("constant ", value.name, " is no number: it has dims.");
      tensor.unsafeGetTensorImpl()->set_wrapped_number(true);
    }
    return tensor;
  }

 private:
  void check_place(const fb::Constant& encoded, const std::vector<int64_t>& sizes,
                   const std::vector<int64_t>& strides, uint64_t element,
                   const std::string& name) const {
    const auto fail = [&](const auto&... parts) { format_error("constant ", name, parts...); };
    if (sizes.size() != strides.size()) {
      fail(" has ", sizes.size(), " sizes and ", strides.size(), " strides.");
    }
    const uint64_t there = records_[encoded.storage()].bytes;
    if (encoded.offset() % element != 0) fail(" begins between two numbers.");
    if (encoded.offset() > there) fail(" begins beyond the end of its storage.");
    checked_bytes(sizes, element);
    const uint64_t room = (there - encoded.offset()) / element;
    if (std::find(sizes.begin(), sizes.end(), 0) != sizes.end()) return;
    uint64_t last = 0;
    for (size_t i = 0; i < sizes.size(); ++i) {
      if (strides[i] < 0) fail(" has the stride ", strides[i], ".");
      uint64_t span = 0;
      if (__builtin_mul_overflow(static_cast<uint64_t>(sizes[i] - 1),
                                 static_cast<uint64_t>(strides[i]), &span) ||
          __builtin_add_overflow(last, span, &last)) {
        fail(" reaches beyond 64 bits.");
      }
    }
    if (last >= room) fail(" needs ", last, " + 1 numbers, and its storage has ", room, ".");
  }

  const at::Tensor& storage(size_t index, c10::Device device) {
    at::Tensor& bytes = loaded_[index];
    if (!bytes.defined()) bytes = load_(records_[index]).to(device);
    if (bytes.device() != device) {
      format_error("two constants share a storage, on ", bytes.device().str(), " and on ",
                   device.str(), ".");
    }
    return bytes;
  }

  void check_bools_of(size_t index, const std::string& name) {
    const at::Tensor bytes = loaded_[index].cpu();
    try {
      check_bools(bytes.const_data_ptr(), bytes.nbytes());
    } catch (const FormatError& error) {
      format_error("constant ", name, ": ", error.what());
    }
  }

  std::vector<StorageRecord> records_;
  const std::function<at::Tensor(const StorageRecord&)>& load_;
  std::vector<at::Tensor> loaded_;
};

// --- the buffer ----------------------------------------------------------------------------------

class Decoder {
 public:
  Decoder(const std::string& buffer, const std::function<at::Tensor(const StorageRecord&)>& load)
      : root_(checked_root(buffer)),
        buffer_size_(buffer.size()),
        budget_(buffer.size()),
        arguments_(budget_),
        storages_(storage_records(), load) {}

  Artifact run() {
    Artifact artifact;
    artifact.name = arguments_.name(root_.name(), "the artifact");
    artifact.torchlift_version = arguments_.name(root_.torchlift_version(), "a version");
    artifact.torch_version = arguments_.name(root_.torch_version(), "a version");
    if (root_.metadata() != nullptr) {
      for (const fb::Metadata* each : *root_.metadata()) {
        artifact.metadata.emplace(text_of(each->key(), budget_), text_of(each->value(), budget_));
      }
    }
    artifact.graph = graphs();
    artifact.signature.inputs = structure(*root_.inputs());
    artifact.signature.outputs = structure(*root_.outputs());
    verify(artifact.graph);
    check_signature(artifact.signature, artifact.graph);
    if (root_.native() != nullptr) artifact.native = native(*root_.native());
    return artifact;
  }

 private:
  static const fb::Artifact& checked_root(const std::string& buffer) {
    constexpr uint32_t kMaxTableDepth = 2 * Structure::kMaxDepth + 16;
    // A table has at least the four bytes that lead to its fields. The library's own limit, a
    // million, is for files whose tables share parts; large graphs have more.
    const auto max_tables = static_cast<uint32_t>(buffer.size() / 4);
    flatbuffers::Verifier verifier(reinterpret_cast<const uint8_t*>(buffer.data()), buffer.size(),
                                   kMaxTableDepth, max_tables);
    if (!fb::VerifyArtifactBuffer(verifier)) {
      format_error("the graph section is no flatbuffer of an artifact: it is damaged.");
    }
    return *fb::GetArtifact(buffer.data());
  }

  std::vector<StorageRecord> storage_records() {
    std::vector<StorageRecord> records;
    for (const fb::Storage* storage : *root_.storages()) {
      records.push_back({.name = arguments_.name(storage->tensor(), "a storage"),
                         .bytes = storage->bytes(),
                         .crc = storage->crc32()});
    }
    return records;
  }

  Graph graphs() {
    const uint32_t count = root_.graphs()->size();
    if (count == 0) format_error("there is no graph in it.");
    for (uint32_t i = 0; i + 1 < count; ++i) {
      auto inner = std::make_shared<Graph>();
      decode(*root_.graphs()->Get(i), *inner);
      done_.push_back(std::move(inner));
    }
    Graph graph;
    decode(*root_.graphs()->Get(count - 1), graph);
    return graph;
  }

  // Where it will be: views of constants are made with a look at their values.
  void decode(const fb::Graph& encoded, Graph& graph) {
    expanded_.push_back(encoded.nodes()->size());
    depth_.push_back(1);
    for (const fb::Value* value : *encoded.values()) decode_value(*value, graph);
    graph.inputs = arguments_.numbers(encoded.inputs());
    for (const fb::Constant* constant : *encoded.constants()) {
      const int32_t id = constant->value();
      if (id < 0 || static_cast<size_t>(id) >= graph.values.size()) {
        format_error("a constant is value ", id, ", and there are ", graph.values.size(), ".");
      }
      graph.constants.push_back({id, storages_.view(*constant, graph.value(id), arguments_)});
    }
    for (const fb::Node* node : *encoded.nodes()) {
      graph.nodes.push_back(decode_node(*node));
      check_operator(graph.nodes.back());
    }
    graph.outputs = arguments_.numbers(encoded.outputs());
    for (const fb::Symbol* symbol : *encoded.symbols()) {
      if (symbol->least() < 0) format_error("a dynamic dim is at least ", symbol->least(), ".");
      graph.symbols.push_back({.name = arguments_.name(symbol->name(), "a dynamic dim"),
                               .input = symbol->input(),
                               .dim = symbol->dim(),
                               .least = symbol->least()});
    }
    graph.layouts_assumed = encoded.layouts_assumed();
  }

  void decode_value(const fb::Value& encoded, Graph& graph) {
    const std::string name = arguments_.name(encoded.name(), "a value");
    const fb::TensorType& type = *encoded.type();
    TensorType decoded{.dtype = from_file(type.dtype()),
                       .device = arguments_.device(type.device()),
                       .layout = from_file(type.layout()),
                       .sizes = arguments_.sizes(*type.sizes()),
                       .strides = arguments_.sizes(*type.strides())};
    check_static_size(decoded, name);
    const ValueId id = graph.add_value(std::move(decoded), name);
    if (graph.value(id).name != name) format_error("two values are named ", name, ".");
  }

  Node decode_node(const fb::Node& encoded) {
    Node node;
    node.op = arguments_.name(encoded.op(), "an operator");
    node.overload = arguments_.name(encoded.overload(), "an operator");
    node.source = arguments_.name(encoded.source(), "a place in the source");
    budget_.take(uint64_t{encoded.args()->size()} * sizeof(uint32_t));
    for (const fb::Argument* argument : *encoded.args()) {
      node.args.push_back(arguments_.argument(*argument));
    }
    budget_.take(uint64_t{encoded.results()->size()} * sizeof(uint32_t));
    for (const fb::Result* result : *encoded.results()) {
      node.results.push_back(
          {.ids = arguments_.numbers(result->values()), .is_list = result->is_list()});
    }
    for (const uint32_t index : arguments_.numbers(encoded.subgraphs())) {
      if (index >= done_.size()) {
        format_error("a node has the subgraph ", index, ", and ", done_.size(),
                     " stand before its graph.");
      }
      add_subgraph(index);
      node.subgraphs.push_back(done_[index]);
    }
    return node;
  }

  // To the graph that is being decoded, the last one.
  void add_subgraph(uint32_t index) {
    depth_.back() = std::max(depth_.back(), depth_[index] + 1);
    if (depth_.back() > kMaxGraphDepth) {
      format_error("graphs contain graphs more than ", kMaxGraphDepth, " deep.");
    }
    expanded_.back() += expanded_[index] + 1;
    if (expanded_.back() > buffer_size_) {
      format_error("subgraphs are shared so often that the program has more than ", buffer_size_,
                   " nodes.");
    }
  }

  NativeCode native(const fb::NativeCode& encoded) {
    NativeCode code;
    code.backend = arguments_.name(encoded.backend(), "a backend");
    code.torchlift_version = arguments_.name(encoded.torchlift_version(), "a version");
    code.torch_version = arguments_.name(encoded.torch_version(), "a version");
    code.machine = arguments_.name(encoded.machine(), "a machine");
    std::istringstream features(arguments_.name(encoded.cpu_features(), "features of a CPU"));
    for (std::string each; features >> each;) code.cpu_features.push_back(each);
    code.package = storages_.load(encoded.package(), "the machine code");
    return code;
  }

  Structure structure(const fb::Structure& encoded) {
    Structure result;
    result.kind = from_file(encoded.kind());
    result.name = arguments_.name(encoded.name(), "a part of the signature");
    if (result.kind == Structure::Kind::kConstant) {
      if (encoded.constant() == nullptr) format_error("a constant argument has no value.");
      result.constant = structure_constant(arguments_.scalar(*encoded.constant()));
    }
    if (encoded.children() == nullptr) return result;
    budget_.take(uint64_t{encoded.children()->size()} * sizeof(uint32_t));
    for (const fb::Structure* child : *encoded.children()) {
      result.children.push_back(structure(*child));
    }
    return result;
  }

  static Structure::Constant structure_constant(const c10::IValue& value) {
    if (value.isBool()) return value.toBool();
    if (value.isInt()) return value.toInt();
    if (value.isDouble()) return value.toDouble();
    if (value.isString()) return value.toStringRef();
    if (value.isComplexDouble()) {
      const auto number = value.toComplexDouble();
      return std::complex<double>(number.real(), number.imag());
    }
    format_error("a constant argument is a ", value.tagKind(), ".");
  }

  const fb::Artifact& root_;
  uint64_t buffer_size_;
  Budget budget_;
  ArgumentDecoder arguments_;
  StorageLoader storages_;
  std::vector<std::shared_ptr<const Graph>> done_;
  // By graph: its nodes, each subgraph counted as often as it is used; and how deep it goes.
  std::vector<uint64_t> expanded_;
  std::vector<int> depth_;
};

}  // namespace

Artifact decode(const std::string& buffer,
                const std::function<at::Tensor(const StorageRecord&)>& load) {
  return Decoder(buffer, load).run();
}

}  // namespace torchlift::compile
