#include "compile/hollow_rules.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <ATen/native/ConvUtils.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "batching/rules/assumptions.h"
#include "compile/hollow.h"

namespace torchlift::compile {
namespace {

using at::Tensor;
using c10::IValue;
using torch::jit::Stack;

// --- convolutions --------------------------------------------------------------------------------

// The arguments that convolution and convolution_backward have in common.
struct Convolution {
  Tensor input, weight;
  std::optional<Tensor> bias;
  std::optional<std::vector<int64_t>> bias_sizes;
  std::vector<int64_t> stride, padding, dilation, output_padding;
  bool transposed = false;
  int64_t groups = 1;

  // From its input on; the bias, or its sizes, come third.
  static Convolution from(const Stack& arguments, size_t first) {
    Convolution all;
    all.input = arguments[first].toTensor();
    all.weight = arguments[first + 1].toTensor();
    const IValue& bias = arguments[first + 2];
    if (bias.isTensor()) all.bias = bias.toTensor();
    if (bias.isIntList()) all.bias_sizes = bias.toIntVector();
    all.stride = all.spatial(arguments[first + 3]);
    all.padding = all.spatial(arguments[first + 4]);
    all.dilation = all.spatial(arguments[first + 5]);
    all.transposed = arguments[first + 6].toBool();
    all.output_padding = all.spatial(arguments[first + 7]);
    all.groups = arguments[first + 8].toInt();
    return all;
  }

  // One number stands for all dims of an image.
  std::vector<int64_t> spatial(const IValue& numbers) const {
    const std::vector<int64_t> given = numbers.toIntVector();
    const auto dims = static_cast<size_t>(std::max<int64_t>(weight.dim() - 2, 0));
    return given.size() == 1 ? std::vector<int64_t>(dims, given[0]) : given;
  }

  std::vector<int64_t> output_sizes() const {
    return transposed ? at::native::conv_input_size(input.sizes(), weight.sizes(), padding,
                                                    output_padding, stride, dilation, groups)
                      : at::native::conv_output_size(input.sizes(), weight.sizes(), padding, stride,
                                                     dilation);
  }

