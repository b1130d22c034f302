#include "compile/dynamic.h"

#include <ATen/core/ivalue.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/zeros.h>
#include <c10/util/StringUtil.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <utility>

#include "compile/assumptions.h"
#include "core/error.h"

namespace torchlift::compile {
namespace {

using c10::IValue;
using Sizes = std::vector<int64_t>;  // of the symbols

// --- expressions through points ------------------------------------------------------------------

struct Fraction {
  __int128 num = 0;
  __int128 den = 1;
};

__int128 gcd(__int128 a, __int128 b) {
  if (a < 0) a = -a;
  if (b < 0) b = -b;
  while (b != 0) a = std::exchange(b, a % b);
  return a;
}

Fraction reduced(__int128 num, __int128 den) {
  const __int128 divisor = gcd(num, den);
  if (den < 0) return {-num / divisor, -den / divisor};
  return {num / divisor, den / divisor};
}

Fraction operator*(const Fraction& a, const Fraction& b) {
  return reduced(a.num * b.num, a.den * b.den);
}
Fraction operator/(const Fraction& a, const Fraction& b) {
  return reduced(a.num * b.den, a.den * b.num);
}
Fraction operator-(const Fraction& a, const Fraction& b) {
  return reduced(a.num * b.den - b.num * a.den, a.den * b.den);
}

// All products of at most two symbols.
std::vector<SizeExpr> monomials(size_t symbols) {
  std::vector<SizeExpr> all = {SizeExpr(1)};
  for (size_t i = 0; i < symbols; ++i) all.push_back(SizeExpr::symbol(static_cast<int32_t>(i)));
  for (size_t i = 0; i < symbols; ++i) {
    for (size_t j = i; j < symbols; ++j) all.push_back(all[1 + i] * all[1 + j]);
  }
  return all;
}

// As many sizes as there are monomials, through which there is one polynomial, and one more to
// check it. Multiples of the example's sizes: what those can be divided by, these can.
std::vector<Sizes> sample_sizes(const Sizes& base) {
  std::vector<Sizes> samples = {base};
  const size_t count = base.size();
  const auto scaled = [&](size_t i, int64_t factor) {
    Sizes sizes = base;
    sizes[i] *= factor;
    return sizes;
  };
  for (size_t i = 0; i < count; ++i) {
    samples.push_back(scaled(i, 2));
    samples.push_back(scaled(i, 3));
    for (size_t j = i + 1; j < count; ++j) {
      samples.push_back(scaled(i, 2));
      samples.back()[j] *= 2;
    }
  }
  samples.push_back(base);
  for (size_t i = 0; i < count; ++i) samples.back()[i] *= 4 + static_cast<int64_t>(i);
  return samples;
}

class Fitter {
 public:
  explicit Fitter(std::vector<Sizes> samples)
      : samples_(std::move(samples)), monomials_(monomials(samples_[0].size())) {}

  const std::vector<Sizes>& samples() const { return samples_; }

  // The polynomial that has these values at the samples, if there is one.
  std::optional<SizeExpr> integers(const std::vector<int64_t>& values) const {
    if (std::all_of(values.begin(), values.end(), [&](int64_t v) { return v == values[0]; })) {
      return SizeExpr(values[0]);
    }
    SizeExpr sum;
    const std::vector<Fraction> coefficients = solve(values);
    for (size_t m = 0; m < monomials_.size(); ++m) {
      if (coefficients[m].num == 0) continue;
      sum = sum + monomials_[m] * SizeExpr(static_cast<int64_t>(coefficients[m].num)) /
                      static_cast<int64_t>(coefficients[m].den);
    }
    return sum.evaluate(samples_.back()) == values.back() ? std::optional<SizeExpr>(sum)
                                                          : std::nullopt;
  }

