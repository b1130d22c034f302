#include "compile/import/torchscript.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/jit/api/module.h>

#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "autodiff/grad.h"
#include "autodiff/jacobian.h"
#include "batching/vmap.h"
#include "compile/import/recorded.h"
#include "compile/save.h"
#include "core/error.h"
#include "core/testing.h"

namespace torchlift::compile {
namespace {

using at::Tensor;
using ::testing::HasSubstr;

ImportedModule model(const std::string& name) { return load_torchscript(model_path(name + ".pt")); }

// A module with a weight, a buffer, a number and a list, and these methods, in a file.
std::string written(const std::string& methods) {
  torch::jit::Module module("Written");
  module.register_parameter("weight", at::full({2}, 3.0, at::kDouble), /*is_buffer=*/false);
  module.register_buffer("seen", at::zeros({2}, at::kDouble));
  module.register_attribute("count", c10::IntType::get(), 0);
  module.register_attribute("list", c10::ListType::ofTensors(), std::vector<Tensor>());
  module.define(methods);
  const std::string file = ::testing::TempDir() + "written.pt";
  module.save(file);
  return file;
}

Tensor x2() { return at::tensor({1.0, -2.0}, at::kDouble); }

// --- numbers -------------------------------------------------------------------------------------

class ScriptNumbersTest : public ::testing::TestWithParam<const char*> {};

TEST_P(ScriptNumbersTest, AreThoseOfPython) {
  expect_recorded(model(GetParam()), Recorded(GetParam()));
}

INSTANTIATE_TEST_SUITE_P(Models, ScriptNumbersTest,
                         ::testing::Values("mlp", "conv", "attention", "script", "average",
                                           "recurrent"));

TEST(TorchScriptTest, StateHasNames) {
  const ImportedModule attention = model("attention");
  const ModuleState parameters = attention.parameters();
  EXPECT_EQ(parameters.size(), 6U);
  EXPECT_FALSE(parameters.at("qkv.weight").requires_grad());
  EXPECT_EQ(attention.buffers().count("mask"), 1U);
  EXPECT_EQ(attention.input_names(), (std::vector<std::string>{"x"}));
  EXPECT_EQ(model("script").input_names(), (std::vector<std::string>{"pair.0", "pair.1"}));
}

TEST(TorchScriptTest, TiedWeightsAreOne) {
  const ImportedModule attention = model("attention");
  const Tensor x = Recorded("attention").inputs[0];
  const Tensor other = attention.parameters().at("out.weight") * 2;
  const Tensor expected = attention({{"out.weight", other}}, {x})[0];
  EXPECT_FALSE(at::allclose(expected, attention({x})[0]));
  EXPECT_CLOSE(attention({{"again.weight", other}}, {x})[0], expected);
}

TEST(TorchScriptTest, BuffersAreWrittenWhereTheCallTakesThem) {
  const ImportedModule mlp = model("mlp");
  const Recorded recorded("mlp");
  ModuleState given;
  for (const auto& [key, buffer] : mlp.buffers()) given[key] = buffer.clone();
  mlp(given, recorded.inputs);
  EXPECT_CLOSE(given["norm.running_var"], recorded.buffers.at("norm.running_var"));
  EXPECT_CLOSE(mlp.buffers().at("norm.running_var"), at::ones({5}, at::kDouble));
}

TEST(TorchScriptTest, OptionsChooseModeMethodAndArguments) {
  const Recorded recorded("mlp");
  const ImportedModule mlp = load_torchscript(model_path("mlp.pt"), {.training = false});
  mlp(recorded.inputs);
  EXPECT_CLOSE(mlp.buffers().at("norm.running_mean"), at::zeros({5}, at::kDouble));
  const std::string file = written(R"(
      def forward(self, x, n: int, scale: float = 2.0, bias: Optional[Tensor] = None):
          y = self.weight * x * n * scale
          return y if bias is None else y + bias
      def other(self, pair: Tuple[Tensor, Tensor]):
          return pair[0] - pair[1]
  )");
  const Tensor x = x2();
  const ImportedModule five = load_torchscript(file, {.arguments = {{"n", 5}}});
  EXPECT_CLOSE(five({x})[0], x * 30);
  const ImportedModule biased =
      load_torchscript(file, {.arguments = {{"n", 5}, {"scale", 1.0}}, .inputs = {"bias", "x"}});
  EXPECT_CLOSE(biased({at::ones({2}, at::kDouble), x})[0], x * 15 + 1);
  EXPECT_CLOSE(load_torchscript(file, {.method = "other"})({x, x * 3})[0], x * -2);
  EXPECT_THAT(error_of<UnsupportedError>([&] { load_torchscript(file); }),
              HasSubstr("argument 'n' is int, which calls cannot give"));
  EXPECT_THAT(error_of<TransformError>([&] {
                load_torchscript(file, {.arguments = {{"n", 5.5}}});
              }),
              HasSubstr("argument 'n' is int; got float."));
  EXPECT_THAT(error_of<TransformError>([&] { load_torchscript(file, {.method = "no"}); }),
              HasSubstr("no method 'no'; it has forward, other."));
}

// --- the language --------------------------------------------------------------------------------

TEST(ScriptLanguageTest, LoopsBranchesAndLists) {
  const ImportedModule f = load_torchscript(written(R"(
      def forward(self, x):
          out: List[Tensor] = []
          sizes = {"a": 1, "b": 2}
          total = 0
          i = 0
          while i < 5:
              i += 1
              if i == 2:
                  continue
              if i == 5:
                  break
              total += i
              out.append(x * i)
          a, b = out[0], out[1:]
          for key in sizes:
              total += sizes[key]
          (p, q), r = (a, x), total
          assert len(b) == 2, "b"
          last: Optional[Tensor] = None
          for each in b:
              last = each
          if last is not None:
              q = q + last
          return {"sum": torch.stack(out).sum(0), "q": q}, [p], r, float(total), r > 3
  )"));
  const Tensor x = x2();
  const std::vector<Tensor> outputs = f({x});
  ASSERT_EQ(outputs.size(), 6U);
  EXPECT_CLOSE(outputs[0], x * 8);
  EXPECT_CLOSE(outputs[1], x * 5);
  EXPECT_CLOSE(outputs[2], x);
  EXPECT_EQ(outputs[3].item<int64_t>(), 11);
  EXPECT_EQ(outputs[4].item<double>(), 11.0);
  EXPECT_TRUE(outputs[5].item<bool>());
  const auto sum = [&](const Tensor& v) { return f({v})[0].square().sum(); };
  EXPECT_CLOSE(vmap(grad(sum))(at::stack({x, x * 2})), at::stack({x, x * 2}) * 128);
}

TEST(ScriptLanguageTest, AssignedBuffersAreKeptInTheStateOfTheCall) {
  const ImportedModule f = load_torchscript(written(R"(
      def forward(self, x):
          self.seen = self.seen * 0.5 + x
          return self.seen + 1
  )"));
  const Tensor x = x2();
  EXPECT_CLOSE(f({x})[0], x + 1);
  EXPECT_CLOSE(f.buffers().at("seen"), x);
  EXPECT_CLOSE(f({x})[0], x * 1.5 + 1);
  const auto per_row = vmap([&](const Tensor& v) { return f({}, ReturnBuffers{}, {v}); });
  EXPECT_CLOSE(per_row(at::stack({x, x * 2})).second.at("seen"), at::stack({x * 1.75, x * 2.75}));
}

TEST(ScriptLanguageTest, NothingElseIsKept) {
  const ImportedModule counts = load_torchscript(written(R"(
      def forward(self, x):
          self.count += 1
          return x
  )"));
  EXPECT_THAT(
      error_of<UnsupportedError>([&] { counts({x2()}); }),
      HasSubstr("the module assigns its attribute 'count', which is no parameter or buffer"));
  const ImportedModule appends = load_torchscript(written(R"(
      def forward(self, x):
          same = [self.list, self.list][1]
          same.append(x)
          return x
  )"));
  EXPECT_THAT(error_of<UnsupportedError>([&] { appends({x2()}); }),
              HasSubstr("aten::append changes a list or dict of the module"));
  const ImportedModule reshapes = load_torchscript(written(R"(
      def forward(self, x):
          self.seen = x.sum()
          return x
  )"));
  EXPECT_THAT(error_of<UnsupportedError>([&] { reshapes({x2()}); }),
              HasSubstr("assigns a tensor of shape [], Double to 'seen', which has shape [2]"));
}

TEST(ScriptLanguageTest, ErrorsKeepTheirKindAndNameTheLine) {
  const ImportedModule branches = load_torchscript(written(R"(
      def forward(self, x):
          if bool(x.sum() > 0):
              return x
          return -x
  )"));
  EXPECT_CLOSE(branches({x2()})[0], -x2());
  const std::string error = error_of<UnsupportedError>([&] {
    vmap([&](const Tensor& v) { return branches({v})[0]; })(at::ones({3, 2}, at::kDouble));
  });
  EXPECT_THAT(error, HasSubstr("vmap"));
  EXPECT_THAT(error, HasSubstr("in aten::Bool (code/__torch__.py:"));
  const ImportedModule raises = load_torchscript(written(R"(
      def forward(self, x):
          assert x.size(0) == 5, "only five"
          return x
  )"));
  EXPECT_THAT(error_of<TransformError>([&] { raises({x2()}); }),
              HasSubstr("[imported module] the module raises: AssertionError: only five"));
}

TEST(ScriptLanguageTest, GradModeIsPutBackWhereAnOperatorThrows) {
  const ImportedModule f = load_torchscript(written(R"(
      def forward(self, x):
          torch.set_grad_enabled(False)
          return x.view(7)
  )"));
  ASSERT_TRUE(c10::GradMode::is_enabled());
  EXPECT_THROW(f({x2()}), c10::Error);
  EXPECT_TRUE(c10::GradMode::is_enabled());
}

// --- transforms ----------------------------------------------------------------------------------

TEST(ScriptTransformTest, PerSampleGradientsOfParameters) {
  const ImportedModule attention = model("attention");
  const Tensor xs = at::randn({3, 2, 5, 4}, at::kDouble);
  const auto loss = [&](const ModuleState& p, const Tensor& x) {
    return attention(p, {x})[0].square().mean();
  };
  const ModuleState gradients =
      vmap(grad(loss), {.in_dims = in(kNone, 0)})(attention.parameters(), xs);
  for (int64_t i = 0; i < 3; ++i) {
    ModuleState leaves;
    for (const auto& [name, p] : attention.parameters()) leaves[name] = p.clone().requires_grad_();
    loss(leaves, xs[i]).backward();
    for (const auto& [name, leaf] : leaves) EXPECT_CLOSE(gradients.at(name)[i], leaf.grad());
  }
}

// The layer reads its weights out of a list.
TEST(ScriptTransformTest, GradientsOfRecurrentWeights) {
  const ImportedModule recurrent = model("recurrent");
  const Tensor x = Recorded("recurrent").inputs[0];
  const auto loss = [&](const ModuleState& p) { return recurrent(p, {x})[0].square().sum(); };
  ModuleState leaves;
  for (const auto& [name, p] : recurrent.parameters()) leaves[name] = p.clone().requires_grad_();
  loss(leaves).backward();
  const ModuleState gradients = grad(loss)(recurrent.parameters());
  ASSERT_EQ(gradients.size(), 4U);
  for (const auto& [name, leaf] : leaves) {
    EXPECT_GT(leaf.grad().abs().sum().item<double>(), 0) << name;
    EXPECT_CLOSE(gradients.at(name), leaf.grad());
  }
}

TEST(ScriptTransformTest, Jacobians) {
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

TEST(ScriptTransformTest, BatchSizesAreFree) {
  const ImportedModule conv = model("conv");
  const Tensor xs = at::randn({3, 1, 1, 4, 4}, at::kDouble);
  const auto loss = [&](const Tensor& x) { return conv({x})[0].square().sum(); };
  const Tensor gradients = vmap(grad(loss))(xs);
  for (int64_t i = 0; i < 3; ++i) EXPECT_CLOSE(gradients[i], grad(loss)(xs[i]));
}

TEST(ScriptTransformTest, TrainingUnderVmapGivesBuffersOfEachExample) {
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
}

TEST(ScriptTransformTest, SavedAgain) {
  const ImportedModule conv = model("conv");
  const Tensor xs = at::randn({3, 2, 1, 4, 4}, at::kDouble);
  const auto loss = [&](const ModuleState& p, const Tensor& x) {
    return conv(p, {x})[0].square().mean();
  };
  const auto per_sample = vmap(grad(loss), {.in_dims = in(kNone, 0)});
  const std::string file = ::testing::TempDir() + "conv.tlc";
  save(per_sample, file, conv.parameters(), xs);
  std::vector<Tensor> inputs = tree_flatten(conv.parameters());
  inputs.push_back(xs);
  const std::vector<Tensor> expected = tree_flatten(per_sample(conv.parameters(), xs));
  const std::vector<Tensor> got = load(file).run(inputs);
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) EXPECT_TRUE(at::equal(got[i], expected[i])) << i;
}

TEST(ScriptTransformTest, CallsAtOnce) {
  const ImportedModule script = model("script");
  const Recorded recorded("script");
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, copy = script] {
      for (int k = 0; k < 20; ++k) {
        expect_same(copy({}, ReturnBuffers{}, recorded.inputs).first, recorded.outputs);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// --- what is refused -----------------------------------------------------------------------------

TEST(ScriptRefusedTest, WhatCannotBeRunOperatorByOperator) {
  EXPECT_THAT(error_of<UnsupportedError>([] { model("autocast"); }),
              HasSubstr("a 'with' block of __torch__.torch.amp.autocast_mode.autocast"));
  EXPECT_THAT(error_of<UnsupportedError>([] { model("interface"); }),
              HasSubstr("the TorchScript program has prim::CallMethod (code/__torch__.py:"));
}

// --- files ---------------------------------------------------------------------------------------

TEST(ScriptFilesTest, OtherFilesAreNamed) {
  EXPECT_THAT(error_of<TransformError>([] { load_torchscript("no_such.pt"); }),
              HasSubstr("[load_torchscript] no_such.pt: "));
  EXPECT_THAT(error_of<TransformError>([] { load_torchscript(model_path("mlp.pt2")); }),
              HasSubstr("load_exported reads it"));
  EXPECT_THAT(error_of<TransformError>([] { load_torchscript(model_path("mlp.safetensors")); }),
              HasSubstr("[load_torchscript]"));
}

TEST(ScriptFilesTest, CutFilesAreRefused) {
  std::ifstream in(model_path("mlp.pt"), std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(in)), {});
  const std::string path = ::testing::TempDir() + "cut.pt";
  for (size_t length = 0; length < bytes.size(); length += 97) {
    std::ofstream(path, std::ios::binary) << bytes.substr(0, length);
    EXPECT_THROW(load_torchscript(path), TransformError) << length;
  }
}

TEST(ScriptFilesTest, BytesThatChangeAreNoticedOrMeanNothing) {
  std::ifstream in(model_path("mlp.pt"), std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(in)), {});
  const std::string path = ::testing::TempDir() + "changed.pt";
  const Recorded recorded("mlp");
  int refused = 0;
  for (size_t i = 0; i < bytes.size(); i += 7) {
    std::string changed = bytes;
    changed[i] ^= static_cast<char>(1 << i % 8);
    std::ofstream(path, std::ios::binary) << changed;
    try {
      expect_recorded(load_torchscript(path), recorded);
    } catch (const TransformError&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, static_cast<int>(bytes.size() / 7 / 3));
}

}  // namespace
}  // namespace torchlift::compile
