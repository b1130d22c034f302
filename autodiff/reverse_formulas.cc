#include "autodiff/reverse_formulas.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/_batch_norm_with_update_ops.h>
#include <ATen/ops/_native_batch_norm_legit_ops.h>
#include <ATen/ops/batch_norm_backward_ops.h>
#include <ATen/ops/cholesky_inverse_ops.h>
#include <ATen/ops/index_put_ops.h>
#include <ATen/ops/native_batch_norm_backward_ops.h>
#include <ATen/ops/native_batch_norm_ops.h>
#include <ATen/ops/native_layer_norm_backward_ops.h>
#include <ATen/ops/native_layer_norm_ops.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "autodiff/reverse_kernels.h"
#include "batching/rules/numbers.h"
#include "core/autograd_node.h"
#include "core/lifted_tensor.h"
#include "core/tensor_operators.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;
using at::Tensor;
using c10::DispatchKeySet;
using reverse_internal::alias_of;
using reverse_internal::is_recorded;
using reverse_internal::Original;
using reverse_internal::replace_autograd;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

thread_local int64_t open_count = 0;

// --- cholesky_inverse ----------------------------------------------------------------------------

Tensor cholesky_inverse(DispatchKeySet keys, const Tensor& self, bool upper) {
  using Autograd = Original<ops::cholesky_inverse>;
  if (!is_recorded(self)) return Autograd::call(keys, self, upper);
  return Autograd::call(keys, upper ? self.triu() : self.tril(), upper);
}

// --- x[mask] = v ---------------------------------------------------------------------------------

// Whether the examples of some level have masks of their own.
bool differs(const Tensor& mask) {
  for (const LiftedTensorImpl* impl = as_lifted(mask); impl != nullptr;
       impl = as_lifted(impl->value())) {
    if (impl->bdim()) return true;
  }
  return false;
}

// Where libtorch's formula reads the gradient at the places of a mask, whose number differs from
// example to example: the mask, with a dim for each of x's; v has none for the places.
std::optional<Tensor> mask_to_fill_by(const Tensor& self,
                                      const c10::List<std::optional<Tensor>>& indices,
                                      const Tensor& values) {
  if (!is_recorded(self) && !is_recorded(values)) return std::nullopt;
  if (indices.size() != 1 || !indices.get(0).has_value()) return std::nullopt;
  Tensor mask = *indices.get(0);
  if (mask.scalar_type() != at::kBool || !differs(mask)) return std::nullopt;
  if (mask.dim() + values.dim() > self.dim()) return std::nullopt;
  while (mask.dim() < self.dim()) mask = mask.unsqueeze(-1);
  return mask;
}

Tensor filled(const Tensor& mask, const Tensor& self, const Tensor& values, bool accumulate) {
  return at::where(mask, accumulate ? self + values : values, self);
}

// NOTE [masks in traces]
// Where a mask is computed from the inputs of a trace, and v has an element for each of its places,
// their number is that of v, which the graph checks. x[:, mask] = v is then
//   x with the dims of the mask in front, y: masked_scatter(y, mask, v),
// whose gradient has the shape of v whatever the mask holds.
struct MaskedPlaces {
  Tensor mask;  // [mask..., 1...], for the dims of x with those of the mask in front
  int64_t leading = 0;
  int64_t rank = 0;   // of the mask
  int64_t count = 0;  // of places, in v

  // x, or values that have one dim for the places, with their dims in front; and back.
  Tensor in_front(const Tensor& t, int64_t dims) const { return moved(t, dims, /*to_front=*/true); }
  Tensor back(const Tensor& t, int64_t dims) const { return moved(t, dims, /*to_front=*/false); }

 private:
  Tensor moved(const Tensor& t, int64_t dims, bool to_front) const {
    std::vector<int64_t> order(dims), places(dims);
    for (int64_t i = 0; i < dims; ++i) {
      order[i] = i;
      places[i] = leading + i;
    }
    return to_front ? t.movedim(places, order) : t.movedim(order, places);
  }
};

