#include "compile/import/exported_program.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <string>
#include <thread>
#include <vector>

#include "autodiff/grad.h"
#include "autodiff/jacobian.h"
#include "batching/vmap.h"
#include "compile/import/recorded.h"
#include "compile/replay.h"
#include "compile/save.h"
#include "core/error.h"
#include "core/testing.h"

namespace torchlift::compile {
namespace {

using at::Tensor;
using ::testing::HasSubstr;

ImportedModule model(const std::string& name) { return load_exported(model_path(name + ".pt2")); }

class ExportedNumbersTest : public ::testing::TestWithParam<const char*> {};

TEST_P(ExportedNumbersTest, AreThoseOfPython) {
  const std::string file = GetParam();
  expect_recorded(model(file), Recorded(file.substr(0, file.find("_functional"))));
}

INSTANTIATE_TEST_SUITE_P(Models, ExportedNumbersTest,
                         ::testing::Values("mlp", "mlp_functional", "conv", "attention",
                                           "structured", "flow", "strided", "average",
                                           "average_functional", "recurrent",
                                           "multihead_torch_2_11"));

TEST(ExportedProgramTest, StateHasNames) {
  const ImportedModule mlp = model("mlp");
  const ModuleState parameters = mlp.parameters();
  EXPECT_EQ(parameters.size(), 6U);
  EXPECT_EQ(parameters.at("first.weight").sizes(), (std::vector<int64_t>{5, 3}));
  EXPECT_FALSE(parameters.at("first.weight").requires_grad());
  EXPECT_EQ(mlp.buffers().count("norm.running_mean"), 1U);
  EXPECT_EQ(mlp.state().size(), 9U);
  EXPECT_EQ(mlp.input_names(), (std::vector<std::string>{"x"}));
}

TEST(ExportedProgramTest, TiedWeightsAreOne) {
  const ImportedModule attention = model("attention");
  const Tensor x = Recorded("attention").inputs[0];
  const ModuleState parameters = attention.parameters();
  EXPECT_EQ(parameters.count("out.weight"), 1U);
  EXPECT_EQ(parameters.count("again.weight"), 0U);
  const Tensor other = parameters.at("out.weight") * 2;
  const Tensor expected = attention({{"out.weight", other}}, {x})[0];
  EXPECT_FALSE(at::allclose(expected, attention({x})[0]));
  EXPECT_CLOSE(attention({{"again.weight", other}}, {x})[0], expected);
  EXPECT_THAT(error_of<TransformError>([&] {
                attention({{"again.weight", other}, {"out.weight", other + 1}}, {x});
              }),
              HasSubstr("'again.weight' and 'out.weight' are one tensor"));
}

TEST(ExportedProgramTest, BuffersAreWrittenWhereTheCallTakesThem) {
  for (const char* name : {"mlp", "mlp_functional"}) {
    const ImportedModule mlp = model(name);
    const Recorded recorded("mlp");
    ModuleState given;
    for (const auto& [key, buffer] : mlp.buffers()) given[key] = buffer.clone();
    mlp(given, recorded.inputs);
    EXPECT_CLOSE(given["norm.running_var"], recorded.buffers.at("norm.running_var"));
    EXPECT_CLOSE(mlp.buffers().at("norm.running_var"), at::ones({5}, at::kDouble));
    mlp(recorded.inputs);
    EXPECT_CLOSE(mlp.buffers().at("norm.running_var"), recorded.buffers.at("norm.running_var"));
  }
}

// --- transforms ----------------------------------------------------------------------------------

// The gradient of f's result by autograd itself.
template <class F>
ModuleState autograd_gradient(const ModuleState& parameters, const F& f) {
  ModuleState leaves;
  for (const auto& [name, p] : parameters) leaves[name] = p.clone().requires_grad_();
  f(leaves).backward();
  for (auto& [name, leaf] : leaves) leaf = leaf.grad();
  return leaves;
}

TEST(ExportedTransformTest, PerSampleGradientsOfParameters) {
  const ImportedModule attention = model("attention");
  const Tensor xs = at::randn({3, 2, 5, 4}, at::kDouble);
  const auto loss = [&](const ModuleState& p, const Tensor& x) {
    return attention(p, {x})[0].square().mean();
  };
  const ModuleState gradients =
      vmap(grad(loss), {.in_dims = in(kNone, 0)})(attention.parameters(), xs);
  for (int64_t i = 0; i < 3; ++i) {
    const ModuleState expected = autograd_gradient(
        attention.parameters(), [&](const ModuleState& p) { return loss(p, xs[i]); });
    for (const auto& [name, g] : expected) EXPECT_CLOSE(gradients.at(name)[i], g);
  }
}

TEST(ExportedTransformTest, PerSampleGradientsOfInputs) {
  const ImportedModule conv = model("conv");
  const Tensor xs = at::randn({3, 2, 1, 4, 4}, at::kDouble);
  const auto loss = [&](const Tensor& x) { return conv({x})[0].square().sum(); };
  const Tensor gradients = vmap(grad(loss))(xs);
  for (int64_t i = 0; i < 3; ++i) {
    Tensor x = xs[i].clone().requires_grad_();
    loss(x).backward();
    EXPECT_CLOSE(gradients[i], x.grad());
  }
}

TEST(ExportedTransformTest, Jacobians) {
  const ImportedModule conv = model("conv");
  const Tensor x = at::randn({2, 1, 4, 4}, at::kDouble);
  const auto f = [&](const Tensor& v) { return conv({v})[0].flatten(); };
  const Tensor jacobian = jacrev(f)(x);
  EXPECT_CLOSE(jacobian, jacfwd(f)(x));
  for (int64_t row = 0; row < jacobian.size(0); ++row) {
    Tensor leaf = x.clone().requires_grad_();
    f(leaf)[row].backward();
    EXPECT_CLOSE(jacobian[row], leaf.grad());
  }
}

TEST(ExportedTransformTest, TrainingUnderVmapGivesBuffersOfEachExample) {
  const ImportedModule mlp = model("mlp");
  const Tensor xs = at::randn({3, 4, 3}, at::kDouble);
  const auto f = [&](const Tensor& x) {
    auto [outputs, buffers] = mlp({}, ReturnBuffers{}, {x});
    return std::pair(outputs[0], buffers);
  };
  const auto [ys, buffers] = vmap(f)(xs);
  for (int64_t i = 0; i < 3; ++i) {
    const auto [y, one] = f(xs[i]);
    EXPECT_CLOSE(ys[i], y);
    EXPECT_CLOSE(buffers.at("norm.running_mean")[i], one.at("norm.running_mean"));
  }
  // A buffer that all examples share has no room for what each writes.
  EXPECT_THAT(
      error_of<UnsupportedError>([&] { vmap([&](const Tensor& x) { return mlp({x})[0]; })(xs); }),
      HasSubstr("batch_norm"));
}

TEST(ExportedTransformTest, BlocksWithoutGradientsAreConstants) {
  const ImportedModule flow = model("flow");
  const Recorded recorded("flow");
  const Tensor xs = recorded.inputs[1];
  const Tensor n = recorded.inputs[2];
  const Tensor x = recorded.inputs[0];
  const auto f = [&](const Tensor& v) { return flow({v, xs, n})[0].sum(); };
  const Tensor w = flow.parameters().at("line.weight");
  const Tensor b = flow.parameters().at("line.bias");
  const Tensor line = at::linear(x, w, b);
  EXPECT_CLOSE(grad(f)(x), (line.cos() * line).matmul(w));
}

TEST(ExportedTransformTest, SavedAgain) {
  const ImportedModule mlp = model("attention");
  const Tensor xs = at::randn({3, 2, 5, 4}, at::kDouble);
  const auto loss = [&](const ModuleState& p, const Tensor& x) {
    return mlp(p, {x})[0].square().mean();
  };
  const auto per_sample = vmap(grad(loss), {.in_dims = in(kNone, 0)});
  const std::string file = ::testing::TempDir() + "attention.tlc";
  save(per_sample, file, mlp.parameters(), xs);
  const auto loaded = load(file);
  std::vector<Tensor> inputs = tree_flatten(mlp.parameters());
  inputs.push_back(xs);
  const std::vector<Tensor> expected = tree_flatten(per_sample(mlp.parameters(), xs));
  const std::vector<Tensor> got = loaded.run(inputs);
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) EXPECT_TRUE(at::equal(got[i], expected[i])) << i;
}

TEST(ExportedTransformTest, TrainingCanBeSaved) {
  const ImportedModule mlp = model("mlp");
  const Tensor xs = at::randn({3, 4, 3}, at::kDouble);
  const auto step = [&](const Tensor& x) { return mlp(mlp.parameters(), ReturnBuffers{}, {x}); };
  const std::string file = ::testing::TempDir() + "mlp.tlc";
  save(vmap(step), file, xs);
  // Of other inputs than those that were traced.
  const Tensor others = at::randn({3, 4, 3}, at::kDouble);
  const auto [outputs, buffers] = vmap(step)(others);
  const std::vector<Tensor> got = load(file).run({others});
  EXPECT_CLOSE(got[0], outputs[0]);
  EXPECT_CLOSE(got[2], buffers.at("norm.running_mean"));
}

TEST(ExportedTransformTest, WhatIsWrittenWithoutGradientsIsAConstant) {
  // (The decomposed program has forgotten that block.)
  const ImportedModule average = model("average");
  const Tensor x = Recorded("average").inputs[0];
  const auto f = [&](const Tensor& v) {
    const auto [outputs, buffers] = average({}, ReturnBuffers{}, {v});
    return outputs[0].sum();
  };
  const Tensor kept = at::ones({3}, at::kDouble) * 0.5 + x.mean(0);
  EXPECT_CLOSE(grad(f)(x), kept.expand({4, 3}));
}

// A call is traced with buffers of its own, which are results.
TEST(ExportedTransformTest, TracedCallsReturnBuffers) {
  for (const char* name : {"average", "average_functional"}) {
    const ImportedModule average = model(name);
    const Tensor x = Recorded("average").inputs[0];
    const std::string file = ::testing::TempDir() + "average.tlc";
    save([&](const Tensor& v) { return average({}, ReturnBuffers{}, {v}).second; }, file, x);
    EXPECT_CLOSE(load(file).run({x * 2})[0], at::ones({3}, at::kDouble) * 0.5 + (x * 2).mean(0));
  }
}

// Under transforms other kernels run, whose results have other layouts.
TEST(ExportedTransformTest, ViewsCopyWhereTheyMust) {
  const ImportedModule heads = model("multihead_torch_2_11");
  const Tensor xs = at::randn({3, 2, 5, 8}, at::kDouble);
  const auto f = [&](const Tensor& x) { return heads({x})[0].square().sum(); };
  const Tensor gradients = vmap(grad(f))(xs);
  for (int64_t i = 0; i < 3; ++i) EXPECT_CLOSE(gradients[i], grad(f)(xs[i]));
  EXPECT_CLOSE(vmap(grad(f), {.in_dims = in(1)})(xs.transpose(0, 1)), gradients);
}

TEST(ExportedTransformTest, BranchesFollowEachExample) {
  const ImportedModule flow = model("flow");
  const Recorded recorded("flow");
  const Tensor xs = at::tensor({1.0, 2.0, 0.5, -1.0, -2.0, 0.5}, at::kDouble).view({2, 3});
  const auto f = [&](const Tensor& x) {
    return flow({x, recorded.inputs[1], recorded.inputs[2]})[0];
  };
  const auto sum = [&](const Tensor& x) { return f(x).sum(); };
  const Tensor ys = vmap(f)(xs);
  const Tensor gradients = vmap(grad(sum))(xs);
  for (int64_t i = 0; i < 2; ++i) {
    EXPECT_CLOSE(ys[i], f(xs[i]));
    EXPECT_CLOSE(gradients[i], grad(sum)(xs[i]));
  }
}

// --- graphs --------------------------------------------------------------------------------------

TEST(ReadExportedTest, GivesAGraphWithItsStateInside) {
  const Recorded recorded("attention");
  const Graph graph = read_exported(model_path("attention.pt2"));
  EXPECT_EQ(graph.inputs.size(), 1U);
  expect_same(Program(graph).run(recorded.inputs), recorded.outputs);
  const std::string file = ::testing::TempDir() + "attention_graph.tlc";
  save_graph(graph, "attention", file);
  expect_same(load(file).run(recorded.inputs), recorded.outputs);
}

TEST(ReadExportedTest, RefusesWhatAGraphCannotSay) {
  EXPECT_THAT(error_of<UnsupportedError>([] { read_exported(model_path("conv.pt2")); }),
              HasSubstr("<= 64, which a graph cannot say"));
}

// --- sizes and errors ----------------------------------------------------------------------------

TEST(ExportedSizesTest, DynamicDimsHaveTheirRange) {
  const ImportedModule conv = model("conv");
  const auto call = [&](int64_t batch) {
    return conv({at::ones({batch, 1, 4, 4}, at::kDouble)})[0];
  };
  EXPECT_EQ(call(2).size(0), 2);
  EXPECT_EQ(call(64).size(0), 64);
  EXPECT_THAT(error_of<TransformError>([&] { call(1); }), HasSubstr("sizes from 2 on"));
  EXPECT_THAT(error_of<TransformError>([&] { call(65); }), HasSubstr("<= 64 does not hold of s"));
  const ImportedModule structured = model("structured");
  const Tensor x = at::ones({7, 3}, at::kDouble), y = at::ones({2}, at::kDouble);
  const std::vector<Tensor> outputs = structured({x, y, y});
  EXPECT_EQ(outputs[0].size(0), 14);
  EXPECT_CLOSE(outputs[1], at::full({2}, 8.0, at::kDouble));
  EXPECT_EQ(outputs[2].item<int64_t>(), 7);
  EXPECT_CLOSE(outputs[3], at::scalar_tensor(3.0, at::kDouble));
}

TEST(ExportedSizesTest, SizesThatAreNoPolynomials) {
  const ImportedModule strided = model("strided");
  const ModuleState p = strided.parameters();
  for (const auto& [batch, height, width] :
       std::vector<std::array<int64_t, 3>>{{3, 7, 9}, {2, 12, 5}, {5, 8, 8}, {3, 7, 9}}) {
    const Tensor x = at::randn({batch, 1, height, width}, at::kDouble);
    Tensor y = at::conv2d(x, p.at("conv.weight"), p.at("conv.bias"), 2);
    y = y.sum().item<double>() > 0 ? y.sin() : y - 1;
    EXPECT_CLOSE(strided({x})[0], y.reshape({batch, -1}) / (y.size(2) / 2));
  }
  const auto call = [&](int64_t height) { strided({at::ones({3, 1, height, 9}, at::kDouble)}); };
  EXPECT_THAT(error_of<TransformError>([&] { call(4); }), HasSubstr("sizes from 5 on"));
  EXPECT_THAT(error_of<UnsupportedError>([] { read_exported(model_path("strided.pt2")); }),
              HasSubstr("FloorDiv"));
}

TEST(ExportedErrorsTest, CallsAreChecked) {
  const ImportedModule mlp = model("mlp");
  const Tensor x = at::ones({4, 3}, at::kDouble);
  EXPECT_THAT(error_of<TransformError>([&] {
                mlp({x, x});
              }),
              HasSubstr("[imported module] the module takes 1 tensors ('x'), and got 2."));
  EXPECT_THAT(error_of<TransformError>([&] { mlp({x.to(at::kFloat)}); }), HasSubstr("Float[4, 3]"));
  EXPECT_THAT(error_of<TransformError>([&] {
                mlp({{"first", x}}, {x});
              }),
              HasSubstr("no parameter or buffer 'first'; it has 'first.bias'"));
  EXPECT_THAT(error_of<TransformError>([&] {
                mlp({{"first.bias", x}}, {x});
              }),
              HasSubstr("'first.bias' is a tensor of shape [5], Double on cpu; got one of shape"));
  EXPECT_THAT(error_of<TransformError>([&] { mlp({x.detach(), Tensor()}); }), HasSubstr("takes 1"));
}

TEST(ExportedErrorsTest, OtherFilesAreNamed) {
  EXPECT_THAT(error_of<TransformError>([] { load_exported("no_such.pt2"); }),
              HasSubstr("[load_exported] no_such.pt2: "));
  EXPECT_THAT(error_of<TransformError>([] { load_exported(model_path("mlp.pt")); }),
              HasSubstr("load_torchscript reads TorchScript"));
  EXPECT_THAT(error_of<TransformError>([] { load_exported(model_path("mlp.safetensors")); }),
              HasSubstr("[load_exported]"));
  EXPECT_THAT(
      error_of<TransformError>([] { load_exported(model_path("mlp.pt2"), {.model = "other"}); }),
      HasSubstr("there is no such model in it; choose one of model."));
}

TEST(ExportedThreadsTest, CallsAtOnce) {
  const ImportedModule attention = model("attention");
  const Recorded recorded("attention");
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, copy = attention] {
      for (int k = 0; k < 20; ++k) expect_same(copy(recorded.inputs), recorded.outputs);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace torchlift::compile
