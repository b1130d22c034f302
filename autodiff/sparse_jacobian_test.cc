#include "autodiff/sparse_jacobian.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/diag_embed.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "autodiff/custom_rules.h"
#include "autodiff/grad.h"
#include "autodiff/jacobian.h"
#include "batching/vmap.h"
#include "core/error.h"
#include "core/tensor_operators.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

at::Tensor randoms(at::IntArrayRef sizes) { return at::rand(sizes, at::kDouble) + 0.5; }

at::Tensor differences(const at::Tensor& x) { return x.slice(0, 1).sin() - x.slice(0, 0, -1); }

at::Tensor rosenbrock(const at::Tensor& x) {
  const at::Tensor head = x.slice(0, 0, -1), tail = x.slice(0, 1);
  return (100 * (tail - head * head).square() + (1 - head).square()).sum();
}

at::Tensor dense_of(const at::Tensor& pattern) { return pattern.to_dense(); }

// Of the Jacobian at some points.
template <class F>
at::Tensor nonzeros_of(const F& f, const at::Tensor& x) {
  const at::Tensor jacobian = jacrev(f)(x);
  return jacobian.reshape({-1, x.numel()}).ne(0);
}

TEST(SparsityTest, NamedCasesAreTight) {
  const at::Tensor x = randoms({6});
  EXPECT_TRUE(dense_of(sparsity(differences)(x)).equal(nonzeros_of(differences, x)));
  const auto each = [](const at::Tensor& v) { return v.exp() * v; };
  EXPECT_TRUE(dense_of(sparsity(each)(x)).equal(at::eye(6).ne(0)));
  const auto total = [](const at::Tensor& v) { return v.sum(); };
  EXPECT_TRUE(dense_of(sparsity(total)(x)).equal(at::ones({1, 6}).ne(0)));
  EXPECT_THAT(dense_operators(), IsEmpty());
}

TEST(SparsityTest, HoldsForEveryPoint) {
  // At a point below zero the derivative is zero, but not at every point.
  const auto relu = [](const at::Tensor& v) { return v.relu(); };
  EXPECT_TRUE(dense_of(sparsity(relu)(-randoms({3}))).equal(at::eye(3).ne(0)));
  const auto chosen = [](const at::Tensor& v) { return at::where(v > 0, v, v.flip(0)); };
  EXPECT_TRUE(dense_of(sparsity(chosen)(randoms({2}))).all().item<bool>());
}

TEST(SparsityTest, WritesAndConstants) {
  const auto writes = [](const at::Tensor& v) {
    at::Tensor z = at::zeros({5}, at::kDouble);
    const at::Tensor view = z.slice(0, 1, 4);
    view.copy_(v.slice(0, 0, 3));
    view.select(0, 1).fill_(7);
    z.select(0, 0).add_(v.select(0, 2));
    return z * 2;
  };
  const at::Tensor x = randoms({4});
  EXPECT_TRUE(dense_of(sparsity(writes)(x)).equal(nonzeros_of(writes, x)));
  const auto detached = [](const at::Tensor& v) {
    at::Tensor constant;
    {
      const c10::NoGradGuard no_grad;
      constant = v.flip(0) * 3;
    }
    return v * constant + v.detach().sum();
  };
  EXPECT_TRUE(dense_of(sparsity(detached)(x)).equal(at::eye(4).ne(0)));
}

TEST(SparsityTest, Hessians) {
  const at::Tensor x = randoms({6});
  const at::Tensor expected = hessian(rosenbrock)(x).ne(0);
  EXPECT_TRUE(dense_of(hessian_sparsity(rosenbrock)(x)).equal(expected));
  const auto linear = [](const at::Tensor& v) { return (3 * v).sum(); };
  EXPECT_EQ(dense_of(hessian_sparsity(linear)(x)).sum().item<int64_t>(), 0);
}

TEST(SparsityTest, ChunksAgreeWithTheWhole) {
  const at::Tensor x = randoms({7});
  const at::Tensor whole = dense_of(sparsity(differences)(x));
  for (const int64_t chunk : {1, 2, 3, 7, 100}) {
    EXPECT_TRUE(dense_of(sparsity(differences, {.chunk_size = chunk})(x)).equal(whole));
  }
  EXPECT_EQ(sparsity(differences)(randoms({1})).size(0), 0);
  EXPECT_EQ(
      sparsity([](const at::Tensor& v) { return v * 2; })(at::zeros({0}, at::kDouble)).size(1), 0);
}

TEST(SparsityTest, InsideOtherTransforms) {
  const at::Tensor xs = randoms({3, 4});
  // The union over the examples: the weights differ in what is zero.
  const at::Tensor weights = at::eye(3, 4, at::kDouble);
  const auto patterns = vmap([](const at::Tensor& v, const at::Tensor& w) {
    const auto f = [&](const at::Tensor& u) { return u * w; };
    return v * sparsity(f)(v).to_dense().sum();
  });
  EXPECT_CLOSE(patterns(xs, weights), xs * 3);
}

TEST(SparsityTest, OperatorsOfNoTableAreDense) {
  const auto f = [](const at::Tensor& v) { return v.renorm(2, 0, 1); };
  const at::Tensor x = randoms({2, 2});
  EXPECT_TRUE(dense_of(sparsity(f)(x)).all().item<bool>());
  EXPECT_THAT(dense_operators(), ElementsAre("aten::renorm"));
}

