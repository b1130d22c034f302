// What surrounds machine code. The code itself needs a compiler: bindings/tests/test_native.py.

#include "compile/artifact/native_code.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "compile/artifact/artifact.h"
#include "compile/artifact/library_source.h"
#include "compile/artifact/loaded_program.h"
#include "compile/artifact/native_plan.h"
#include "compile/artifact/sample_artifacts.h"
#include "compile/passes/testing.h"
#include "compile/replay.h"
#include "core/error.h"

namespace torchlift::compile {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Tensors = std::vector<at::Tensor>;

at::Tensor bytes_of(const std::string& text) {
  at::Tensor bytes = at::empty({static_cast<int64_t>(text.size())}, at::kByte);
  std::memcpy(bytes.mutable_data_ptr(), text.data(), text.size());
  return bytes;
}

// An artifact whose package is no package.
Artifact native_artifact() {
  Artifact artifact = loss_artifact();
  artifact.native = native_code_for_here(bytes_of("this is no package"));
  return artifact;
}

Tensors loss_inputs() {
  return {at::tensor({1.0F, 2.0F, 3.0F}), at::tensor({0.5F}).squeeze(),
          at::tensor({1.0F, 0.0F, 2.0F})};
}

template <class F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const TransformError& error) {
    return error.what_without_backtrace();
  } catch (const UnsupportedError& error) {
    return std::string("unsupported: ") + error.what_without_backtrace();
  }
  return "no error";
}

std::string loading_error(const Artifact& artifact, const LoadOptions& options) {
  return error_of([&] { LoadedProgram(artifact, options, "f.tlc"); });
}

// --- files ---------------------------------------------------------------------------------------

TEST(NativeCodeTest, AFileKeepsItAndReadingItRunsNothing) {
  const Artifact artifact = native_artifact();
  const std::string bytes = artifact_bytes(artifact);
  const Artifact loaded = parse_artifact(bytes);
  ASSERT_TRUE(loaded.native.has_value());
  EXPECT_EQ(loaded.native->backend, "inductor");
  EXPECT_EQ(loaded.native->torch_version, artifact.native->torch_version);
  EXPECT_EQ(loaded.native->torchlift_version, artifact.native->torchlift_version);
  EXPECT_EQ(loaded.native->machine, artifact.native->machine);
  EXPECT_EQ(loaded.native->cpu_features, artifact.native->cpu_features);
  EXPECT_TRUE(loaded.native->package.equal(artifact.native->package));
  EXPECT_EQ(difference(loaded.graph, artifact.graph), "");
  EXPECT_EQ(artifact_bytes(loaded), bytes);
}

TEST(NativeCodeTest, CutAndDamagedPackagesAreErrors) {
  const std::string bytes = artifact_bytes(native_artifact());
  const size_t package = bytes.find("this is no package");
  ASSERT_NE(package, std::string::npos);
  std::string damaged = bytes;
  damaged[package + 3] ^= 1;
  EXPECT_THAT(error_of([&] { parse_artifact(damaged, "f.tlc"); }),
              HasSubstr("[load] f.tlc: the weights 'native/package.pt2' are damaged."));
  EXPECT_THAT(error_of([&] { parse_artifact(bytes.substr(0, bytes.size() - 1), "f.tlc"); }),
              HasSubstr("it is cut"));
}

// --- loading -------------------------------------------------------------------------------------

TEST(NativeCodeTest, ItIsNotLoadedUnlessThatIsAllowed) {
  EXPECT_THAT(
      loading_error(native_artifact(), {}),
      HasSubstr("[load] f.tlc: it holds machine code, made by inductor, and loading it runs "
                "it. If you trust who made the file, load it with allow_native_code"));
}

