// Operators that are linear in each of two arguments.

#include "autodiff/jet_products.h"

#include <ATen/ops/addmm_ops.h>
#include <ATen/ops/addmv_ops.h>
#include <ATen/ops/baddbmm_ops.h>
#include <ATen/ops/bmm_ops.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/convolution_backward_ops.h>
#include <ATen/ops/mm_ops.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/mul_ops.h>
#include <ATen/ops/mv_ops.h>
#include <ATen/ops/result_type.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "autodiff/jet_rules.h"
#include "autodiff/jet_series.h"
#include "core/level.h"
#include "core/lifted_tensor.h"

namespace torchlift::jet_internal {
namespace {

namespace ops = at::_ops;
using at::Tensor;

Tensor index_tensor(const std::vector<int64_t>& indices, c10::Device device) {
  return at::tensor(indices, at::TensorOptions().dtype(at::kLong)).to(device);
}

// Which parts are multiplied, and the part that each product belongs to. A constant factor has part
// 0 alone.
class Pairs {
 public:
  Pairs(const Terms& terms, bool left_varies, bool right_varies)
      : left_varies_(left_varies), right_varies_(right_varies) {
    for (int64_t each = 0; each < terms.level->size(); ++each) {
      first_.push_back(count());
      if (!left_varies || !right_varies || !terms.many_directions()) {
        add_of_order(each);
      } else {
        add(each, 0, each);
        if (each > 0) add(0, each, each);
        add_crossed(terms, each);
      }
    }
  }

  int64_t count() const { return static_cast<int64_t>(part_.size()); }
  const std::vector<int64_t>& left() const { return left_; }
  const std::vector<int64_t>& right() const { return right_; }
  const std::vector<int64_t>& part() const { return part_; }
  // The pair that part k of the addend belongs to.
  const std::vector<int64_t>& first() const { return first_; }

 private:
  void add_of_order(int64_t order) {
    for (int64_t a = left_varies_ ? order : 0; a >= 0 && (right_varies_ || a == order); --a) {
      add(a, order - a, order);
    }
  }

  // The directions whose parts of order 1 give a product to this part of order 2.
  void add_crossed(const Terms& terms, int64_t part) {
    const int64_t directions = terms.directions(), second = part - directions - 1;
    if (second < 0) return;
    if (terms.kind == SeriesKind::kPaired) {
      return add(1 + second / directions, 1 + second % directions, part);
    }
    for (int64_t d = 1; d <= directions; ++d) add(d, d, part);
  }

  void add(int64_t a, int64_t b, int64_t part) {
    left_.push_back(left_varies_ ? a : 0);
    right_.push_back(right_varies_ ? b : 0);
    part_.push_back(part);
  }

