// scatter_reduce and index_reduce by "prod".
//
// libtorch's formula gives the gradient of each factor without dividing by zero, but its own
// derivative is wrong where two zeros meet at one place. So it asks for the number of zeros
// whenever a graph of the gradient is made, which neither vmap nor a trace can tell it. Here the
// second derivative asks, when there is one: whether in some example there are two zeros at a
// place; in a graph, in each run.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/index_reduce_ops.h>
#include <ATen/ops/scatter_reduce_ops.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <cstdint>
#include <string>
#include <string_view>

#include "autodiff/reverse_kernels.h"
#include "batching/rules/numbers.h"
#include "core/autograd_node.h"
#include "core/derivative_code.h"
#include "core/lifted_tensor.h"
#include "core/tensor_operators.h"

namespace torchlift::reverse_internal {
namespace {

namespace ops = at::_ops;
using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// --- the two operators ---------------------------------------------------------------------------

// The result at a place is self there, times the elements of src that have the place in index.
struct Scatter {
  using Op = ops::scatter_reduce_two;
  using InPlace = ops::scatter_reduce__two;

  static bool fits(const Tensor& index, const Tensor& src) { return index.sizes() == src.sizes(); }
  static Tensor at_places(const Tensor& t, int64_t dim, const Tensor& index) {
    return t.gather(dim, index);
  }
  static Tensor sum(const Tensor& like, int64_t dim, const Tensor& index, const Tensor& src) {
    return at::zeros_like(like, src.scalar_type()).scatter_add(dim, index, src);
  }
  static Tensor zeroed(const Tensor& t, int64_t dim, const Tensor& index) {
    return t.scatter(dim, index, 0);
  }
};

struct Index {
  using Op = ops::index_reduce;
  using InPlace = ops::index_reduce_;

  static bool fits(const Tensor& /*index*/, const Tensor& /*src*/) { return true; }
  static Tensor at_places(const Tensor& t, int64_t dim, const Tensor& index) {
    return t.index_select(dim, index);
  }
  static Tensor sum(const Tensor& like, int64_t dim, const Tensor& index, const Tensor& src) {
    return at::zeros_like(like, src.scalar_type()).index_add(dim, index, src);
  }
  static Tensor zeroed(const Tensor& t, int64_t dim, const Tensor& index) {
    return t.index_fill(dim, index, 0);
  }
};

// --- the check of the second derivative ----------------------------------------------------------

// The gradient passes unchanged, if `right` is true everywhere.
struct DifferentiableWhereBackward final : public torch::autograd::Node {
  variable_list apply(variable_list&& grads) override {
    check_all(right.unpack(),
              "scatter_reduce() and index_reduce(): Double backward is unsupported for src when >1 "
              "zeros in src are scattered to the same position in self. A jvp of a jvp has no such "
              "limit.");
    return std::move(grads);
  }
  std::string name() const override { return "DifferentiableWhereBackward"; }
  void release_variables() override { right.reset_data(); }

  SavedVariable right;
};

Tensor differentiable_where(const Tensor& right, const Tensor& t) {
  if (!c10::GradMode::is_enabled() || !t.requires_grad()) return t;
  auto node = make_node<DifferentiableWhereBackward>();
  node->right = SavedVariable(right, /*is_output=*/false);
  node->add_next_edge(torch::autograd::impl::gradient_edge(t));
  Tensor result = alias_of(t);
  torch::autograd::set_history(result, node);
  const Tensor& tangent = t._fw_grad(kDual);
  if (tangent.defined()) result._set_fw_grad(tangent, kDual, /*is_inplace_op=*/false);
  return result;
}

// --- the formula ---------------------------------------------------------------------------------

template <class Kind>
struct ProductBackward final : public torch::autograd::Node {
  variable_list apply(variable_list&& grads) override {
    const Tensor& grad = grads[0];
    if (!grad.defined()) return {Tensor(), Tensor()};
    const Tensor x = self.unpack(), place = index.unpack(), factors = src.unpack();
    variable_list result(2);
    if (task_should_compute_output(0)) result[0] = of_self(grad, x, place, factors);
    if (task_should_compute_output(1)) result[1] = of_factors(grad, x, place, factors);
    return result;
  }
  std::string name() const override { return "ProductBackward"; }
  void release_variables() override {
    self.reset_data();
    index.reset_data();
    src.reset_data();
  }

