#include "nn_functional/batch_norm.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/nn.h>
#include <torch/torch.h>

#include <memory>
#include <string>

#include "batching/vmap.h"
#include "core/error.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using ::testing::HasSubstr;

// A module that holds a norm in a member.
struct Block : torch::nn::Module {
  Block() { norm = register_module("norm", torch::nn::BatchNorm1d(3)); }
  at::Tensor forward(const at::Tensor& x) { return norm->forward(x); }
  torch::nn::BatchNorm1d norm{nullptr};
};

TEST(ReplaceAllBatchNormModules, StatisticsOfTheBatchOnly) {
  torch::nn::Sequential net(torch::nn::BatchNorm2d(2), torch::nn::Conv2d(2, 3, 1),
                            torch::nn::Flatten(), std::make_shared<Block>());
  const at::Tensor weight = (*net)[0]->as<torch::nn::BatchNorm2d>()->weight;
  replace_all_batch_norm_modules_(*net);
  EXPECT_TRUE(net->named_buffers().is_empty());
  EXPECT_TRUE((*net)[0]->as<torch::nn::BatchNorm2d>()->weight.is_same(weight));
  const at::Tensor xs = torch::randn({4, 5, 2, 1, 1});
  // Under vmap, and in eval mode too, each batch is normalised by itself.
  for (const bool training : {true, false}) {
    net->train(training);
    torch::nn::BatchNorm2d norm(torch::nn::BatchNorm2dOptions(2).track_running_stats(false));
    auto* replaced = (*net)[0]->as<torch::nn::BatchNorm2d>();
    const at::Tensor got = vmap([&](const at::Tensor& x) { return replaced->forward(x); })(xs);
    for (int64_t i = 0; i < 4; ++i) {
      EXPECT_TRUE(torch::allclose(got[i], norm->forward(xs[i]), 1e-5, 1e-6));
    }
  }
  Block block;
  replace_all_batch_norm_modules_(block);
  EXPECT_TRUE(block.buffers().empty());
  torch::nn::BatchNorm1d root(3);
  replace_all_batch_norm_modules_(*root);
  EXPECT_FALSE(root->running_mean.defined());
}

TEST(PatchBatchNormWith, ContainersOfLibtorch) {
  torch::nn::BatchNorm2d shared(4);
  torch::nn::ModuleList list(torch::nn::BatchNorm2d(4), torch::nn::Linear(2, 2));
  torch::nn::ModuleDict dict;
  dict->update(torch::OrderedDict<std::string, std::shared_ptr<torch::nn::Module>>(
      {{"a", torch::nn::BatchNorm2d(8).ptr()}, {"b", shared.ptr()}}));
  torch::nn::Sequential net(torch::nn::Conv2d(2, 4, 1), shared, torch::nn::ReLU(), shared);
  struct All : torch::nn::Module {
    using torch::nn::Module::register_module;
  } all;
  all.register_module("net", net);
  all.register_module("list", list);
  all.register_module("dict", dict);
  all.eval();
  int made = 0;
  patch_batch_norm_with(all, [&](torch::nn::Module& norm) {
    ++made;
    return torch::nn::AnyModule(torch::nn::GroupNorm(2, num_features(norm)));
  });
  EXPECT_EQ(made, 3);  // shared, and the two others
  for (const auto& item : all.named_modules("", false)) {
    EXPECT_EQ(item.value()->as<torch::nn::BatchNorm2d>(), nullptr) << item.key();
  }
  EXPECT_EQ((*net)[1].get(), (*net)[3].get());
  EXPECT_EQ(net->named_children()["1"].get(), (*net)[1].get());
  EXPECT_FALSE((*net)[1]->is_training());
  EXPECT_EQ((*dict)["a"]->as<torch::nn::GroupNorm>()->options.num_channels(), 8);
  // forward uses the new one
  const at::Tensor x = torch::randn({1, 2, 3, 3});
  at::Tensor want = (*net)[0]->as<torch::nn::Conv2d>()->forward(x);
  want = torch::group_norm(torch::relu(torch::group_norm(want, 2)), 2);
  EXPECT_TRUE(torch::allclose(net->forward(x), want, 1e-5, 1e-6));
}

TEST(PatchBatchNormWith, Errors) {
  const MakeNorm make = [](torch::nn::Module&) {
    return torch::nn::AnyModule(torch::nn::Identity());
  };
  torch::nn::Sequential net(torch::nn::BatchNorm1d(3), std::make_shared<Block>());
  EXPECT_THAT(error_of<TransformError>([&] { patch_batch_norm_with(*net, make); }),
              HasSubstr("'1.norm' is a member of a module that is no Sequential"));
  EXPECT_NE((*net)[0]->as<torch::nn::BatchNorm1d>(), nullptr);  // nothing was changed
  torch::nn::BatchNorm1d norm(3);
  EXPECT_THAT(error_of<TransformError>([&] { patch_batch_norm_with(*norm, make); }),
              HasSubstr("root itself is a BatchNorm"));
  torch::nn::Sequential one(torch::nn::BatchNorm1d(3));
  EXPECT_THAT(error_of<TransformError>([&] {
                patch_batch_norm_with(*one, [](auto&) { return torch::nn::AnyModule(); });
              }),
              HasSubstr("make returned no module"));
}

}  // namespace
}  // namespace torchlift