  const bool left_varies_, right_varies_;
  std::vector<int64_t> left_, right_, part_, first_;
};

// The coefficients of t at these places, for a batch.
Tensor chosen(const Tensor& t, const Terms& terms, const std::vector<int64_t>& places) {
  if (!is_series(t, *terms.level)) return lower(t, *terms.level).value;
  return stacked(t, *terms.level).index_select(0, index_tensor(places, t.device()));
}

Tensor spread_addend(const Tensor& addend, const Terms& terms, const Pairs& pairs) {
  if (!addend.defined()) return {};
  const Tensor all = is_series(addend, *terms.level)
                         ? stacked(addend, *terms.level)
                         : spread_value(lower(addend, *terms.level).value, terms.level->size());
  std::vector<int64_t> sizes = all.sizes().vec();
  sizes[0] = pairs.count();
  const Tensor places = index_tensor(pairs.first(), addend.device());
  return at::zeros(sizes, all.options()).index_add(0, places, all);
}

}  // namespace

Tensor product(const Tensor& a, const Tensor& b, const Tensor& addend,
               c10::function_ref<Tensor(const Tensor&, const Tensor&, const Tensor&)> f) {
  const Terms terms = terms_of({a, b});
  const bool left = is_series(a, *terms.level), right = is_series(b, *terms.level);
  const Pairs pairs(terms, left, right);
  const Tensor as = chosen(a, terms, pairs.left()), bs = chosen(b, terms, pairs.right());
  const Tensor addends = spread_addend(addend, terms, pairs);
  Tensor products;
  {
    const LevelScope batch(
        {.kind = LevelKind::kVmap, .size = pairs.count(), .randomness = Randomness::kSame});
    const auto lifted = [&](const Tensor& t, bool batched) {
      return batched && t.defined() ? lift(t, 0, batch.level()) : t;
    };
    const Tensor result = f(lifted(as, left), lifted(bs, right), lifted(addends, true));
    products = stacked(result, *batch.level());
  }
  if (!left || !right) return to_series(products, terms.level);
  std::vector<int64_t> sizes = products.sizes().vec();
  sizes[0] = terms.level->size();
  const Tensor zeros = at::zeros(sizes, products.options());
  const Tensor places = index_tensor(pairs.part(), products.device());
  return to_series(zeros.index_add(0, places, products), terms.level);
}

namespace {

// Element by element: coefficient i of the left with all of the right at once. A batch of pairs
// would have to copy both.
Tensor mul(const Tensor& self, const Tensor& other) {
  const Terms terms = terms_of({self, other});
  const at::ScalarType type = at::result_type(self, other);
  const int64_t rank = std::max(self.dim(), other.dim());
  const Tensor left = with_rank(stacked(self, *terms.level), rank).to(type);
  const Tensor right = with_rank(stacked(other, *terms.level), rank).to(type);
  Tensor result = at::mul(left.select(0, 0), right);
  const int64_t parts = terms.level->size();
  if (terms.many_directions()) {
    const auto but_first = [](const Tensor& t) { return t.slice(0, 1); };
    but_first(result).addcmul_(but_first(left), right.select(0, 0));
    terms.second_parts(result).add_(terms.cross(terms.first_parts(left), terms.first_parts(right)));
    return to_series(result, terms.level);
  }
  for (int64_t i = 1; i < parts; ++i) {
    const int64_t rest = parts - i;
    result.narrow(0, i, rest).addcmul_(left.narrow(0, i, 1), right.narrow(0, 0, rest));
  }
  return to_series(result, terms.level);
}

// Each of the three results is a product of two of the arguments; the third only tells its shape.
std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight,
    at::OptionalSymIntArrayRef bias_sizes, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
    c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups, std::array<bool, 3> mask) {
  const Terms terms = terms_of({grad, input, weight});
  const Tensor input_0 = lower(primal(input, terms.level), *terms.level).value;
  const Tensor weight_0 = lower(primal(weight, terms.level), *terms.level).value;
  const auto run = [&](const Tensor& g, const Tensor& x, const Tensor& w,
                       std::array<bool, 3> wanted) {
    return ops::convolution_backward::call(g, x, w, bias_sizes, stride, padding, dilation,
                                           transposed, output_padding, groups, wanted);
  };
  std::tuple<Tensor, Tensor, Tensor> results;
  const bool grad_varies = is_series(grad, *terms.level);
  if (mask[0] && (grad_varies || is_series(weight, *terms.level))) {
    std::get<0>(results) =
        product(grad, weight, {}, [&](const Tensor& g, const Tensor& w, const Tensor&) {
          return std::get<0>(run(g, input_0, w, {true, false, false}));
        });
  } else if (mask[0]) {
    std::get<0>(results) = std::get<0>(run(grad, input_0, weight, {true, false, false}));
  }
  if (mask[1] && (grad_varies || is_series(input, *terms.level))) {
    std::get<1>(results) =
        product(grad, input, {}, [&](const Tensor& g, const Tensor& x, const Tensor&) {
          return std::get<1>(run(g, x, weight_0, {false, true, false}));
        });
  } else if (mask[1]) {
    std::get<1>(results) = std::get<1>(run(grad, input, weight_0, {false, true, false}));
  }
  if (mask[2]) {  // Linear in grad.
    std::get<2>(results) = std::get<2>(
        run(grad, primal(input, terms.level), primal(weight, terms.level), {false, false, true}));
  }
  return results;
}

// The products of these operators (of "aten::"), whose factors are at these places.
std::vector<JetRule> product_rules(size_t a, size_t b, std::initializer_list<const char*> names) {
  std::vector<JetRule> rules;
  for (const char* name : names) {
    rules.push_back({.name = std::string("aten::") + name,
                     .linear_in = {{a}, {b}},
                     .otherwise = Otherwise::kProduct,
                     .factors = {a, b}});
  }
  return rules;
}

std::vector<JetRule> product_rules_with(size_t addend, size_t a, size_t b,
                                        std::initializer_list<const char*> names) {
  std::vector<JetRule> rules;
  for (const char* name : names) {
    rules.push_back({.name = std::string("aten::") + name,
                     .linear_in = {{addend, a}, {addend, b}},
                     .otherwise = Otherwise::kProduct,
                     .factors = {a, b},
                     .addend = addend});
  }
  return rules;
}

// beta self + alpha (a product), for a constant self.
template <class Product>
Tensor constant_plus_product(const Tensor& self, const Tensor& a, const Tensor& b,
                             const at::Scalar& beta, const at::Scalar& alpha) {
  Tensor product = Product::call(a, b);
  if (!alpha.equal(1)) product = at::mul(product, alpha);
  return terms_of({a, b}).plus_constant(product, beta.equal(1) ? self : at::mul(self, beta));
}

template <class Op, class Product>
JetRule sum_with_product() {
  JetRule rule = product_rules_with(0, 1, 2, {Op::name})[0];
  rule.name = operator_name<Op>();
  rule.constant_addend =
      c10::KernelFunction::makeFromUnboxedFunction(TORCH_FN(constant_plus_product<Product>));
  return rule;
}

[[maybe_unused]] const JetRules kRules{
    {function_rule<ops::mul_Tensor, &mul>({{0}, {1}}),
     function_rule<ops::convolution_backward, &convolution_backward>({{0}}),
     sum_with_product<ops::addmm, ops::mm>(), sum_with_product<ops::addmv, ops::mv>(),
     sum_with_product<ops::baddbmm, ops::bmm>()},
    product_rules(0, 1, {"mm", "bmm", "mv", "dot", "vdot", "linalg_cross"}),
    product_rules_with(0, 1, 2, {"addbmm", "addr", "addcmul"}),
    product_rules_with(2, 0, 1, {"convolution"}),
};

}  // namespace
}  // namespace torchlift::jet_internal