  // That of the backend which libtorch takes. Throws for arguments that do not fit.
  at::MemoryFormat format() const {
    const auto symbolic = [](const std::vector<int64_t>& numbers) {
      return std::vector<c10::SymInt>(numbers.begin(), numbers.end());
    };
    std::vector<c10::SymInt> of_bias;
    if (bias_sizes.has_value()) of_bias = symbolic(*bias_sizes);
    const at::native::ConvBackend backend = at::native::select_conv_backend(
        input, weight, bias, symbolic(stride), symbolic(padding), symbolic(dilation), transposed,
        symbolic(output_padding), groups,
        bias_sizes.has_value() ? at::OptionalSymIntArrayRef(of_bias) : std::nullopt);
    // It works on images one line high.
    const bool lines = weight.dim() == 3;
    return at::native::_determine_backend_memory_format(
        lines ? input.unsqueeze(2) : input, lines ? weight.unsqueeze(2) : weight, backend);
  }
};

// A hollow tensor of these sizes, and of the dtype and device of `like`.
Tensor formatted(const std::vector<int64_t>& sizes, at::MemoryFormat format, const Tensor& like) {
  const auto empty = [&](at::IntArrayRef shape) {
    return at::empty(shape, like.options().device(c10::kMeta), format);
  };
  if (sizes.size() == 3 && format == at::MemoryFormat::ChannelsLast) {
    return hollow_like(empty({sizes[0], sizes[1], 1, sizes[2]}).squeeze(2), like.device());
  }
  return hollow_like(empty(sizes), like.device());
}

Stack convolution(const Stack& arguments, Stack /*results*/) {
  const Convolution call = Convolution::from(arguments, 0);
  const at::MemoryFormat format = call.format();
  return {formatted(call.output_sizes(), format, call.input)};
}

Stack convolution_backward(const Stack& arguments, Stack /*results*/) {
  const Convolution call = Convolution::from(arguments, 1);
  const at::MemoryFormat format = call.format();
  const auto wanted = arguments[10].toBoolList();
  const Tensor& grad = arguments[0].toTensor();
  const int64_t channels = grad.size(1);
  return {wanted[0] ? formatted(call.input.sizes().vec(), format, call.input) : Tensor(),
          wanted[1] ? formatted(call.weight.sizes().vec(), format, call.weight) : Tensor(),
          wanted[2] ? formatted({channels}, at::MemoryFormat::Contiguous, grad) : Tensor()};
}

// --- batch norms ---------------------------------------------------------------------------------

// In eval mode the CPU's kernel saves no statistics. (The first tensor is the input; `training` is
// the only flag.)
Stack batch_norm(const Stack& arguments, Stack results) {
  bool training = true;
  for (const IValue& argument : arguments) {
    if (argument.isBool()) {
      training = argument.toBool();
      break;
    }
  }
  if (training || !arguments[0].toTensor().is_cpu()) return results;
  for (size_t i = 1; i < 3; ++i) {
    const Tensor& saved = results[i].toTensor();
    results[i] = hollow_like(at::empty({0}, saved.options().device(c10::kMeta)), saved.device());
  }
  return results;
}

// --- what looks at numbers -----------------------------------------------------------------------

// There is nothing to check.
Stack assert_async(const Stack& /*arguments*/, Stack /*results*/) { return {}; }

Tensor contiguous(const std::vector<int64_t>& sizes, const Tensor& like) {
  return formatted(sizes, at::MemoryFormat::Contiguous, like);
}

// Of lengths that are integers, or of tensors of which the last target is as long as it can be:
// NOTE [ctc losses of one size] in compile/trace_rules.cc.
Stack ctc_loss(const Stack& arguments, Stack /*results*/) {
  const Tensor &log_probs = arguments[0].toTensor(), &targets = arguments[1].toTensor();
  const int64_t count = log_probs.size(1);
  int64_t longest = targets.dim() == 1 ? targets.size(0) / 2 : targets.size(1);
  if (arguments[3].isIntList()) {
    longest = 0;
    for (const int64_t each : arguments[3].toIntVector()) longest = std::max(longest, each);
  }
  return {contiguous({count}, log_probs),
          contiguous({count, log_probs.size(0), 2 * longest + 1}, log_probs)};
}

Stack masked_scatter_backward(const Stack& arguments, Stack /*results*/) {
  return {contiguous(arguments[2].toIntVector(), arguments[0].toTensor())};
}

const std::unordered_map<std::string, HollowRule>& rules() {
  static const auto* all = new std::unordered_map<std::string, HollowRule>{
      {"aten::convolution", {.complete = true, .apply = convolution}},
      {"aten::convolution_backward", {.complete = true, .apply = convolution_backward}},
      {"aten::_assert_async", {.complete = true, .apply = assert_async}},
      {kAssumeOp, {.complete = true, .apply = assert_async}},
      {"aten::_ctc_loss", {.complete = true, .apply = ctc_loss}},
      {"aten::masked_scatter_backward", {.complete = true, .apply = masked_scatter_backward}},
      {"aten::native_batch_norm", {.complete = false, .apply = batch_norm}},
      {"aten::_native_batch_norm_legit", {.complete = false, .apply = batch_norm}},
  };
  return *all;
}

}  // namespace

const HollowRule* find_hollow_rule(const c10::OperatorHandle& op) {
  // Not for the out= forms.
  if (op.schema().is_mutable() && op.schema().overload_name().find("out") != std::string::npos) {
    return nullptr;
  }
  const auto found = rules().find(op.schema().name());
  return found == rules().end() ? nullptr : &found->second;
}

}  // namespace torchlift::compile