  // c * p or c / p for one of a few polynomials p.
  std::optional<SizeRatio> numbers(const std::vector<double>& values) const {
    for (const SizeExpr& p : candidates()) {
      const auto constant = [&](bool divided) -> std::optional<double> {
        std::vector<double> c;
        for (size_t s = 0; s < values.size(); ++s) {
          const auto size = static_cast<double>(p.evaluate(samples_[s]));
          if (size == 0) return std::nullopt;
          c.push_back(divided ? values[s] * size : values[s] / size);
        }
        for (const double each : c) {
          if (!(std::abs(each - c[0]) <= 1e-13 * std::abs(c[0]))) return std::nullopt;
        }
        return c[0];
      };
      if (const auto c = constant(true)) return SizeRatio{rounded(*c), 1, p};
      if (const auto c = constant(false)) return SizeRatio{rounded(*c), p, 1};
    }
    return std::nullopt;
  }

 private:
  std::vector<SizeExpr> candidates() const {
    std::vector<SizeExpr> all(monomials_.begin() + 1, monomials_.end());
    const size_t count = all.size();
    for (size_t i = 0; i < count; ++i) all.push_back(all[i] - 1);
    return all;
  }

  // An integer that division has made inexact.
  static double rounded(double c) {
    const double nearest = std::nearbyint(c);
    return std::abs(c - nearest) <= 1e-13 * std::abs(c) ? nearest : c;
  }

  // Gauss' elimination.
  std::vector<Fraction> solve(const std::vector<int64_t>& values) const {
    const size_t n = monomials_.size();
    std::vector<std::vector<Fraction>> rows(n);
    for (size_t s = 0; s < n; ++s) {
      for (const SizeExpr& monomial : monomials_) {
        rows[s].push_back({monomial.evaluate(samples_[s]), 1});
      }
      rows[s].push_back({values[s], 1});
    }
    for (size_t i = 0; i < n; ++i) {
      size_t pivot = i;
      while (rows[pivot][i].num == 0) ++pivot;
      std::swap(rows[i], rows[pivot]);
      for (size_t r = 0; r < n; ++r) {
        if (r == i || rows[r][i].num == 0) continue;
        const Fraction factor = rows[r][i] / rows[i][i];
        for (size_t c = i; c <= n; ++c) rows[r][c] = rows[r][c] - factor * rows[i][c];
      }
    }
    std::vector<Fraction> result;
    for (size_t i = 0; i < n; ++i) result.push_back(rows[i][n] / rows[i][i]);
    return result;
  }

  const std::vector<Sizes> samples_;
  const std::vector<SizeExpr> monomials_;
};

// --- comparing graphs ----------------------------------------------------------------------------

class Generalizer {
 public:
  Generalizer(std::vector<Graph> graphs, Fitter fitter, std::vector<std::string> names)
      : graphs_(std::move(graphs)), fitter_(std::move(fitter)), names_(std::move(names)) {}

  Graph run() {
    const Graph& first = graphs_[0];
    for (const Graph& graph : graphs_) check_structure(graph);
    Graph result = first;
    for (size_t id = 0; id < first.values.size(); ++id) generalize_type(id, result);
    for (size_t n = 0; n < first.nodes.size(); ++n) {
      for (size_t a = 0; a < first.nodes[n].args.size(); ++a) generalize_argument(n, a, result);
      for (size_t g = 0; g < first.nodes[n].subgraphs.size(); ++g) {
        generalize_subgraph(n, g, result);
      }
    }
    generalize_constants(result);
    return result;
  }

 private:
  [[noreturn]] void specialises(const std::string& what) const {
    unsupported_error("trace", "the function does not do the same at all sizes of ",
                      c10::Join(", ", names_), ": ", what,
                      ". Trace it without dynamic dims, or keep from looking at sizes there.");
  }

  std::string at(size_t sample) const {
    std::string text;
    for (size_t i = 0; i < names_.size(); ++i) {
      text += c10::str(i > 0 ? ", " : "", names_[i], " = ", fitter_.samples()[sample][i]);
    }
    return text;
  }

