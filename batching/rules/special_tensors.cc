// Operators that make quantized or nested tensors of batched ones: refused. See NOTE [nested and
// quantized tensors] in core/lifted_tensor.cc.

#include <ATen/core/dispatch/Dispatcher.h>

#include "core/error.h"
#include "core/registry.h"

namespace torchlift {
namespace {

[[noreturn]] void throw_quantized(const c10::OperatorHandle& op, const LevelPtr& level,
                                  torch::jit::Stack* /*stack*/) {
  unsupported_error("vmap", op.schema().name(), " of a tensor of ", level->describe(),
                    " would give a quantized tensor that differs between the examples, on which "
                    "operators have no batching rules. Use "
                    "torch.fake_quantize_per_tensor_affine, which rounds as it does and returns an "
                    "ordinary tensor, or quantize the result of vmap.");
}

[[noreturn]] void throw_nested(const c10::OperatorHandle& op, const LevelPtr& level,
                               torch::jit::Stack* /*stack*/) {
  unsupported_error("vmap", op.schema().name(), " of tensors of ", level->describe(),
                    " would give a nested tensor that differs between the examples, which has no "
                    "sizes to batch. Pad them to one shape (torch.nn.functional.pad), and mask.");
}

[[maybe_unused]] const RuleSet kRules{
    boxed_rule("aten::quantize_per_tensor", "", &throw_quantized),
    boxed_rule("aten::quantize_per_tensor", "tensor_qparams", &throw_quantized),
    boxed_rule("aten::quantize_per_tensor", "tensors", &throw_quantized),
    boxed_rule("aten::quantize_per_tensor_dynamic", "", &throw_quantized),
    boxed_rule("aten::quantize_per_channel", "", &throw_quantized),
    boxed_rule("aten::_make_per_tensor_quantized_tensor", "", &throw_quantized),
    boxed_rule("aten::_make_per_channel_quantized_tensor", "", &throw_quantized),
    boxed_rule("aten::_nested_tensor_from_tensor_list", "", &throw_nested),
    boxed_rule("aten::_nested_tensor_from_mask", "", &throw_nested),
    boxed_rule("aten::_nested_from_padded", "", &throw_nested),
};

}  // namespace
}  // namespace torchlift
