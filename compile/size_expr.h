#ifndef TORCHLIFT_COMPILE_SIZE_EXPR_H_
#define TORCHLIFT_COMPILE_SIZE_EXPR_H_

// File: compile/size_expr.h
//
// Sizes that depend on the dynamic dims of a graph's inputs: polynomials in these, over an integer.
//
//   // n0 * (n0 + 1) / 2
//   const SizeExpr rows = (SizeExpr::symbol(0) * SizeExpr::symbol(0) + SizeExpr::symbol(0)) / 2;
//   rows.evaluate({4});   // 10
//   rows.str({"n"});      // "(n^2 + n)/2"

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace torchlift::compile {

class SizeExpr {
 public:
  // The power of each symbol, without trailing zeros: {} is 1, {0, 2} is n1^2.
  using Monomial = std::vector<int32_t>;

  SizeExpr() = default;        // 0
  SizeExpr(int64_t constant);  // NOLINT(google-explicit-constructor): a number is an expression.
  static SizeExpr symbol(int32_t index);
  // From its parts, as a file has them. Throws TransformError if they are none of an expression: a
  // denominator below 1, a negative power, more than kMaxPower.
  static SizeExpr from_parts(std::map<Monomial, int64_t> terms, int64_t denominator);
  static constexpr int32_t kMaxPower = 16;

  bool is_constant() const;
  // The number, where is_constant().
  std::optional<int64_t> constant() const;
  const std::map<Monomial, int64_t>& terms() const { return terms_; }
  int64_t denominator() const { return denominator_; }
  // One more than the largest symbol in it.
  int32_t symbol_count() const;

  // Of given sizes of the symbols. Throws TransformError where that is no integer, or beyond the
  // range of int64_t, or a symbol has no size.
  int64_t evaluate(const std::vector<int64_t>& sizes) const;
  // names[i] stands for symbol i; "n<i>" where there is none.
  std::string str(const std::vector<std::string>& names = {}) const;

  SizeExpr operator+(const SizeExpr& other) const;
  SizeExpr operator-(const SizeExpr& other) const;
  SizeExpr operator*(const SizeExpr& other) const;
  SizeExpr operator/(int64_t divisor) const;
  bool operator==(const SizeExpr& other) const {
    return terms_ == other.terms_ && denominator_ == other.denominator_;
  }
  bool operator!=(const SizeExpr& other) const { return !(*this == other); }

 private:
  void reduce();

  std::map<Monomial, int64_t> terms_;  // without zeros
  int64_t denominator_ = 1;
};

// A number that depends on sizes: factor * numerator / denominator. A mean divides by one.
struct SizeRatio {
  double factor = 1;
  SizeExpr numerator = 1;
  SizeExpr denominator = 1;

  double evaluate(const std::vector<int64_t>& sizes) const;
  std::string str(const std::vector<std::string>& names = {}) const;
  bool operator==(const SizeRatio& other) const {
    return factor == other.factor && numerator == other.numerator &&
           denominator == other.denominator;
  }
};

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_SIZE_EXPR_H_
