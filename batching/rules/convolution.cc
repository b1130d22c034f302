#include <ATen/core/Tensor.h>
#include <ATen/ops/_convolution_ops.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/conv1d_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/conv1d_ops.h>
#include <ATen/ops/conv2d_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/conv2d_ops.h>
#include <ATen/ops/conv3d_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/conv3d_ops.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/convolution_backward_ops.h>
#include <ATen/ops/convolution_ops.h>
#include <c10/util/accumulate.h>

#include <array>

#include "batching/rules/dims.h"
#include "core/registry.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;

// NOTE [convolutions of examples]
// input [N, C, *], weight [O, C/g, *] (transposed: [C, O/g, *]), output [N, O, *]. One kernel does
// all examples; where the batch dim goes depends on who has one:
//   input                  into N
//   weight, g == 1         into O: one input, all kernels
//   both                   into C and O, with B*g groups: [N, B*C, *] * [B*O, C/g, *] -> [N, B*O,
//   *]
// The gradients are convolutions too: that of the input is decided by (grad_output, weight), that
// of the weight by (grad_output, input), each as above. Operands that decide only a shape are not
// read.

// How a convolution is made, apart from its tensors.
struct Geometry {
  at::IntArrayRef stride;
  at::IntArrayRef padding;
  at::IntArrayRef dilation;
  bool transposed;
  at::IntArrayRef output_padding;
  int64_t groups;

  // The dim of the weight that goes with the output's (input's) channels.
  int64_t out_dim() const { return transposed ? 1 : 0; }
  int64_t in_dim() const { return transposed ? 0 : 1; }
};

at::Tensor convolve(const at::Tensor& input, const at::Tensor& weight,
                    const std::optional<at::Tensor>& bias, const Geometry& g, int64_t groups) {
  return at::convolution(input, weight, bias, g.stride, g.padding, g.dilation, g.transposed,
                         g.output_padding, groups);
}

at::Tensor grad_of_input(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
                         const Geometry& g, int64_t groups) {
  return std::get<0>(at::convolution_backward(grad, input, weight, std::nullopt, g.stride,
                                              g.padding, g.dilation, g.transposed, g.output_padding,
                                              groups, {true, false, false}));
}

at::Tensor grad_of_weight(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
                          const Geometry& g, int64_t groups) {
  return std::get<1>(at::convolution_backward(grad, input, weight, std::nullopt, g.stride,
                                              g.padding, g.dilation, g.transposed, g.output_padding,
                                              groups, {false, true, false}));
}

// [B, N, C, *] -> [B*N, C, *]
at::Tensor into_batch(const BatchedArg& arg) { return merge_dim(batch_first(arg), 0, 0); }

// [B, N, C, *] -> [N, B*C, *]; without a batch dim, C is repeated.
at::Tensor into_channels(const BatchedArg& arg, int64_t batch) {
  return merge_dim(expanded(arg, batch), 0, 1);
}

// [B, O, C, *] -> [B*O, C, *]
at::Tensor into_rows(const BatchedArg& weight, int64_t batch) {
  return merge_dim(expanded(weight, batch), 0, 0);
}

void check_ranks(const BatchedArg& input, const BatchedArg& weight) {
  TORCH_CHECK(
      input.logical_dim() == weight.logical_dim() && weight.logical_dim() > 2,
      "[vmap] convolution: expected input [N, C, ...] and weight [O, C, ...] with the same number "
      "of dimensions, but got ",
      at::IntArrayRef(logical_sizes(input)), " and ", at::IntArrayRef(logical_sizes(weight)));
}

// One example of zeros in place of arg.
at::Tensor zero_example(const BatchedArg& arg) { return arg.value.new_zeros(logical_sizes(arg)); }

// A batch of no examples shaped like `example`.
Batched no_examples(const at::Tensor& example) { return {example.unsqueeze(0).narrow(0, 0, 0), 0}; }

// --- forward -------------------------------------------------------------------------------------

// NOTE [bias after]
// libtorch's kernel for transposed convolutions on a CPU takes 1.5 to 6 times as long with a bias
// for the channels of all examples as without one. There it is added after; kernels for other
// convolutions add it on the way.

