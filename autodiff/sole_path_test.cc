#include "autodiff/sole_path.h"

#include <ATen/ops/rand.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include <optional>

#include "core/tensor_operators.h"

namespace torchlift {
namespace {

using torch::autograd::Edge;
using torch::autograd::Node;

Edge edge_of(const at::Tensor& t) { return torch::autograd::impl::gradient_edge(t); }

// Whether all of the gradient of t passes through what `node` is the result of.
bool passes(const at::Tensor& output, const at::Tensor& t, const at::Tensor& node) {
  const Node* wanted = edge_of(node).function.get();
  const SolePaths paths(output);
  return paths.above(edge_of(t), [&](const Node& n) { return &n == wanted; }) == wanted;
}

class SolePathsTest : public ::testing::Test {
 protected:
  at::Tensor x = at::rand({2, 2}).requires_grad_();
  at::Tensor w = at::rand({2, 2}).requires_grad_();
};

TEST_F(SolePathsTest, FollowsWhatIsTakenOnce) {
  const at::Tensor y = x.mm(w.t()), z = y.sin();
  const at::Tensor loss = (z * z.exp()).sum();
  EXPECT_TRUE(passes(loss, w, y));
  EXPECT_TRUE(passes(loss, x, z));
  EXPECT_FALSE(passes(loss, w, loss));  // beyond z, which is taken twice
  EXPECT_FALSE(passes(loss, w, x.mm(w.t())));
}

TEST_F(SolePathsTest, EndsWhereTheGraphForks) {
  const at::Tensor t = w.t(), y = x.mm(t);
  EXPECT_FALSE(passes((y + t).sum(), w, y));
  EXPECT_TRUE(passes((y + t).sum(), x, y));
  EXPECT_FALSE(passes((y * x).sum(), x, y));
  // The formula of a second derivative takes the transpose that the first pass saved.
  const at::Tensor g =
      torch::autograd::grad({y.sin().sum()}, {x}, {}, std::nullopt, /*create_graph=*/true)[0];
  EXPECT_FALSE(passes(g.sum(), w, y));
}

TEST_F(SolePathsTest, KnowsWhatTheOutputDependsOn) {
  const SolePaths paths(x.sin());
  EXPECT_TRUE(paths.contains(edge_of(x)));
  EXPECT_FALSE(paths.contains(edge_of(w)));
  const SolePaths leaf(x), constant(at::rand({}));
  EXPECT_TRUE(leaf.contains(edge_of(x)));
  EXPECT_FALSE(constant.contains(edge_of(x)));
  EXPECT_EQ(leaf.above(edge_of(x), [](const Node&) { return true; }), nullptr);
}

}  // namespace
}  // namespace torchlift
