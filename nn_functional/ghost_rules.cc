#include "nn_functional/ghost_rules.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <functional>
#include <iterator>
#include <numeric>
#include <string>

#include "core/tensor_operators.h"

namespace torchlift::ghost_internal {
namespace {

using c10::IValue;

// --- formulas ------------------------------------------------------------------------------------

// |sum_t g_t a_t^T|^2 for a: [..., T, I] and g: [..., T, O], summed over the dims in front.
at::Tensor products(const at::Tensor& a, const at::Tensor& g) {
  if (a.size(-2) == 1) return (a.square().sum(-1) * g.square().sum(-1)).sum();
  return (a.matmul(a.mT()) * g.matmul(g.mT())).sum();
}

at::Tensor rows(const at::Tensor& t) { return t.reshape({-1, t.size(-1)}); }

at::Tensor of_linear(const LayerCall& /*call*/, const at::Tensor& a, const at::Tensor& g) {
  return products(rows(a), rows(g));
}

// A parameter that is added, and broadcast as need be.
at::Tensor of_summand(const LayerCall& call, const at::Tensor& /*a*/, const at::Tensor& g) {
  return g.sum_to_size(call.bias_sizes).square().sum();
}

// The padding of a convolution, as constant_pad_nd wants it: the last dim first, both sides.
std::vector<int64_t> padding_of(const LayerCall& call, const std::vector<int64_t>& dilation) {
  const size_t spatial = call.weight_sizes.size() - 2;
  std::vector<int64_t> pads(2 * spatial, 0);
  for (size_t dim = 0; dim < spatial; ++dim) {
    int64_t before = 0, after = 0;
    if (call.arguments[4].isString()) {
      if (call.arguments[4].toStringRef() == "same") {
        const int64_t total = dilation[dim] * (call.weight_sizes[2 + dim] - 1);
        before = total / 2;
        after = total - before;
      }
    } else {
      const std::vector<int64_t> given = call.arguments[4].toIntVector();
      before = after = given[given.size() == 1 ? 0 : dim];
    }
    pads[2 * (spatial - 1 - dim)] = before;
    pads[2 * (spatial - 1 - dim) + 1] = after;
  }
  return pads;
}

std::vector<int64_t> per_dim(const IValue& given, size_t count) {
  std::vector<int64_t> values = given.toIntVector();
  if (values.size() == 1) values.resize(count, values[0]);
  return values;
}

// What each output position of a convolution sees: [batch, channels * kernel, positions].
at::Tensor patches(const LayerCall& call, at::Tensor a) {
  const auto spatial = static_cast<int64_t>(call.weight_sizes.size()) - 2;
  const auto stride = per_dim(call.arguments[3], static_cast<size_t>(spatial));
  const auto dilation = per_dim(call.arguments[5], static_cast<size_t>(spatial));
  const std::vector<int64_t> pads = padding_of(call, dilation);
  if (std::any_of(pads.begin(), pads.end(), [](int64_t p) { return p != 0; })) {
    a = at::constant_pad_nd(a, pads, 0);
  }
  for (int64_t dim = 0; dim < spatial; ++dim) {
    const auto i = static_cast<size_t>(dim);
    const int64_t extent = dilation[i] * (call.weight_sizes[2 + i] - 1) + 1;
    a = a.unfold(2 + dim, extent, stride[i]).slice(-1, 0, extent, dilation[i]);
  }
  // [batch, channels, *positions, *kernel] -> [batch, channels, *kernel, *positions]
  std::vector<int64_t> order{0, 1};
  for (int64_t dim = 0; dim < spatial; ++dim) order.push_back(2 + spatial + dim);
  for (int64_t dim = 0; dim < spatial; ++dim) order.push_back(2 + dim);
  return a.permute(order).flatten(2 + spatial).flatten(1, 1 + spatial);
}

// [batch, channels, positions] -> [groups, batch * positions, channels of a group]
at::Tensor by_group(const at::Tensor& t, int64_t groups) {
  return t.unflatten(1, {groups, -1}).permute({1, 0, 3, 2}).flatten(1, 2);
}

at::Tensor with_batch(const LayerCall& call, const at::Tensor& t) {
  return t.dim() + 1 == static_cast<int64_t>(call.weight_sizes.size()) ? t.unsqueeze(0) : t;
}

int64_t groups_of(const LayerCall& call) { return call.arguments[6].toInt(); }

at::Tensor of_conv(const LayerCall& call, const at::Tensor& a, const at::Tensor& g) {
  const int64_t groups = groups_of(call);
  const at::Tensor seen = patches(call, with_batch(call, a));
  return products(by_group(seen, groups), by_group(with_batch(call, g).flatten(2), groups));
}

at::Tensor of_conv_bias(const LayerCall& call, const at::Tensor& /*a*/, const at::Tensor& g) {
  return with_batch(call, g).flatten(2).sum(at::IntArrayRef{0, 2}).square().sum();
}

at::Tensor of_embedding(const LayerCall& call, const at::Tensor& a, const at::Tensor& g) {
  const at::Tensor ids = a.reshape(-1);
  at::Tensor by_row = rows(g);
  const int64_t padding = call.arguments[2].toInt();
  if (padding >= 0) by_row = at::where(ids.eq(padding).unsqueeze(-1), 0.0, by_row);
  const at::Tensor same = ids.unsqueeze(0).eq(ids.unsqueeze(1)).to(g.scalar_type());
  return (same * by_row.matmul(by_row.mT())).sum();
}

// --- rules ---------------------------------------------------------------------------------------

bool is_one(const IValue& number) { return number.toScalar().equal(1); }

bool matrix_weight(const std::vector<IValue>& arguments) {
  return arguments[0].toTensor().dim() >= 1 && arguments[1].toTensor().dim() == 2;
}

bool plain_addmm(const std::vector<IValue>& arguments) {
  return is_one(arguments[3]) && is_one(arguments[4]);
}

bool plain_embedding(const std::vector<IValue>& arguments) {
  return !arguments[3].toBool() && !arguments[4].toBool();
}

// clang-format off
constexpr Rule kRules[] = {
    {"aten::linear",         0, 1, 2,           0, of_linear,    of_summand,   matrix_weight},
    {"aten::matmul",         0, 1, kNoArgument, 1, of_linear,    nullptr,      matrix_weight},
    {"aten::mm",             0, 1, kNoArgument, 1, of_linear,    nullptr,      matrix_weight},
    {"aten::addmm",          1, 2, 0,           1, of_linear,    of_summand,   plain_addmm},
    {"aten::conv1d",         0, 1, 2,           0, of_conv,      of_conv_bias},
    {"aten::conv2d",         0, 1, 2,           0, of_conv,      of_conv_bias},
    {"aten::conv3d",         0, 1, 2,           0, of_conv,      of_conv_bias},
    {"aten::conv1d.padding", 0, 1, 2,           0, of_conv,      of_conv_bias},
    {"aten::conv2d.padding", 0, 1, 2,           0, of_conv,      of_conv_bias},
    {"aten::conv3d.padding", 0, 1, 2,           0, of_conv,      of_conv_bias},
    {"aten::embedding",      1, 0, kNoArgument, 1, of_embedding, nullptr,      plain_embedding},
};
// clang-format on

int64_t product(const std::vector<int64_t>& sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>());
}

}  // namespace

const Rule* rule_of(const c10::OperatorHandle& op) {
  const c10::OperatorName& name = op.operator_name();
  const std::string full =
      name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
  const auto* found = std::find_if(std::begin(kRules), std::end(kRules),
                                   [&](const Rule& r) { return r.op == full; });
  return found == std::end(kRules) ? nullptr : found;
}

bool is_worth_it(const LayerCall& call, int64_t output_numel) {
  const int64_t weight = product(call.weight_sizes);
  if (weight == 0) return false;
  const int64_t positions = output_numel / call.weight_sizes[call.rule->features];
  const int64_t groups = call.rule->of_weight == of_conv ? groups_of(call) : 1;
  return 2 * groups * positions * positions <= weight;
}

}  // namespace torchlift::ghost_internal
