#include "core/random_state.h"

#include <ATen/ops/rand.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <vector>

#include "core/level.h"
#include "core/lifted_tensor.h"

namespace torchlift {
namespace {

TEST(RandomState, DrawsTheSameNumbersAgain) {
  const RandomState before(std::vector<c10::Device>{});
  const at::Tensor first = at::rand({3});
  EXPECT_FALSE(before == before.now());
  before.restore();
  EXPECT_TRUE(before == before.now());
  EXPECT_TRUE(at::rand({3}).equal(first));
  EXPECT_FALSE(at::rand({3}).equal(first));
}

TEST(RandomState, KnowsTheDevicesOfValues) {
  const LevelScope level(Level::Options{.size = 2});
  const at::Tensor lifted = lift(at::zeros({2, 3}), 0, level.level());
  const auto devices = devices_of({lifted, at::Tensor(), at::zeros({1})});
  ASSERT_EQ(devices.size(), 1U);
  EXPECT_EQ(devices[0], c10::Device(c10::kCPU));
  EXPECT_TRUE(devices_of({}).empty());
}

}  // namespace
}  // namespace torchlift
