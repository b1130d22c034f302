#ifndef TORCHLIFT_COMPILE_IMPORT_SIZE_LANGUAGE_H_
#define TORCHLIFT_COMPILE_IMPORT_SIZE_LANGUAGE_H_

// File: compile/import/size_language.h
//
// What torch.export writes about sizes: expressions as sympy prints them, and conditions as Python.
//
//   const SizeTerm term = parse_size("Add(Symbol('s0', integer=True), Integer(1))");
//   size_expr_of(term, symbols);                 // s0 + 1, of the graph's dynamic dims
//   parse_size("L['x'].size()[0] % 4 == 0");     // a condition: evaluate() gives 0 or 1
//
// One parser reads both. What it cannot read is an UnsupportedError that shows the text.

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "compile/size_expr.h"

namespace torchlift::compile {

struct SizeTerm {
  enum class Kind {
    kNumber,  // `number`
    kFloat,   // `real`
    kSymbol,  // `name`
    kSize,    // the size of dim `number` of the input at `name`: "x", "d_k" for L['d']['k']
    kCall,    // `name` of `operands`: Add, Mul, Pow, FloorDiv, Mod, Eq, And...
  };
  Kind kind = Kind::kNumber;
  int64_t number = 0;
  double real = 0;
  std::string name;
  std::vector<SizeTerm> operands;
};

SizeTerm parse_size(std::string_view text);

// What stands for a symbol. Throws where there is none.
using SymbolLookup = std::function<SizeExpr(const std::string& name)>;

// Throws UnsupportedError where it is no polynomial: FloorDiv, Mod, Max...
SizeExpr size_expr_of(const SizeTerm& term, const SymbolLookup& symbols);
// Of a float: ToFloat, IntTrueDiv.
SizeRatio size_ratio_of(const SizeTerm& term, const SymbolLookup& symbols);

// The number that a leaf (a symbol, or the size of an input) is in a call.
using LeafValue = std::function<int64_t(const SizeTerm& leaf)>;

// Of integers and bools (0, 1). Throws UnsupportedError for an operation that it does not know,
// TransformError where the number is beyond 64 bits.
int64_t evaluate(const SizeTerm& term, const LeafValue& leaves);
// Of floats, too.
double evaluate_float(const SizeTerm& term, const LeafValue& leaves);

// Calls f with every leaf.
void for_each_leaf(const SizeTerm& term, const std::function<void(const SizeTerm&)>& f);

// --- what sizes mean -----------------------------------------------------------------------------

class SizeMeaning {
 public:
  SizeMeaning() = default;
  SizeMeaning(const SizeMeaning&) = delete;
  SizeMeaning& operator=(const SizeMeaning&) = delete;
  virtual ~SizeMeaning() = default;
  virtual SizeExpr size(const SizeTerm& term) const = 0;
  virtual SizeRatio ratio(const SizeTerm& term) const = 0;
};

// Expressions of dynamic dims: for a graph of all sizes.
class SymbolicSizes final : public SizeMeaning {
 public:
  explicit SymbolicSizes(SymbolLookup symbols) : symbols_(std::move(symbols)) {}
  SizeExpr size(const SizeTerm& term) const override { return size_expr_of(term, symbols_); }
  SizeRatio ratio(const SizeTerm& term) const override { return size_ratio_of(term, symbols_); }

 private:
  SymbolLookup symbols_;
};

// Numbers: for a graph of some sizes. Whatever the sizes are computed by, they are numbers then.
class ConcreteSizes final : public SizeMeaning {
 public:
  explicit ConcreteSizes(LeafValue leaves) : leaves_(std::move(leaves)) {}
  SizeExpr size(const SizeTerm& term) const override { return evaluate(term, leaves_); }
  SizeRatio ratio(const SizeTerm& term) const override {
    return {.factor = evaluate_float(term, leaves_), .numerator = 1, .denominator = 1};
  }

 private:
  LeafValue leaves_;
};

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_IMPORT_SIZE_LANGUAGE_H_
