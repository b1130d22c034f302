// linspace and logspace between tensors. libtorch takes the numbers out of them.

#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/linspace_ops.h>
#include <ATen/ops/logspace_ops.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/where.h>
#include <c10/core/DefaultDtype.h>

#include <optional>

#include "core/registry.h"
#include "core/tensor_operators.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;
using at::Tensor;

struct Target {
  at::ScalarType dtype;
  at::ScalarType compute;  // what libtorch calculates steps in
  at::Device device;
};

bool is_complex(const at::Scalar& end) { return end.isComplex(); }
bool is_complex(const Tensor& end) { return end.is_complex(); }

template <class Start, class End>
Target target_of(const Start& start, const End& end, std::optional<at::ScalarType> dtype,
                 std::optional<at::Device> device) {
  at::ScalarType chosen = c10::get_default_dtype_as_scalartype();
  if (is_complex(start) || is_complex(end)) {
    chosen = c10::typeMetaToScalarType(c10::get_default_complex_dtype());
  }
  if (dtype) chosen = *dtype;
  const at::ScalarType compute =
      at::isIntegralType(chosen, /*includeBool=*/true) ? at::kDouble : chosen;
  return {chosen, compute, device.value_or(at::kCPU)};
}

// An end as a tensor of the dtype to compute in, by way of the one that was asked for. What comes
// of it is a constant to autograd, as libtorch's is.
Tensor end_of(const Tensor& end, const Target& target) {
  TORCH_CHECK(end.dim() == 0,
              "linspace only supports 0-dimensional start and end tensors, but got ", "one of ",
              end.dim(), " dims");
  return end.detach().to(target.dtype).to(target.compute);
}

Tensor end_of(const at::Scalar& end, const Target& target) {
  const auto options = at::TensorOptions().device(target.device).dtype(target.compute);
  return at::scalar_tensor(end, options);
}

// From each end to the middle, so that both ends are exact.
template <class Start, class End>
Tensor steps_between(const Start& from, const End& to, int64_t steps, const Target& target) {
  TORCH_CHECK(steps >= 0, "number of steps must be non-negative");
  const Tensor start = end_of(from, target), end = end_of(to, target);
  const auto options = at::TensorOptions().device(target.device);
  const Tensor place = at::arange(steps, options.dtype(at::toRealValueType(target.compute)));
  if (steps == 1) return start + place;
  const Tensor step = (end - start) / static_cast<double>(steps - 1);
  const Tensor first_half = at::arange(steps, options).lt(steps / 2);
  return at::where(first_half, start + step * place, end - step * (steps - 1 - place));
}

template <class Start, class End>
Tensor linspace(const Start& start, const End& end, int64_t steps,
                std::optional<at::ScalarType> dtype, std::optional<at::Layout> /*layout*/,
                std::optional<at::Device> device, std::optional<bool> /*pin_memory*/) {
  const Target target = target_of(start, end, dtype, device);
  return steps_between(start, end, steps, target).to(target.dtype);
}

template <class Start, class End>
Tensor logspace(const Start& start, const End& end, int64_t steps, double base,
                std::optional<at::ScalarType> dtype, std::optional<at::Layout> /*layout*/,
                std::optional<at::Device> device, std::optional<bool> /*pin_memory*/) {
  const Target target = target_of(start, end, dtype, device);
  return at::pow(base, steps_between(start, end, steps, target)).to(target.dtype);
}

using at::Scalar;

[[maybe_unused]] const RuleSet kRules{
    composite<ops::linspace_Tensor_Tensor, &linspace<Tensor, Tensor>>(),
    composite<ops::linspace_Tensor_Scalar, &linspace<Tensor, Scalar>>(),
    composite<ops::linspace_Scalar_Tensor, &linspace<Scalar, Tensor>>(),
    composite<ops::logspace_Tensor_Tensor, &logspace<Tensor, Tensor>>(),
    composite<ops::logspace_Tensor_Scalar, &logspace<Tensor, Scalar>>(),
    composite<ops::logspace_Scalar_Tensor, &logspace<Scalar, Tensor>>(),
};

}  // namespace
}  // namespace torchlift