std::optional<MaskedPlaces> recorded_places(const Tensor& self,
                                            const c10::List<std::optional<Tensor>>& indices,
                                            const Tensor& values) {
  if (!is_recorded(values) || values.scalar_type() != self.scalar_type()) return std::nullopt;
  MaskedPlaces all;
  std::optional<Tensor> mask;
  for (size_t i = 0; i < indices.size(); ++i) {
    const std::optional<Tensor> index = indices.get(i);
    if (!index.has_value() || !index->defined()) continue;
    if (mask.has_value()) return std::nullopt;
    mask = index;
    all.leading = static_cast<int64_t>(i);
  }
  if (!mask.has_value() || mask->scalar_type() != at::kBool || recorded_by(*mask) == nullptr) {
    return std::nullopt;
  }
  all.rank = mask->dim();
  const int64_t trailing = self.dim() - all.leading - all.rank;
  if (all.rank == 0 || trailing < 0) return std::nullopt;
  if (self.sizes().slice(all.leading, all.rank) != mask->sizes()) return std::nullopt;
  all.count = values.dim() > trailing ? values.size(values.dim() - trailing - 1) : 1;
  all.mask = *mask;
  for (int64_t i = 0; i < self.dim() - all.rank; ++i) all.mask = all.mask.unsqueeze(-1);
  return all;
}

// As the operator gives it, without a graph of its places.
Tensor scattered(const MaskedPlaces& places, const Tensor& self, const Tensor& values,
                 bool accumulate) {
  const Tensor base = places.in_front(self, places.rank);
  // [leading..., places, trailing...]
  std::vector<int64_t> sizes = self.sizes().slice(0, places.leading).vec();
  sizes.push_back(places.count);
  for (int64_t d = places.leading + places.rank; d < self.dim(); ++d) sizes.push_back(self.size(d));
  Tensor result;
  if (places.count == 1) {
    // Perhaps one value for all places.
    const Tensor source = places.in_front(values.expand(sizes), 1);
    result = at::where(places.mask, accumulate ? base + source : source, base);
  } else {
    check_all(places.mask.sum().eq(places.count),
              "shape mismatch: the values that are written at the places of a mask are more, or "
              "fewer, than its places");
    const Tensor source = places.in_front(values.expand(sizes), 1).contiguous();
    const Tensor mask = places.mask.expand(base.sizes());
    result = accumulate ? base + at::zeros_like(base).masked_scatter(mask, source)
                        : base.masked_scatter(mask, source);
  }
  return places.back(result, places.rank);
}

Tensor index_put(DispatchKeySet keys, const Tensor& self,
                 const c10::List<std::optional<Tensor>>& indices, const Tensor& values,
                 bool accumulate) {
  if (const auto mask = mask_to_fill_by(self, indices, values)) {
    return filled(*mask, self, values, accumulate);
  }
  if (const auto places = recorded_places(self, indices, values)) {
    return scattered(*places, self, values, accumulate);
  }
  return Original<ops::index_put>::call(keys, self, indices, values, accumulate);
}

Tensor& index_put_(DispatchKeySet keys, Tensor& self,
                   const c10::List<std::optional<Tensor>>& indices, const Tensor& values,
                   bool accumulate) {
  if (const auto mask = mask_to_fill_by(self, indices, values)) {
    return self.copy_(filled(*mask, self, values, accumulate));
  }
  if (const auto places = recorded_places(self, indices, values)) {
    return self.copy_(scattered(*places, self, values, accumulate));
  }
  return Original<ops::index_put_>::call(keys, self, indices, values, accumulate);
}

// --- statistics of normalizations ----------------------------------------------------------------