  void check_structure(const Graph& graph) const {
    const Graph& first = graphs_[0];
    const size_t sample = static_cast<size_t>(&graph - graphs_.data());
    for (size_t n = 0; n < std::min(first.nodes.size(), graph.nodes.size()); ++n) {
      if (first.nodes[n].full_name() != graph.nodes[n].full_name() ||
          results_of(first.nodes[n]) != results_of(graph.nodes[n])) {
        specialises(c10::str("operator ", n, " is ", first.nodes[n].full_name(), " for ", at(0),
                             ", and ", graph.nodes[n].full_name(), " for ", at(sample)));
      }
    }
    if (first.nodes.size() != graph.nodes.size()) {
      const Graph& longer = first.nodes.size() > graph.nodes.size() ? first : graph;
      const size_t n = std::min(first.nodes.size(), graph.nodes.size());
      specialises(c10::str("it runs ", first.nodes.size(), " operators for ", at(0), ", and ",
                           graph.nodes.size(), " for ", at(sample), " (from ",
                           longer.nodes[n].full_name(), " on)"));
    }
    if (first.outputs != graph.outputs || first.values.size() != graph.values.size() ||
        first.constants.size() != graph.constants.size()) {
      specialises(c10::str("its results are made in another way for ", at(sample)));
    }
  }

  SizeExpr fit(const std::function<int64_t(const Graph&)>& number, const std::string& where) const {
    std::vector<int64_t> values;
    for (const Graph& graph : graphs_) values.push_back(number(graph));
    const std::optional<SizeExpr> expression = fitter_.integers(values);
    if (!expression.has_value()) {
      specialises(c10::str(where, " is ", values[0], " for ", at(0), ", and ", values.back(),
                           " for ", at(values.size() - 1), ", which is no polynomial of degree 2"));
    }
    return *expression;
  }

  void generalize_type(size_t id, Graph& result) const {
    TensorType& type = result.values[id].type;
    const std::string where = "the shape of " + result.values[id].name;
    for (const Graph& graph : graphs_) {
      const TensorType& other = graph.values[id].type;
      if (other.dtype != type.dtype || other.dim() != type.dim() || other.layout != type.layout) {
        specialises(where + " has another number of dims, or dtype");
      }
    }
    for (size_t d = 0; d < type.sizes.size(); ++d) {
      type.sizes[d] =
          fit([&](const Graph& g) { return *g.values[id].type.sizes[d].constant(); }, where);
    }
    for (size_t d = 0; d < type.strides.size(); ++d) {
      type.strides[d] =
          fit([&](const Graph& g) { return *g.values[id].type.strides[d].constant(); }, where);
    }
  }

  // Its numbers are expressions in the symbols of the graph around.
  void generalize_subgraph(size_t n, size_t g, Graph& result) const {
    std::vector<Graph> graphs;
    for (const Graph& graph : graphs_) graphs.push_back(*graph.nodes[n].subgraphs[g]);
    result.nodes[n].subgraphs[g] =
        std::make_shared<const Graph>(Generalizer(std::move(graphs), fitter_, names_).run());
  }

  // --- arguments ---------------------------------------------------------------------------------

  void generalize_argument(size_t n, size_t a, Graph& result) const {
    Argument& argument = result.nodes[n].args[a];
    const std::string where = c10::str("argument ", a, " of ", result.nodes[n].full_name());
    const auto of = [&](const Graph& graph) -> const Argument& { return graph.nodes[n].args[a]; };
    if (std::all_of(graphs_.begin(), graphs_.end(),
                    [&](const Graph& graph) { return same(of(graph), argument); })) {
      return;
    }
    for (const Graph& graph : graphs_) {
      if (!same_kind(of(graph), argument)) specialises(where + " differs");
    }
    const IValue value = std::get<IValue>(argument);
    if (value.isInt()) {
      argument = fit([&](const Graph& g) { return std::get<IValue>(of(g)).toInt(); }, where);
    } else if (value.isIntList()) {
      std::vector<SizeExpr> sizes;
      for (size_t i = 0; i < value.toIntVector().size(); ++i) {
        sizes.push_back(
            fit([&](const Graph& g) { return std::get<IValue>(of(g)).toIntVector()[i]; }, where));
      }
      argument = std::move(sizes);
    } else if (value.isDouble()) {
      argument =
          fit_number([&](size_t s) { return std::get<IValue>(of(graphs_[s])).toDouble(); }, where);
    } else {
      specialises(where + " differs");
    }
  }

