#include "compile/artifact/artifact.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <complex>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>

#include "compile/artifact/bytes.h"
#include "compile/artifact/sample_artifacts.h"
#include "core/error.h"

namespace torchlift::compile {
namespace {

using ::testing::HasSubstr;

std::string file_in_test_folder(const std::string& name) { return ::testing::TempDir() + name; }

template <class F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const TransformError& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

const at::Tensor& constant_named(const Graph& graph, const std::string& name) {
  for (const Constant& constant : graph.constants) {
    if (graph.value(constant.id).name == name) return constant.tensor;
  }
  throw std::runtime_error("no constant " + name);
}

// A graph of one constant, which it gives.
Artifact only(const at::Tensor& tensor) {
  Artifact artifact;
  artifact.graph.outputs = {artifact.graph.add_constant(tensor, "c")};
  artifact.signature = flat_signature(artifact.graph);
  return artifact;
}

class RoundTripTest : public ::testing::TestWithParam<size_t> {};

TEST_P(RoundTripTest, GivesTheSameArtifact) {
  const Artifact artifact = sample_artifacts()[GetParam()];
  const std::string path = file_in_test_folder(artifact.name + ".tlc");
  save_artifact(artifact, path);
  const Artifact loaded = load_artifact(path);
  EXPECT_EQ(loaded.graph.str(), artifact.graph.str());
  EXPECT_EQ(difference(loaded.graph, artifact.graph), "");
  EXPECT_EQ(loaded.signature, artifact.signature);
  EXPECT_EQ(loaded.name, artifact.name);
  EXPECT_EQ(loaded.metadata, artifact.metadata);
  EXPECT_FALSE(loaded.torch_version.empty());
  EXPECT_FALSE(loaded.torchlift_version.empty());
}

TEST_P(RoundTripTest, TheSameArtifactIsTheSameFile) {
  const Artifact artifact = sample_artifacts()[GetParam()];
  const std::string bytes = artifact_bytes(artifact);
  EXPECT_EQ(artifact_bytes(artifact), bytes);
  EXPECT_EQ(artifact_bytes(parse_artifact(bytes)), bytes);
}

INSTANTIATE_TEST_SUITE_P(Samples, RoundTripTest, ::testing::Range<size_t>(0, 5));

TEST(ArtifactTest, TheComparisonOfTheseTestsSeesDifferences) {
  const Artifact artifact = constants_artifact();
  Artifact other = constants_artifact();
  other.graph.constants[7].tensor[3] = 0.0;  // was -0.0
  EXPECT_EQ(difference(other.graph, artifact.graph), "constant special: its numbers");
  Artifact arguments = arguments_artifact();
  arguments.graph.nodes[1].args[1] = c10::IValue(0.0);  // was -0.0
  EXPECT_EQ(difference(arguments.graph, arguments_artifact().graph),
            "aten::mul.Scalar: argument 1");
}

TEST(ArtifactTest, TiedConstantsAreKeptOnceAndStayTied) {
  const at::Tensor weight = at::zeros({1000});
  Artifact artifact;
  Graph& graph = artifact.graph;
  graph.outputs = {graph.add_constant(weight, "a"), graph.add_constant(weight.view({10, 100}), "b"),
                   graph.add_constant(weight.slice(0, 500), "c")};
  artifact.signature = flat_signature(graph);
  const std::string bytes = artifact_bytes(artifact);
  EXPECT_LT(bytes.size(), 4000 + 3000);
  const Artifact loaded = parse_artifact(bytes);
  constant_named(loaded.graph, "a")[999].fill_(7);
  EXPECT_EQ((constant_named(loaded.graph, "b")[9][99].item<float>()), 7);
  EXPECT_EQ((constant_named(loaded.graph, "c")[499].item<float>()), 7);
}

TEST(ArtifactTest, ConstantsOfSubgraphsStayTied) {
  const Artifact loaded = parse_artifact(artifact_bytes(control_flow_artifact()));
  const Graph& inner = *loaded.graph.nodes[0].subgraphs[0];
  EXPECT_TRUE(inner.constants[0].tensor.is_alias_of(loaded.graph.constants[0].tensor));
}

TEST(ArtifactTest, SharedSubgraphsStayShared) {
  const Artifact loaded = parse_artifact(artifact_bytes(control_flow_artifact()));
  EXPECT_EQ(loaded.graph.nodes[0].subgraphs[0], loaded.graph.nodes[1].subgraphs[0]);
  EXPECT_NE(loaded.graph.nodes[0].subgraphs[0], loaded.graph.nodes[0].subgraphs[1]);
}

TEST(ArtifactTest, ARowDoesNotBringItsTableAlong) {
  const at::Tensor table = at::zeros({10000, 8});
  EXPECT_LT(artifact_bytes(only(table[5000])).size(), 2000);
}

TEST(ArtifactTest, StoragesOfWhatIsViewedByOffsetAreKeptWhole) {
  Artifact artifact = only(at::arange(100)[50]);
  Graph& graph = artifact.graph;
  const ValueId view = graph.add_value(type_of(at::empty({2}, at::kLong)), "view");
  graph.nodes.push_back({.op = "aten::as_strided",
                         .overload = "",
                         .args = {ValueRef{0}, c10::IValue(std::vector<int64_t>{2}),
                                  c10::IValue(std::vector<int64_t>{1}), c10::IValue(30)},
                         .results = {{.ids = {view}}},
                         .subgraphs = {},
                         .source = ""});
  const Artifact loaded = parse_artifact(artifact_bytes(artifact));
  const at::Tensor& constant = loaded.graph.constants[0].tensor;
  EXPECT_EQ(constant.item<int64_t>(), 50);
  EXPECT_EQ(constant.as_strided({2}, {1}, 30)[1].item<int64_t>(), 31);
}

TEST(ArtifactTest, LazyBitsAreResolved) {
  const at::Tensor z = at::zeros({2}, at::kComplexDouble).fill_(c10::complex<double>(1, 2));
  const Artifact loaded = parse_artifact(artifact_bytes(only(z.conj())));
  const at::Tensor& constant = loaded.graph.constants[0].tensor;
  EXPECT_FALSE(constant.is_conj());
  EXPECT_TRUE(constant.equal(z.conj()));
}

TEST(ArtifactTest, TheWeightsAreASafetensorsFile) {
  const std::string bytes = artifact_bytes(constants_artifact());
  const size_t names = bytes.find("{\"weight\":{\"dtype\":");
  ASSERT_NE(names, std::string::npos);
  // The section begins at a multiple of 64, eight bytes before its names.
  EXPECT_EQ((names - 8) % 64, 0);
}

TEST(ArtifactTest, SavingReplacesAFileAsAWhole) {
  const std::string path = file_in_test_folder("replaced.tlc");
  save_artifact(loss_artifact(), path);
  Artifact bad = loss_artifact();
  bad.graph.nodes.pop_back();
  EXPECT_THAT(error_of([&] { save_artifact(bad, path); }), HasSubstr("the outputs reads mul"));
  EXPECT_EQ(load_artifact(path).name, "loss");
  for (const auto& entry : std::filesystem::directory_iterator(::testing::TempDir())) {
    EXPECT_THAT(entry.path().string(), ::testing::Not(HasSubstr(".partial")));
  }
}

// --- errors --------------------------------------------------------------------------------------

TEST(ArtifactErrorTest, WhatCannotBeKeptIsRefused) {
  EXPECT_THAT(error_of([] { artifact_bytes(only(at::eye(3).to_sparse())); }),
              HasSubstr("constant c is f32[3, 3] Sparse, and only strided tensors of numbers"));
  EXPECT_THAT(error_of([] { artifact_bytes(only(at::empty({3}, at::device(c10::kMeta)))); }),
              HasSubstr("constant c has no memory of its own"));
}

TEST(ArtifactErrorTest, TheSignatureFitsTheGraph) {
  Artifact artifact = loss_artifact();
  artifact.signature.inputs.children.pop_back();
  EXPECT_THAT(error_of([&] { artifact_bytes(artifact); }),
              HasSubstr("the signature has 2 tensors in its inputs, and the graph has 3"));
  artifact = loss_artifact();
  artifact.signature.inputs.children[0].children[1].name = "w";
  EXPECT_THAT(error_of([&] { artifact_bytes(artifact); }), HasSubstr("has the key 'w' twice"));
}

TEST(ArtifactErrorTest, FilesThatAreNoneAreNamed) {
  const std::string path = file_in_test_folder("none.tlc");
  std::filesystem::remove(path);
  EXPECT_EQ(error_of([&] { load_artifact(path); }),
            "[load] " + path + ": the file cannot be opened: No such file or directory.");
  std::ofstream(path) << "PK and so on";
  EXPECT_EQ(error_of([&] { load_artifact(path); }),
            "[load] " + path + ": this is no torchlift artifact: it does not begin as one.");
  EXPECT_THAT(error_of([] { load_artifact(::testing::TempDir()); }),
              HasSubstr("this is no regular file"));
  EXPECT_THAT(error_of([] { save_artifact(loss_artifact(), "/no/such/folder/a.tlc"); }),
              HasSubstr("[save] /no/such/folder/a.tlc: the file cannot be written: No such"));
}

// --- the signature -------------------------------------------------------------------------------

TEST(SignatureTest, Prints) {
  EXPECT_EQ(loss_artifact().signature.str(),
            "(params: {w: Tensor, b: Tensor}, x: Tensor) -> (loss: Tensor, state: None)");
  EXPECT_EQ(arguments_artifact().signature.inputs.str(),
            "(x: Tensor, others: [Tensor, Tensor], flag: True, count: -3, zero: -0.0, "
            "z: (nan + 1.0j), mode: 'mean')");
  EXPECT_EQ(tuple_of({tensor()}).str(), "(Tensor,)");
}

TEST(SignatureTest, NamesThePathsOfTensors) {
  const Structure tree =
      tuple_of({dict_of({tensor("w"), list_of({tensor(), none(), tensor()}, "xs")}, "params"),
                tensor("x"), tensor()});
  EXPECT_EQ(tree.tensor_paths(),
            (std::vector<std::string>{"params.w", "params.xs[0]", "params.xs[2]", "x", "[2]"}));
}

TEST(SignatureTest, ComparesConstantsByBits) {
  EXPECT_EQ(constant(std::nan("")), constant(std::nan("")));
  EXPECT_NE(constant(0.0), constant(-0.0));
  EXPECT_NE(constant(int64_t{1}), constant(true));
}

TEST(BytesTest, ChecksumIsThatOfZlib) {
  EXPECT_EQ(crc32("123456789", 9), 0xCBF43926U);
  EXPECT_EQ(crc32("56789", 5, crc32("1234", 4)), 0xCBF43926U);
}

}  // namespace
}  // namespace torchlift::compile
