#include "compile/own_copy.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <vector>

#include "core/testing.h"

namespace torchlift::compile {
namespace {

using at::Tensor;

TEST(OwnCopyTest, HasNumbersAndStrides) {
  const Tensor x = at::rand({4, 6});
  const std::vector<Tensor> all = {x,
                                   x.t(),
                                   x.slice(0, 1, 3),
                                   x.slice(1, 0, 6, 2).t(),
                                   x.select(1, 2),
                                   x[0][0],
                                   x.unfold(1, 3, 1),
                                   x.narrow(0, 0, 0),
                                   x.unsqueeze(0).expand({3, 4, 6})};
  for (const Tensor& t : all) {
    const Tensor copy = own_copy(t);
    EXPECT_TRUE(at::equal(copy, t)) << t.sizes();
    EXPECT_EQ(copy.strides(), t.strides()) << t.sizes();
    EXPECT_FALSE(copy.is_alias_of(x)) << t.sizes();
  }
}

TEST(OwnCopyTest, WhatRepeatsIsStoredOnce) {
  const Tensor copy = own_copy(at::rand({3}).expand({1000, 3}));
  EXPECT_EQ(copy.storage().nbytes(), 12U);
}

TEST(OwnCopyTest, Conjugates) {
  const Tensor z = at::randn({4, 2}, at::kComplexFloat);
  for (const Tensor& t : {z.conj(), z.conj().select(1, 0), at::imag(z.conj())}) {
    EXPECT_TRUE(at::equal(own_copy(t), t));
  }
}

TEST(OwnCopyTest, IsDifferentiable) {
  const Tensor x = at::rand({3, 4}).requires_grad_();
  for (const Tensor& t : {x.select(1, 0), x.unsqueeze(0).expand({2, 3, 4})}) {
    x.mutable_grad().reset();
    own_copy(t).sum().backward();
    EXPECT_CLOSE(x.grad().sum(), at::full({}, static_cast<float>(t.numel())));
  }
}

}  // namespace
}  // namespace torchlift::compile
