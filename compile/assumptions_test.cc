#include "compile/assumptions.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

namespace torchlift::compile {
namespace {

using ::testing::HasSubstr;

constexpr const char* kMessage = "[trace] nonzero: the number was {was}, and is {is} now. Do that.";

AssumptionError error_of(const at::Tensor& numbers, at::IntArrayRef expected) {
  try {
    assume(numbers, expected, kMessage);
  } catch (const AssumptionError& error) {
    return error;
  }
  ADD_FAILURE() << "no error";
  return {"", 0, {}};
}

Node assumption(std::vector<int64_t> expected, int64_t number) {
  return {.op = kAssumeOp,
          .overload = "",
          .args = {ValueRef{0}, c10::IValue(std::move(expected)), c10::IValue(kMessage),
                   c10::IValue(number)},
          .results = {},
          .subgraphs = {},
          .source = ""};
}

TEST(AssumptionsTest, SaysWhatItExpectsAndFinds) {
  assume(at::scalar_tensor(3, at::kLong), {3}, kMessage);
  assume(at::scalar_tensor(true, at::kBool), {1}, kMessage);
  assume(at::tensor({1, 4}, at::kInt), {1, 4}, kMessage);
  EXPECT_THAT(error_of(at::scalar_tensor(3, at::kLong), {5}).what_without_backtrace(),
              HasSubstr("was 5, and is 3 now"));
  const AssumptionError several = error_of(at::tensor({1, 2}, at::kLong), {1, 4});
  EXPECT_THAT(several.what_without_backtrace(), HasSubstr("was [1, 4], and is [1, 2] now"));
  EXPECT_EQ(several.found(), (std::vector<int64_t>{1, 2}));
  EXPECT_EQ(reason_of(several), "nonzero: the number was [1, 4], and is [1, 2] now");
}

TEST(AssumptionsTest, AnswersAreInTheOrderOfTheTrace) {
  Graph graph;
  graph.nodes = {assumption({7}, 1), assumption({2, 3}, 0)};
  EXPECT_TRUE(assumes(graph));
  EXPECT_EQ(answers_of(graph), (Answers{{2, 3}, {7}}));
  EXPECT_EQ(find_assumption(graph, 1), graph.nodes.data());
  EXPECT_EQ(find_assumption(graph, 2), nullptr);
  EXPECT_EQ(asker_of(graph.nodes[0]), "nonzero");
  EXPECT_FALSE(assumes(Graph()));
}

// The first answer that differs tells which graphs may fit.
TEST(AssumptionsTest, KnownAnswersChooseAmongGraphs) {
  KnownAnswers known;
  EXPECT_TRUE(known.agree({{1}, {2}, {3}}));
  EXPECT_EQ(known.reason(), "");
  known.note({{1}, {2}, {3}}, AssumptionError("[trace] f: it is 5. Do that.", 1, {5}));
  EXPECT_EQ(known.reason(), "f: it is 5");
  EXPECT_FALSE(known.agree({{1}, {2}, {3}}));
  EXPECT_FALSE(known.agree({{4}, {5}}));
  EXPECT_FALSE(known.agree({{1}}));
  EXPECT_TRUE(known.agree({{1}, {5}}));
  EXPECT_TRUE(known.agree({{1}, {5}, {9}}));
}

}  // namespace
}  // namespace torchlift::compile
