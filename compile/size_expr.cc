#include "compile/size_expr.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <sstream>
#include <utility>

#include "core/error.h"

namespace torchlift::compile {
namespace {

[[noreturn]] void throw_overflow() {
  transform_error("compile", "a size that depends on dynamic dims is larger than 64 bits hold.");
}

int64_t add(int64_t a, int64_t b) {
  int64_t sum = 0;
  if (__builtin_add_overflow(a, b, &sum)) throw_overflow();
  return sum;
}

int64_t multiply(int64_t a, int64_t b) {
  int64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) throw_overflow();
  return product;
}

SizeExpr::Monomial product(const SizeExpr::Monomial& a, const SizeExpr::Monomial& b) {
  SizeExpr::Monomial result(std::max(a.size(), b.size()), 0);
  for (size_t i = 0; i < a.size(); ++i) result[i] += a[i];
  for (size_t i = 0; i < b.size(); ++i) result[i] += b[i];
  return result;
}

std::string symbol_name(size_t index, const std::vector<std::string>& names) {
  return index < names.size() ? names[index] : "n" + std::to_string(index);
}

std::string monomial_str(const SizeExpr::Monomial& powers, int64_t coefficient,
                         const std::vector<std::string>& names) {
  std::ostringstream out;
  const char* times = "";
  if (coefficient != 1 || powers.empty()) {
    out << coefficient;
    times = "*";
  }
  for (size_t i = 0; i < powers.size(); ++i) {
    if (powers[i] == 0) continue;
    out << std::exchange(times, "*") << symbol_name(i, names);
    if (powers[i] > 1) out << "^" << powers[i];
  }
  return out.str();
}

}  // namespace

SizeExpr::SizeExpr(int64_t constant) {
  if (constant != 0) terms_.emplace(Monomial{}, constant);
}

SizeExpr SizeExpr::symbol(int32_t index) {
  SizeExpr result;
  Monomial powers(static_cast<size_t>(index) + 1, 0);
  powers.back() = 1;
  result.terms_.emplace(std::move(powers), 1);
  return result;
}

SizeExpr SizeExpr::from_parts(std::map<Monomial, int64_t> terms, int64_t denominator) {
  if (denominator < 1) {
    transform_error("compile", "a size has the denominator ", denominator, ", which must be >= 1.");
  }
  SizeExpr result;
  for (auto& [powers, coefficient] : terms) {
    for (const int32_t power : powers) {
      if (power < 0 || power > kMaxPower) {
        transform_error("compile", "a size has the power ", power, " of a dim; 0 to ", kMaxPower,
                        " can be.");
      }
    }
    if (coefficient == std::numeric_limits<int64_t>::min())
      throw_overflow();  // has no -coefficient
    if (coefficient != 0) result.terms_.emplace(powers, coefficient);
  }
  result.denominator_ = denominator;
  result.reduce();
  return result;
}

void SizeExpr::reduce() {
  std::map<Monomial, int64_t> kept;
  int64_t divisor = denominator_;
  for (auto& [powers, coefficient] : terms_) {
    if (coefficient == 0) continue;
    Monomial trimmed = powers;
    while (!trimmed.empty() && trimmed.back() == 0) trimmed.pop_back();
    int64_t& sum = kept[std::move(trimmed)];
    sum = add(sum, coefficient);
  }
  for (auto term = kept.begin(); term != kept.end();) {
    term = term->second == 0 ? kept.erase(term) : std::next(term);
  }
  for (const auto& term : kept) divisor = std::gcd(divisor, term.second);
  for (auto& term : kept) term.second /= divisor;
  denominator_ = kept.empty() ? 1 : denominator_ / divisor;
  terms_ = std::move(kept);
}

bool SizeExpr::is_constant() const {
  return terms_.empty() || (terms_.size() == 1 && terms_.begin()->first.empty());
}

std::optional<int64_t> SizeExpr::constant() const {
  if (terms_.empty()) return 0;
  if (!is_constant() || denominator_ != 1) return std::nullopt;
  return terms_.begin()->second;
}

int32_t SizeExpr::symbol_count() const {
  size_t count = 0;
  for (const auto& term : terms_) count = std::max(count, term.first.size());
  return static_cast<int32_t>(count);
}

int64_t SizeExpr::evaluate(const std::vector<int64_t>& sizes) const {
  if (static_cast<size_t>(symbol_count()) > sizes.size()) {
    transform_error("compile", "a size depends on ", symbol_count(),
                    " dynamic dims, and the sizes of ", sizes.size(), " are known.");
  }
  int64_t sum = 0;
  for (const auto& [powers, coefficient] : terms_) {
    int64_t term = coefficient;
    for (size_t i = 0; i < powers.size(); ++i) {
      for (int32_t k = 0; k < powers[i]; ++k) term = multiply(term, sizes[i]);
    }
    sum = add(sum, term);
  }
  if (sum % denominator_ != 0) {
    transform_error("compile", "the size ", str(), " is no integer for these dynamic dims: ", sum,
                    "/", denominator_, ".");
  }
  return sum / denominator_;
}

std::string SizeExpr::str(const std::vector<std::string>& names) const {
  if (terms_.empty()) return "0";
  std::ostringstream out;
  bool first = true;
  // Large powers first, the constant last.
  for (auto term = terms_.rbegin(); term != terms_.rend(); ++term) {
    const bool negative = term->second < 0;
    if (!first) out << (negative ? " - " : " + ");
    if (first && negative) out << "-";
    out << monomial_str(term->first, negative ? -term->second : term->second, names);
    first = false;
  }
  if (denominator_ == 1) return out.str();
  return "(" + out.str() + ")/" + std::to_string(denominator_);
}

SizeExpr SizeExpr::operator+(const SizeExpr& other) const {
  SizeExpr result;
  result.denominator_ = multiply(denominator_, other.denominator_);
  for (const auto& [powers, c] : terms_) result.terms_[powers] = multiply(c, other.denominator_);
  for (const auto& [powers, c] : other.terms_) {
    int64_t& sum = result.terms_[powers];
    sum = add(sum, multiply(c, denominator_));
  }
  result.reduce();
  return result;
}

SizeExpr SizeExpr::operator-(const SizeExpr& other) const { return *this + other * SizeExpr(-1); }

SizeExpr SizeExpr::operator*(const SizeExpr& other) const {
  SizeExpr result;
  result.denominator_ = multiply(denominator_, other.denominator_);
  for (const auto& [a, x] : terms_) {
    for (const auto& [b, y] : other.terms_) {
      int64_t& sum = result.terms_[product(a, b)];
      sum = add(sum, multiply(x, y));
    }
  }
  result.reduce();
  return result;
}

SizeExpr SizeExpr::operator/(int64_t divisor) const {
  if (divisor == 0) transform_error("compile", "a size was divided by 0.");
  SizeExpr result = divisor < 0 ? *this * SizeExpr(-1) : *this;
  result.denominator_ = multiply(result.denominator_, std::abs(divisor));
  result.reduce();
  return result;
}

double SizeRatio::evaluate(const std::vector<int64_t>& sizes) const {
  return factor * static_cast<double>(numerator.evaluate(sizes)) /
         static_cast<double>(denominator.evaluate(sizes));
}

std::string SizeRatio::str(const std::vector<std::string>& names) const {
  std::ostringstream out;
  out << factor << "*(" << numerator.str(names) << ")/(" << denominator.str(names) << ")";
  return out.str();
}

}  // namespace torchlift::compile
