#include "compile/passes/algebraic_simplification.h"

#include <ATen/ops/_to_copy.h>
#include <ATen/ops/eq.h>
#include <ATen/ops/select.h>
#include <ATen/ops/signbit.h>

#include <array>
#include <cmath>
#include <numeric>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "compile/passes/evaluate.h"
#include "compile/passes/node_facts.h"

namespace torchlift::compile {
namespace {

std::optional<double> real_number(const Argument& argument) {
  const auto* value = std::get_if<c10::IValue>(&argument);
  if (value == nullptr) return std::nullopt;
  if (value->isInt()) return static_cast<double>(value->toInt());
  if (value->isBool()) return value->toBool() ? 1 : 0;
  if (value->isDouble()) return value->toDouble();
  return std::nullopt;
}

// The number that all elements are, if they are not too many to look at.
std::optional<double> uniform_number(const at::Tensor& t) {
  constexpr int64_t kMaxElements = 4096;
  if (t.numel() == 0 || t.numel() > kMaxElements || !t.device().is_cpu() || t.is_complex() ||
      t.layout() != c10::kStrided || t.is_neg()) {
    return std::nullopt;
  }
  const at::Tensor numbers = at::_to_copy(t.detach(), at::kDouble).reshape({-1});
  const at::Tensor first = numbers[0];
  if (!at::eq(numbers, first).all().item().toBool()) return std::nullopt;
  if (!at::eq(at::signbit(numbers), at::signbit(first)).all().item().toBool()) return std::nullopt;
  return first.item().toDouble();
}

bool is_positive_zero(double number) { return number == 0 && !std::signbit(number); }

class Simplifier {
 public:
  explicit Simplifier(Graph& graph) : graph_(graph), classes_(graph), uses_(graph) {
    map_.assign(graph.values.size(), kNoValue);
  }

  int64_t run() {
    for (const Constant& constant : graph_.constants) {
      if (const auto number = uniform_number(constant.tensor)) uniform_[constant.id] = *number;
    }
    for (Node& node : graph_.nodes) {
      replace_arguments(node, map_);
      if (node.is_control_flow() || node.results.size() != 1 || node.results[0].is_list) continue;
      if (result(node) == kNoValue) continue;
      note_uniform(node);
      simplify(node);
    }
    replace_everywhere(graph_, map_);
    return changed_;
  }

 private:
  // --- what is known of arguments ---

  static ValueId tensor(const Node& node, size_t i) {
    if (i >= node.args.size()) return kNoValue;
    const auto* ref = std::get_if<ValueRef>(&node.args[i]);
    return ref == nullptr ? kNoValue : ref->id;
  }
  static ValueId result(const Node& node) { return node.results[0].ids[0]; }

  std::optional<double> number(const Node& node, size_t i) const {
    std::optional<double> number;
    if (i >= node.args.size()) return number;
    const ValueId id = tensor(node, i);
    if (id == kNoValue) {
      number = real_number(node.args[i]);
    } else if (const auto found = uniform_.find(id); found != uniform_.end()) {
      number = found->second;
    }
    return number;
  }

  void note_uniform(const Node& node) {
    constexpr std::array<std::string_view, 3> kOnes = {"aten::ones", "aten::ones_like",
                                                       "aten::new_ones"};
    constexpr std::array<std::string_view, 3> kZeros = {"aten::zeros", "aten::zeros_like",
                                                        "aten::new_zeros"};
    constexpr std::array<std::string_view, 4> kFull = {"aten::full", "aten::full_like",
                                                       "aten::new_full", "aten::scalar_tensor"};
    constexpr std::array<std::string_view, 9> kSame = {
        "aten::expand",  "aten::view",      "aten::clone",   "aten::t",    "aten::transpose",
        "aten::permute", "aten::unsqueeze", "aten::squeeze", "aten::alias"};
    std::optional<double> is;
    if (is_one_of(node.op, kOnes)) is = 1;
    if (is_one_of(node.op, kZeros)) is = 0;
    if (is_one_of(node.op, kFull)) {
      const Argument* value =
          find_argument(node, node.op == "aten::scalar_tensor" ? "s" : "fill_value");
      if (value != nullptr) is = real_number(*value);
    }
    if (is_one_of(node.op, kSame) && node.overload != "dtype") is = number(node, 0);
    // Where the tensor holds another number than was asked for, as 0.5 of integers, it is not 0 or
    // 1 in all cases; -0 is 0 there, but nothing asks for -0 of integers.
    if (is == 0.0 || is == 1.0) uniform_[result(node)] = *is;
  }