// mean(x) and (var(x) + eps)^(-1/2) over some dims of x.
struct StatisticsBackward final : public torch::autograd::Node {
  variable_list apply(variable_list&& grads) override;
  std::string name() const override { return "StatisticsBackward"; }
  void release_variables() override { input.reset_data(); }

  SavedVariable input;
  std::vector<int64_t> dims;
  std::vector<int64_t> shape;  // of a statistic, with the dims of x
  double eps = 0;
};

variable_list StatisticsBackward::apply(variable_list&& grads) {
  const Tensor &of_mean = grads[0], &of_rstd = grads[1];
  if (!of_mean.defined() && !of_rstd.defined()) return {Tensor()};
  const Tensor saved = input.unpack();
  const Tensor x = saved.to((of_mean.defined() ? of_mean : of_rstd).scalar_type());
  double count = 1;
  for (const int64_t dim : dims) count *= static_cast<double>(x.size(dim));
  Tensor grad;
  if (of_mean.defined()) grad = (of_mean.reshape(shape) / count).expand_as(x);
  if (of_rstd.defined()) {
    const Tensor centred = x - x.mean(dims, /*keepdim=*/true);
    const Tensor variance = (centred * centred).mean(dims, /*keepdim=*/true);
    const Tensor part = of_rstd.reshape(shape) * (variance + eps).pow(-1.5) * centred / -count;
    grad = grad.defined() ? grad + part : part;
  }
  return {grad.to(saved.scalar_type())};
}

void connect(Tensor& mean, Tensor& rstd, const Tensor& input, std::vector<int64_t> dims,
             double eps) {
  auto node = make_node<StatisticsBackward>();
  node->input = SavedVariable(input, /*is_output=*/false);
  node->shape.assign(input.sizes().begin(), input.sizes().end());
  for (const int64_t dim : dims) node->shape[dim] = 1;
  node->dims = std::move(dims);
  node->eps = eps;
  node->add_next_edge(torch::autograd::impl::gradient_edge(input));
  for (Tensor* statistic : {&mean, &rstd}) {
    *statistic = alias_of(*statistic);
    torch::autograd::set_history(*statistic, node);
  }
}

// All but the channels.
std::vector<int64_t> batch_dims(const Tensor& input) {
  std::vector<int64_t> dims;
  for (int64_t i = 0; i < input.dim(); ++i) {
    if (i != 1) dims.push_back(i);
  }
  return dims;
}

std::vector<int64_t> last_dims(const Tensor& input, c10::SymIntArrayRef shape) {
  std::vector<int64_t> dims;
  for (int64_t i = input.dim() - static_cast<int64_t>(shape.size()); i < input.dim(); ++i) {
    dims.push_back(i);
  }
  return dims;
}

template <class... A>
std::vector<int64_t> normalized_dims(const Tensor& input, const A&... rest) {
  const auto& second = std::get<0>(std::tie(rest...));
  if constexpr (std::is_same_v<decltype(second), const c10::SymIntArrayRef&>) {
    return last_dims(input, second);
  } else {
    return batch_dims(input);
  }
}

// An operator that returns its output, the mean and the reciprocal standard deviation, and takes
// eps as its last argument.
template <class Op, class Schema = typename Op::schema>
struct Normalization;

template <class Op, class R, class... A>
struct Normalization<Op, R(const Tensor&, A...)> {
  static R call(DispatchKeySet keys, const Tensor& input, A... rest) {
    R results = Original<Op>::call(keys, input, rest...);
    // Without training there are none.
    if (is_recorded(input) && std::get<1>(results).numel() > 0) {
      const double eps = std::get<sizeof...(A) - 1>(std::tie(rest...));
      connect(std::get<1>(results), std::get<2>(results), input, normalized_dims(input, rest...),
              eps);
    }
    return results;
  }
};

// --- their backward passes -----------------------------------------------------------------------
//
// libtorch's second derivatives take the statistics for what they are, functions of the input, and
// refuse such as have a graph of their own. Those of an outer domain have one now.

