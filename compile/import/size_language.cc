#include "compile/import/size_language.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <cmath>
#include <limits>
#include <map>
#include <optional>
#include <utility>

#include "core/error.h"

namespace torchlift::compile {
namespace {

using Kind = SizeTerm::Kind;

constexpr const char* kImport = "import";

// Its negative is no number of 64 bits.
constexpr int64_t kLeast = std::numeric_limits<int64_t>::min();

SizeTerm call(std::string name, std::vector<SizeTerm> operands) {
  SizeTerm term;
  term.kind = Kind::kCall;
  term.name = std::move(name);
  term.operands = std::move(operands);
  return term;
}

SizeTerm number(int64_t value) {
  SizeTerm term;
  term.number = value;
  return term;
}

// --- reading -------------------------------------------------------------------------------------

// An operator between two terms, and what sympy calls it.
struct Infix {
  const char* text;
  const char* name;
};

// Of the loosest binding first; the longer of two that begin alike before the shorter.
constexpr std::array<Infix, 1> kOr = {{{"or", "Or"}}};
constexpr std::array<Infix, 1> kAnd = {{{"and", "And"}}};
constexpr std::array<Infix, 6> kComparisons = {{{"==", "Eq"},
                                                {"!=", "Ne"},
                                                {"<=", "LessThan"},
                                                {">=", "GreaterThan"},
                                                {"<", "StrictLessThan"},
                                                {">", "StrictGreaterThan"}}};
constexpr std::array<Infix, 2> kSums = {{{"+", "Add"}, {"-", "Sub"}}};
constexpr std::array<Infix, 3> kProducts = {{{"//", "FloorDiv"}, {"*", "Mul"}, {"%", "Mod"}}};

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  SizeTerm run() {
    SizeTerm term = expression();
    skip_spaces();
    if (next_ != text_.size()) fail();
    return term;
  }

 private:
  static constexpr int kMaxDepth = 100;

  [[noreturn]] void fail() const {
    unsupported_error(kImport, "the program says '", text_,
                      "' of its sizes, which cannot be read from place ", next_,
                      " on. Export it with fixed sizes there.");
  }

  void skip_spaces() {
    while (next_ < text_.size() && text_[next_] == ' ') ++next_;
  }

  static bool is_letter(char c) {
    return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_';
  }

  bool takes(std::string_view token) {
    skip_spaces();
    if (text_.substr(next_, token.size()) != token) return false;
    const size_t end = next_ + token.size();
    // "or" does not begin "order", nor "*" the power "**".
    if (is_letter(token.back()) && end < text_.size() && is_letter(text_[end])) return false;
    if (token == "*" && end < text_.size() && text_[end] == '*') return false;
    next_ = end;
    return true;
  }

  void expect(std::string_view token) {
    if (!takes(token)) fail();
  }

  template <size_t N>
  std::optional<std::string> takes_one(const std::array<Infix, N>& choices) {
    for (const Infix& choice : choices) {
      if (takes(choice.text)) return choice.name;
    }
    return std::nullopt;
  }

  // Terms with operators of one strength between them, from left to right.
  template <size_t N, class Next>
  SizeTerm chain(const std::array<Infix, N>& choices, Next&& next) {
    SizeTerm left = next();
    while (const auto name = takes_one(choices)) {
      std::vector<SizeTerm> operands;
      operands.push_back(std::move(left));
      operands.push_back(next());
      left = call(*name, std::move(operands));
      if (++length_ > kMaxLength) fail();
    }
    return left;
  }

  SizeTerm expression() {
    if (++depth_ > kMaxDepth) fail();
    SizeTerm term = chain(kOr, [&] { return conjunction(); });
    --depth_;
    return term;
  }

  SizeTerm conjunction() {
    return chain(kAnd, [&] { return negation(); });
  }

  SizeTerm negation() {
    if (!takes("not")) return comparison();
    if (++depth_ > kMaxDepth) fail();
    SizeTerm operand = negation();
    --depth_;
    return call("Not", {std::move(operand)});
  }

  SizeTerm comparison() {
    SizeTerm left = sum();
    const auto name = takes_one(kComparisons);
    if (!name.has_value()) return left;
    // a < b < c would have another meaning than a chain of calls.
    SizeTerm right = sum();
    if (takes_one(kComparisons).has_value()) fail();
    std::vector<SizeTerm> operands;
    operands.push_back(std::move(left));
    operands.push_back(std::move(right));
    return call(*name, std::move(operands));
  }

