#include "examples/per_sample_gradients/models.h"

#include <ATen/ops/allclose.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/stack.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "autodiff/grad.h"
#include "batching/vmap.h"
#include "core/tree.h"
#include "examples/per_sample_gradients/tensor_file.h"

namespace digits {
namespace {

namespace tl = torchlift;

Layer random_layer(at::IntArrayRef shape) {
  return {at::randn(shape).mul(0.2), at::randn({shape[0]}).mul(0.2)};
}

Mlp random_mlp() {
  return {random_layer({64, 64}), random_layer({32, 64}), random_layer({10, 32})};
}

Cnn random_cnn() {
  return {random_layer({16, 1, 3, 3}), random_layer({32, 16, 3, 3}), random_layer({10, 128})};
}

// Plain autograd, a digit at a time.
template <class Model>
Model gradients_by_loop(const Model& model, const at::Tensor& images, const at::Tensor& labels) {
  const Model leaves =
      tl::tree_map(model, [](const at::Tensor& t) { return t.detach().requires_grad_(); });
  const std::vector<at::Tensor> weights = tl::tree_flatten(leaves);
  std::vector<std::vector<at::Tensor>> rows(weights.size());
  for (int64_t i = 0; i < images.size(0); ++i) {
    const auto found = torch::autograd::grad({loss(leaves, images[i], labels[i])}, weights);
    for (size_t k = 0; k < found.size(); ++k) rows[k].push_back(found[k]);
  }
  std::vector<at::Tensor> stacked;
  for (const auto& row : rows) stacked.push_back(at::stack(row));
  return tl::tree_unflatten(model, stacked);
}

template <class Model>
void expect_gradients_of_the_loop(const Model& model) {
  const at::Tensor images = at::randn({7, 1, 8, 8});
  const at::Tensor labels = at::randint(10, {7}, at::kLong);
  const auto expected = tl::tree_flatten(gradients_by_loop(model, images, labels));
  const auto per_sample =
      tl::vmap(tl::grad(loss<Model>), {.in_dims = tl::in(tl::kNone, 0, 0), .chunk_size = 3});
  const auto found = tl::tree_flatten(per_sample(model, images, labels));
  ASSERT_EQ(found.size(), expected.size());
  for (size_t k = 0; k < found.size(); ++k) {
    EXPECT_EQ(found[k].sizes(), expected[k].sizes());
    EXPECT_TRUE(at::allclose(found[k], expected[k], 1e-4, 1e-5)) << "leaf " << k;
  }
}

TEST(Models, MlpGradientsAreThoseOfALoop) { expect_gradients_of_the_loop(random_mlp()); }

TEST(Models, CnnGradientsAreThoseOfALoop) { expect_gradients_of_the_loop(random_cnn()); }

TEST(TensorFile, ReadsWhatItWrote) {
  const std::string path = testing::TempDir() + "/tensors.pt";
  const NamedTensors tensors{{"a", at::randn({2, 3})}, {"b.c", at::randint(9, {4}, at::kLong)}};
  save_tensors(path, tensors);
  const NamedTensors found = load_tensors(path);
  std::remove(path.c_str());
  ASSERT_EQ(found.size(), 2u);
  for (const auto& [name, tensor] : tensors) EXPECT_TRUE(found.at(name).equal(tensor)) << name;
}

TEST(TensorFile, SaysWhatItCannotRead) {
  try {
    load_tensors("/no/such/file.pt");
    FAIL() << "no exception";
  } catch (const std::runtime_error& error) {
    EXPECT_STREQ(error.what(), "cannot read /no/such/file.pt");
  }
}

}  // namespace
}  // namespace digits