  const Node* producer(ValueId id) const {
    const int32_t index = id == kNoValue ? -1 : uses_.producer[static_cast<size_t>(id)];
    return index < 0 ? nullptr : &graph_.nodes[static_cast<size_t>(index)];
  }

  bool is_real(ValueId id) const { return !at::isComplexType(graph_.type(id).dtype); }
  bool is_integral(ValueId id) const { return at::isIntegralType(graph_.type(id).dtype, true); }

  // Whether it may be a view that conjugates, which view_as_real does not take. An operator gives
  // the numbers themselves.
  bool may_be_conjugated(ValueId id) const {
    if (is_real(id)) return false;
    const Node* node = producer(id);
    return node == nullptr || node->is_control_flow() || may_view(*node);
  }

  // --- rules ---

  void simplify(Node& node) {
    const ValueId same = same_as(node);
    if (same != kNoValue && (may_view(node) || !may_be_conjugated(same))) {
      replace(result(node), same);
    } else if (node.op == "aten::pow") {
      square(node);
    } else if (is_permutation(node)) {
      merge_permutations(node);
    }
  }

  void replace(ValueId old, ValueId by) {
    if (graph_.type(old) != graph_.type(by) || !classes_.may_replace(old, by)) return;
    classes_.replaced(old, by);
    map_[static_cast<size_t>(old)] = by;
    ++changed_;
  }

  // The argument that the node gives back, if its type is the same.
  ValueId same_as(const Node& node) const {
    if (const ValueId id = neutral(node); id != kNoValue) return id;
    if (const ValueId id = undone(node); id != kNoValue) return id;
    constexpr std::array<std::string_view, 3> kNothingToDo = {"aten::expand", "aten::amax",
                                                              "aten::amin"};
    if (is_one_of(node.op, kNothingToDo)) return tensor(node, 0);
    if (node.op == "aten::sum" && is_integral(result(node))) return tensor(node, 0);
    if (node.op == "aten::where" && node.overload == "self") {
      const auto condition = number(node, 0);
      if (condition.has_value()) return tensor(node, *condition != 0 ? 1 : 2);
    }
    if (node.op == "aten::cat") {
      const std::vector<ValueId> parts = values_in(node.args[0]);
      if (parts.size() == 1) return parts[0];
    }
    return kNoValue;
  }

  // x * 1 and its like.
  ValueId neutral(const Node& node) const {
    const bool pair = node.overload == "Tensor" || node.overload == "Scalar";
    if (!pair && node.overload != "Tensor_Scalar") return kNoValue;
    const ValueId x = tensor(node, 0);
    if (x == kNoValue || !is_real(result(node))) return kNoValue;
    const auto first = number(node, 0), second = number(node, 1);
    const bool integral = is_integral(result(node));
    const auto adds_nothing = [&](std::optional<double> n) {
      return n.has_value() && *n == 0 && (integral || std::signbit(*n));
    };
    if (node.op == "aten::mul" && pair) {
      if (second == 1.0) return x;
      if (first == 1.0) return tensor(node, 1);
    }
    if (node.op == "aten::div" && pair && second == 1.0) return x;
    if (node.op == "aten::pow" && node.overload == "Tensor_Scalar" && second == 1.0) return x;
    if ((node.op == "aten::add" || node.op == "aten::sub") && pair &&
        number(node, 2) == std::optional(1.0)) {
      if (node.op == "aten::sub") {
        return second.has_value() && (integral ? *second == 0 : is_positive_zero(*second))
                   ? x
                   : kNoValue;
      }
      if (adds_nothing(second)) return x;
      if (adds_nothing(first)) return tensor(node, 1);
    }
    return kNoValue;
  }