  SizeTerm sum() {
    return chain(kSums, [&] { return chain(kProducts, [&] { return sign(); }); });
  }

  SizeTerm sign() {
    if (!takes("-")) return power();
    if (++depth_ > kMaxDepth) fail();
    SizeTerm operand = sign();
    --depth_;
    if (operand.kind == Kind::kNumber && operand.number != kLeast) return number(-operand.number);
    return call("Mul", {number(-1), std::move(operand)});
  }

  SizeTerm power() {
    SizeTerm base = primary();
    if (!takes("**")) return base;
    if (++depth_ > kMaxDepth) fail();
    SizeTerm exponent = sign();
    --depth_;
    std::vector<SizeTerm> operands;
    operands.push_back(std::move(base));
    operands.push_back(std::move(exponent));
    return call("Pow", std::move(operands));
  }

  SizeTerm primary() {
    skip_spaces();
    if (takes("(")) {
      SizeTerm term = expression();
      expect(")");
      return term;
    }
    if (next_ < text_.size() && std::isdigit(static_cast<unsigned char>(text_[next_])) != 0) {
      return literal();
    }
    const std::string name = word();
    if (name == "L") return size_of_input();
    if (name == "True" || name == "true" || name == "BooleanTrue") return boolean(true);
    if (name == "False" || name == "false" || name == "BooleanFalse") return boolean(false);
    if (!takes("(")) fail();
    if (name == "Symbol") return symbol();
    if (name == "Integer") return integer();
    if (name == "Float") return real();
    return arguments_of(name);
  }

  SizeTerm boolean(bool value) {
    if (takes("(")) expect(")");
    return number(value ? 1 : 0);
  }

  std::string word() {
    skip_spaces();
    const size_t begin = next_;
    while (next_ < text_.size() && is_letter(text_[next_])) ++next_;
    if (next_ == begin) fail();
    return std::string(text_.substr(begin, next_ - begin));
  }

  template <class Number>
  Number digits() {
    skip_spaces();
    Number value = 0;
    const auto [end, error] =
        std::from_chars(text_.data() + next_, text_.data() + text_.size(), value);
    if (error != std::errc()) fail();
    next_ = static_cast<size_t>(end - text_.data());
    return value;
  }

  SizeTerm literal() {
    SizeTerm term = number(digits<int64_t>());
    // A float, or a name that begins with a digit.
    if (next_ < text_.size() && (text_[next_] == '.' || is_letter(text_[next_]))) fail();
    return term;
  }

  std::string quoted() {
    skip_spaces();
    const char quote = next_ < text_.size() ? text_[next_] : '\0';
    if (quote != '\'' && quote != '"') fail();
    const size_t end = text_.find(quote, next_ + 1);
    if (end == std::string_view::npos) fail();
    std::string inside(text_.substr(next_ + 1, end - next_ - 1));
    next_ = end + 1;
    return inside;
  }

  // Symbol('s0', positive=True, integer=True)
  SizeTerm symbol() {
    SizeTerm term;
    term.kind = Kind::kSymbol;
    term.name = quoted();
    while (takes(",")) {
      word();
      expect("=");
      word();
    }
    expect(")");
    return term;
  }

  SizeTerm integer() {
    SizeTerm term = number(digits<int64_t>());
    expect(")");
    return term;
  }

  // Float('0.5', precision=53)
  SizeTerm real() {
    const std::string text = quoted();
    SizeTerm term;
    term.kind = Kind::kFloat;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), term.real);
    if (error != std::errc() || end != text.data() + text.size()) fail();
    while (takes(",")) {
      word();
      expect("=");
      digits<int64_t>();
    }
    expect(")");
    return term;
  }

  SizeTerm arguments_of(const std::string& name) {
    std::vector<SizeTerm> operands;
    if (!takes(")")) {
      do {
        operands.push_back(expression());
        if (++length_ > kMaxLength) fail();
      } while (takes(","));
      expect(")");
    }
    return call(name, std::move(operands));
  }

  // L['d']['k'].size()[0]
  SizeTerm size_of_input() {
    SizeTerm term;
    term.kind = Kind::kSize;
    while (takes("[")) {
      skip_spaces();
      const bool is_key = next_ < text_.size() && (text_[next_] == '\'' || text_[next_] == '"');
      term.name += term.name.empty() ? "" : "_";
      term.name += is_key ? quoted() : std::to_string(digits<int64_t>());
      expect("]");
    }
    expect(".");
    if (word() != "size") fail();
    for (const char* token : {"(", ")", "["}) expect(token);
    term.number = digits<int64_t>();
    expect("]");
    return term;
  }

  static constexpr int kMaxLength = 10000;

  std::string_view text_;
  size_t next_ = 0;
  int depth_ = 0;
  int length_ = 0;
};