// What libtorch's kernels check of a bias, and an addition would not.
void check_bias(const BatchedArg& bias, const at::Tensor& out, int64_t channels) {
  TORCH_CHECK(bias.logical_dim() == 1 && logical_sizes(bias)[0] == channels,
              "[vmap] convolution: expected a bias of shape [", channels,
              "], one number for each output channel, but got shape ",
              at::IntArrayRef(logical_sizes(bias)));
  TORCH_CHECK(bias.value.scalar_type() == out.scalar_type(),
              "[vmap] convolution: expected a bias of the input's dtype, ", out.scalar_type(),
              ", but got ", bias.value.scalar_type());
}

// out [N, O, *] (with a batch dim or not) + bias [O] (with one or not).
Batched add_bias(const Batched& out, const std::optional<BatchedArg>& bias) {
  if (!bias.has_value()) return out;
  const at::Tensor value = batch_first(as_arg(out));
  check_bias(*bias, value, value.size(out.bdim ? 2 : 1));
  const int64_t spatial = value.dim() - (out.bdim ? 3 : 2);
  at::Tensor row = batch_first(*bias);
  if (bias->bdim) row = row.unsqueeze(1);
  for (int64_t i = 0; i < spatial; ++i) row = row.unsqueeze(-1);
  return {value.add(row), 0};
}

// Calls run(bias for B*O channels), which returns [N, B*O, *].
template <class Run>
Batched with_bias_of_all(const std::optional<BatchedArg>& bias, int64_t batch, const Geometry& g,
                         Run&& run) {
  if (!bias.has_value() || g.transposed) {
    return add_bias({split_dim(run(std::nullopt), 1, batch), 1}, bias);
  }
  return {split_dim(run(expanded(*bias, batch).flatten(0, 1)), 1, batch), 1};
}

Batched convolve_inputs(const BatchedArg& input, const at::Tensor& weight,
                        const std::optional<BatchedArg>& bias, const Geometry& g) {
  const int64_t batch = batch_size_of({&input});
  const bool shared_bias = bias.has_value() && !bias->bdim;
  const auto fused = shared_bias ? std::optional<at::Tensor>(bias->value) : std::nullopt;
  const at::Tensor out = convolve(into_batch(input), weight, fused, g, g.groups);
  const Batched split{split_dim(out, 0, batch), 0};
  return shared_bias ? split : add_bias(split, bias);
}

Batched convolve_weights(const at::Tensor& input, const BatchedArg& weight,
                         const std::optional<BatchedArg>& bias, const Geometry& g) {
  const int64_t batch = batch_size_of({&weight});
  const at::Tensor kernels = merge_dim(batch_first(weight), 0, g.out_dim());
  return with_bias_of_all(bias, batch, g, [&](const std::optional<at::Tensor>& row) {
    return convolve(input, kernels, row, g, 1);
  });
}

Batched convolve_both(const BatchedArg& input, const BatchedArg& weight,
                      const std::optional<BatchedArg>& bias, const Geometry& g) {
  const int64_t batch = batch_size_of({&input, &weight});
  return with_bias_of_all(bias, batch, g, [&](const std::optional<at::Tensor>& row) {
    return convolve(into_channels(input, batch), into_rows(weight, batch), row, g,
                    batch * g.groups);
  });
}

Batched convolution_rule(const Level& level, BatchedArg input, BatchedArg weight,
                         std::optional<BatchedArg> bias, at::IntArrayRef stride,
                         at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                         at::IntArrayRef output_padding, int64_t groups) {
  check_ranks(input, weight);
  const Geometry g{stride, padding, dilation, transposed, output_padding, groups};
  if (!weight.bdim && !input.bdim) {
    return add_bias({convolve(input.value, weight.value, std::nullopt, g, groups), std::nullopt},
                    bias);
  }
  if (level.size() == 0) {
    return no_examples(
        convolve(zero_example(input), zero_example(weight), std::nullopt, g, groups));
  }
  if (!weight.bdim) return convolve_inputs(input, weight.value, bias, g);
  if (!input.bdim && groups == 1) return convolve_weights(input.value, weight, bias, g);
  return convolve_both(input, weight, bias, g);
}

at::Tensor unpacked_convolution(const at::Tensor& input, const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias, c10::SymIntArrayRef stride,
                                c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                                bool transposed, c10::SymIntArrayRef output_padding,
                                c10::SymInt groups, bool /*benchmark*/, bool /*deterministic*/,
                                bool /*cudnn_enabled*/, bool /*allow_tf32*/) {
  return at::convolution_symint(input, weight, bias, stride, padding, dilation, transposed,
                                output_padding, std::move(groups));
}