TEST(NativeCodeTest, TheGraphRunsWithoutIt) {
  const LoadedProgram program(native_artifact(), {.backend = "eager"});
  EXPECT_EQ(program.backend(), "eager");
  EXPECT_EQ(program.run(loss_inputs())[0].item<float>(), 56.25);
  EXPECT_THAT(loading_error(native_artifact(), {.backend = "ts"}),
              HasSubstr("there is no backend 'ts' to load it with"));
}

TEST(NativeCodeTest, WhatIsNoPackageIsAnError) {
  const LoadOptions allowed{.allow_native_code = true};
  EXPECT_THAT(loading_error(native_artifact(), allowed),
              HasSubstr("[load] f.tlc: its machine code cannot be loaded: "));
  Artifact empty = native_artifact();
  empty.native->package = at::empty({0}, at::kByte);
  EXPECT_THAT(loading_error(parse_artifact(artifact_bytes(empty)), allowed),
              HasSubstr("its machine code cannot be loaded: "));
}

TEST(NativeCodeTest, ItFitsOneVersionAndOneKindOfMachine) {
  const LoadOptions allowed{.allow_native_code = true};
  Artifact artifact = native_artifact();
  artifact.native->torch_version = "1.0.0";
  EXPECT_THAT(loading_error(artifact, allowed),
              HasSubstr("its machine code was made with torch 1.0.0, and this is torch "));
  artifact = native_artifact();
  artifact.native->torchlift_version = "0.0.0";
  EXPECT_THAT(loading_error(artifact, allowed), HasSubstr("was made with torchlift 0.0.0"));
  artifact = native_artifact();
  artifact.native->machine = "pdp11";
  EXPECT_THAT(loading_error(artifact, allowed), HasSubstr("its machine code is for pdp11, and"));
  artifact = native_artifact();
  artifact.native->cpu_features.push_back("avx4096");
  EXPECT_THAT(loading_error(artifact, allowed),
              HasSubstr("its machine code may use avx4096, which this CPU does not have"));
  artifact = native_artifact();
  artifact.native->backend = "other";
  EXPECT_THAT(loading_error(artifact, allowed), HasSubstr("is of the backend 'other'"));
}

TEST(NativeCodeTest, NoTemporaryFolderIsLeft) {
  const auto folders = [] {
    size_t count = 0;
    for (const auto& each :
         std::filesystem::directory_iterator(std::filesystem::temp_directory_path())) {
      count += each.path().filename().string().rfind("torchlift-", 0) == 0 ? 1 : 0;
    }
    return count;
  };
  const size_t before = folders();
  loading_error(native_artifact(), {.allow_native_code = true});
  EXPECT_EQ(folders(), before);
}

TEST(NativeCodeTest, ALibraryOutOfItIsRefused) {
  EXPECT_THAT(error_of([] {
                library_source(artifact_bytes(native_artifact()),
                               {.file = "f.tlc", .header_path = "f.h", .cpp_namespace = "f"});
              }),
              HasSubstr("[torchlift_library] f.tlc holds machine code by inductor"));
}

// --- what surrounds it ---------------------------------------------------------------------------

// As machine code would: gives what the plan says to compute.
Tensors run_around(const Graph& graph, const Tensors& inputs) {
  const NativeFrame frame(graph);
  const Program computed(native_plan(graph).computed);
  return frame.run(Program(graph).prepared(inputs),
                   [&](const Tensors& all) { return computed.run(all); });
}

TEST(NativePlanTest, RandomProgramsGiveWhatTheReplayGives) {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    RandomGraphOptions options;
    options.writes = seed % 2 == 1;
    const Graph graph = random_graph(seed, options);
    const Tensors inputs = random_inputs(graph);
    Tensors copies;
    for (const at::Tensor& each : inputs) copies.push_back(each.clone());
    const Tensors expected = Program(graph).run(inputs);
    Tensors found;
    try {
      found = run_around(graph, copies);
    } catch (const UnsupportedError&) {
      continue;  // a write without functional form
    }
    ASSERT_EQ(found.size(), expected.size());
    for (size_t i = 0; i < found.size(); ++i)
      EXPECT_TRUE(identical(found[i], expected[i])) << graph.str();
    for (size_t i = 0; i < inputs.size(); ++i)
      EXPECT_TRUE(identical(copies[i], inputs[i])) << graph.str();
  }
}

