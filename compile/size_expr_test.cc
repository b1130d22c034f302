#include "compile/size_expr.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>

#include "core/error.h"

namespace torchlift::compile {
namespace {

const SizeExpr n = SizeExpr::symbol(0);
const SizeExpr m = SizeExpr::symbol(1);

TEST(SizeExprTest, NumbersAreExpressions) {
  EXPECT_EQ(SizeExpr(7).constant(), 7);
  EXPECT_EQ(SizeExpr().constant(), 0);
  EXPECT_TRUE(SizeExpr(7).is_constant());
  EXPECT_FALSE(n.constant().has_value());
}

TEST(SizeExprTest, Evaluates) {
  const SizeExpr triangle = (n * n + n) / 2;
  EXPECT_EQ(triangle.evaluate({4}), 10);
  EXPECT_EQ((n * m - m * 3 + 1).evaluate({5, 7}), 15);
}

TEST(SizeExprTest, EqualOnesAreEqualHoweverTheyWereMade) {
  EXPECT_EQ((n + m) * (n - m), n * n - m * m);
  EXPECT_EQ((n * 4) / 8, n / 2);
  EXPECT_EQ(n - n, SizeExpr(0));
  EXPECT_EQ((n * 2) / -2, n * SizeExpr(-1));
  EXPECT_EQ((n - n).symbol_count(), 0);
}

TEST(SizeExprTest, Prints) {
  EXPECT_EQ(((n * n + n) / 2).str({"rows"}), "(rows^2 + rows)/2");
  EXPECT_EQ((n * m * 3 - 1).str({"n", "m"}), "3*n*m - 1");
  EXPECT_EQ(SizeExpr(0).str(), "0");
}

TEST(SizeExprTest, RefusesWhatIsNoSize) {
  EXPECT_THROW((n / 2).evaluate({3}), TransformError);
  EXPECT_THROW(m.evaluate({3}), TransformError);
  EXPECT_THROW((n * n).evaluate({std::numeric_limits<int64_t>::max() / 2}), TransformError);
  EXPECT_THROW(n / 0, TransformError);
  EXPECT_THROW(SizeExpr::from_parts({{{1}, 2}}, 0), TransformError);
  EXPECT_THROW(SizeExpr::from_parts({{{SizeExpr::kMaxPower + 1}, 2}}, 1), TransformError);
}

TEST(SizeRatioTest, IsAFraction) {
  const SizeRatio mean{.factor = 2, .numerator = 1, .denominator = n - 1};
  EXPECT_DOUBLE_EQ(mean.evaluate({5}), 0.5);
}

}  // namespace
}  // namespace torchlift::compile
