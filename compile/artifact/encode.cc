#include "compile/artifact/encode.h"

#include <bit>
#include <set>
#include <string>
#include <utility>

#include "compile/artifact/artifact_generated.h"
#include "compile/artifact/enums.h"
#include "compile/artifact/format_error.h"

namespace torchlift::compile {
namespace {

template <class T>
using Offset = flatbuffers::Offset<T>;

uint64_t bits(double value) { return std::bit_cast<uint64_t>(value); }

class Encoder {
 public:
  Encoder(const Artifact& artifact, const Storages& storages)
      : artifact_(artifact), storages_(storages) {}

  std::string run() {
    const std::vector<const Graph*> all = all_graphs(artifact_.graph);
    std::vector<Offset<fb::Graph>> graphs;
    for (const Graph* graph : all) {
      graphs.push_back(encode(*graph));
      graph_index_.emplace(graph, static_cast<uint32_t>(graph_index_.size()));
    }
    std::vector<Offset<fb::Storage>> records;
    for (const StorageRecord& record : storages_.records) {
      records.push_back(fb::CreateStorage(builder_, text(record.name), record.bytes, record.crc));
    }
    std::vector<Offset<fb::Metadata>> metadata;
    for (const auto& [key, value] : artifact_.metadata) {
      metadata.push_back(fb::CreateMetadata(builder_, text(key), text(value)));
    }
    const auto name = text(artifact_.name);
    const auto torchlift = text(artifact_.torchlift_version);
    const auto torch = text(artifact_.torch_version);
    const auto graph_list = vector(graphs);
    const auto record_list = vector(records);
    const auto inputs = encode(artifact_.signature.inputs);
    const auto outputs = encode(artifact_.signature.outputs);
    const auto metadata_list = vector(metadata);
    Offset<fb::NativeCode> native;
    if (artifact_.native.has_value()) native = encode(*artifact_.native);
    builder_.Finish(fb::CreateArtifact(builder_, name, torchlift, torch, graph_list, record_list,
                                       inputs, outputs, metadata_list, native),
                    fb::ArtifactIdentifier());
    return {reinterpret_cast<const char*>(builder_.GetBufferPointer()), builder_.GetSize()};
  }

 private:
  // Strings are shared: the names of operators repeat.
  Offset<flatbuffers::String> text(const std::string& value) {
    return builder_.CreateSharedString(value);
  }
  template <class T>
  Offset<flatbuffers::Vector<T>> vector(const std::vector<T>& values) {
    return builder_.CreateVector(values);
  }

  // --- sizes -------------------------------------------------------------------------------------

  Offset<fb::SizeExpr> encode(const SizeExpr& size) {
    std::vector<Offset<fb::SizeTerm>> terms;
    for (const auto& [powers, coefficient] : size.terms()) {
      terms.push_back(fb::CreateSizeTerm(builder_, coefficient, vector(powers)));
    }
    return fb::CreateSizeExpr(builder_, vector(terms), size.denominator());
  }

  Offset<fb::SizeExprs> encode(const std::vector<SizeExpr>& sizes) {
    std::vector<int64_t> constants;
    std::vector<Offset<fb::DynamicSize>> dynamic;
    for (const SizeExpr& size : sizes) {
      const auto constant = size.constant();
      if (!constant.has_value()) {
        const auto index = static_cast<uint32_t>(constants.size());
        dynamic.push_back(fb::CreateDynamicSize(builder_, index, encode(size)));
      }
      constants.push_back(constant.value_or(0));
    }
    return fb::CreateSizeExprs(builder_, vector(constants), vector(dynamic));
  }

  Offset<fb::SizeRatio> encode(const SizeRatio& ratio) {
    const auto numerator = encode(ratio.numerator);
    const auto denominator = encode(ratio.denominator);
    return fb::CreateSizeRatio(builder_, bits(ratio.factor), numerator, denominator);
  }

  Offset<fb::Value> encode(const Value& value) {
    const TensorType& type = value.type;
    const auto sizes = encode(type.sizes);
    const auto strides = encode(type.strides);
    const auto encoded = fb::CreateTensorType(builder_, to_file(type.dtype), to_file(type.layout),
                                              text(type.device.str()), sizes, strides);
    return fb::CreateValue(builder_, text(value.name), encoded);
  }

  // --- arguments ---------------------------------------------------------------------------------

  template <class T>
  Offset<fb::Argument> argument(fb::ArgumentValue kind, Offset<T> value) {
    return fb::CreateArgument(builder_, kind, value.Union());
  }

  Offset<fb::Argument> encode(const Argument& value) {
    return std::visit([&](const auto& each) { return encode_argument(each); }, value);
  }

