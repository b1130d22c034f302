#include "autodiff/reverse_formulas.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/CppSignature.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/stack.h>
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
#include <c10/core/CompileTimeFunctionPointer.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/autograd_node.h"
#include "core/keys.h"
#include "core/lifted_tensor.h"
#include "core/tensor_operators.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;
using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

thread_local int64_t open_count = 0;

bool is_recorded(const Tensor& t) {
  return open_count > 0 && c10::GradMode::is_enabled() && t.requires_grad();
}

// Autograd's kernel of an operator, once ours has taken its place.
template <class Op>
struct Original {
  static inline c10::KernelFunction kernel;

  template <class... A>
  static decltype(auto) call(DispatchKeySet keys, A&&... args) {
    return call_as(static_cast<typename Op::schema*>(nullptr), keys, std::forward<A>(args)...);
  }

 private:
  template <class R, class... Parameters, class... A>
  static R call_as(R (* /*schema*/)(Parameters...), DispatchKeySet keys, A&&... args) {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow(Op::name, Op::overload_name);
    return kernel.call<R, Parameters...>(op, keys, std::forward<A>(args)...);
  }
};

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

Tensor index_put(DispatchKeySet keys, const Tensor& self,
                 const c10::List<std::optional<Tensor>>& indices, const Tensor& values,
                 bool accumulate) {
  if (const auto mask = mask_to_fill_by(self, indices, values)) {
    return filled(*mask, self, values, accumulate);
  }
  return Original<ops::index_put>::call(keys, self, indices, values, accumulate);
}

Tensor& index_put_(DispatchKeySet keys, Tensor& self,
                   const c10::List<std::optional<Tensor>>& indices, const Tensor& values,
                   bool accumulate) {
  if (const auto mask = mask_to_fill_by(self, indices, values)) {
    return self.copy_(filled(*mask, self, values, accumulate));
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

// Autograd keeps the statistic itself, as a constant.
Tensor alias_of(const Tensor& statistic) {
  const LiftedTensorImpl* impl = as_lifted(statistic);
  return impl != nullptr ? lift_alias(impl->value(), impl->bdim(), impl->level_ptr())
                         : statistic.detach();
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

// Registrations live as long as the process: libtorch's tables are torn down after us at exit.
std::vector<c10::RegistrationHandleRAII>& handles() {
  static auto* all = new std::vector<c10::RegistrationHandleRAII>();
  return *all;
}

// Before torch 2.15 the dispatcher hands out a kernel that can only be called boxed.
template <class Found>
class BoxedKernel final : public c10::OperatorKernel {
 public:
  explicit BoxedKernel(Found found) : found_(std::move(found)) {}
  void operator()(const c10::OperatorHandle& op, DispatchKeySet keys, torch::jit::Stack* stack) {
    found_.callBoxed(op, keys, stack);
  }

 private:
  const Found found_;
};

template <class Found>
c10::KernelFunction kernel_of(Found found) {
  if constexpr (requires { found.kernelFunction(); }) {
    return found.kernelFunction();
  } else {
    return c10::KernelFunction::makeFromBoxedFunctor(
        std::make_unique<BoxedKernel<Found>>(std::move(found)));
  }
}

// libtorch registers its kernels for all of autograd, ours come before those for single backends.
template <class Op, auto Kernel>
void replace_autograd() {
  auto& dispatcher = c10::Dispatcher::singleton();
  const auto op = dispatcher.findSchemaOrThrow(Op::name, Op::overload_name);
  Original<Op>::kernel = kernel_of(op.getComputedKernelForDispatchKey(DispatchKey::AutogradCPU));
  for (const DispatchKey key :
       {DispatchKey::AutogradCPU, DispatchKey::AutogradCUDA, DispatchKey::AutogradPrivateUse3}) {
    handles().push_back(dispatcher.registerImpl(
        op.operator_name(), key, c10::KernelFunction::makeFromUnboxedFunction(TORCH_FN(Kernel)),
        c10::impl::CppSignature::make<typename Op::schema>(),
        /*inferred_function_schema=*/nullptr, "torchlift"));
  }
}

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
  return true;
}

}  // namespace

void open_reverse_formulas() {
  static const bool installed = install();
  static_cast<void>(installed);
  ++open_count;
}

void close_reverse_formulas() { --open_count; }

bool reverse_formulas_open() { return open_count > 0; }

}  // namespace torchlift
