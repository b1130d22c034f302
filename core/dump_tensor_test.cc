#include "core/dump_tensor.h"

#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <optional>

#include "core/level.h"
#include "core/lifted_tensor.h"

namespace torchlift {
namespace {

using ::testing::HasSubstr;
using ::testing::MatchesRegex;
using ::testing::Not;
using ::testing::StartsWith;

TEST(DumpTensor, ShowsAPlainTensor) {
  EXPECT_THAT(dump_tensor(at::ones({2, 3})),
              MatchesRegex("plain tensor: shape \\[2, 3\\], strides \\[3, 1\\], Float cpu; no "
                           "autograd; keys .*CPU.*\n"));
}

TEST(DumpTensor, ShowsAutogradState) {
  at::Tensor leaf = at::ones({2}).set_requires_grad(true);
  EXPECT_THAT(dump_tensor(leaf), HasSubstr("; leaf, requires grad; "));
  EXPECT_THAT(dump_tensor(at::mul(leaf, leaf)), HasSubstr("; grad_fn MulBackward0; "));
}

TEST(DumpTensor, ShowsEveryLevelFromTheDeepest) {
  const at::Tensor value = at::ones({3, 5});
  LevelScope outer({.size = 8});
  const at::Tensor shared = lift(value, std::nullopt, outer.level());
  LevelScope inner({.size = 3});
  const at::Tensor t = lift(shared, 0, inner.level());
  const std::string text = dump_tensor(t);
  EXPECT_THAT(text, StartsWith("vmap level 2 (size 3): shape [5], batch dim 0, Float cpu"));
  EXPECT_THAT(text,
              HasSubstr("\n  vmap level 1 (size 8): shape [3, 5], batch dim none, Float cpu"));
  EXPECT_THAT(text, HasSubstr("\n    plain tensor: shape [3, 5]"));
  EXPECT_THAT(text, Not(HasSubstr("ENDED")));
}

TEST(DumpTensor, ShowsTheDomainsApart) {
  at::Tensor value = at::ones({2}).set_requires_grad(true);
  LevelScope scope({.size = 2});
  const std::string text = dump_tensor(lift(value, 0, scope.level()));
  EXPECT_THAT(text,
              MatchesRegex("vmap[^\n]*no autograd[^\n]*\n  plain[^\n]*leaf, requires grad.*"));
}

TEST(DumpTensor, TellsOfALevelThatHasEnded) {
  at::Tensor escaped;
  {
    LevelScope scope({.size = 2});
    escaped = lift(at::ones({2}), 0, scope.level());
  }
  EXPECT_THAT(dump_tensor(escaped), StartsWith("vmap level 1 (size 2), ENDED: shape []"));
}

TEST(DumpTensor, TakesAnUndefinedTensor) {
  EXPECT_EQ(dump_tensor(at::Tensor()), "undefined tensor\n");
}

}  // namespace
}  // namespace torchlift