// --- polynomials ---------------------------------------------------------------------------------

[[noreturn]] void throw_unknown(const SizeTerm& term) {
  unsupported_error(kImport, "a size of the program is computed by ",
                    term.name.empty() ? "a float" : term.name, " of ", term.operands.size(),
                    " operands; sizes can be polynomials of the dynamic dims. Export it with fixed "
                    "sizes there.");
}

// Products of sums, as a file may have them that was made to do harm, have terms without end.
SizeExpr bounded(SizeExpr size) {
  constexpr size_t kMaxTerms = 1000;
  if (size.terms().size() > kMaxTerms) {
    unsupported_error(kImport, "a size of the program is a sum of more than ", kMaxTerms,
                      " terms.");
  }
  return size;
}

SizeExpr raised(const SizeExpr& base, const SizeTerm& exponent) {
  if (exponent.kind != Kind::kNumber || exponent.number < 0 ||
      exponent.number > SizeExpr::kMaxPower) {
    unsupported_error(kImport,
                      "a size of the program is a power that is no whole number from 0 to ",
                      SizeExpr::kMaxPower, ". Export it with fixed sizes there.");
  }
  SizeExpr result = 1;
  for (int64_t i = 0; i < exponent.number; ++i) result = bounded(result * base);
  return result;
}

// --- numbers -------------------------------------------------------------------------------------

[[noreturn]] void throw_overflow() {
  transform_error(kImport, "a size of the program is beyond 64 bits.");
}

int64_t floor_div(int64_t a, int64_t b) {
  if (b == 0) transform_error(kImport, "a size of the program is divided by 0.");
  if (b == -1) {
    int64_t negated = 0;
    if (__builtin_sub_overflow(int64_t{0}, a, &negated)) throw_overflow();
    return negated;
  }
  const int64_t quotient = a / b;
  return a % b != 0 && (a < 0) != (b < 0) ? quotient - 1 : quotient;
}

int64_t modulo(int64_t a, int64_t b) {
  if (b == -1) return 0;
  return a - floor_div(a, b) * b;
}

int64_t sum(int64_t a, int64_t b) {
  int64_t result = 0;
  if (__builtin_add_overflow(a, b, &result)) throw_overflow();
  return result;
}

int64_t difference(int64_t a, int64_t b) {
  int64_t result = 0;
  if (__builtin_sub_overflow(a, b, &result)) throw_overflow();
  return result;
}

int64_t product(int64_t a, int64_t b) {
  int64_t result = 0;
  if (__builtin_mul_overflow(a, b, &result)) throw_overflow();
  return result;
}

int64_t power(int64_t base, int64_t exponent) {
  if (exponent < 0 || exponent > 64) transform_error(kImport, "a size is a power of ", exponent);
  int64_t result = 1;
  for (int64_t i = 0; i < exponent; ++i) result = product(result, base);
  return result;
}

using Binary = int64_t (*)(int64_t, int64_t);

// Folded from the left over as many operands as there are, at least two.
const std::map<std::string, Binary> kFolds = {
    {"Add", &sum},
    {"Mul", &product},
    {"Max", [](int64_t a, int64_t b) { return std::max(a, b); }},
    {"Min", [](int64_t a, int64_t b) { return std::min(a, b); }},
    {"And", [](int64_t a, int64_t b) -> int64_t { return a != 0 && b != 0 ? 1 : 0; }},
    {"Or", [](int64_t a, int64_t b) -> int64_t { return a != 0 || b != 0 ? 1 : 0; }},
};

const std::map<std::string, Binary> kBinaries = {
    {"Sub", &difference},
    {"Pow", &power},
    {"PowByNatural", &power},
    {"FloorDiv", &floor_div},
    {"Mod", &modulo},
    {"PythonMod", &modulo},
    {"Eq", [](int64_t a, int64_t b) -> int64_t { return a == b ? 1 : 0; }},
    {"Equality", [](int64_t a, int64_t b) -> int64_t { return a == b ? 1 : 0; }},
    {"Ne", [](int64_t a, int64_t b) -> int64_t { return a != b ? 1 : 0; }},
    {"Unequality", [](int64_t a, int64_t b) -> int64_t { return a != b ? 1 : 0; }},
    {"LessThan", [](int64_t a, int64_t b) -> int64_t { return a <= b ? 1 : 0; }},
    {"GreaterThan", [](int64_t a, int64_t b) -> int64_t { return a >= b ? 1 : 0; }},
    {"StrictLessThan", [](int64_t a, int64_t b) -> int64_t { return a < b ? 1 : 0; }},
    {"StrictGreaterThan", [](int64_t a, int64_t b) -> int64_t { return a > b ? 1 : 0; }},
};

}  // namespace