  SavedVariable self, index, src;
  int64_t dim = 0;
  bool include_self = true;

 private:
  Tensor product(const Tensor& x, const Tensor& place, const Tensor& factors) const {
    return Kind::Op::call(x, dim, place, factors, "prod", include_self);
  }

  Tensor of_self(const Tensor& grad, const Tensor& x, const Tensor& place,
                 const Tensor& factors) const {
    const Tensor nonzero = x.masked_fill(x.eq(0), 1);
    const Tensor result = grad * product(nonzero, place, factors) / nonzero;
    return include_self ? result : Kind::zeroed(result, dim, place);
  }

  // The product by a factor that is not zero; where it is the only zero of its place, the product
  // of the others.
  Tensor of_factors(const Tensor& grad, const Tensor& x, const Tensor& place,
                    const Tensor& factors) const {
    const auto there = [&](const Tensor& t) { return Kind::at_places(t, dim, place); };
    const Tensor zero = factors.eq(0);
    const Tensor zeros = there(Kind::sum(x, dim, place, zero.to(at::kLong)));
    const Tensor only = zero.logical_and(zeros.eq(1));
    const Tensor of_others = product(x, place, factors.masked_fill(only, 1));
    const Tensor result =
        at::where(only, there(grad * of_others),
                  there(grad * product(x, place, factors)) / factors.masked_fill(zero, 1));
    return differentiable_where(zeros.le(1), result);
  }
};

// --- kernels -------------------------------------------------------------------------------------

template <class Kind>
bool is_ours(const Tensor& self, const Tensor& index, const Tensor& src, std::string_view reduce) {
  return reduce == "prod" && (is_recorded(self) || is_recorded(src)) && Kind::fits(index, src) &&
         !src.is_complex();
}

bool has_tangent(const Tensor& t) { return t._fw_grad(kDual).defined(); }

template <class Kind>
Tensor reduce_into(c10::DispatchKeySet keys, const Tensor& self, int64_t dim, const Tensor& index,
                   const Tensor& src, std::string_view reduce, bool include_self) {
  using Op = typename Kind::Op;
  if (!is_ours<Kind>(self, index, src, reduce) || has_tangent(self) || has_tangent(src)) {
    return Original<Op>::call(keys, self, dim, index, src, reduce, include_self);
  }
  auto node = make_node<ProductBackward<Kind>>();
  node->self = SavedVariable(self, /*is_output=*/false);
  node->index = SavedVariable(index, /*is_output=*/false);
  node->src = SavedVariable(src, /*is_output=*/false);
  node->dim = dim;
  node->include_self = include_self;
  node->set_next_edges(torch::autograd::collect_next_edges(self, src));
  Tensor result = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return Op::redispatch(keys & c10::after_autograd_keyset, self, dim, index, src, reduce,
                          include_self);
  }();
  torch::autograd::set_history(result, node);
  return result;
}

template <class Kind>
Tensor& reduce_in_place(c10::DispatchKeySet keys, Tensor& self, int64_t dim, const Tensor& index,
                        const Tensor& src, std::string_view reduce, bool include_self) {
  using Op = typename Kind::InPlace;
  if (!is_ours<Kind>(self, index, src, reduce)) {
    return Original<Op>::call(keys, self, dim, index, src, reduce, include_self);
  }
  // The node keeps what self was before.
  return self.copy_(Kind::Op::call(self.clone(), dim, index, src, reduce, include_self));
}

template <class Kind>
void install() {
  replace_autograd<typename Kind::Op, &reduce_into<Kind>>();
  replace_autograd<typename Kind::InPlace, &reduce_in_place<Kind>>();
}

}  // namespace

void install_products() {
  install<Scatter>();
  install<Index>();
}

}  // namespace torchlift::reverse_internal