  Offset<fb::Argument> encode_argument(std::monostate) { return fb::CreateArgument(builder_); }
  Offset<fb::Argument> encode_argument(const ValueRef& ref) {
    return argument(fb::ArgumentValue::TensorRef, fb::CreateTensorRef(builder_, ref.id));
  }
  Offset<fb::Argument> encode_argument(const std::vector<ValueRef>& refs) {
    std::vector<int32_t> ids;
    for (const ValueRef& ref : refs) ids.push_back(ref.id);
    return argument(fb::ArgumentValue::TensorRefs, fb::CreateTensorRefs(builder_, vector(ids)));
  }
  Offset<fb::Argument> encode_argument(const SizeExpr& size) {
    return argument(fb::ArgumentValue::SizeExpr, encode(size));
  }
  Offset<fb::Argument> encode_argument(const std::vector<SizeExpr>& sizes) {
    return argument(fb::ArgumentValue::SizeExprs, encode(sizes));
  }
  Offset<fb::Argument> encode_argument(const SizeRatio& ratio) {
    return argument(fb::ArgumentValue::SizeRatio, encode(ratio));
  }
  Offset<fb::Argument> encode_argument(const c10::IValue& value) {
    if (value.isList() || value.isIntList() || value.isDoubleList() || value.isBoolList()) {
      return encode_list(value);
    }
    return encode_scalar(value);
  }

  Offset<fb::Argument> encode_scalar(const c10::IValue& value) {
    using Kind = fb::ArgumentValue;
    if (value.isInt()) return argument(Kind::Int, fb::CreateInt(builder_, value.toInt()));
    if (value.isBool()) return argument(Kind::Bool, fb::CreateBool(builder_, value.toBool()));
    if (value.isDouble()) return encode_float(value.toDouble());
    if (value.isComplexDouble()) return encode_complex(value.toComplexDouble());
    if (value.isString()) return encode_text(value.toStringRef());
    if (value.isDevice()) {
      return argument(Kind::Device, fb::CreateDevice(builder_, text(value.toDevice().str())));
    }
    format_error("a node has a constant of type ", value.tagKind(), ", which cannot be saved.");
  }
  Offset<fb::Argument> encode_float(double value) {
    return argument(fb::ArgumentValue::Float, fb::CreateFloat(builder_, bits(value)));
  }
  Offset<fb::Argument> encode_complex(const c10::complex<double>& value) {
    return argument(fb::ArgumentValue::Complex,
                    fb::CreateComplex(builder_, bits(value.real()), bits(value.imag())));
  }
  Offset<fb::Argument> encode_text(const std::string& value) {
    return argument(fb::ArgumentValue::Text, fb::CreateText(builder_, text(value)));
  }

  Offset<fb::Argument> encode_list(const c10::IValue& value) {
    if (value.isIntList()) {
      return argument(fb::ArgumentValue::Ints,
                      fb::CreateInts(builder_, vector(value.toIntVector())));
    }
    if (value.isDoubleList()) {
      std::vector<uint64_t> all;
      for (const double each : value.toDoubleVector()) all.push_back(bits(each));
      return argument(fb::ArgumentValue::Floats, fb::CreateFloats(builder_, vector(all)));
    }
    if (value.isBoolList()) {
      std::vector<uint8_t> all;
      for (const bool each : value.toBoolList()) all.push_back(each ? 1 : 0);
      return argument(fb::ArgumentValue::Bools, fb::CreateBools(builder_, vector(all)));
    }
    return encode_mixed_list(value);
  }

  Offset<fb::Argument> encode_mixed_list(const c10::IValue& value) {
    std::vector<Offset<fb::Argument>> items;
    const auto list = value.toList();
    const auto element = element_type(*list.elementType());
    for (const c10::IValue& item : list.vec()) items.push_back(encode_scalar(item));
    return argument(fb::ArgumentValue::Constants,
                    fb::CreateConstants(builder_, element, vector(items)));
  }

  static fb::ElementType element_type(const c10::Type& type) {
    if (type.kind() == c10::TypeKind::NumberType) return fb::ElementType::Number;
    if (type.kind() == c10::TypeKind::StringType) return fb::ElementType::String;
    format_error("a node has a list of ", type.str(), ", which cannot be saved.");
  }

  // --- graphs ------------------------------------------------------------------------------------

