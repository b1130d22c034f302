#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <thread>
#include <vector>

#include "compile/artifact/arguments.h"
#include "compile/artifact/artifact.h"
#include "compile/artifact/library_source.h"
#include "compile/artifact/loss.h"
#include "compile/artifact/sample_artifacts.h"
#include "core/error.h"

namespace torchlift::compile {
namespace {

using ::testing::HasSubstr;

TEST(TorchliftLibraryTest, RunsAsAFunctionOfStructs) {
  const test::loss::Outputs outputs =
      test::loss::run({.params = {.w = at::tensor({1.0F, 2.0F, 3.0F}), .b = at::zeros({})},
                       .x = at::tensor({1.0F, 0.0F, 2.0F})});
  EXPECT_EQ(outputs.loss.item<float>(), 49);
}

TEST(TorchliftLibraryTest, RunsInSeveralThreads) {
  std::vector<float> losses(4);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < losses.size(); ++i) {
    threads.emplace_back([i, &losses] {
      const at::Tensor ones = at::zeros({3}).add_(1);
      losses[i] = test::loss::run({.params = {.w = ones, .b = at::zeros({})}, .x = ones})
                      .loss.item<float>();
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(losses, (std::vector<float>{9, 9, 9, 9}));
}

TEST(TorchliftLibraryTest, InputsThatDoNotFitAreRefused) {
  EXPECT_THROW(
      test::loss::run({.params = {.w = at::zeros({4}), .b = at::zeros({})}, .x = at::zeros({4})}),
      TransformError);
}

// Its outputs are a dict {p, rest: [., ()], again, q}, the second of which is not defined.
TEST(TorchliftLibraryTest, StructsFollowTheSignature) {
  arguments::Inputs inputs;
  static_assert(sizeof(inputs.others) == 2 * sizeof(at::Tensor));
  arguments::Outputs outputs;
  EXPECT_FALSE(outputs.rest.item_0.defined());
}

LibrarySource source_of(const Artifact& artifact, const std::string& cpp_namespace = "a::b") {
  return library_source(
      artifact_bytes(artifact),
      {.file = "file.tlc", .header_path = "pkg/file.h", .cpp_namespace = cpp_namespace});
}

TEST(LibrarySourceTest, TheHeaderSaysWhatTensorsAre) {
  const std::string header = source_of(dynamic_artifact()).header;
  EXPECT_THAT(header, HasSubstr("struct Inputs {\n  at::Tensor x;  // f32[n, 3]\n};\n"));
  EXPECT_THAT(header, HasSubstr("// n may be any size of at least 1: it is dim 0 of x.\n"));
  EXPECT_THAT(header, HasSubstr("struct Outputs {\n  at::Tensor mean;  // f32[3]\n"));
  EXPECT_THAT(header, HasSubstr("#ifndef TORCHLIFT_LIBRARY_PKG_FILE_H_\n"));
}

TEST(LibrarySourceTest, NamesBecomeIdentifiersThatDiffer) {
  Artifact artifact = loss_artifact();
  artifact.signature.inputs = tuple_of(
      {dict_of({tensor("layer1.weight"), tensor("layer1_weight")}, "Inputs"), tensor("class")});
  artifact.signature.outputs = tensor();
  const std::string header = source_of(artifact).header;
  EXPECT_THAT(header, HasSubstr("  struct Inputs1 {\n"
                                "    at::Tensor layer1_weight;  // f32[3], 'layer1.weight'\n"
                                "    at::Tensor layer1_weight_1;  // f32[], 'layer1_weight'\n"
                                "  };\n"
                                "  Inputs1 Inputs_1;\n"
                                "  at::Tensor class_;  // f32[3], 'class'\n"));
  EXPECT_THAT(header, HasSubstr("struct Outputs {\n  at::Tensor output;  // f32[]\n};"));
}

TEST(LibrarySourceTest, CommentsEndWhereTheyShould) {
  Artifact artifact = loss_artifact();
  artifact.signature.inputs.children[1].name = "x\\";
  EXPECT_THAT(source_of(artifact).header, HasSubstr("at::Tensor x_;  // f32[3], 'x/'\n"));
}

TEST(LibrarySourceTest, NamespacesAreChecked) {
  for (const char* name : {"", "a::", "1a", "a-b", "a::class", "a; int x"}) {
    EXPECT_THROW(source_of(loss_artifact(), name), TransformError) << name;
  }
}

// A file that version 1 of the format wrote, and that all later ones must read.
TEST(FormatTest, Version1IsRead) {
  for (const Artifact& artifact : {loss_artifact(), arguments_artifact(), constants_artifact(),
                                   control_flow_artifact(), dynamic_artifact()}) {
    const Artifact loaded = load_artifact("compile/artifact/testdata/" + artifact.name + "_v1.tlc");
    EXPECT_EQ(difference(loaded.graph, artifact.graph), "") << artifact.name;
    EXPECT_EQ(loaded.signature, artifact.signature);
  }
}

}  // namespace
}  // namespace torchlift::compile