// --- gradient of the input -----------------------------------------------------------------------

// A tensor of which only the shape is read.
at::Tensor shape_only(const BatchedArg& arg, at::IntArrayRef sizes) {
  return arg.value.new_empty(sizes);
}

at::Tensor folded_shape(const BatchedArg& input, int64_t batch, int64_t dim) {
  auto sizes = logical_sizes(input);
  sizes[dim] *= batch;
  return shape_only(input, sizes);
}

Batched input_gradient(const Level& level, const BatchedArg& grad, const BatchedArg& input,
                       const BatchedArg& weight, const Geometry& g) {
  const int64_t batch = level.size();
  if (!grad.bdim && !weight.bdim) {
    const at::Tensor shape = folded_shape(input, 1, 0);
    return {grad_of_input(grad.value, shape, weight.value, g, g.groups), std::nullopt};
  }
  if (batch == 0) return no_examples(zero_example(input));
  if (!weight.bdim) {
    const at::Tensor shape = input.bdim ? into_batch(input) : folded_shape(input, batch, 0);
    return {split_dim(grad_of_input(into_batch(grad), shape, weight.value, g, g.groups), 0, batch),
            0};
  }
  const at::Tensor shape = folded_shape(input, batch, 1);
  const at::Tensor out = grad_of_input(into_channels(grad, batch), shape, into_rows(weight, batch),
                                       g, batch * g.groups);
  return {split_dim(out, 1, batch), 1};
}

// --- gradient of the weight ----------------------------------------------------------------------

int64_t parameter(at::IntArrayRef list, int64_t i) { return list.size() == 1 ? list[0] : list[i]; }

// The windows that each weight meets: x [B, N, C, *] -> [B, N, C, *out, *kernel], a view of x
// padded.
at::Tensor windows(const at::Tensor& x, at::IntArrayRef kernel, const Geometry& g) {
  const int64_t spatial = static_cast<int64_t>(kernel.size());
  c10::SmallVector<int64_t, 6> pads;
  bool padded = false;
  for (int64_t i = spatial - 1; i >= 0; --i) {
    pads.append(2, parameter(g.padding, i));
    padded = padded || parameter(g.padding, i) != 0;
  }
  at::Tensor view = padded ? at::constant_pad_nd(x, pads, 0) : x;
  for (int64_t i = 0; i < spatial; ++i) {
    const int64_t step = parameter(g.dilation, i);
    view = view.unfold(3 + i, (kernel[i] - 1) * step + 1, parameter(g.stride, i));
    if (step != 1) view = view.slice(-1, 0, std::nullopt, step);
  }
  return view;
}

// [B, O, N*out] times [B, N*out, C*kernel] -> [B, O, C, *kernel].
Batched weight_gradient_by_windows(const at::Tensor& grad, const at::Tensor& x,
                                   at::IntArrayRef kernel, const Geometry& g) {
  const at::Tensor view = windows(x, kernel, g);
  const int64_t spatial = static_cast<int64_t>(kernel.size());
  const int64_t batch = x.size(0);
  const int64_t channels = x.size(2);
  c10::SmallVector<int64_t, 10> order{0, 2};  // B, C, kernel, N, out
  for (int64_t i = 0; i < spatial; ++i) order.push_back(3 + spatial + i);
  order.push_back(1);
  for (int64_t i = 0; i < spatial; ++i) order.push_back(3 + i);
  c10::SmallVector<int64_t, 6> sizes{batch, grad.size(2), channels};
  int64_t taps = channels;
  for (const int64_t k : kernel) taps *= k;
  sizes.append(kernel.begin(), kernel.end());
  const at::Tensor rows = grad.transpose(1, 2).flatten(2);
  const at::Tensor columns = view.permute(order).reshape({batch, taps, rows.size(2)});
  return {at::bmm(rows, columns.transpose(1, 2)).view(sizes), 0};
}

// NOTE [windows or groups]
// The weight gradients of each sample, by a grouped convolution or by a product with the windows.
// On one CPU thread the windows win by 1.6 to 5 times with few input channels (1 -> 16, 3 -> 16)
// and for kernels of one element, are equal at 16 -> 32, and lose by 1.8 times at 64 -> 64.
constexpr int64_t kFewChannels = 12;

