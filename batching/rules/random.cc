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
#include <ATen/ops/empty.h>
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
#include <ATen/ops/stack.h>
#include <ATen/ops/uniform_ops.h>
#include <ATen/ops/where.h>

#include "batching/rules/bulk_draws.h"
#include "batching/rules/distributions.h"
#include "batching/rules/memory_format.h"
#include "batching/rules/pointwise.h"
#include "batching/rules/reproducible.h"
#include "core/boxed.h"
#include "core/dispatch.h"
#include "core/grad_mode.h"
#include "core/promotion.h"
#include "core/random_stream.h"

// Random operators with a batched argument: see NOTE [random operators] in random_mode.cc. A rule
// draws for the level it is given; while it works, random operators on values belong to the level
// around.

namespace torchlift {
namespace {

namespace ops = at::_ops;

using Gen = std::optional<at::Generator>;

bool is_same(const Level& level) { return level.randomness() == Randomness::kSame; }
bool is_reproducible(const Level& level) { return level.randomness() == Randomness::kReproducible; }

// An uninitialized tensor like one example.
at::Tensor example_like(const BatchedArg& arg) { return arg.value.new_empty(logical_sizes(arg)); }

// The same numbers for every example, each in its own memory.
Batched repeated(const at::Tensor& draw, int64_t batch_size) {
  const BatchedArg shared{draw, std::nullopt};
  return {expanded(shared, batch_size).clone(at::MemoryFormat::Contiguous), 0};
}

// The value with a batch dim first as one whose batch dim is where self has it.
at::Tensor placed_like(const at::Tensor& batch_first_value, const BatchedArg& self) {
  return *self.bdim == 0 ? batch_first_value : batch_first_value.movedim(0, *self.bdim);
}

// Numbers that were drawn do not depend on `source`, whose gradient is zero; that an outer domain
// tracks it is to be seen in the result all the same.
at::Tensor connected(const at::Tensor& numbers, const at::Tensor& source) {
  if (!is_tracked(source) && !tracked_outside(source)) return numbers;
  const at::Tensor always = at::ones({}, source.options().dtype(at::kBool));
  return at::where(always, numbers, source.to(numbers.scalar_type()));
}

// --- reproducible numbers ------------------------------------------------------------------------

using Kind = Distribution::Kind;

const Gen& generator_among(const Gen& generator) { return generator; }
template <class First, class... Rest>
const Gen& generator_among(const First&, const Rest&... rest) {
  return generator_among(rest...);
}

// Lets the operator itself check its arguments, by drawing no number.
template <class Op, class... A>
void check_arguments(const at::Tensor& value, A... rest) {
  const RandomHandledScope outside(*level_stack().front());
  const NoRowDraws none;
  at::Tensor nothing = at::empty({0}, at::TensorOptions().dtype(value.scalar_type()));
  if constexpr (std::is_same_v<typename Op::schema, at::Tensor&(at::Tensor&, A...)>) {
    Op::call(nothing, rest...);
  } else {
    Op::call(std::as_const(nothing), rest...);
  }
}

// The numbers of an operator that takes a tensor for its shape and dtype alone.
template <class Op, auto Of, class... A>
at::Tensor numbers_like(const Level& level, const BatchedArg& self, A... rest) {
  check_arguments<Op>(self.value, rest...);
  const at::ScalarType dtype = self.value.scalar_type();
  return reproducible_numbers(level, logical_sizes(self), dtype, self.value.device(),
                              generator_among(rest...), Of(dtype, rest...), Op::name)
      .value;
}

// --- numbers that depend on no tensor ------------------------------------------------------------

// x.uniform_(), x.normal_()...
template <class Op, auto Of, class Schema = typename Op::schema>
struct Fill;
template <class Op, auto Of, class... A>
struct Fill<Op, Of, at::Tensor&(at::Tensor&, A...)> {
  static void apply(const Level& level, BatchedArg self, A... rest) {
    at::Tensor target = self.value;
    if (is_reproducible(level)) {
      target.copy_(placed_like(numbers_like<Op, Of>(level, self, rest...), self));
      return;
    }
    if (!is_same(level)) {
      if constexpr (std::is_same_v<Op, ops::bernoulli__float>) {
        if (draw_bernoulli(target, rest...)) return;
      }
      Op::call(target, rest...);
      return;
    }
    at::Tensor draw = example_like(self);
    Op::call(draw, rest...);
    target.copy_(draw.unsqueeze(*self.bdim));
  }
};

// uniform(x), bernoulli(x, 0.5)...
template <class Op, auto Of, class Schema = typename Op::schema>
struct Draw;
template <class Op, auto Of, class... A>
struct Draw<Op, Of, at::Tensor(const at::Tensor&, A...)> {
  static Batched apply(const Level& level, BatchedArg self, A... rest) {
    if (is_reproducible(level)) {
      const at::Tensor numbers = placed_like(numbers_like<Op, Of>(level, self, rest...), self);
      return {connected(numbers, self.value), self.bdim};
    }
    if (!is_same(level)) return {Op::call(self.value, rest...), self.bdim};
    return repeated(Op::call(example_like(self), rest...), level.size());
  }
};

using Dtype = std::optional<at::ScalarType>;
using OptLayout = std::optional<at::Layout>;
using OptDevice = std::optional<at::Device>;
using OptPin = std::optional<bool>;
using Format = std::optional<at::MemoryFormat>;

template <class... First>
Gen generator_of(const First&... first) {
  [[maybe_unused]] Gen found;
  [[maybe_unused]] const auto look = [&](const auto& argument) {
    if constexpr (std::is_same_v<std::decay_t<decltype(argument)>, Gen>) found = argument;
  };
  (look(first), ...);
  return found;
}

// rand_like(x), randint_like(x, 10)...; First are the arguments between x and the options.
template <class Op, class Of, class... First>
Batched draw_like(const Level& level, BatchedArg self, First... first, Dtype dtype,
                  OptLayout layout, OptDevice device, OptPin pin, Format format) {
  const auto draw = [&](const at::Tensor& value, auto physical) {
    return Op::call(value, first..., dtype, layout, device, pin, physical);
  };
  if (is_reproducible(level)) {
    at::Tensor like;  // checks the arguments, has the dtype and device
    {
      const RandomHandledScope outside(*level_stack().front());
      const NoRowDraws none;
      const at::Tensor nothing = at::empty(
          {0}, at::TensorOptions().dtype(self.value.scalar_type()).device(self.value.device()));
      like = draw(nothing, std::nullopt);
    }
    const at::Tensor numbers =
        reproducible_numbers(level, logical_sizes(self), like.scalar_type(), like.device(),
                             generator_of(first...), Of()(like.scalar_type(), first...), Op::name)
            .value;
    if (!format.has_value() && self.value.is_contiguous()) return {numbers, 0};
    return with_memory_format({numbers, 0}, format, [&](const at::Tensor& value, auto physical) {
      return value.clone(physical);
    });
  }
  if (!is_same(level)) return with_memory_format(self, format, draw);
  const at::Tensor example = draw(example_like(self), format);
  return repeated(example, level.size());
}

[[maybe_unused]] const RuleSet kFills{
    rule<ops::uniform_, &Fill<ops::uniform_, &uniform_numbers_of>::apply>(),
    rule<ops::normal_, &Fill<ops::normal_, &normal_numbers_of>::apply>(),
    rule<ops::exponential_, &Fill<ops::exponential_, &exponential_numbers_of>::apply>(),
    rule<ops::cauchy_, &Fill<ops::cauchy_, &cauchy_numbers_of>::apply>(),
    rule<ops::geometric_, &Fill<ops::geometric_, &geometric_numbers_of>::apply>(),
    rule<ops::log_normal_, &Fill<ops::log_normal_, &log_normal_numbers_of>::apply>(),
    rule<ops::random_, &Fill<ops::random_, &random_numbers_of>::apply>(),
    rule<ops::random__from, &Fill<ops::random__from, &random_from_numbers_of>::apply>(),
    rule<ops::random__to, &Fill<ops::random__to, &random_to_numbers_of>::apply>(),
    rule<ops::bernoulli__float, &Fill<ops::bernoulli__float, &bernoulli_numbers_of>::apply>(),
};

[[maybe_unused]] const RuleSet kDraws{
    rule<ops::uniform, &Draw<ops::uniform, &uniform_numbers_of>::apply>(),
    rule<ops::normal_functional, &Draw<ops::normal_functional, &normal_numbers_of>::apply>(),
    rule<ops::exponential, &Draw<ops::exponential, &exponential_numbers_of>::apply>(),
    rule<ops::cauchy, &Draw<ops::cauchy, &cauchy_numbers_of>::apply>(),
    rule<ops::geometric, &Draw<ops::geometric, &geometric_numbers_of>::apply>(),
    rule<ops::log_normal, &Draw<ops::log_normal, &log_normal_numbers_of>::apply>(),
    rule<ops::random, &Draw<ops::random, &random_numbers_of>::apply>(),
    rule<ops::random_from, &Draw<ops::random_from, &random_from_numbers_of>::apply>(),
    rule<ops::random_to, &Draw<ops::random_to, &random_to_numbers_of>::apply>(),
    rule<ops::bernoulli_p, &Draw<ops::bernoulli_p, &bernoulli_numbers_of>::apply>(),
    rule<ops::rand_like, &draw_like<ops::rand_like, UnitUniform>>(),
    rule<ops::rand_like_generator, &draw_like<ops::rand_like_generator, UnitUniform, Gen>>(),
    rule<ops::randn_like, &draw_like<ops::randn_like, UnitNormal>>(),
    rule<ops::randn_like_generator, &draw_like<ops::randn_like_generator, UnitNormal, Gen>>(),
    rule<ops::randint_like, &draw_like<ops::randint_like, BelowHigh, int64_t>>(),
    rule<ops::randint_like_generator,
         &draw_like<ops::randint_like_generator, BelowHigh, int64_t, Gen>>(),
    rule<ops::randint_like_low_dtype,
         &draw_like<ops::randint_like_low_dtype, FromLowToHigh, int64_t, int64_t>>(),
    rule<ops::randint_like_low_generator_dtype,
         &draw_like<ops::randint_like_low_generator_dtype, FromLowToHigh, int64_t, int64_t, Gen>>(),
};

// --- bernoulli with a tensor of probabilities ----------------------------------------------------

// Whether a rule draws numbers on its own, of the shape of one example or of each example, and then
// computes with the batched arguments. Otherwise it calls the operator on whole values.
bool draws_first(const Level& level) { return is_same(level) || is_reproducible(level); }

// Uniform (or unit normal) numbers for tensors of `sizes` in a function under `level`: shared by
// all examples, or each its own.
Batched drawn_first(const Level& level, Kind kind, const at::Tensor& like, at::ScalarType dtype,
                    at::IntArrayRef sizes, const Gen& generator, const char* op) {
  if (is_reproducible(level)) {
    return reproducible_numbers(level, sizes, dtype, like.device(), generator,
                                {.kind = kind, .a = 0, .b = 1}, op);
  }
  const auto options = like.options().dtype(dtype).requires_grad(std::nullopt);
  if (kind == Kind::kUniform) return {at::rand(sizes, generator, options), std::nullopt};
  const at::Tensor noise = like.new_empty(sizes, options);
  return {ops::normal_functional::call(noise, 0.0, 1.0, generator), std::nullopt};
}

// 1 with the probabilities of p: u < p, of `rank` logical dims.
at::Tensor below_probability(const Level& level, const BatchedArg& p, int64_t rank,
                             at::IntArrayRef sizes, const Gen& generator, const char* op) {
  const Batched u = drawn_first(level, Kind::kUniform, p.value, at::kDouble, sizes, generator, op);
  return aligned(as_arg(u), rank).lt(aligned(p, rank));
}

Batched bernoulli_rule(const Level& level, BatchedArg p, Gen generator) {
  using Op = ops::bernoulli;
  if (!draws_first(level)) return {Op::call(p.value, generator), p.bdim};
  const at::Tensor drawn =
      below_probability(level, p, p.logical_dim(), logical_sizes(p), generator, Op::name);
  return {connected(drawn.to(p.value.scalar_type()), batch_first(p)), 0};
}

void bernoulli__tensor_rule(const Level& level, BatchedArg self, BatchedArg p, Gen generator) {
  using Op = ops::bernoulli__Tensor;
  if (!draws_first(level)) {
    pointwise_internal::Pointwise<Op>::apply(self, p, generator);
    return;
  }
  const int64_t rank = self.logical_dim();
  pointwise_internal::check_target_rank(Op::name, self, p.logical_dim());
  batch_first(self).copy_(
      below_probability(level, p, rank, logical_sizes(self), generator, Op::name));
}

Batched bernoulli_tensor_rule(const Level& level, BatchedArg self, BatchedArg p, Gen generator) {
  using Op = ops::bernoulli_Tensor;
  const int64_t rank = self.logical_dim();
  pointwise_internal::check_target_rank(Op::name, self, p.logical_dim());
  const at::Tensor shape = expanded(self, level.size());
  if (!draws_first(level)) return {Op::call(shape, aligned(p, rank), generator), 0};
  const at::Tensor drawn =
      below_probability(level, p, rank, logical_sizes(self), generator, Op::name)
          .to(self.value.scalar_type());
  return {drawn.expand(shape.sizes()).clone(at::MemoryFormat::Contiguous), 0};
}

// --- normal with tensors of parameters -----------------------------------------------------------

// What combine makes of parameters and noise. As libtorch has it, the gradient of what is drawn is
// zero, in every domain.
template <class Combine>
Batched constant_combination(const Combine& combine, std::initializer_list<BatchedArg> parameters,
                             const Batched& noise, int64_t rank) {
  std::vector<at::Tensor> values;
  for (const BatchedArg& each : parameters) values.push_back(aligned(each, rank));
  at::Tensor result;
  {
    note_nodes();
    const c10::AutoGradMode no_grad(false);
    result = combine(values, aligned(as_arg(noise), rank));
  }
  for (const at::Tensor& value : values) result = connected(result, value);
  return {result, 0};
}

using Values = std::vector<at::Tensor>;

Batched normal_tensors_rule(const Level& level, BatchedArg mean, BatchedArg std, Gen generator) {
  using Op = ops::normal_Tensor_Tensor;
  if (!draws_first(level)) return pointwise<Op>(mean, std, generator);
  const auto sizes = at::infer_size(logical_sizes(mean), logical_sizes(std));
  const Batched noise = drawn_first(level, Kind::kNormal, mean.value, mean.value.scalar_type(),
                                    sizes, generator, Op::name);
  return constant_combination(
      [](const Values& v, const at::Tensor& n) { return n.mul(v[1]).add(v[0]); }, {mean, std},
      noise, static_cast<int64_t>(sizes.size()));
}

Batched normal_mean_rule(const Level& level, BatchedArg mean, double std, Gen generator) {
  using Op = ops::normal_Tensor_float;
  if (!draws_first(level)) return {Op::call(mean.value, std, generator), mean.bdim};
  const Batched noise = drawn_first(level, Kind::kNormal, mean.value, mean.value.scalar_type(),
                                    logical_sizes(mean), generator, Op::name);
  return constant_combination(
      [&](const Values& v, const at::Tensor& n) { return n.mul(std).add(v[0]); }, {mean}, noise,
      mean.logical_dim());
}

Batched normal_std_rule(const Level& level, double mean, BatchedArg std, Gen generator) {
  using Op = ops::normal_float_Tensor;
  if (!draws_first(level)) return {Op::call(mean, std.value, generator), std.bdim};
  const Batched noise = drawn_first(level, Kind::kNormal, std.value, std.value.scalar_type(),
                                    logical_sizes(std), generator, Op::name);
  return constant_combination(
      [&](const Values& v, const at::Tensor& n) { return n.mul(v[0]).add(mean); }, {std}, noise,
      std.logical_dim());
}

// --- dropout -------------------------------------------------------------------------------------

// Every example its own mask: input * mask / (1 - p).
std::tuple<Batched, Batched> reproducible_dropout(const Level& level, const BatchedArg& input,
                                                  double p) {
  const at::Tensor mask =
      reproducible_numbers(level, logical_sizes(input), at::kBool, input.value.device(),
                           std::nullopt, {.kind = Kind::kBernoulli, .a = 1 - p}, "native_dropout")
          .value;
  const double scale = p == 1 ? 0 : 1 / (1 - p);
  return {Batched{batch_first(input).mul(mask).mul(scale), 0}, Batched{mask, 0}};
}

std::tuple<Batched, Batched> native_dropout_rule(const Level& level, BatchedArg input, double p,
                                                 std::optional<bool> train) {
  if (!draws_first(level) || !train.value_or(true) || p == 0.0) {
    return pointwise<ops::native_dropout>(input, p, train);
  }
  if (is_reproducible(level)) return reproducible_dropout(level, input, p);
  const at::Tensor ones = at::ones({}, input.value.options()).expand(logical_sizes(input));
  const auto [scale, mask] = ops::native_dropout::call(ones.contiguous(), p, train);
  const Batched masks = repeated(mask, level.size());
  return {{scale.unsqueeze(*input.bdim).mul(input.value), input.bdim}, masks};
}

// Randomized leaky relu: negative values are multiplied by a slope drawn from [lower, upper].
at::Tensor rrelu_slopes(const Level& level, const BatchedArg& self, double lower, double upper,
                        const Gen& generator) {
  if (is_reproducible(level)) {
    const at::Tensor slopes =
        reproducible_numbers(level, logical_sizes(self), self.value.scalar_type(),
                             self.value.device(), generator,
                             {.kind = Kind::kUniform, .a = lower, .b = upper}, "rrelu_with_noise")
            .value;
    return at::where(self.value.le(0), placed_like(slopes, self),
                     at::ones({}, self.value.options()));
  }
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
  const bool in_place = writes_argument(op, 0);
  if (in_place) promote("rrelu_with_noise_", args[0].toTensor(), level);
  if (args[4].toBool()) promote("rrelu_with_noise", args[1].toTensor(), level);
  Batched self = lower(args[0].toTensor(), *level);
  const Batched noise = lower(args[1].toTensor(), *level);
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

// Whether the operator runs once a row, each with a generator of its own: see RowDraws.
bool draws_by_row(const Level& level) {
  return level.size() > 0 && (is_reproducible(level) || RowDraws::current() != nullptr);
}

at::Tensor row_of(const BatchedArg& arg, int64_t row) {
  return arg.batched() ? arg.value.select(*arg.bdim, row) : arg.value;
}

// Stacks draw(row), for every row.
template <class Op, class DrawRow>
Batched by_row(const Level& level, const Gen& generator, const DrawRow& draw) {
  std::vector<at::Tensor> results;
  {
    RowDraws rows(level, generator, Op::name);
    for (int64_t row = 0; row < level.size(); ++row) {
      rows.begin(row);
      results.push_back(draw(row));
    }
  }
  return {at::stack(results), 0};
}

template <class Op>
Batched draw_each(const Level& level, BatchedArg self, Gen generator) {
  if (!draws_by_row(level)) return {Op::call(self.value, generator), self.bdim};
  return by_row<Op>(level, generator,
                    [&](int64_t row) { return Op::call(row_of(self, row), generator); });
}

Batched binomial_rule(const Level& level, BatchedArg count, BatchedArg prob, Gen generator) {
  using Op = ops::binomial;
  if (!draws_by_row(level)) return pointwise<Op>(count, prob, generator);
  return by_row<Op>(level, generator, [&](int64_t row) {
    return Op::call(row_of(count, row), row_of(prob, row), generator);
  });
}

Batched sample_dirichlet_rule(const Level& level, BatchedArg self, Gen generator) {
  return draw_each<ops::_sample_dirichlet>(level, {batch_first(self), 0}, generator);
}

// B...C -> B...S: the categories are in the last dim, and at most one dim comes before it.
Batched multinomial_rule(const Level& level, BatchedArg self, int64_t num_samples, bool replacement,
                         Gen generator) {
  using Op = ops::multinomial;
  const auto call = [&](const at::Tensor& p) {
    return Op::call(p, num_samples, replacement, generator);
  };
  if (draws_by_row(level)) {
    return by_row<Op>(level, generator, [&](int64_t row) { return call(row_of(self, row)); });
  }
  const at::Tensor value = batch_first(self);
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
    rule<ops::poisson, &draw_each<ops::poisson>>(),
    rule<ops::binomial, &binomial_rule>(),
    rule<ops::_standard_gamma, &draw_each<ops::_standard_gamma>>(),
    pointwise_row<ops::_standard_gamma_grad>(),
};

}  // namespace
}  // namespace torchlift