using Gradients = std::tuple<Tensor, Tensor, Tensor>;
using OptionalTensor = std::optional<Tensor>;

Tensor without_graph(const Tensor& statistic) {
  return statistic.defined() && statistic.grad_fn() != nullptr ? alias_of(statistic) : statistic;
}

OptionalTensor without_graph(const OptionalTensor& statistic) {
  return statistic.has_value() ? OptionalTensor(without_graph(*statistic)) : std::nullopt;
}

Gradients layer_norm_backward(DispatchKeySet keys, const Tensor& grad, const Tensor& input,
                              c10::SymIntArrayRef shape, const Tensor& mean, const Tensor& rstd,
                              const OptionalTensor& weight, const OptionalTensor& bias,
                              std::array<bool, 3> mask) {
  return Original<ops::native_layer_norm_backward>::call(
      keys, grad, input, shape, without_graph(mean), without_graph(rstd), weight, bias, mask);
}

Gradients native_batch_norm_backward(DispatchKeySet keys, const Tensor& grad, const Tensor& input,
                                     const OptionalTensor& weight,
                                     const OptionalTensor& running_mean,
                                     const OptionalTensor& running_var, const OptionalTensor& mean,
                                     const OptionalTensor& rstd, bool train, double eps,
                                     std::array<bool, 3> mask) {
  return Original<ops::native_batch_norm_backward>::call(keys, grad, input, weight, running_mean,
                                                         running_var, without_graph(mean),
                                                         without_graph(rstd), train, eps, mask);
}

Gradients batch_norm_backward(DispatchKeySet keys, const Tensor& grad, const Tensor& input,
                              const Tensor& weight, const OptionalTensor& running_mean,
                              const OptionalTensor& running_var, const OptionalTensor& mean,
                              const OptionalTensor& rstd, bool update, double eps,
                              std::array<bool, 3> mask, const Tensor& reserve) {
  return Original<ops::batch_norm_backward>::call(keys, grad, input, weight, running_mean,
                                                  running_var, without_graph(mean),
                                                  without_graph(rstd), update, eps, mask, reserve);
}

// --- installing ----------------------------------------------------------------------------------

template <class Op>
void replace_normalization() {
  replace_autograd<Op, &Normalization<Op>::call>();
}

bool install() {
  replace_autograd<ops::cholesky_inverse, &cholesky_inverse>();
  replace_autograd<ops::index_put, &index_put>();
  replace_autograd<ops::index_put_, &index_put_>();
  replace_normalization<ops::native_batch_norm>();
  replace_normalization<ops::_native_batch_norm_legit>();
  replace_normalization<ops::_native_batch_norm_legit_no_stats>();
  replace_normalization<ops::_batch_norm_with_update>();
  replace_normalization<ops::native_layer_norm>();
  replace_autograd<ops::native_layer_norm_backward, &layer_norm_backward>();
  replace_autograd<ops::native_batch_norm_backward, &native_batch_norm_backward>();
  replace_autograd<ops::batch_norm_backward, &batch_norm_backward>();
  reverse_internal::install_products();
  return true;
}

}  // namespace

// Autograd keeps the tensor itself as it is.
Tensor reverse_internal::alias_of(const Tensor& t) {
  const LiftedTensorImpl* impl = as_lifted(t);
  return impl != nullptr ? lift_alias(impl->value(), impl->bdim(), impl->level_ptr()) : t.detach();
}

void reverse_internal::keep(c10::RegistrationHandleRAII handle) {
  static auto* all = new std::vector<c10::RegistrationHandleRAII>();
  all->push_back(std::move(handle));
}

void open_reverse_formulas() {
  static const bool installed = install();
  static_cast<void>(installed);
  ++open_count;
}

void close_reverse_formulas() { --open_count; }

bool reverse_formulas_open() { return open_count > 0; }

}  // namespace torchlift