SizeTerm parse_size(std::string_view text) { return Parser(text).run(); }

SizeExpr size_expr_of(const SizeTerm& term, const SymbolLookup& symbols) {
  if (term.kind == Kind::kNumber && term.number != kLeast) return term.number;
  if (term.kind == Kind::kSymbol) return symbols(term.name);
  const auto operand = [&](size_t i) { return size_expr_of(term.operands[i], symbols); };
  const size_t count = term.operands.size();
  if (term.name == "Add" && count > 0) {
    SizeExpr result = operand(0);
    for (size_t i = 1; i < count; ++i) result = bounded(result + operand(i));
    return result;
  }
  if (term.name == "Mul" && count > 0) {
    SizeExpr result = operand(0);
    for (size_t i = 1; i < count; ++i) result = bounded(result * operand(i));
    return result;
  }
  if (term.name == "Sub" && count == 2) return operand(0) - operand(1);
  if ((term.name == "Pow" || term.name == "PowByNatural") && count == 2) {
    return raised(operand(0), term.operands[1]);
  }
  throw_unknown(term);
}

SizeRatio size_ratio_of(const SizeTerm& term, const SymbolLookup& symbols) {
  SizeRatio ratio;
  if (term.kind == Kind::kFloat) {
    ratio.factor = term.real;
  } else if (term.name == "ToFloat" && term.operands.size() == 1) {
    ratio.numerator = size_expr_of(term.operands[0], symbols);
  } else if (term.name == "IntTrueDiv" && term.operands.size() == 2) {
    ratio.numerator = size_expr_of(term.operands[0], symbols);
    ratio.denominator = size_expr_of(term.operands[1], symbols);
  } else {
    throw_unknown(term);
  }
  return ratio;
}

int64_t evaluate(const SizeTerm& term, const LeafValue& leaves) {
  if (term.kind == Kind::kNumber) return term.number;
  if (term.kind == Kind::kSymbol || term.kind == Kind::kSize) return leaves(term);
  const auto operand = [&](size_t i) { return evaluate(term.operands[i], leaves); };
  const size_t count = term.operands.size();
  if (term.name == "Not" && count == 1) return operand(0) == 0 ? 1 : 0;
  if (const auto fold = kFolds.find(term.name); fold != kFolds.end() && count > 0) {
    int64_t result = operand(0);
    for (size_t i = 1; i < count; ++i) result = fold->second(result, operand(i));
    return result;
  }
  const auto binary = kBinaries.find(term.name);
  if (binary == kBinaries.end() || count != 2) throw_unknown(term);
  return binary->second(operand(0), operand(1));
}

double evaluate_float(const SizeTerm& term, const LeafValue& leaves) {
  if (term.kind == Kind::kFloat) return term.real;
  if (term.kind != Kind::kCall) return static_cast<double>(evaluate(term, leaves));
  const auto operand = [&](size_t i) { return evaluate_float(term.operands[i], leaves); };
  const size_t count = term.operands.size();
  if (term.name == "ToFloat" && count == 1) return operand(0);
  if ((term.name == "IntTrueDiv" || term.name == "FloatTrueDiv") && count == 2) {
    return operand(0) / operand(1);
  }
  if ((term.name == "Pow" || term.name == "FloatPow") && count == 2) {
    return std::pow(operand(0), operand(1));
  }
  if ((term.name == "Add" || term.name == "Mul") && count > 0) {
    double result = operand(0);
    for (size_t i = 1; i < count; ++i) {
      result = term.name == "Add" ? result + operand(i) : result * operand(i);
    }
    return result;
  }
  return static_cast<double>(evaluate(term, leaves));
}

void for_each_leaf(const SizeTerm& term, const std::function<void(const SizeTerm&)>& f) {
  if (term.kind == Kind::kSymbol || term.kind == Kind::kSize) f(term);
  for (const SizeTerm& operand : term.operands) for_each_leaf(operand, f);
}

}  // namespace torchlift::compile
