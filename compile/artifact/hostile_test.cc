// Files whose checksums are right and whose contents are made to do harm.

#include <ATen/ops/ones.h>
#include <ATen/ops/tensor.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <limits>
#include <memory>
#include <string>

#include "compile/artifact/artifact.h"
#include "compile/artifact/artifact_generated.h"
#include "compile/artifact/native_code.h"
#include "compile/artifact/sample_artifacts.h"
#include "compile/artifact/tampering.h"
#include "core/error.h"

namespace torchlift::compile {
namespace {

using ::testing::HasSubstr;

using Edit = std::function<void(fb::ArtifactT&)>;

std::string edited(const Artifact& artifact, const Edit& edit) {
  Sections sections = split(artifact_bytes(artifact));
  const auto root = fb::UnPackArtifact(sections.graph.data());
  edit(*root);
  flatbuffers::FlatBufferBuilder builder;
  builder.Finish(fb::Artifact::Pack(builder, root.get()), fb::ArtifactIdentifier());
  sections.graph.assign(reinterpret_cast<const char*>(builder.GetBufferPointer()),
                        builder.GetSize());
  return join(sections);
}

std::string error_of(const std::string& bytes) {
  try {
    parse_artifact(bytes, "it");
  } catch (const TransformError& error) {
    return error.what_without_backtrace();
  } catch (const UnsupportedError& error) {
    return std::string("unsupported: ") + error.what_without_backtrace();
  }
  return "no error";
}

std::string error_of(const Artifact& artifact, const Edit& edit) {
  return error_of(edited(artifact, edit));
}

TEST(HostileTest, EditingNothingGivesTheSame) {
  for (const Artifact& artifact : sample_artifacts()) {
    const Artifact loaded = parse_artifact(edited(artifact, [](fb::ArtifactT&) {}));
    EXPECT_EQ(difference(loaded.graph, artifact.graph), "");
  }
}

TEST(HostileTest, MachineCodeIsAStorageOfItsOwn) {
  Artifact artifact = constants_artifact();
  artifact.native = native_code_for_here(at::ones({20}, at::kByte));
  EXPECT_THAT(error_of(artifact, [](fb::ArtifactT& root) { root.native->package = 1000; }),
              HasSubstr("the machine code is storage 1000 of"));
  EXPECT_THAT(error_of(artifact, [](fb::ArtifactT& root) { root.native->package = 0; }),
              HasSubstr("two storages are the weights"));
  EXPECT_THAT(error_of(artifact, [](fb::ArtifactT& root) { root.native.reset(); }),
              HasSubstr("the weights 'native/package.pt2' belong to no constant"));
  EXPECT_THAT(error_of(artifact, [](fb::ArtifactT& root) { root.native->machine = "x\ny"; }),
              HasSubstr("has control characters"));
}

TEST(HostileTest, NumbersOfValuesAreChecked) {
  EXPECT_THAT(error_of(loss_artifact(), [](auto& root) { root.graphs[0]->inputs[0] = 1 << 30; }),
              HasSubstr("[load] it: [compile] the graph is not well formed: an input is value"));
  EXPECT_THAT(error_of(loss_artifact(),
                       [](auto& root) {
                         root.graphs[0]->nodes[0]->args[0]->value.AsTensorRef()->value = -5;
                       }),
              HasSubstr("reads value -5"));
  EXPECT_THAT(
      error_of(constants_artifact(), [](auto& root) { root.graphs[0]->constants[0]->value = -1; }),
      HasSubstr("a constant is value -1"));
}

TEST(HostileTest, OperatorsAreChecked) {
  const auto with_operator = [](const std::string& op) {
    return error_of(loss_artifact(), [&](auto& root) { root.graphs[0]->nodes[0]->op = op; });
  };
  EXPECT_THAT(with_operator("aten::gone"), HasSubstr("unsupported: [load] it: [compile] the graph "
                                                     "calls aten::gone"));
  EXPECT_THAT(with_operator("aten::from_file"), HasSubstr("which reads and writes files"));
  EXPECT_THAT(with_operator("aten::\x1b[2J"), HasSubstr("an operator has control characters"));
  EXPECT_THAT(with_operator("aten::sin"), HasSubstr("aten::sin has 2 arguments"));
}

TEST(HostileTest, EnumsAreChecked) {
  EXPECT_THAT(error_of(loss_artifact(),
                       [](auto& root) {
                         root.graphs[0]->values[0]->type->dtype = static_cast<fb::DType>(200);
                       }),
              HasSubstr("there is no dtype of number 200"));
  const auto is_zeros = [](const auto& node) { return node->op == "aten::zeros"; };
  EXPECT_THAT(error_of(arguments_artifact(),
                       [&](auto& root) {
                         auto& nodes = root.graphs[0]->nodes;
                         auto zeros = std::find_if(nodes.begin(), nodes.end(), is_zeros);
                         (*zeros)->args[1]->value.AsInt()->value = -128;
                       }),
              HasSubstr("argument dtype of aten::zeros is the number -128, which stands for"));
  EXPECT_THAT(error_of(loss_artifact(),
                       [](auto& root) { root.graphs[0]->values[0]->type->device = "cuda:99999"; }),
              HasSubstr("there is no device 'cuda:99999'"));
}

TEST(HostileTest, ConstantsStayInsideTheirStorage) {
  const auto with_constant = [](const std::function<void(fb::ConstantT&)>& edit) {
    return error_of(constants_artifact(), [&](auto& root) { edit(*root.graphs[0]->constants[0]); });
  };
  constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();
  EXPECT_THAT(with_constant([](auto& c) { c.offset = 4; }), HasSubstr("its storage has 11"));
  EXPECT_THAT(with_constant([](auto& c) { c.offset = 1; }), HasSubstr("begins between two"));
  EXPECT_THAT(with_constant([](auto& c) { c.offset = ~uint64_t{3}; }), HasSubstr("begins beyond"));
  EXPECT_THAT(with_constant([](auto& c) { c.storage = 1000; }), HasSubstr("in storage 1000"));
  EXPECT_THAT(with_constant([](auto& c) { c.sizes[0] = -1; }), HasSubstr("cannot be negative"));
  EXPECT_THAT(with_constant([](auto& c) { c.sizes[0] = kHuge; }), HasSubstr("2^63 - 1 bytes"));
  EXPECT_THAT(with_constant([](auto& c) { c.strides[0] = -4; }), HasSubstr("the stride -4"));
  EXPECT_THAT(with_constant([](auto& c) { c.strides[0] = kHuge; }), HasSubstr("64 bits"));
  EXPECT_THAT(with_constant([](auto& c) { c.strides.pop_back(); }), HasSubstr("1 strides"));
  EXPECT_THAT(with_constant([](auto& c) { c.sizes[0] = 2; }), HasSubstr("is said to be"));
}

TEST(HostileTest, StoragesAreThoseOfTheWeights) {
  const Artifact artifact = constants_artifact();
  constexpr uint64_t kHuge = uint64_t{1} << 62;
  EXPECT_THAT(error_of(artifact, [](auto& root) { root.storages[0]->bytes = kHuge; }),
              HasSubstr("have 48 bytes, and the graph says 4611686018427387904"));
  EXPECT_THAT(error_of(artifact, [](auto& root) { root.storages[0]->crc32 ^= 1; }),
              HasSubstr("the weights 'weight' are damaged"));
  EXPECT_THAT(error_of(artifact, [](auto& root) { root.storages[0]->tensor = "other"; }),
              HasSubstr("there are no weights 'other'"));
  EXPECT_THAT(error_of(artifact, [](auto& root) { *root.storages[1] = *root.storages[0]; }),
              HasSubstr("two storages are the weights 'weight'"));
}

TEST(HostileTest, BoolsAreZeroOrOne) {
  Artifact artifact;
  artifact.graph.outputs = {artifact.graph.add_constant(at::tensor({0.0, 1.0}).to(at::kByte), "c")};
  artifact.graph.constants[0].tensor.add_(1);  // 1, 2
  artifact.signature = flat_signature(artifact.graph);
  EXPECT_THAT(
      error_of(artifact,
               [](auto& root) { root.graphs[0]->values[0]->type->dtype = fb::DType::Bool; }),
      HasSubstr("constant c: a bool has the byte 2; it must be 0 or 1"));
}

TEST(HostileTest, SizesAreChecked) {
  const auto with_size = [](int64_t coefficient, int32_t power, int64_t denominator) {
    return error_of(dynamic_artifact(), [&](auto& root) {
      auto& size = *root.graphs[0]->values[0]->type->sizes->dynamic[0]->size;
      size.terms[0]->coefficient = coefficient;
      size.terms[0]->powers = {power};
      size.denominator = denominator;
    });
  };
  EXPECT_THAT(with_size(1, 1, 0), HasSubstr("the denominator 0"));
  EXPECT_THAT(with_size(1, 99, 1), HasSubstr("the power 99"));
  EXPECT_THAT(with_size(1, -1, 1), HasSubstr("the power -1"));
  EXPECT_THAT(with_size(std::numeric_limits<int64_t>::min(), 1, 1), HasSubstr("-2^63"));
  EXPECT_THAT(
      error_of(dynamic_artifact(),
               [](auto& root) { root.graphs[0]->values[0]->type->sizes->dynamic[0]->at = 7; }),
      HasSubstr("size 7 of 2 depends on a dynamic dim"));
  EXPECT_THAT(error_of(dynamic_artifact(), [](auto& root) { root.graphs[0]->symbols.clear(); }),
              HasSubstr("depends on a dynamic dim that no input has"));
  EXPECT_THAT(
      error_of(dynamic_artifact(), [](auto& root) { root.graphs[0]->symbols[0]->least = -1; }),
      HasSubstr("a dynamic dim is at least -1"));
  EXPECT_THAT(
      error_of(loss_artifact(),
               [](auto& root) { root.graphs[0]->values[0]->type->sizes->constants[0] = -3; }),
      HasSubstr("value params_w: a size is -3"));
}

TEST(HostileTest, SignaturesFitAndAreNotDeep) {
  EXPECT_THAT(error_of(loss_artifact(), [](auto& root) { root.inputs->children.pop_back(); }),
              HasSubstr("the signature has 2 tensors in its inputs"));
  for (const int depth : {40, 100000}) {
    const std::string error = error_of(loss_artifact(), [&](auto& root) {
      for (int i = 0; i < depth; ++i) {
        auto outer = std::make_unique<fb::StructureT>();
        outer->kind = fb::StructureKind::List;
        outer->children.push_back(std::move(root.outputs));
        root.outputs = std::move(outer);
        if (depth > 1000 && i > 1000) return;  // packing is recursive too
      }
    });
    EXPECT_THAT(error, ::testing::AnyOf(HasSubstr("nested more than 32 deep"),
                                        HasSubstr("no flatbuffer of an artifact")));
  }
}

TEST(HostileTest, SubgraphsComeBeforeTheirGraph) {
  const auto with_subgraph = [](uint32_t index) {
    return error_of(control_flow_artifact(),
                    [&](auto& root) { root.graphs.back()->nodes[0]->subgraphs[0] = index; });
  };
  const std::string itself = with_subgraph(3);
  EXPECT_THAT(itself, HasSubstr("a node has the subgraph 3, and 3 stand before its graph"));
  EXPECT_THAT(with_subgraph(0xFFFFFFFF), HasSubstr("a node has the subgraph 4294967295"));
}

// A chain of graphs, each of which holds the one before twice.
std::string doubling_graphs(int levels) {
  return edited(control_flow_artifact(), [&](fb::ArtifactT& root) {
    // Graph 1 is the identity; what holds it is a copy of it with a cond.
    for (int level = 0; level < levels; ++level) {
      auto graph = std::make_unique<fb::GraphT>(*root.graphs[1]);
      auto cond = std::make_unique<fb::NodeT>(*root.graphs.back()->nodes[0]);
      cond->subgraphs = {static_cast<uint32_t>(root.graphs.size() - 2),
                         static_cast<uint32_t>(root.graphs.size() - 2)};
      graph->nodes.clear();
      graph->nodes.push_back(std::move(cond));
      root.graphs.insert(root.graphs.end() - 1, std::move(graph));
    }
    root.graphs.back()->nodes[0]->subgraphs = {static_cast<uint32_t>(root.graphs.size() - 2), 0};
  });
}

TEST(HostileTest, GraphsThatDoubleAtEachLevelAreRefusedSoon) {
  const auto start = std::chrono::steady_clock::now();
  EXPECT_THAT(error_of(doubling_graphs(30)), HasSubstr("subgraphs are shared so often"));
  EXPECT_THAT(error_of(doubling_graphs(500)), HasSubstr("subgraphs are shared so often"));
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
}

// A megabyte that 100,000 nodes share: 100 GB, were it copied for each.
TEST(HostileTest, StringsThatAreSharedAreCounted) {
  flatbuffers::FlatBufferBuilder builder;
  const auto text = builder.CreateString(std::string(1 << 20, 'x'));
  const auto node = fb::CreateNode(
      builder, text, text, builder.CreateVector(std::vector<flatbuffers::Offset<fb::Argument>>{}),
      builder.CreateVector(std::vector<flatbuffers::Offset<fb::Result>>{}), 0, text);
  const std::vector<flatbuffers::Offset<fb::Node>> nodes(100000, node);
  const auto ids = builder.CreateVector(std::vector<int32_t>{});
  const auto graph =
      fb::CreateGraph(builder, builder.CreateVector(std::vector<flatbuffers::Offset<fb::Value>>{}),
                      ids, builder.CreateVector(std::vector<flatbuffers::Offset<fb::Constant>>{}),
                      builder.CreateVector(nodes), ids,
                      builder.CreateVector(std::vector<flatbuffers::Offset<fb::Symbol>>{}));
  const auto name = builder.CreateString("name");
  const auto tree = fb::CreateStructure(builder, fb::StructureKind::Tuple);
  const auto graphs = builder.CreateVector(&graph, 1);
  const auto storages = builder.CreateVector(std::vector<flatbuffers::Offset<fb::Storage>>{});
  builder.Finish(fb::CreateArtifact(builder, name, name, name, graphs, storages, tree, tree),
                 fb::ArtifactIdentifier());
  const std::string buffer(reinterpret_cast<const char*>(builder.GetBufferPointer()),
                           builder.GetSize());
  const Sections plain = split(artifact_bytes(loss_artifact()));
  EXPECT_THAT(error_of(join({buffer, plain.weights})),
              ::testing::AnyOf(HasSubstr("repeats its parts"), HasSubstr("unsupported")));
}

TEST(HostileTest, SectionsAreChecked) {
  const Sections sections = split(artifact_bytes(constants_artifact()));
  EXPECT_THAT(error_of(join({"", sections.weights})), HasSubstr("no flatbuffer"));
  EXPECT_THAT(error_of(join({std::string(1000, '\0'), sections.weights})),
              HasSubstr("no flatbuffer"));
  EXPECT_THAT(error_of(join({sections.graph, ""})), HasSubstr("no safetensors: it has 0 bytes"));
  EXPECT_THAT(error_of(join({sections.graph, sections.weights + "more"})),
              HasSubstr("follow the header"));
  const Sections without = split(artifact_bytes(loss_artifact()));
  EXPECT_THAT(error_of(join({without.graph, sections.weights})),
              HasSubstr("belong to no constant"));
}

TEST(HostileTest, AnotherVersionSaysSo) {
  std::string bytes = artifact_bytes(loss_artifact());
  bytes[8] = 9;
  EXPECT_THAT(error_of(bytes), HasSubstr("format version 9, and this torchlift reads 1"));
}

}  // namespace
}  // namespace torchlift::compile
