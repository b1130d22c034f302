#include "compile/import/size_language.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "core/error.h"

namespace torchlift::compile {
namespace {

using ::testing::HasSubstr;

SizeExpr expr(const std::string& text) {
  return size_expr_of(parse_size(text), [](const std::string& name) -> SizeExpr {
    if (name == "s0") return SizeExpr::symbol(0);
    if (name == "s1") return SizeExpr::symbol(1);
    unsupported_error("import", "no ", name);
  });
}

// s0 is 5, s1 is 8; the size of dim d of an input is 10 + d.
int64_t number(const std::string& text) {
  return evaluate(parse_size(text), [](const SizeTerm& leaf) -> int64_t {
    if (leaf.kind == SizeTerm::Kind::kSize) return 10 + leaf.number;
    return leaf.name == "s0" ? 5 : 8;
  });
}

template <class Error = UnsupportedError, class F>
std::string error(const F& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what_without_backtrace();
  }
  return "no error";
}

TEST(SizeLanguageTest, ReadsWhatSympyPrints) {
  EXPECT_EQ(expr("Symbol('s0', positive=True, integer=True)"), SizeExpr::symbol(0));
  EXPECT_EQ(expr("Add(Symbol('s0', integer=True), Integer(-16))"), SizeExpr::symbol(0) - 16);
  EXPECT_EQ(expr("Mul(Integer(2), Symbol('s0'), Pow(Symbol('s1'), Integer(2)))"),
            SizeExpr(2) * SizeExpr::symbol(0) * SizeExpr::symbol(1) * SizeExpr::symbol(1));
}

TEST(SizeLanguageTest, ReadsPython) {
  EXPECT_EQ(number("L['x'].size()[2]"), 12);
  EXPECT_EQ(number("2 + 3 * 4 - 1"), 13);
  EXPECT_EQ(number("(2 + 3) * -4 // 3"), -7);
  EXPECT_EQ(number("-7 % 4"), 1);
  EXPECT_EQ(number("-2 ** 2"), -4);
  EXPECT_EQ(number("((4*L['y'].size()[0] + 4) % 4) == 0"), 1);
  EXPECT_EQ(number("((-1) + L['x'].size()[0]) != 9"), 0);
  EXPECT_EQ(number("not 1 > 2 and (1 <= 0 or 3 >= 3)"), 1);
  EXPECT_EQ(number("Max(1, 7, 3) < Min(8, 9)"), 1);
  SizeTerm name;
  for_each_leaf(parse_size("L['d']['k'].size()[1] > L[0].size()[0]"), [&](const SizeTerm& leaf) {
    if (leaf.number == 1) name = leaf;
  });
  EXPECT_EQ(name.name, "d_k");
}

TEST(SizeLanguageTest, EvaluatesWhatIsNoPolynomial) {
  EXPECT_EQ(number("FloorDiv(Add(Symbol('s0'), Integer(2)), Integer(2))"), 3);
  EXPECT_EQ(number("GreaterThan(Symbol('s0'), Symbol('s1'))"), 0);
  EXPECT_EQ(number("Eq(Mod(Symbol('s1'), Integer(4)), Integer(0))"), 1);
  EXPECT_THAT(error([] { expr("FloorDiv(Symbol('s0'), Integer(2))"); }), HasSubstr("FloorDiv"));
}

TEST(SizeLanguageTest, Ratios) {
  const SymbolLookup symbols = [](const std::string&) { return SizeExpr::symbol(0); };
  const SizeRatio ratio =
      size_ratio_of(parse_size("IntTrueDiv(Symbol('s0'), Integer(2))"), symbols);
  EXPECT_EQ(ratio.evaluate({5}), 2.5);
  EXPECT_EQ(size_ratio_of(parse_size("Float('0.5', precision=53)"), symbols).factor, 0.5);
  EXPECT_EQ(size_ratio_of(parse_size("ToFloat(Symbol('s0'))"), symbols).evaluate({5}), 5);
}

TEST(SizeLanguageTest, WhatCannotBeReadIsShown) {
  for (const char* text :
       {"", "(", "1 +", "1 < 2 < 3", "x", "L['x'].stride()[0]", "1.5", "Symbol(s0)", "Add(1",
        "99999999999999999999", "L['x].size()[0]", "Float('x')", "1 ; 2"}) {
    EXPECT_THAT(error([&] { parse_size(text); }), HasSubstr("'" + std::string(text) + "'")) << text;
  }
  EXPECT_THAT(error([] { number("Frobenius(1, 2)"); }), HasSubstr("Frobenius"));
  EXPECT_THAT(error([] { parse_size(std::string(100000, '(')); }), HasSubstr("cannot be read"));
  EXPECT_THAT(error([] { parse_size(std::string(100000, '-')); }), HasSubstr("cannot be read"));
}

TEST(SizeLanguageTest, NumbersBeyond64BitsAreErrors) {
  const std::string large = std::to_string(std::numeric_limits<int64_t>::max());
  for (const std::string& text :
       std::vector<std::string>{large + " + 1", large + " * 2", "-" + large + " - 2", "1 // 0",
                                "1 % 0", "2 ** 64", "2 ** -1"}) {
    EXPECT_NE(error<TransformError>([&] { number(text); }), "no error") << text;
  }
  EXPECT_EQ(number("Integer(-9223372036854775808) % -1"), 0);
  EXPECT_THAT(error([] { expr("Mul(-1, Integer(-9223372036854775808))"); }), HasSubstr("size"));
}

TEST(SizeLanguageTest, SumsWithoutEndAreRefused) {
  // (1 + s0 + s0^2 + ... )^16 and the like.
  std::string sum = "Add(1";
  for (int i = 1; i <= 16; ++i) sum += ", Pow(Symbol('s0'), " + std::to_string(i) + ")";
  for (int i = 1; i <= 16; ++i) sum += ", Pow(Symbol('s1'), " + std::to_string(i) + ")";
  EXPECT_THROW(expr("Pow(" + sum + "), 16)"), c10::Error);
}

}  // namespace
}  // namespace torchlift::compile
