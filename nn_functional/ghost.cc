#include "nn_functional/ghost.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/stack.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/group_norm.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/rms_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include "core/error.h"
#include "core/tensor_operators.h"

namespace torchlift::ghost_internal {

using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;

struct Rule;

struct Site {
  const Rule* rule = nullptr;
  std::vector<IValue> arguments;  // of the call; none for tensors
  std::string weight, bias;       // names of the parameters covered, or ""
  std::vector<int64_t> weight_sizes, bias_sizes;
  std::vector<int64_t> output_sizes;
  at::ScalarType output_dtype = at::kFloat;
  at::Device output_device = at::kCPU;
};

// The squared norm of a parameter's gradient, from the input a of the operator and the gradient g
// of its output.
using SquaredNorm = at::Tensor (*)(const Site& site, const at::Tensor& a, const at::Tensor& g);

constexpr size_t kNone = SIZE_MAX;

struct Rule {
  std::string_view op;
  size_t input;         // positions among the arguments
  size_t weight, bias;  // kNone where there is none
  SquaredNorm of_weight, of_bias;
  bool transposed = false;  // the weight may be given as weight.t()
  bool in_place = false;    // the output is the argument `input`
  bool (*accepts)(const std::vector<IValue>& arguments) = nullptr;
};

namespace {

// --- formulas
// -------------------------------------------------------------------------------------

// |sum_t g_t a_t^T|^2 for a: [..., T, I] and g: [..., T, O], summed over the dims in front.
at::Tensor products(const at::Tensor& a, const at::Tensor& g) {
  const int64_t positions = a.size(-2), wide = a.size(-1) * g.size(-1);
  if (positions == 1) return (a.square().sum(-1) * g.square().sum(-1)).sum();
  if (2 * positions * positions <= wide) return (a.matmul(a.mT()) * g.matmul(g.mT())).sum();
  return g.mT().matmul(a).square().sum();
}

at::Tensor rows(const at::Tensor& t) { return t.reshape({-1, t.size(-1)}); }

at::Tensor of_linear(const Site& /*site*/, const at::Tensor& a, const at::Tensor& g) {
  return products(rows(a), rows(g));
}

// A parameter that is added, and broadcast as need be.
at::Tensor of_summand(const Site& site, const at::Tensor& /*a*/, const at::Tensor& g) {
  return g.sum_to_size(site.bias_sizes).square().sum();
}

// The padding of a convolution, as constant_pad_nd wants it: the last dim first, both sides.
std::vector<int64_t> padding_of(const Site& site, const std::vector<int64_t>& dilation) {
  const size_t spatial = site.weight_sizes.size() - 2;
  std::vector<int64_t> pads(2 * spatial, 0);
  for (size_t dim = 0; dim < spatial; ++dim) {
    int64_t before = 0, after = 0;
    if (site.arguments[4].isString()) {
      if (site.arguments[4].toStringRef() == "same") {
        const int64_t total = dilation[dim] * (site.weight_sizes[2 + dim] - 1);
        before = total / 2;
        after = total - before;
      }
    } else {
      const std::vector<int64_t> given = site.arguments[4].toIntVector();
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
at::Tensor patches(const Site& site, at::Tensor a) {
  const auto spatial = static_cast<int64_t>(site.weight_sizes.size()) - 2;
  const auto stride = per_dim(site.arguments[3], static_cast<size_t>(spatial));
  const auto dilation = per_dim(site.arguments[5], static_cast<size_t>(spatial));
  const std::vector<int64_t> pads = padding_of(site, dilation);
  if (std::any_of(pads.begin(), pads.end(), [](int64_t p) { return p != 0; })) {
    a = at::constant_pad_nd(a, pads, 0);
  }
  for (int64_t dim = 0; dim < spatial; ++dim) {
    const auto i = static_cast<size_t>(dim);
    const int64_t extent = dilation[i] * (site.weight_sizes[2 + i] - 1) + 1;
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

at::Tensor with_batch(const Site& site, const at::Tensor& t) {
  return t.dim() + 1 == static_cast<int64_t>(site.weight_sizes.size()) ? t.unsqueeze(0) : t;
}

at::Tensor of_conv(const Site& site, const at::Tensor& a, const at::Tensor& g) {
  const int64_t groups = site.arguments[6].toInt();
  const at::Tensor seen = patches(site, with_batch(site, a));
  return products(by_group(seen, groups), by_group(with_batch(site, g).flatten(2), groups));
}

at::Tensor of_conv_bias(const Site& site, const at::Tensor& /*a*/, const at::Tensor& g) {
  return with_batch(site, g).flatten(2).sum(at::IntArrayRef{0, 2}).square().sum();
}

at::Tensor of_embedding(const Site& site, const at::Tensor& a, const at::Tensor& g) {
  const at::Tensor ids = a.reshape(-1);
  at::Tensor by_row = rows(g);
  const int64_t padding = site.arguments[2].toInt();
  if (padding >= 0) by_row = at::where(ids.eq(padding).unsqueeze(-1), 0.0, by_row);
  const at::Tensor same = ids.unsqueeze(0).eq(ids.unsqueeze(1)).to(g.scalar_type());
  return (same * by_row.matmul(by_row.mT())).sum();
}

// The squared norm of t summed over all dims but those that `kept` says.
template <class Kept>
at::Tensor summed_square(const at::Tensor& t, const Kept& kept) {
  std::vector<int64_t> dims;
  for (int64_t dim = 0; dim < t.dim(); ++dim) {
    if (!kept(dim)) dims.push_back(dim);
  }
  return (dims.empty() ? t : t.sum(dims)).square().sum();
}

at::Tensor over_last(const Site& site, const at::Tensor& t) {
  const auto count = static_cast<int64_t>(site.arguments[1].toIntVector().size());
  return summed_square(t, [&](int64_t dim) { return dim >= t.dim() - count; });
}

at::Tensor of_layer_norm(const Site& site, const at::Tensor& a, const at::Tensor& g) {
  const at::Tensor normed =
      at::layer_norm(a, site.arguments[1].toIntVector(), {}, {}, site.arguments[4].toDouble());
  return over_last(site, g * normed);
}

at::Tensor of_layer_norm_bias(const Site& site, const at::Tensor& /*a*/, const at::Tensor& g) {
  return over_last(site, g);
}

at::Tensor of_rms_norm(const Site& site, const at::Tensor& a, const at::Tensor& g) {
  const IValue& eps = site.arguments[3];
  const at::Tensor normed =
      at::rms_norm(a, site.arguments[1].toIntVector(), {},
                   eps.isNone() ? std::nullopt : std::optional<double>(eps.toDouble()));
  return over_last(site, g * normed);
}

at::Tensor of_group_norm(const Site& site, const at::Tensor& a, const at::Tensor& g) {
  const at::Tensor normed =
      at::group_norm(a, site.arguments[1].toInt(), {}, {}, site.arguments[4].toDouble());
  return summed_square(g * normed, [](int64_t dim) { return dim == 1; });
}

at::Tensor of_group_norm_bias(const Site& /*site*/, const at::Tensor& /*a*/, const at::Tensor& g) {
  return summed_square(g, [](int64_t dim) { return dim == 1; });
}

// --- rules
// ----------------------------------------------------------------------------------------

bool is_one(const IValue& number) { return number.toScalar().equal(1); }

bool matrix_weight(const std::vector<IValue>& arguments) {
  return arguments[0].toTensor().dim() >= 1 && arguments[1].toTensor().dim() == 2;
}

bool plain_addmm(const std::vector<IValue>& arguments) {
  return is_one(arguments[3]) && is_one(arguments[4]);
}

bool plain_add(const std::vector<IValue>& arguments) { return is_one(arguments[2]); }

bool plain_embedding(const std::vector<IValue>& arguments) {
  return !arguments[3].toBool() && !arguments[4].toBool();
}

constexpr Rule kRules[] = {
    {"aten::linear", 0, 1, 2, of_linear, of_summand},
    {"aten::matmul", 0, 1, kNone, of_linear, nullptr, true, false, matrix_weight},
    {"aten::mm", 0, 1, kNone, of_linear, nullptr, true, false, matrix_weight},
    {"aten::addmm", 1, 2, 0, of_linear, of_summand, true, false, plain_addmm},
    {"aten::add.Tensor", 0, kNone, 1, nullptr, of_summand, false, false, plain_add},
    {"aten::add_.Tensor", 0, kNone, 1, nullptr, of_summand, false, true, plain_add},
    {"aten::conv1d", 0, 1, 2, of_conv, of_conv_bias},
    {"aten::conv2d", 0, 1, 2, of_conv, of_conv_bias},
    {"aten::conv3d", 0, 1, 2, of_conv, of_conv_bias},
    {"aten::conv1d.padding", 0, 1, 2, of_conv, of_conv_bias},
    {"aten::conv2d.padding", 0, 1, 2, of_conv, of_conv_bias},
    {"aten::conv3d.padding", 0, 1, 2, of_conv, of_conv_bias},
    {"aten::embedding", 1, 0, kNone, of_embedding, nullptr, false, false, plain_embedding},
    {"aten::layer_norm", 0, 2, 3, of_layer_norm, of_layer_norm_bias},
    {"aten::rms_norm", 0, 2, kNone, of_rms_norm, nullptr},
    {"aten::group_norm", 0, 2, 3, of_group_norm, of_group_norm_bias},
};

const Rule* rule_of(const OperatorHandle& op) {
  const c10::OperatorName& name = op.operator_name();
  const std::string full =
      name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
  const auto* found = std::find_if(std::begin(kRules), std::end(kRules),
                                   [&](const Rule& r) { return r.op == full; });
  return found == std::end(kRules) ? nullptr : found;
}

bool is_transposition(const OperatorHandle& op) { return op.operator_name().name == "aten::t"; }

std::vector<IValue> arguments_of(const OperatorHandle& op, const Stack& stack) {
  return {stack.end() - static_cast<std::ptrdiff_t>(op.schema().arguments().size()), stack.end()};
}

using Names = std::map<const c10::TensorImpl*, std::string>;

const std::string* find_name(const Names& names, const at::Tensor& t) {
  const auto found = t.defined() ? names.find(t.unsafeGetTensorImpl()) : names.end();
  return found == names.end() ? nullptr : &found->second;
}

const std::string* name_of(const Names& names, const IValue& argument) {
  return argument.isTensor() ? find_name(names, argument.toTensor()) : nullptr;
}

// The name of the parameter at a position of the arguments, or "".
std::string name_at(const Names& names, const std::vector<IValue>& arguments, size_t position) {
  if (position == kNone) return {};
  const std::string* name = name_of(names, arguments[position]);
  return name == nullptr ? std::string() : *name;
}

// f(name, position) for each parameter among the arguments; those in lists have position kNone.
template <class F>
void for_each_name(const Names& names, const std::vector<IValue>& arguments, const F& f) {
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (const std::string* name = name_of(names, arguments[i])) f(*name, i);
    if (arguments[i].isTensorList()) {
      for (const at::Tensor& t : arguments[i].toTensorVector()) {
        if (const std::string* name = find_name(names, t)) f(*name, kNone);
      }
    } else if (arguments[i].isOptionalTensorList()) {
      for (const std::optional<at::Tensor>& t : arguments[i].toOptionalTensorVector()) {
        const std::string* name = t.has_value() ? find_name(names, *t) : nullptr;
        if (name != nullptr) f(*name, kNone);
      }
    }
  }
}

std::vector<int64_t> sizes_at(const std::vector<IValue>& arguments, size_t position) {
  if (position == kNone || !arguments[position].isTensor()) return {};
  const at::Tensor& t = arguments[position].toTensor();
  return t.defined() ? t.sizes().vec() : std::vector<int64_t>();
}

}  // namespace

// --- the plan
// -------------------------------------------------------------------------------------

GhostPlan::GhostPlan(const StateSlots& slots, const ModuleState& params)
    : sites_(std::make_shared<std::vector<Site>>()) {
  const std::vector<std::string> names = slots.parameter_names();
  const std::vector<at::Tensor> own = slots.parameters();
  for (size_t i = 0; i < own.size(); ++i) {
    if (params.count(names[i]) > 0) names_.emplace(own[i].unsafeGetTensorImpl(), names[i]);
  }
}

std::pair<ModuleState, ModuleState> GhostPlan::split(const ModuleState& params) const {
  std::pair<ModuleState, ModuleState> parts{params, {}};
  for (const std::string& name : covered()) parts.second.insert(parts.first.extract(name));
  return parts;
}

std::vector<std::string> GhostPlan::covered() const {
  std::vector<std::string> names;
  for (const Site& site : *sites_) {
    for (const std::string& name : {site.weight, site.bias}) {
      if (!name.empty()) names.push_back(name);
    }
  }
  return names;
}

std::vector<at::Tensor> GhostPlan::nudges() const {
  std::vector<at::Tensor> zeros;
  for (const Site& site : *sites_) {
    zeros.push_back(at::zeros(site.output_sizes,
                              at::TensorOptions(site.output_device).dtype(site.output_dtype)));
  }
  return zeros;
}

at::Tensor GhostPlan::squared_norm(const ModuleState& grads,
                                   const std::vector<at::Tensor>& nudge_grads,
                                   const std::vector<at::Tensor>& inputs) const {
  std::vector<at::Tensor> squares;
  for (const auto& [name, g] : grads) squares.push_back(g.square().sum());
  for (size_t i = 0; i < sites_->size(); ++i) {
    const Site& site = (*sites_)[i];
    if (!site.weight.empty()) {
      squares.push_back(site.rule->of_weight(site, inputs[i], nudge_grads[i]));
    }
    if (!site.bias.empty()) {
      squares.push_back(site.rule->of_bias(site, inputs[i], nudge_grads[i]));
    }
  }
  return at::stack(squares).sum();
}

// --- one example
// ----------------------------------------------------------------------------------

namespace {
constexpr int kNoFormula = 2;  // as good as a second use
}

GhostPlan::Probe::Probe(GhostPlan& plan, at::Device device)
    : plan_(plan), names_(plan.names_), scope_(this) {
  std::vector<at::Device> devices{at::kCPU};
  if (device.is_cuda()) devices.push_back(device);
  for (const at::Device& d : devices) {
    generators_.emplace_back(d, at::globalContext().defaultGenerator(d).get_state());
  }
}

GhostPlan::Probe::~Probe() {
  for (const auto& [device, state] : generators_) {
    at::Generator generator = at::globalContext().defaultGenerator(device);
    generator.set_state(state);
  }
}

void GhostPlan::Probe::call(const OperatorHandle& op, Stack* stack) {
  std::vector<IValue> arguments = arguments_of(op, *stack);
  if (is_transposition(op) && name_of(names_, arguments[0]) != nullptr) {
    const std::string name = *name_of(names_, arguments[0]);
    run_substituted(op, stack);
    const at::Tensor& view = stack->back().toTensor();
    transposed_.emplace(view.unsafeGetTensorImpl(), view);
    names_.emplace(view.unsafeGetTensorImpl(), name);
    return;
  }
  const Rule* rule = rule_of(op);
  const bool accepted = rule != nullptr && (rule->accepts == nullptr || rule->accepts(arguments));
  bool seen = false;
  for_each_name(names_, arguments, [&](const std::string& name, size_t position) {
    const bool transposed =
        position != kNone &&
        transposed_.count(arguments[position].toTensor().unsafeGetTensorImpl()) > 0;
    const bool fits = accepted && position != kNone &&
                      (position == rule->weight ? !transposed || rule->transposed
                                                : position == rule->bias && !transposed);
    uses_[name] += fits ? 1 : kNoFormula;
    seen = true;
  });
  run_substituted(op, stack);
  if (!seen || !accepted) return;
  const at::Tensor& output = stack->back().toTensor();
  Site site{.rule = rule,
            .arguments = {},
            .weight = name_at(names_, arguments, rule->weight),
            .bias = name_at(names_, arguments, rule->bias),
            .weight_sizes = sizes_at(arguments, rule->weight),
            .bias_sizes = sizes_at(arguments, rule->bias),
            .output_sizes = output.sizes().vec(),
            .output_dtype = output.scalar_type(),
            .output_device = output.device()};
  for (IValue& argument : arguments) {
    if (argument.isTensor()) argument = IValue();
  }
  site.arguments = std::move(arguments);
  plan_.sites_->push_back(std::move(site));
}

void GhostPlan::Probe::finish() {
  std::vector<Site> covering;
  for (Site& site : *plan_.sites_) {
    for (std::string* name : {&site.weight, &site.bias}) {
      if (!name->empty() && uses_[*name] != 1) name->clear();
    }
    if (!site.weight.empty() || !site.bias.empty()) covering.push_back(std::move(site));
  }
  *plan_.sites_ = std::move(covering);
}

// --- the run
// --------------------------------------------------------------------------------------

GhostRun::GhostRun(const GhostPlan& plan, const std::vector<at::Tensor>& nudges)
    : plan_(plan), nudges_(nudges), names_(plan.names_), inputs_(nudges.size()), scope_(this) {}

void GhostRun::call(const OperatorHandle& op, Stack* stack) {
  const std::vector<IValue> arguments = arguments_of(op, *stack);
  if (is_transposition(op) && name_of(names_, arguments[0]) != nullptr) {
    const std::string name = *name_of(names_, arguments[0]);
    run_substituted(op, stack);
    const at::Tensor& view = stack->back().toTensor();
    transposed_.emplace(view.unsafeGetTensorImpl(), view);
    names_.emplace(view.unsafeGetTensorImpl(), name);
    return;
  }
  const Rule* rule = rule_of(op);
  if (rule == nullptr) return run_substituted(op, stack);
  const std::string weight = name_at(names_, arguments, rule->weight);
  const std::string bias = name_at(names_, arguments, rule->bias);
  const std::vector<Site>& sites = *plan_.sites_;
  const auto site = std::find_if(sites.begin(), sites.end(), [&](const Site& s) {
    return s.rule == rule && (s.weight.empty() ? s.bias == bias : s.weight == weight);
  });
  if (site == sites.end()) return run_substituted(op, stack);
  const auto index = static_cast<size_t>(site - sites.begin());
  const at::Tensor& given = arguments[rule->input].toTensor();
  const at::Tensor* value = SubstitutionScope::find_anywhere(given);
  // An in-place operator writes over it; its formula does not need it.
  inputs_[index] =
      rule->in_place ? nudges_[index].detach() : (value == nullptr ? given : *value).detach();
  run_substituted(op, stack);
  at::Tensor output = stack->back().toTensor();
  stack->back() = rule->in_place ? output.add_(nudges_[index]) : output + nudges_[index];
}

}  // namespace torchlift::ghost_internal
