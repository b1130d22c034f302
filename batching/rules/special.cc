#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <string>
#include <vector>

#include "batching/rules/pointwise.h"
#include "core/boxed.h"

// Special functions, element by element. They are many and seldom used, so one boxed rule serves
// them all.

namespace torchlift {
namespace {

namespace pi = pointwise_internal;

void boxed_pointwise(const c10::OperatorHandle& op, const LevelPtr& level,
                     torch::jit::Stack* stack) {
  const std::vector<c10::IValue> args = torch::jit::pop(*stack, op.schema().arguments().size());
  std::vector<Batched> operands;
  for (const c10::IValue& arg : args) {
    if (arg.isTensor()) operands.push_back(lower(arg.toTensor(), *level));
  }
  pi::Common common;
  for (const Batched& operand : operands) common(as_arg(operand));
  torch::jit::Stack call;
  size_t next = 0;
  for (const c10::IValue& arg : args) {
    call.push_back(arg.isTensor() ? c10::IValue(pi::align(as_arg(operands[next++]), common)) : arg);
  }
  op.callBoxed(call);
  stack->emplace_back(lift(call.back().toTensor(), 0, level));
}

std::vector<RuleEntry> special_rows() {
  std::vector<RuleEntry> rows;
  const auto add = [&](const std::string& name, std::initializer_list<const char*> overloads) {
    for (const char* overload : overloads) {
      rows.push_back(boxed_rule("aten::special_" + name, overload, &boxed_pointwise));
    }
  };
  for (const char* name :
       {"airy_ai", "bessel_j0", "bessel_j1", "bessel_y0", "bessel_y1", "entr", "erfcx", "i0e", "i1",
        "i1e", "log_ndtr", "modified_bessel_i0", "modified_bessel_i1", "modified_bessel_k0",
        "modified_bessel_k1", "ndtri", "scaled_modified_bessel_k0", "scaled_modified_bessel_k1",
        "spherical_bessel_j0"}) {
    add(name, {""});
  }
  for (const char* name :
       {"chebyshev_polynomial_t", "chebyshev_polynomial_u", "chebyshev_polynomial_v",
        "chebyshev_polynomial_w", "hermite_polynomial_h", "hermite_polynomial_he",
        "laguerre_polynomial_l", "legendre_polynomial_p", "shifted_chebyshev_polynomial_t",
        "shifted_chebyshev_polynomial_u", "shifted_chebyshev_polynomial_v",
        "shifted_chebyshev_polynomial_w"}) {
    add(name, {"", "n_scalar", "x_scalar"});
  }
  for (const char* name : {"xlog1py", "zeta"}) add(name, {"", "other_scalar", "self_scalar"});
  return rows;
}

[[maybe_unused]] const RuleSet kRules{special_rows()};

}  // namespace
}  // namespace torchlift