TEST(NativePlanTest, ViewsOfInputsAndResultsAreViewsAndConstantsAreCopied) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({2, 3}));
  const at::Tensor held = at::randn({2, 3});
  const ValueId c = b.constant(held);
  const ValueId y =
      b.call("aten::add.Tensor", {{"self", ref(x)}, {"other", ref(c)}, {"alpha", c10::IValue(1)}});
  const ValueId row = b.call(
      "aten::select.int", {{"self", ref(y)}, {"dim", c10::IValue(0)}, {"index", c10::IValue(1)}});
  const Graph graph =
      b.finish({b.call("aten::t", {{"self", ref(x)}}), b.call("aten::t", {{"self", ref(c)}}), row,
                b.call("aten::t", {{"self", ref(y)}}), x, kNoValue});
  const NativePlan plan = native_plan(graph);
  EXPECT_EQ(plan.results, 1U);
  EXPECT_EQ(plan.computed.nodes.size(), 1U);
  EXPECT_THAT(plan.updates, IsEmpty());
  ASSERT_EQ(plan.constants.size(), 1U);
  EXPECT_THAT(plan.computed.constants, IsEmpty());

  const at::Tensor input = at::randn({2, 3});
  const Tensors outputs = run_around(graph, {input});
  EXPECT_EQ(outputs[0].data_ptr(), input.data_ptr());
  EXPECT_FALSE(outputs[1].is_alias_of(held));
  EXPECT_TRUE(outputs[1].equal(held.t()));
  EXPECT_EQ(outputs[2].storage().data(), outputs[3].storage().data());
  EXPECT_TRUE(outputs[3].equal(input.add(held).t()));
  EXPECT_TRUE(outputs[4].is_same(input));
  EXPECT_FALSE(outputs[5].defined());
}

// y.mul_(2) after x.copy_(y): what is written into x is what y was.
TEST(NativePlanTest, InputsAreWrittenAsTheProgramWritesThem) {
  GraphBuilder b;
  const ValueId y = b.input(at::randn({3}));
  const ValueId x = b.input(at::randn({3}));
  b.call("aten::copy_", {{"self", ref(x)}, {"src", ref(y)}, {"non_blocking", c10::IValue(false)}});
  b.call("aten::mul_.Scalar", {{"self", ref(y)}, {"other", c10::IValue(2)}});
  const Graph graph = b.finish({y});
  EXPECT_EQ(native_plan(graph).updates.size(), 2U);
  const at::Tensor first = at::arange(3, at::kFloat);
  const at::Tensor second = at::zeros({3});
  // A compiler that gives the input where the program copies it.
  const NativeFrame frame(graph);
  const Tensors outputs = frame.run({first, second}, [](const Tensors& all) -> Tensors {
    return {all[0].mul(2), all[0]};
  });
  EXPECT_TRUE(second.equal(at::arange(3, at::kFloat)));
  EXPECT_TRUE(first.equal(at::arange(0, 6, 2, at::kFloat)));
  EXPECT_TRUE(outputs[0].is_same(first));
}

TEST(NativePlanTest, ResultsHaveMemoryOfTheirOwn) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({3}));
  const Graph graph =
      b.finish({b.call("aten::sin", {{"self", ref(x)}}), b.call("aten::cos", {{"self", ref(x)}}),
                b.call("aten::clone", {{"self", ref(x)}, {"memory_format", std::monostate()}})});
  const at::Tensor input = at::arange(3, at::kFloat);
  const at::Tensor both = at::zeros({6});
  const Tensors found = NativeFrame(graph).run({input}, [&](const Tensors& all) -> Tensors {
    return {both.narrow(0, 3, 3), both.narrow(0, 0, 3), all[0]};
  });
  for (const at::Tensor& each : found) EXPECT_EQ(each.storage_offset(), 0);
  EXPECT_NE(found[0].storage().data(), found[1].storage().data());
  EXPECT_NE(found[2].storage().data(), input.storage().data());
  EXPECT_TRUE(found[2].equal(input));
}

