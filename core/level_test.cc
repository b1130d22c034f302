#include "core/level.h"

#include <c10/util/Exception.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <stdexcept>
#include <thread>

#include "core/error.h"
#include "core/keys.h"

namespace torchlift {
namespace {

using ::testing::HasSubstr;

TEST(LevelTest, ScopesNestAndEnd) {
  EXPECT_EQ(current_level(), nullptr);
  LevelPtr outer;
  {
    const LevelScope first({.size = 3});
    outer = first.level();
    EXPECT_EQ(outer->depth(), 1);
    EXPECT_EQ(outer->size(), 3);
    {
      const LevelScope second({.size = 5});
      EXPECT_EQ(current_level(), second.level().get());
      EXPECT_EQ(second.level()->depth(), 2);
      EXPECT_EQ(level_stack().size(), 2u);
    }
    EXPECT_EQ(current_level(), outer.get());
    EXPECT_TRUE(outer->alive());
  }
  EXPECT_EQ(current_level(), nullptr);
  EXPECT_FALSE(outer->alive());
}

TEST(LevelTest, AnExceptionLeavesNoLevelAndNoThreadState) {
  const auto before = c10::impl::tls_local_dispatch_key_set();
  try {
    const LevelScope a({.size = 1});
    const LevelScope b({.size = 2});
    const LevelScope c({.size = 3});
    throw std::runtime_error("from three levels deep");
  } catch (const std::runtime_error&) {
  }
  const auto after = c10::impl::tls_local_dispatch_key_set();
  EXPECT_EQ(current_level(), nullptr);
  EXPECT_EQ(before.included_, after.included_);
  EXPECT_EQ(before.excluded_, after.excluded_);
}

TEST(LevelTest, DescribesItself) {
  const LevelScope scope({.size = 8});
  EXPECT_EQ(scope.level()->describe(), "vmap level 1 (size 8)");
}

TEST(LevelTest, ThreadsHaveTheirOwnStack) {
  const LevelScope scope({.size = 2});
  std::thread other([] {
    EXPECT_EQ(current_level(), nullptr);
    const LevelScope theirs({.size = 7});
    EXPECT_EQ(theirs.level()->depth(), 1);
  });
  other.join();
  EXPECT_EQ(current_level(), scope.level().get());
}

TEST(LevelTest, RandomOperatorsBelongToTheInnermostLevelNotYetHandled) {
  EXPECT_EQ(random_level(), nullptr);
  const LevelScope outer({.size = 2});
  const LevelScope inner({.size = 3});
  EXPECT_EQ(random_level(), inner.level().get());
  {
    const RandomHandledScope handled(*inner.level());
    EXPECT_EQ(random_level(), outer.level().get());
    const RandomHandledScope both(*outer.level());
    EXPECT_EQ(random_level(), nullptr);
  }
  EXPECT_EQ(random_level(), inner.level().get());
}

TEST(LevelTest, RefusesToStartInsideTorchFunc) {
  const c10::impl::IncludeDispatchKeyGuard active(
      c10::DispatchKeySet(c10::DispatchKey::FuncTorchDynamicLayerFrontMode));
  try {
    const LevelScope scope({.size = 2});
    FAIL() << "expected an error";
  } catch (const UnsupportedError& e) {
    EXPECT_THAT(e.what_without_backtrace(), HasSubstr("inside a transform of torch.func"));
    EXPECT_THAT(e.what_without_backtrace(), HasSubstr("for the whole composition"));
  }
  EXPECT_EQ(current_level(), nullptr);
}

}  // namespace
}  // namespace torchlift