  // neg(neg(x)) is x; abs(abs(x)) is abs(x).
  ValueId undone(const Node& node) const {
    constexpr std::array<std::string_view, 4> kInvolutions = {
        "aten::neg", "aten::bitwise_not", "aten::logical_not", "aten::conj_physical"};
    constexpr std::array<std::string_view, 8> kIdempotent = {
        "aten::abs",  "aten::relu",  "aten::floor", "aten::ceil",
        "aten::sign", "aten::trunc", "aten::round", "aten::sgn"};
    const Node* inner = producer(tensor(node, 0));
    if (inner == nullptr || inner->op != node.op || !node.overload.empty() ||
        !inner->overload.empty()) {
      return kNoValue;
    }
    if (is_one_of(node.op, kInvolutions)) return tensor(*inner, 0);
    // sgn divides complex numbers by their lengths, and rounds.
    if (is_one_of(node.op, kIdempotent) && is_real(result(node))) return result(*inner);
    return kNoValue;
  }

  // libtorch's kernel multiplies as well.
  void square(Node& node) {
    const at::ScalarType dtype = graph_.type(result(node)).dtype;
    const ValueId x = tensor(node, 0);
    if (node.overload != "Tensor_Scalar" || number(node, 1) != std::optional(2.0)) return;
    if ((dtype != at::kFloat && dtype != at::kDouble) || graph_.type(x).dtype != dtype) return;
    Node mul = make_node("aten::mul", "Tensor", {{"self", ValueRef{x}}, {"other", ValueRef{x}}});
    mul.results = node.results;
    mul.source = node.source;
    node = std::move(mul);
    ++changed_;
  }

  static bool is_permutation(const Node& node) {
    return node.op == "aten::t" || node.op == "aten::permute" ||
           (node.op == "aten::transpose" && node.overload == "int");
  }

  static int64_t constant_int(const Argument& argument) {
    return std::get<c10::IValue>(argument).toInt();
  }

  // Dim d of the result is dim dims[d] of the argument.
  std::vector<int64_t> permutation(const Node& node) const {
    const int64_t rank = graph_.type(result(node)).dim();
    const auto wrap = [&](int64_t d) { return d < 0 ? d + rank : d; };
    std::vector<int64_t> dims(static_cast<size_t>(rank));
    std::iota(dims.begin(), dims.end(), 0);
    if (node.op == "aten::permute") {
      dims = std::get<c10::IValue>(node.args[1]).toIntVector();
      for (int64_t& d : dims) d = wrap(d);
    } else if (rank > 1 || node.op == "aten::transpose") {
      const int64_t a = node.op == "aten::t" ? 0 : wrap(constant_int(node.args[1]));
      const int64_t b = node.op == "aten::t" ? 1 : wrap(constant_int(node.args[2]));
      if (rank > 0) std::swap(dims[static_cast<size_t>(a)], dims[static_cast<size_t>(b)]);
    }
    return dims;
  }

  void merge_permutations(Node& node) {
    const Node* inner = producer(tensor(node, 0));
    if (inner == nullptr || !is_permutation(*inner)) return;
    const ValueId x = tensor(*inner, 0);
    const std::vector<int64_t> outer_dims = permutation(node), inner_dims = permutation(*inner);
    std::vector<int64_t> dims;
    bool identity = true;
    for (size_t d = 0; d < outer_dims.size(); ++d) {
      dims.push_back(inner_dims[static_cast<size_t>(outer_dims[d])]);
      identity = identity && dims[d] == static_cast<int64_t>(d);
    }
    if (identity) return replace(result(node), x);
    Node permute = make_node("aten::permute", "",
                             {{"self", ValueRef{x}}, {"dims", c10::IValue(std::move(dims))}});
    permute.results = node.results;
    permute.source = node.source;
    node = std::move(permute);
    ++changed_;
  }

  Graph& graph_;
  AliasClasses classes_;
  const Uses uses_;  // nodes stay in their places
  std::vector<ValueId> map_;
  std::unordered_map<ValueId, double> uniform_;
  int64_t changed_ = 0;
};

}  // namespace

int64_t algebraic_simplification(Graph& graph) {
  require_functional(graph, "algebraic_simplification");
  return Simplifier(graph).run();
}

}  // namespace torchlift::compile
