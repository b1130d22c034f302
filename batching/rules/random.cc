#include <ATen/ExpandUtils.h>
#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_sample_dirichlet_ops.h>
#include <ATen/ops/_standard_gamma_grad_ops.h>
#include <ATen/ops/_standard_gamma_ops.h>
#include <ATen/ops/bernoulli_ops.h>
#include <ATen/ops/binomial_ops.h>
#include <ATen/ops/cauchy_ops.h>
#include <ATen/ops/exponential_ops.h>
#include <ATen/ops/geometric_ops.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/log_normal_ops.h>
#include <ATen/ops/multinomial_ops.h>
#include <ATen/ops/native_dropout_backward_ops.h>
#include <ATen/ops/native_dropout_ops.h>
#include <ATen/ops/normal_ops.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/poisson_ops.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/rand_like_ops.h>
#include <ATen/ops/randint_like_ops.h>
#include <ATen/ops/randn_like_ops.h>
#include <ATen/ops/random_ops.h>
#include <ATen/ops/uniform_ops.h>
#include <ATen/ops/where.h>

#include "batching/rules/memory_format.h"
#include "batching/rules/pointwise.h"
#include "core/boxed.h"
#include "core/dispatch.h"

// Random operators with a batched argument: see NOTE [random operators] in random_mode.cc. A rule
// draws for the level it is given; while it works, random operators on values belong to the level
// around.