  SizeRatio fit_number(const std::function<double(size_t)>& number,
                       const std::string& where) const {
    std::vector<double> values;
    for (const auto s : c10::irange(graphs_.size())) values.push_back(number(s));
    const std::optional<SizeRatio> ratio = fitter_.numbers(values);
    if (!ratio.has_value()) {
      specialises(c10::str(where, " is ", values[0], " for ", at(0), ", and ", values.back(),
                           " for ", at(values.size() - 1)));
    }
    return *ratio;
  }

  static bool same(const Argument& a, const Argument& b) {
    if (a.index() != b.index()) return false;
    if (const auto* x = std::get_if<ValueRef>(&a)) return *x == std::get<ValueRef>(b);
    if (const auto* x = std::get_if<std::vector<ValueRef>>(&a)) {
      return *x == std::get<std::vector<ValueRef>>(b);
    }
    if (const auto* x = std::get_if<IValue>(&a)) {
      const auto& y = std::get<IValue>(b);
      return x->tagKind() == y.tagKind() && *x == y;
    }
    return std::holds_alternative<std::monostate>(a);
  }

  static bool same_kind(const Argument& a, const Argument& b) {
    const auto* x = std::get_if<IValue>(&a);
    const auto* y = std::get_if<IValue>(&b);
    if (x == nullptr || y == nullptr || x->tagKind() != y->tagKind()) return false;
    return !x->isIntList() || x->toIntVector().size() == y->toIntVector().size();
  }

  // --- constants ---------------------------------------------------------------------------------

  // What differs in size is made when the graph runs: all elements the same, or in steps.
  void generalize_constants(Graph& result) const {
    std::vector<Constant> kept;
    std::vector<Node> made;
    for (const auto c : c10::irange(result.constants.size())) {
      const Constant& constant = result.constants[c];
      const bool everywhere_same =
          std::all_of(graphs_.begin(), graphs_.end(), [&](const Graph& graph) {
            return same_tensor(graph.constants[c].tensor, constant.tensor);
          });
      if (everywhere_same) {
        kept.push_back(constant);
        continue;
      }
      make_constant(c, result, made);
    }
    result.constants = std::move(kept);
    result.nodes.insert(result.nodes.begin(), made.begin(), made.end());
  }

  static bool same_tensor(const at::Tensor& a, const at::Tensor& b) {
    if (a.is_same(b)) return true;
    return a.layout() == c10::kStrided && a.scalar_type() == b.scalar_type() &&
           a.sizes() == b.sizes() && a.strides() == b.strides() && a.equal(b);
  }

  void make_constant(size_t c, Graph& result, std::vector<Node>& made) const {
    const ValueId id = result.constants[c].id;
    TensorType type = result.value(id).type;
    std::vector<at::Tensor> all;
    for (const Graph& graph : graphs_) all.push_back(graph.constants[c].tensor);
    if (std::all_of(all.begin(), all.end(), [](const at::Tensor& t) { return is_uniform(t); })) {
      type = result.value(id).type = contiguous(type);
      made.push_back(factory("aten::full", "", type, id));
      made.back().args.insert(
          made.back().args.begin(),
          {type.sizes, uniform_value(all, "a constant of shape " + type.str())});
      return;
    }
    if (!std::all_of(all.begin(), all.end(), [](const at::Tensor& t) { return is_range(t); })) {
      specialises(
          c10::str("it makes a tensor of shape ", type.str(names_),
                   " of numbers by itself, and they are neither all the same nor in steps"));
    }
    type = result.value(id).type = contiguous(type);
    const auto start = all[0].flatten()[0].item<int64_t>();
    const int64_t step = all[0].flatten()[1].item<int64_t>() - start;
    TensorType flat = type;
    SizeExpr count = 1;
    for (const SizeExpr& size : type.sizes) count = count * size;
    flat.sizes = {count};
    flat.strides = {1};
    const ValueId range = result.add_value(flat, "arange");
    made.push_back(factory("aten::arange", "start_step", flat, range));
    made.back().args.insert(
        made.back().args.begin(),
        {IValue(start), count * SizeExpr(step) + SizeExpr(start), IValue(step)});
    made.push_back({.op = "aten::view",
                    .overload = "",
                    .args = {ValueRef{range}, type.sizes},
                    .results = {{.ids = {id}}},
                    .subgraphs = {},
                    .source = ""});
  }