  Offset<fb::Node> encode(const Node& node) {
    std::vector<Offset<fb::Argument>> args;
    for (const Argument& each : node.args) args.push_back(encode(each));
    std::vector<Offset<fb::Result>> results;
    for (const Result& result : node.results) {
      results.push_back(fb::CreateResult(builder_, vector(result.ids), result.is_list));
    }
    std::vector<uint32_t> subgraphs;
    for (const auto& graph : node.subgraphs) subgraphs.push_back(graph_index_.at(graph.get()));
    const auto op = text(node.op);
    const auto overload = text(node.overload);
    const auto arg_list = vector(args);
    const auto result_list = vector(results);
    const auto subgraph_list = vector(subgraphs);
    return fb::CreateNode(builder_, op, overload, arg_list, result_list, subgraph_list,
                          text(node.source));
  }

  Offset<fb::Constant> encode(const Constant& constant) {
    const Place& place = storages_.places.at(&constant);
    const auto sizes = vector(constant.tensor.sizes().vec());
    const auto strides = vector(constant.tensor.strides().vec());
    return fb::CreateConstant(builder_, constant.id, static_cast<uint32_t>(place.storage),
                              place.offset, sizes, strides,
                              constant.tensor.unsafeGetTensorImpl()->is_wrapped_number());
  }

  Offset<fb::Graph> encode(const Graph& graph) {
    std::vector<Offset<fb::Value>> values;
    for (const Value& value : graph.values) values.push_back(encode(value));
    std::vector<Offset<fb::Constant>> constants;
    for (const Constant& constant : graph.constants) constants.push_back(encode(constant));
    std::vector<Offset<fb::Node>> nodes;
    for (const Node& node : graph.nodes) nodes.push_back(encode(node));
    std::vector<Offset<fb::Symbol>> symbols;
    for (const Symbol& symbol : graph.symbols) {
      symbols.push_back(
          fb::CreateSymbol(builder_, text(symbol.name), symbol.input, symbol.dim, symbol.least));
    }
    const auto value_list = vector(values);
    const auto inputs = vector(graph.inputs);
    const auto constant_list = vector(constants);
    const auto node_list = vector(nodes);
    const auto outputs = vector(graph.outputs);
    return fb::CreateGraph(builder_, value_list, inputs, constant_list, node_list, outputs,
                           vector(symbols), graph.layouts_assumed);
  }

  // --- the signature -----------------------------------------------------------------------------

  Offset<fb::Argument> encode(const Structure::Constant& constant) {
    if (const auto* value = std::get_if<bool>(&constant)) {
      return encode_scalar(c10::IValue(*value));
    }
    if (const auto* value = std::get_if<int64_t>(&constant)) {
      return encode_scalar(c10::IValue(*value));
    }
    if (const auto* value = std::get_if<double>(&constant)) return encode_float(*value);
    if (const auto* value = std::get_if<std::string>(&constant)) return encode_text(*value);
    const auto& value = std::get<std::complex<double>>(constant);
    return encode_complex({value.real(), value.imag()});
  }

  Offset<fb::Structure> encode(const Structure& structure) {
    std::vector<Offset<fb::Structure>> children;
    for (const Structure& child : structure.children) children.push_back(encode(child));
    Offset<fb::Argument> value;
    if (structure.kind == Structure::Kind::kConstant) value = encode(structure.constant);
    const auto name = text(structure.name);
    return fb::CreateStructure(builder_, to_file(structure.kind), name, value, vector(children));
  }

  Offset<fb::NativeCode> encode(const NativeCode& code) {
    std::string features;
    for (const std::string& each : code.cpu_features) {
      features += (features.empty() ? "" : " ") + each;
    }
    const auto backend = text(code.backend);
    const auto torchlift = text(code.torchlift_version);
    const auto torch = text(code.torch_version);
    const auto machine = text(code.machine);
    const auto package = static_cast<uint32_t>(storages_.records.size() - 1);
    return fb::CreateNativeCode(builder_, backend, torchlift, torch, machine, text(features),
                                package);
  }

  const Artifact& artifact_;
  const Storages& storages_;
  flatbuffers::FlatBufferBuilder builder_;
  std::unordered_map<const Graph*, uint32_t> graph_index_;
};

void add_graphs(const Graph& graph, int depth, std::set<const Graph*>& seen,
                std::vector<const Graph*>& all) {
  if (depth > kMaxGraphDepth) {
    format_error("graphs contain graphs more than ", kMaxGraphDepth, " deep.");
  }
  if (!seen.insert(&graph).second) return;
  for (const Node& node : graph.nodes) {
    for (const auto& inner : node.subgraphs) add_graphs(*inner, depth + 1, seen, all);
  }
  all.push_back(&graph);
}

}  // namespace

std::vector<const Graph*> all_graphs(const Graph& graph) {
  std::set<const Graph*> seen;
  std::vector<const Graph*> all;
  add_graphs(graph, 1, seen, all);
  return all;
}

std::string encode(const Artifact& artifact, const Storages& storages) {
  return Encoder(artifact, storages).run();
}

}  // namespace torchlift::compile