bool prefers_windows(const BatchedArg& input, at::IntArrayRef kernel, const Geometry& g) {
  if (g.transposed || g.groups != 1 || input.value.is_complex()) return false;
  for (size_t i = 0; i < kernel.size(); ++i) {
    if (parameter(g.padding, static_cast<int64_t>(i)) < 0) return false;
  }
  const int64_t taps = c10::multiply_integers(kernel);
  return taps == 1 || logical_sizes(input)[1] <= kFewChannels;
}

Batched weight_gradient_of_both(const BatchedArg& grad, const BatchedArg& input,
                                const BatchedArg& weight, const Geometry& g, int64_t batch) {
  const at::Tensor shape = folded_shape(weight, batch, 0);
  const at::Tensor out = grad_of_weight(into_channels(grad, batch), into_channels(input, batch),
                                        shape, g, batch * g.groups);
  return {split_dim(out, 0, batch), 0};
}

Batched weight_gradient(const Level& level, const BatchedArg& grad, const BatchedArg& input,
                        const BatchedArg& weight, const Geometry& g) {
  const int64_t batch = level.size();
  if (!grad.bdim && !input.bdim) {
    const at::Tensor shape = folded_shape(weight, 1, 0);
    return {grad_of_weight(grad.value, input.value, shape, g, g.groups), std::nullopt};
  }
  if (batch == 0) return no_examples(zero_example(weight));
  if (g.groups == 1 && !input.bdim) {
    const at::Tensor shape = folded_shape(weight, batch, g.out_dim());
    const at::Tensor out = grad_of_weight(into_channels(grad, batch), input.value, shape, g, 1);
    return {split_dim(out, g.out_dim(), batch), g.out_dim()};
  }
  if (g.groups == 1 && !grad.bdim) {
    const at::Tensor shape = folded_shape(weight, batch, g.in_dim());
    const at::Tensor out = grad_of_weight(grad.value, into_channels(input, batch), shape, g, 1);
    return {split_dim(out, g.in_dim(), batch), g.in_dim()};
  }
  const auto sizes = logical_sizes(weight);
  const at::IntArrayRef kernel = at::IntArrayRef(sizes).slice(2);
  if (grad.bdim && input.bdim && prefers_windows(input, kernel, g)) {
    return weight_gradient_by_windows(batch_first(grad), batch_first(input), kernel, g);
  }
  return weight_gradient_of_both(grad, input, weight, g, batch);
}

// --- backward ------------------------------------------------------------------------------------

Batched bias_gradient(const BatchedArg& grad) {
  const at::Tensor value = batch_first(grad);
  const int64_t first = grad.bdim ? 1 : 0;
  c10::SmallVector<int64_t, 6> dims{first};
  for (int64_t i = first + 2; i < value.dim(); ++i) dims.push_back(i);
  return {value.sum(dims), grad.bdim ? std::optional<int64_t>(0) : std::nullopt};
}

std::tuple<Batched, Batched, Batched> convolution_backward_rule(
    const Level& level, BatchedArg grad, BatchedArg input, BatchedArg weight,
    at::OptionalIntArrayRef /*bias_sizes*/, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups,
    std::array<bool, 3> wanted) {
  check_ranks(input, weight);
  const Geometry g{stride, padding, dilation, transposed, output_padding, groups};
  return {wanted[0] ? input_gradient(level, grad, input, weight, g) : Batched{},
          wanted[1] ? weight_gradient(level, grad, input, weight, g) : Batched{},
          wanted[2] ? bias_gradient(grad) : Batched{}};
}

namespace implicit = at::compositeimplicitautograd;

template <class Op>
using SchemaOf = std::add_pointer_t<typename Op::schema>;

[[maybe_unused]] const RuleSet kRules{
    rule<ops::convolution, &convolution_rule>(),
    rule<ops::convolution_backward, &convolution_backward_rule>(),
    composite<ops::_convolution, &unpacked_convolution>(),
    composite<ops::conv1d, static_cast<SchemaOf<ops::conv1d>>(&implicit::conv1d_symint)>(),
    composite<ops::conv2d, static_cast<SchemaOf<ops::conv2d>>(&implicit::conv2d_symint)>(),
    composite<ops::conv3d, static_cast<SchemaOf<ops::conv3d>>(&implicit::conv3d_symint)>(),
};

}  // namespace
}  // namespace torchlift