  // With the arguments that say dtype and device.
  static Node factory(const std::string& op, const std::string& overload, const TensorType& type,
                      ValueId id) {
    return {.op = op,
            .overload = overload,
            .args = {IValue(static_cast<int64_t>(type.dtype)), std::monostate{},
                     IValue(type.device), std::monostate{}},
            .results = {{.ids = {id}}},
            .subgraphs = {},
            .source = ""};
  }

  static TensorType contiguous(TensorType type) {
    SizeExpr stride = 1;
    for (size_t d = type.sizes.size(); d-- > 0;) {
      type.strides[d] = stride;
      stride = stride * type.sizes[d];
    }
    return type;
  }

  static bool is_uniform(const at::Tensor& t) {
    if (t.layout() != c10::kStrided || t.numel() == 0 || t.is_complex()) return false;
    return t.eq(t.flatten()[0]).all().item<bool>();
  }

  static bool is_range(const at::Tensor& t) {
    if (t.scalar_type() != at::kLong || t.numel() < 2 || !t.is_contiguous()) return false;
    const at::Tensor flat = t.flatten();
    const int64_t start = flat[0].item<int64_t>(), step = flat[1].item<int64_t>() - start;
    if (step == 0) return false;
    return flat.equal(at::arange(start, start + step * t.numel(), step, t.options()));
  }

  Argument uniform_value(const std::vector<at::Tensor>& all, const std::string& where) const {
    const auto value = [&](size_t s) { return all[s].flatten()[0].item(); };
    bool same = true;
    for (const auto s : c10::irange(all.size())) {
      same = same && IValue(value(s)) == IValue(value(0));
    }
    if (same) return IValue(value(0));
    if (value(0).isIntegral(/*includeBool=*/false)) {
      std::vector<int64_t> values;
      for (const auto s : c10::irange(all.size())) values.push_back(value(s).toLong());
      if (const auto fitted = fitter_.integers(values)) return *fitted;
    }
    return fit_number([&](size_t s) { return value(s).toDouble(); }, where);
  }