namespace torchlift {
namespace {

namespace ops = at::_ops;

using Gen = std::optional<at::Generator>;

bool is_same(const Level& level) { return level.randomness() == Randomness::kSame; }

// An uninitialized tensor like one example.
at::Tensor example_like(const BatchedArg& arg) { return arg.value.new_empty(logical_sizes(arg)); }

// The same numbers for every example, each in its own memory.
Batched repeated(const at::Tensor& draw, int64_t batch_size) {
  const BatchedArg shared{draw, std::nullopt};
  return {expanded(shared, batch_size).clone(at::MemoryFormat::Contiguous), 0};
}

// --- numbers that depend on no tensor ------------------------------------------------------------

// x.uniform_(), x.normal_()...
template <class Op, class Schema = typename Op::schema>
struct Fill;
template <class Op, class... A>
struct Fill<Op, at::Tensor&(at::Tensor&, A...)> {
  static void apply(const Level& level, BatchedArg self, A... rest) {
    at::Tensor target = self.value;
    if (!is_same(level)) {
      Op::call(target, rest...);
      return;
    }
    at::Tensor draw = example_like(self);
    Op::call(draw, rest...);
    target.copy_(draw.unsqueeze(*self.bdim));
  }
};

// uniform(x), bernoulli(x, 0.5)...
template <class Op, class Schema = typename Op::schema>
struct Draw;
template <class Op, class... A>
struct Draw<Op, at::Tensor(const at::Tensor&, A...)> {
  static Batched apply(const Level& level, BatchedArg self, A... rest) {
    if (!is_same(level)) return {Op::call(self.value, rest...), self.bdim};
    return repeated(Op::call(example_like(self), rest...), level.size());
  }
};

using Dtype = std::optional<at::ScalarType>;
using OptLayout = std::optional<at::Layout>;
using OptDevice = std::optional<at::Device>;
using OptPin = std::optional<bool>;
using Format = std::optional<at::MemoryFormat>;

// rand_like(x), randint_like(x, 10)...; First are the arguments between x and the options.
template <class Op, class... First>
Batched draw_like(const Level& level, BatchedArg self, First... first, Dtype dtype,
                  OptLayout layout, OptDevice device, OptPin pin, Format format) {
  const auto draw = [&](const at::Tensor& value, auto physical) {
    return Op::call(value, first..., dtype, layout, device, pin, physical);
  };
  if (!is_same(level)) return with_memory_format(self, format, draw);
  const at::Tensor example = draw(example_like(self), format);
  return repeated(example, level.size());
}

[[maybe_unused]] const RuleSet kFills{
    rule<ops::uniform_, &Fill<ops::uniform_>::apply>(),
    rule<ops::normal_, &Fill<ops::normal_>::apply>(),
    rule<ops::exponential_, &Fill<ops::exponential_>::apply>(),
    rule<ops::cauchy_, &Fill<ops::cauchy_>::apply>(),
    rule<ops::geometric_, &Fill<ops::geometric_>::apply>(),
    rule<ops::log_normal_, &Fill<ops::log_normal_>::apply>(),
    rule<ops::random_, &Fill<ops::random_>::apply>(),
    rule<ops::random__from, &Fill<ops::random__from>::apply>(),
    rule<ops::random__to, &Fill<ops::random__to>::apply>(),
    rule<ops::bernoulli__float, &Fill<ops::bernoulli__float>::apply>(),
};

[[maybe_unused]] const RuleSet kDraws{
    rule<ops::uniform, &Draw<ops::uniform>::apply>(),
    rule<ops::normal_functional, &Draw<ops::normal_functional>::apply>(),
    rule<ops::exponential, &Draw<ops::exponential>::apply>(),
    rule<ops::cauchy, &Draw<ops::cauchy>::apply>(),
    rule<ops::geometric, &Draw<ops::geometric>::apply>(),
    rule<ops::log_normal, &Draw<ops::log_normal>::apply>(),
    rule<ops::random, &Draw<ops::random>::apply>(),
    rule<ops::random_from, &Draw<ops::random_from>::apply>(),
    rule<ops::random_to, &Draw<ops::random_to>::apply>(),
    rule<ops::bernoulli_p, &Draw<ops::bernoulli_p>::apply>(),
    rule<ops::rand_like, &draw_like<ops::rand_like>>(),
    rule<ops::rand_like_generator, &draw_like<ops::rand_like_generator, Gen>>(),
    rule<ops::randn_like, &draw_like<ops::randn_like>>(),
    rule<ops::randn_like_generator, &draw_like<ops::randn_like_generator, Gen>>(),
    rule<ops::randint_like, &draw_like<ops::randint_like, int64_t>>(),
    rule<ops::randint_like_generator, &draw_like<ops::randint_like_generator, int64_t, Gen>>(),
    rule<ops::randint_like_low_dtype, &draw_like<ops::randint_like_low_dtype, int64_t, int64_t>>(),
    rule<ops::randint_like_low_generator_dtype,
         &draw_like<ops::randint_like_low_generator_dtype, int64_t, int64_t, Gen>>(),
};

// --- bernoulli with a tensor of probabilities ----------------------------------------------------

// Uniform numbers of one example's shape: u < p is 1 with probability p.
at::Tensor uniform_numbers(const at::Tensor& like, at::IntArrayRef sizes, const Gen& generator) {
  return at::rand(sizes, generator, like.options().dtype(at::kDouble).requires_grad(std::nullopt));
}

Batched bernoulli_rule(const Level& level, BatchedArg p, Gen generator) {
  if (!is_same(level)) return {ops::bernoulli::call(p.value, generator), p.bdim};
  const at::Tensor u = uniform_numbers(p.value, logical_sizes(p), generator);
  return {u.unsqueeze(*p.bdim).lt(p.value).to(p.value.scalar_type()), p.bdim};
}

void bernoulli__tensor_rule(const Level& level, BatchedArg self, BatchedArg p, Gen generator) {
  using Op = ops::bernoulli__Tensor;
  if (!is_same(level)) {
    pointwise_internal::Pointwise<Op>::apply(self, p, generator);
    return;
  }
  pointwise_internal::check_target_rank(Op::name, self, p.logical_dim());
  const at::Tensor u = uniform_numbers(self.value, logical_sizes(self), generator);
  batch_first(self).copy_(u.lt(aligned(p, self.logical_dim())));
}

Batched bernoulli_tensor_rule(const Level& level, BatchedArg self, BatchedArg p, Gen generator) {
  using Op = ops::bernoulli_Tensor;
  pointwise_internal::check_target_rank(Op::name, self, p.logical_dim());
  const at::Tensor shape = expanded(self, level.size());
  const at::Tensor probability = aligned(p, self.logical_dim());
  if (!is_same(level)) return {Op::call(shape, probability, generator), 0};
  const at::Tensor u = uniform_numbers(self.value, logical_sizes(self), generator);
  const at::Tensor drawn = u.lt(probability).to(self.value.scalar_type());
  return {drawn.expand(shape.sizes()).clone(at::MemoryFormat::Contiguous), 0};
}

// --- normal with tensors of parameters -----------------------------------------------------------

at::Tensor normal_noise(const at::Tensor& like, at::IntArrayRef sizes, const Gen& generator) {
  return ops::normal_functional::call(like.new_empty(sizes), 0.0, 1.0, generator);
}

Batched normal_tensors_rule(const Level& level, BatchedArg mean, BatchedArg std, Gen generator) {
  if (!is_same(level)) return pointwise<ops::normal_Tensor_Tensor>(mean, std, generator);
  const auto sizes = at::infer_size(logical_sizes(mean), logical_sizes(std));
  const at::Tensor noise = normal_noise(mean.value, sizes, generator);
  const auto combine = [](const at::Tensor& m, const at::Tensor& s, const at::Tensor& n) {
    return n.mul(s).add(m);
  };
  return pointwise_internal::call_pointwise(combine, mean, std, BatchedArg{noise, std::nullopt});
}

Batched normal_mean_rule(const Level& level, BatchedArg mean, double std, Gen generator) {
  if (!is_same(level))
    return {ops::normal_Tensor_float::call(mean.value, std, generator), mean.bdim};
  const at::Tensor noise = normal_noise(mean.value, logical_sizes(mean), generator);
  return {noise.mul(std).unsqueeze(*mean.bdim).add(mean.value), mean.bdim};
}

Batched normal_std_rule(const Level& level, double mean, BatchedArg std, Gen generator) {
  if (!is_same(level))
    return {ops::normal_float_Tensor::call(mean, std.value, generator), std.bdim};
  const at::Tensor noise = normal_noise(std.value, logical_sizes(std), generator);
  return {noise.unsqueeze(*std.bdim).mul(std.value).add(mean), std.bdim};
}

// --- dropout -------------------------------------------------------------------------------------

std::tuple<Batched, Batched> native_dropout_rule(const Level& level, BatchedArg input, double p,
                                                 std::optional<bool> train) {
  if (!is_same(level) || !train.value_or(true) || p == 0.0) {
    return pointwise<ops::native_dropout>(input, p, train);
  }
  const at::Tensor ones = at::ones({}, input.value.options()).expand(logical_sizes(input));
  const auto [scale, mask] = ops::native_dropout::call(ones.contiguous(), p, train);
  const Batched masks = repeated(mask, level.size());
  return {{scale.unsqueeze(*input.bdim).mul(input.value), input.bdim}, masks};
}

// Randomized leaky relu: negative values are multiplied by a slope drawn from [lower, upper].
at::Tensor rrelu_slopes(const Level& level, const BatchedArg& self, double lower, double upper,
                        const Gen& generator) {
  const at::Tensor slopes =
      is_same(level)
          ? ops::uniform::call(example_like(self), lower, upper, generator).unsqueeze(*self.bdim)
          : ops::uniform::call(self.value, lower, upper, generator);
  return at::where(self.value.le(0), slopes, at::ones({}, self.value.options()));
}

// Writes the slopes where autograd will look for them.
void write_noise(const Batched& noise, const at::Tensor& slopes, int64_t bdim) {
  TORCH_CHECK(
      noise.bdim.has_value(),
      "[vmap] rrelu_with_noise: noise, to which the slopes are written, is not batched while "
      "the input is. Make it by torch.empty_like(input).");
  batch_first(as_arg(noise)).copy_(slopes.movedim(bdim, 0));
}

Batched rrelu(const Level& level, const Batched& self, const Batched& noise,
              const std::vector<c10::IValue>& args) {
  const double lower = args[2].toScalar().toDouble();
  const double upper = args[3].toScalar().toDouble();
  if (!args[4].toBool()) return {at::leaky_relu(self.value, (lower + upper) / 2), self.bdim};
  const at::Tensor slopes = rrelu_slopes(level, as_arg(self), lower, upper, args[5].to<Gen>());
  write_noise(noise, slopes, *self.bdim);
  return {self.value.mul(slopes), self.bdim};
}

// rrelu_with_noise(self, noise!, lower, upper, training, generator), and in place. Boxed, as it
// writes its second argument.
void rrelu_rule(const c10::OperatorHandle& op, const LevelPtr& level, torch::jit::Stack* stack) {
  const std::vector<c10::IValue> args = torch::jit::pop(*stack, op.schema().arguments().size());
  Batched self = lower(args[0].toTensor(), *level);
  const Batched noise = lower(args[1].toTensor(), *level);
  const bool in_place = writes_argument(op, 0);
  if (!self.bdim && in_place) {
    throw_write_to_unbatched("rrelu_with_noise_", args[0].toTensor(), *level);
  }
  if (!self.bdim) self = {expanded(as_arg(self), level->size()), 0};
  const Batched result = rrelu(*level, self, noise, args);
  if (!in_place) {
    stack->emplace_back(lift(result.value, result.bdim, level));
    return;
  }
  self.value.copy_(result.value);
  if (!args[0].toTensor().is_inference()) args[0].toTensor().unsafeGetTensorImpl()->bump_version();
  stack->push_back(args[0]);
}

// --- other distributions -------------------------------------------------------------------------

Batched sample_dirichlet_rule(BatchedArg self, Gen generator) {
  return {ops::_sample_dirichlet::call(batch_first(self), generator), 0};
}

// B...C -> B...S: the categories are in the last dim, and at most one dim comes before it.
Batched multinomial_rule(BatchedArg self, int64_t num_samples, bool replacement, Gen generator) {
  const at::Tensor value = batch_first(self);
  const auto call = [&](const at::Tensor& p) {
    return ops::multinomial::call(p, num_samples, replacement, generator);
  };
  if (self.logical_dim() != 2) return {call(value), 0};
  return {call(value.flatten(0, 1)).unflatten(0, value.sizes().slice(0, 2)), 0};
}

[[maybe_unused]] const RuleSet kDistributions{
    rule<ops::bernoulli, &bernoulli_rule>(),
    rule<ops::bernoulli__Tensor, &bernoulli__tensor_rule>(),
    rule<ops::bernoulli_Tensor, &bernoulli_tensor_rule>(),
    rule<ops::normal_Tensor_Tensor, &normal_tensors_rule>(),
    rule<ops::normal_Tensor_float, &normal_mean_rule>(),
    rule<ops::normal_float_Tensor, &normal_std_rule>(),
    rule<ops::native_dropout, &native_dropout_rule>(),
    pointwise_row<ops::native_dropout_backward>(),
    boxed_rule("aten::rrelu_with_noise", "", &rrelu_rule),
    boxed_rule("aten::rrelu_with_noise_", "", &rrelu_rule),
    rule<ops::_sample_dirichlet, &sample_dirichlet_rule>(),
    rule<ops::multinomial, &multinomial_rule>(),
    pointwise_row<ops::poisson>(),
    pointwise_row<ops::binomial>(),
    pointwise_row<ops::_standard_gamma>(),
    pointwise_row<ops::_standard_gamma_grad>(),
};

}  // namespace
}  // namespace torchlift