TEST(NativePlanTest, SharedMemoryOfInputsThatAreWrittenIsSeen) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({3}));
  const ValueId y = b.input(at::randn({3}));
  b.call("aten::mul_.Scalar", {{"self", ref(x)}, {"other", c10::IValue(2)}});
  const Graph graph = b.finish({y});
  const NativeFrame frame(graph);
  const at::Tensor shared = at::randn({3});
  EXPECT_FALSE(frame.can_run({shared, shared.view({3})}));
  EXPECT_TRUE(frame.can_run({shared, shared.clone()}));
  std::vector<float> numbers{1, 2, 3, 4};
  const auto of_array = [&](int64_t from) { return at::from_blob(numbers.data() + from, {3}); };
  EXPECT_FALSE(frame.can_run({of_array(0), of_array(1)}));
}

TEST(NativePlanTest, ARunInsideOfARunWithState) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({3}));
  const at::Tensor state = at::zeros({3});
  const ValueId held = b.constant(state);
  b.call("aten::add_.Tensor", {{"self", ref(held)}, {"other", ref(x)}});
  const Graph graph = b.finish({b.call("aten::sin", {{"self", ref(x)}})});
  const NativeFrame frame(graph);
  const Program computed(native_plan(graph).computed);
  state.zero_();  // the builder calls the operators, too
  const at::Tensor input = at::ones({3});
  const auto again = [&](const Tensors& all) {
    frame.run({input}, [&](const Tensors& inner) { return computed.run(inner); });
    return computed.run(all);
  };
  EXPECT_THROW(frame.run({input}, again), UnsupportedError);
  EXPECT_TRUE(state.equal(at::zeros({3})));
  frame.run({input}, [&](const Tensors& all) { return computed.run(all); });
  EXPECT_TRUE(state.equal(input));
}

TEST(NativePlanTest, DynamicDimsHaveAnySizeFromTwoOn) {
  const Graph graph = dynamic_artifact().graph;
  const NativeFrame frame(graph);
  EXPECT_FALSE(frame.can_run({at::zeros({0, 3})}));
  EXPECT_FALSE(frame.can_run({at::zeros({1, 3})}));
  for (const int64_t n : {2, 5}) {
    const at::Tensor x = at::randn({n, 3});
    EXPECT_TRUE(frame.can_run({x}));
    const Tensors found = run_around(graph, {x});
    const Tensors expected = Program(graph).run({x});
    ASSERT_EQ(found.size(), expected.size());
    for (size_t i = 0; i < found.size(); ++i) EXPECT_TRUE(identical(found[i], expected[i]));
  }
}

TEST(NativePlanTest, WhatItGivesIsChecked) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({3}));
  const Graph graph = b.finish({b.call("aten::sin", {{"self", ref(x)}})});
  const NativeFrame frame(graph);
  const auto error = [&](const Tensors& found) {
    return error_of([&] { frame.run({at::zeros({3})}, [&](const Tensors&) { return found; }); });
  };
  EXPECT_THAT(error({}), HasSubstr("gave 0 tensors, and should give 1"));
  EXPECT_THAT(error({at::zeros({4})}), HasSubstr("gave a f32[4] where the graph gives a f32[3]"));
  EXPECT_THAT(error({at::zeros({3}, at::kDouble)}), HasSubstr("gave a f64[3]"));
  EXPECT_THAT(error({at::Tensor()}), HasSubstr("gave no tensor"));
}

}  // namespace
}  // namespace torchlift::compile