  const std::vector<Graph> graphs_;
  const Fitter fitter_;
  const std::vector<std::string> names_;
};

// --- inputs of other sizes -----------------------------------------------------------------------

// The example's rows, again and again.
at::Tensor resized(const at::Tensor& example, int64_t dim, int64_t size) {
  const int64_t rows = example.size(dim);
  if (rows == size) return example;
  if (rows == 0 || example.is_meta()) {
    std::vector<int64_t> sizes = example.sizes().vec();
    sizes[static_cast<size_t>(dim)] = size;
    return at::zeros(sizes, example.options());
  }
  const at::Tensor index = at::arange(size, at::device(example.device()).dtype(at::kLong));
  return example.index_select(dim, index.remainder(rows));
}

std::vector<at::Tensor> inputs_of(const std::vector<at::Tensor>& examples,
                                  const std::vector<DynamicDim>& dims, const Sizes& sizes) {
  std::vector<at::Tensor> inputs = examples;
  for (size_t i = 0; i < dims.size(); ++i) {
    for (const DynamicDim::Place& place : dims[i].places) {
      at::Tensor& input = inputs[static_cast<size_t>(place.input)];
      input = resized(input.detach(), place.dim, sizes[i]);
    }
  }
  return inputs;
}

Sizes example_sizes(const std::vector<at::Tensor>& examples, const std::vector<DynamicDim>& dims) {
  Sizes sizes;
  for (const DynamicDim& dim : dims) {
    std::optional<int64_t> size;
    for (const DynamicDim::Place& place : dim.places) {
      const bool exists = place.input >= 0 && static_cast<size_t>(place.input) < examples.size() &&
                          place.dim >= 0 &&
                          place.dim < examples[static_cast<size_t>(place.input)].dim();
      if (!exists) {
        transform_error("trace", "the dynamic dim ", dim.name, " is dim ", place.dim, " of input ",
                        place.input, ", which there is not.");
      }
      const int64_t here = examples[static_cast<size_t>(place.input)].size(place.dim);
      if (size.has_value() && *size != here) {
        transform_error("trace", "the dynamic dim ", dim.name, " has size ", *size,
                        " in one input, and ", here, " in input ", place.input,
                        ". Give the dims names of their own, or inputs of one size.");
      }
      size = here;
    }
    if (!size.has_value()) transform_error("trace", "the dynamic dim ", dim.name, " has no place.");
    sizes.push_back(std::max<int64_t>(*size, 2));
  }
  return sizes;
}

// Whether a graph does what `general` does at these sizes.
bool agrees(const Graph& general, const Graph& graph, const Sizes& sizes) {
  const size_t made = general.nodes.size() - std::min(general.nodes.size(), graph.nodes.size());
  if (general.nodes.size() != graph.nodes.size() + made) return false;
  for (size_t n = 0; n < graph.nodes.size(); ++n) {
    const Node& a = general.nodes[n + made];
    const Node& b = graph.nodes[n];
    if (a.full_name() != b.full_name() || a.args.size() != b.args.size()) return false;
    for (size_t i = 0; i < a.args.size(); ++i) {
      if (const auto* size = std::get_if<SizeExpr>(&a.args[i])) {
        const auto* other = std::get_if<IValue>(&b.args[i]);
        if (other == nullptr || !other->isInt() || other->toInt() != size->evaluate(sizes)) {
          return false;
        }
      } else if (const auto* all = std::get_if<std::vector<SizeExpr>>(&a.args[i])) {
        const auto* other = std::get_if<IValue>(&b.args[i]);
        if (other == nullptr || !other->isIntList()) return false;
        std::vector<int64_t> evaluated;
        for (const SizeExpr& each : *all) evaluated.push_back(each.evaluate(sizes));
        if (other->toIntVector() != evaluated) return false;
      } else if (a.args[i].index() != b.args[i].index() &&
                 !std::holds_alternative<SizeRatio>(a.args[i])) {
        return false;
      } else if (const auto* value = std::get_if<IValue>(&a.args[i])) {
        const auto& other = std::get<IValue>(b.args[i]);
        if (value->tagKind() != other.tagKind() || !(*value == other)) return false;
      } else if (const auto* ref = std::get_if<ValueRef>(&a.args[i])) {
        if (!(*ref == std::get<ValueRef>(b.args[i]))) return false;
      }
    }
    for (size_t g = 0; g < a.subgraphs.size(); ++g) {
      if (!agrees(*a.subgraphs[g], *b.subgraphs[g], sizes)) return false;
    }
  }
  return general.outputs == graph.outputs;
}

// --- symbols of subgraphs ------------------------------------------------------------------------

// The input of a graph, and its dim, that has the size of a symbol.
std::optional<Symbol> place_of(const Graph& graph, int32_t symbol) {
  for (size_t i = 0; i < graph.inputs.size(); ++i) {
    const std::vector<SizeExpr>& sizes = graph.type(graph.inputs[i]).sizes;
    const auto found = std::find(sizes.begin(), sizes.end(), SizeExpr::symbol(symbol));
    if (found == sizes.end()) continue;
    return Symbol{.name = "",
                  .input = static_cast<int32_t>(i),
                  .dim = static_cast<int32_t>(found - sizes.begin()),
                  .least = 0};
  }
  return std::nullopt;
}

// One more operand of the node, which its subgraphs take as their last input.
void pass_operand(const Graph& graph, ValueId id, Node* node, std::vector<Graph>* subgraphs) {
  std::get<std::vector<ValueRef>>(node->args.back()).push_back({id});
  for (Graph& subgraph : *subgraphs) subgraph.add_input(graph.type(id), graph.value(id).name);
}

// Subgraphs have the symbols of the graph around, each the size of one of their own inputs. Where
// none has it, they are given the input that does.
void give_symbols_to_subgraphs(Graph& graph) {
  for (Node& node : graph.nodes) {
    std::vector<Graph> subgraphs;
    for (const auto& subgraph : node.subgraphs) subgraphs.push_back(*subgraph);
    for (size_t s = 0; s < graph.symbols.size(); ++s) {
      const auto symbol = static_cast<int32_t>(s);
      const bool everywhere =
          std::all_of(subgraphs.begin(), subgraphs.end(),
                      [&](const Graph& each) { return place_of(each, symbol).has_value(); });
      if (!everywhere) {
        const auto input = static_cast<size_t>(graph.symbols[s].input);
        pass_operand(graph, graph.inputs[input], &node, &subgraphs);
      }
      for (Graph& each : subgraphs) {
        each.symbols.push_back(place_of(each, symbol).value());
        each.symbols.back().name = graph.symbols[s].name;
      }
    }
    for (size_t g = 0; g < subgraphs.size(); ++g) {
      give_symbols_to_subgraphs(subgraphs[g]);
      node.subgraphs[g] = std::make_shared<const Graph>(std::move(subgraphs[g]));
    }
  }
}

// The least size of all dims, 0 to 2, that the graph is right for.
int64_t least_size(const Graph& general, const TraceFunction& traced,
                   const std::vector<at::Tensor>& examples, const std::vector<DynamicDim>& dims) {
  for (int64_t size = 1; size >= 0; --size) {
    const Sizes sizes(dims.size(), size);
    try {
      if (!agrees(general, traced(inputs_of(examples, dims, sizes)), sizes)) return size + 1;
    } catch (const std::exception&) {
      return size + 1;  // The function itself cannot do it: it divides by the size, say.
    }
  }
  return 0;
}

}  // namespace

namespace {

// How a number of elements depends on sizes is not to be guessed from the numbers of an example.
void refuse_shapes_of_numbers(const Graph& graph) {
  const Node* assumption = find_assumption_of_shape(graph);
  if (assumption == nullptr) return;
  unsupported_error("trace", asker_of(*assumption),
                    ": the shape of its result depends on numbers that are computed from the "
                    "inputs, which a graph with dynamic dims does not assume. Use "
                    "torchlift.nonzero, masked_select or unique, which take size=, or trace one "
                    "size at a time (jit does).");
}

}  // namespace

Graph trace_dynamic(const TraceFunction& traced, const std::vector<at::Tensor>& examples,
                    const std::vector<DynamicDim>& dims) {
  if (dims.empty()) return traced(examples);
  std::vector<std::string> names;
  for (const DynamicDim& dim : dims) names.push_back(dim.name);
  const std::vector<Sizes> samples = sample_sizes(example_sizes(examples, dims));
  std::vector<Graph> graphs;
  for (const Sizes& sizes : samples) {
    graphs.push_back(traced(inputs_of(examples, dims, sizes)));
    refuse_shapes_of_numbers(graphs.back());
  }
  Graph graph = Generalizer(std::move(graphs), Fitter(samples), names).run();
  for (const DynamicDim& dim : dims) {
    graph.symbols.push_back(
        {.name = dim.name, .input = dim.places[0].input, .dim = dim.places[0].dim, .least = 0});
  }
  const int64_t least = least_size(graph, traced, examples, dims);
  for (Symbol& symbol : graph.symbols) symbol.least = least;
  give_symbols_to_subgraphs(graph);
  verify(graph);
  return graph;
}

}  // namespace torchlift::compile