TEST(SparsityTest, Errors) {
  const at::Tensor x = randoms({3});
  EXPECT_THAT(
      error_of<UnsupportedError>([&] {
        sparsity([](const at::Tensor& v) { return v.sum().item<double>() > 0 ? v : -v; })(x);
      }),
      HasSubstr("[sparsity] A number was asked for"));
  EXPECT_THAT(error_of<UnsupportedError>([&] {
                sparsity([](const at::Tensor& v) { return v.nonzero().to(at::kDouble); })(x);
              }),
              HasSubstr("looks at the values of a tensor that is computed from the inputs"));
  EXPECT_THAT(error_of<TransformError>([&] { sparsity(differences)(at::ones({3}, at::kLong)); }),
              HasSubstr("input 0 of the function has dtype Long"));
  EXPECT_THAT(error_of<TransformError>([&] { hessian_sparsity(differences)(x); }),
              HasSubstr("must return one real number"));
  EXPECT_THAT(error_of<TransformError>([&] { sparsity(differences, {.chunk_size = 0})(x); }),
              HasSubstr("chunk_size must be at least 1"));
}

TEST(SparseJacobianTest, AgreesWithTheDenseOne) {
  const at::Tensor x = randoms({8});
  const at::Tensor pattern = sparsity(differences)(x);
  const at::Tensor expected = jacrev(differences)(x);
  for (const ColoringMode mode :
       {ColoringMode::kAuto, ColoringMode::kForward, ColoringMode::kReverse, ColoringMode::kBoth}) {
    const Coloring c = coloring(pattern, mode);
    EXPECT_EQ(c.colors(), 2) << name_of(c.mode);
    EXPECT_CLOSE(sparse_jacobian(differences, c)(x).to_dense(), expected);
    EXPECT_CLOSE(sparse_jacobian(differences, c, {.layout = SparseLayout::kCoo})(x).to_dense(),
                 expected);
    EXPECT_CLOSE(sparse_jacobian(differences, c, {.chunk_size = 1})(x).to_dense(), expected);
  }
}

// y[0] depends on all, y[i] on x[0] and x[i].
at::Tensor arrow(const at::Tensor& x) {
  const at::Tensor rest = x.slice(0, 1);
  return at::cat({x.square().sum().unsqueeze(0), rest * rest * x.select(0, 0)});
}

TEST(SparseJacobianTest, AnArrowTakesBothDirections) {
  const at::Tensor x = randoms({30});
  const Coloring c = coloring(sparsity(arrow)(x));
  EXPECT_EQ(c.mode, ColoringMode::kBoth);
  EXPECT_EQ(c.colors(), 3);
  EXPECT_CLOSE(sparse_jacobian(arrow, c)(x).to_dense(), jacrev(arrow)(x));
}

TEST(SparseJacobianTest, Hessians) {
  const at::Tensor x = randoms({12});
  const at::Tensor pattern = hessian_sparsity(rosenbrock)(x);
  const Coloring star = coloring(pattern, ColoringMode::kSymmetric);
  EXPECT_EQ(star.colors(), 3);
  const at::Tensor expected = hessian(rosenbrock)(x);
  EXPECT_CLOSE(sparse_hessian(rosenbrock, star)(x).to_dense(), expected);
  EXPECT_CLOSE(sparse_hessian(rosenbrock, coloring(pattern))(x).to_dense(), expected);
}

TEST(SparseJacobianTest, NonzerosAreBatchedAndDifferentiated) {
  const at::Tensor xs = randoms({3, 5});
  const Coloring c = coloring(sparsity(differences)(xs[0]));
  const auto values = sparse_jacobian(differences, c, {.layout = SparseLayout::kValues});
  const at::Tensor batched = vmap(values)(xs);
  EXPECT_EQ(batched.sizes(), (at::IntArrayRef{3, c.nonzeros()}));
  for (int64_t i = 0; i < 3; ++i) EXPECT_CLOSE(batched[i], values(xs[i]));
  const auto loss = [&](const at::Tensor& x) { return values(x).square().sum(); };
  const auto reference = [](const at::Tensor& x) { return jacrev(differences)(x).square().sum(); };
  EXPECT_CLOSE(vmap(grad(loss))(xs), vmap(grad(reference))(xs));
  EXPECT_THAT(error_of<UnsupportedError>([&] { vmap(sparse_jacobian(differences, c))(xs); }),
              HasSubstr("layout=\"values\""));
}

TEST(SparseJacobianTest, AColoringOfAnotherShape) {
  const Coloring c = coloring(sparsity(differences)(randoms({5})));
  EXPECT_THAT(error_of<TransformError>([&] { sparse_jacobian(differences, c)(randoms({6})); }),
              HasSubstr("made for a matrix of shape [4, 5]"));
  const auto other = [](const at::Tensor& x) { return x; };
  const std::string error =
      error_of<TransformError>([&] { sparse_jacobian(other, c)(randoms({5})); });
  EXPECT_THAT(error, HasSubstr("made for a matrix of shape [4, 5]"));
  EXPECT_THAT(error, HasSubstr("has shape [5, 5]"));
  EXPECT_THAT(error_of<TransformError>([&] { coloring(at::ones({3})); }),
              HasSubstr("a pattern is a matrix"));
  EXPECT_THAT(error_of<TransformError>([&] {
                coloring(at::ones({3, 2}), ColoringMode::kSymmetric);
              }),
              HasSubstr("is not symmetric"));
}

}  // namespace
}  // namespace torchlift
