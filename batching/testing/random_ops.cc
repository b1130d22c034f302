#include "batching/testing/random_ops.h"

#include <ATen/ops/full_like.h>
#include <ATen/ops/rrelu.h>

#include <optional>
#include <utility>

#include "batching/testing/call_op.h"

namespace torchlift::testing {
namespace {

using Values = std::vector<c10::IValue>;
using at::Tensor;

constexpr int64_t kNumbers = 40;

// The operator on x and more arguments.
RandomOp on_tensor(const char* name, Values more = {}) {
  return {.name = name, .f = [name, more](const Tensor& x) {
            Values args{x};
            args.insert(args.end(), more.begin(), more.end());
            return call_op(name, args)[0];
          }};
}

RandomOp in_place(const char* name, Values more = {}) {
  RandomOp op = on_tensor(name, std::move(more));
  op.in_place = true;
  return op;
}

// The operator on arguments without a tensor.
RandomOp from_nothing(const char* name, Values args) {
  return {.name = name,
          .f = [name, args](const Tensor&) { return call_op(name, args)[0]; },
          .takes_tensor = false};
}

// An operator whose numbers depend on all of its tensor.
RandomOp of_distribution(const char* name, double scale, Values more = {}) {
  return {.name = name,
          .f =
              [name, scale, more](const Tensor& x) {
                Values args{x.mul(scale)};
                args.insert(args.end(), more.begin(), more.end());
                return call_op(name, args)[0];
              },
          .shares = false};
}

RandomOp binomial() {
  return {.name = "aten::binomial",
          .f =
              [](const Tensor& x) {
                return call_op("aten::binomial", {x.mul(40), x})[0];
              },
          .shares = false};
}

// x is both tensors.
RandomOp on_two(const char* name) {
  return {.name = name, .f = [name](const Tensor& x) { return call_op(name, {x, x})[0]; }};
}

RandomOp bernoulli_tensor_in_place() {
  return {.name = "aten::bernoulli_.Tensor",
          .f =
              [](const Tensor& x) {
                return call_op("aten::bernoulli_.Tensor", {x, x.clone()})[0];
              },
          .in_place = true};
}

// Slopes of -x: where x is not negative nothing is drawn.
RandomOp rrelu_with_noise(const char* name) {
  return {.name = name, .f = [name](const Tensor& x) {
            const Tensor negative = x.neg();
            return call_op(name, {negative, at::full_like(negative, 1.0), 0.1, 0.3, true})[0];
          }};
}

RandomOp rrelu() {
  return {.name = "aten::rrelu",
          .f = [](const Tensor& x) { return at::rrelu(x.neg(), 0.1, 0.3, /*training=*/true); }};
}

RandomOp filling(RandomOp op) {
  op.fills = true;
  return op;
}

// Whole features: x as [1, 40, 1].
RandomOp feature_dropout(const char* name) {
  return {.name = name, .f = [name](const Tensor& x) {
            return call_op(name, {x.view({1, kNumbers, 1}).clone(), 0.5, true})[0].flatten();
          }};
}

// Attention over 40 keys of one feature, whose values are x.
RandomOp attention() {
  RandomOp op{.name = "aten::scaled_dot_product_attention"};
  op.f = [](const Tensor& x) {
    const Tensor value = x.view({1, kNumbers, 1});
    const std::vector<Tensor> results = call_op("aten::scaled_dot_product_attention",
                                                {value, value, value, c10::IValue(), 0.5, false});
    return results[0].flatten();
  };
  op.numbers = false;
  op.exact = false;
  return op;
}

const c10::IValue kFloat = static_cast<int64_t>(at::kDouble);

c10::IValue numbers() { return std::vector<int64_t>{kNumbers}; }
c10::IValue none() { return {}; }

void add_factories(std::vector<RandomOp>& ops) {
  ops.push_back(from_nothing("aten::rand", {numbers()}));
  ops.push_back(from_nothing("aten::rand.generator", {numbers(), none(), kFloat}));
  ops.push_back(from_nothing("aten::randn", {numbers(), kFloat}));
  ops.push_back(from_nothing("aten::randn.generator", {numbers(), none()}));
  ops.push_back(from_nothing("aten::randint", {1000, numbers()}));
  ops.push_back(from_nothing("aten::randint.generator", {1000, numbers(), none()}));
  ops.push_back(from_nothing("aten::randint.low", {-1000, 1000, numbers()}));
  ops.push_back(from_nothing("aten::randint.low_generator", {-1000, 1000, numbers(), none()}));
  ops.push_back(from_nothing("aten::normal.float_float", {1.0, 2.0, numbers()}));
  for (const char* name : {"aten::randperm", "aten::randperm.generator"}) {
    RandomOp op = from_nothing(name, {kNumbers});
    if (op.name == "aten::randperm.generator") op = from_nothing(name, {kNumbers, none()});
    op.numbers = false;
    ops.push_back(op);
  }
}

void add_like(std::vector<RandomOp>& ops) {
  ops.push_back(on_tensor("aten::rand_like"));
  ops.push_back(on_tensor("aten::rand_like.generator", {none()}));
  ops.push_back(on_tensor("aten::randn_like"));
  ops.push_back(on_tensor("aten::randn_like.generator", {none()}));
  ops.push_back(on_tensor("aten::randint_like", {1000}));
  ops.push_back(on_tensor("aten::randint_like.generator", {1000, none()}));
  ops.push_back(on_tensor("aten::randint_like.low_dtype", {10, 1000}));
  ops.push_back(on_tensor("aten::randint_like.low_generator_dtype", {10, 1000, none()}));
}

void add_fills(std::vector<RandomOp>& ops) {
  for (const bool functional : {false, true}) {
    const auto add = [&](const char* with, const char* without, Values more) {
      ops.push_back(functional ? on_tensor(without, more) : in_place(with, more));
    };
    add("aten::uniform_", "aten::uniform", {-1.0, 3.0});
    add("aten::normal_", "aten::normal_functional", {1.0, 2.0});
    add("aten::exponential_", "aten::exponential", {2.0});
    add("aten::cauchy_", "aten::cauchy", {1.0, 2.0});
    add("aten::log_normal_", "aten::log_normal", {0.5, 0.5});
    add("aten::geometric_", "aten::geometric", {0.1});
    add("aten::random_", "aten::random", {});
    add("aten::random_.to", "aten::random.to", {1000});
    add("aten::random_.from", "aten::random.from", {-1000, 1000});
    add("aten::bernoulli_.float", "aten::bernoulli.p", {0.3});
  }
  ops.push_back(bernoulli_tensor_in_place());
}

void add_of_parameters(std::vector<RandomOp>& ops) {
  ops.push_back(on_tensor("aten::bernoulli"));
  ops.push_back(on_two("aten::bernoulli.Tensor"));
  ops.push_back(on_tensor("aten::normal.Tensor_float", {2.0}));
  ops.push_back({.name = "aten::normal.float_Tensor", .f = [](const Tensor& x) {
                   return call_op("aten::normal.float_Tensor", {1.0, x})[0];
                 }});
  ops.push_back(on_two("aten::normal.Tensor_Tensor"));
  ops.push_back(of_distribution("aten::poisson", 40));
  ops.push_back(of_distribution("aten::_standard_gamma", 4));
  ops.push_back(of_distribution("aten::_sample_dirichlet", 4));
  ops.push_back(binomial());
  ops.push_back(of_distribution("aten::multinomial", 1, {kNumbers, true}));
}

void add_dropout(std::vector<RandomOp>& ops) {
  ops.push_back(on_tensor("aten::native_dropout", {0.3, true}));
  ops.push_back(on_tensor("aten::dropout", {0.3, true}));
  ops.push_back(on_tensor("aten::alpha_dropout", {0.3, true}));
  ops.push_back(feature_dropout("aten::feature_dropout"));
  ops.push_back(feature_dropout("aten::feature_alpha_dropout"));
  for (const char* name : {"aten::dropout_", "aten::alpha_dropout_"}) {
    // They change what x holds, and draw nothing into it.
    ops.push_back(filling({.name = name, .f = [name](const Tensor& x) {
                             return call_op(name, {x.clone(), 0.3, true})[0];
                           }}));
  }
  for (const char* name : {"aten::feature_dropout_", "aten::feature_alpha_dropout_"}) {
    ops.push_back(filling(feature_dropout(name)));
  }
  ops.push_back(filling(rrelu()));
  ops.push_back(filling({.name = "aten::rrelu_", .f = [](const Tensor& x) {
                           return call_op("aten::rrelu_", {x.neg(), 0.1, 0.3, true})[0];
                         }}));
  ops.push_back(filling(rrelu_with_noise("aten::rrelu_with_noise")));
  ops.push_back(filling(rrelu_with_noise("aten::rrelu_with_noise_")));
  ops.push_back(attention());
}

}  // namespace

const std::vector<RandomOp>& random_ops() {
  static const auto* all = [] {
    auto* ops = new std::vector<RandomOp>();
    add_factories(*ops);
    add_like(*ops);
    add_fills(*ops);
    add_of_parameters(*ops);
    add_dropout(*ops);
    return ops;
  }();
  return *all;
}

const std::vector<std::pair<std::string, std::string>>& random_ops_left_out() {
  static const auto* all = new std::vector<std::pair<std::string, std::string>>{
      {"aten::randint_like.Tensor", "reads the bound from a tensor's memory"},
      {"aten::randint_like.Tensor_generator", "reads the bound from a tensor's memory"},
      {"aten::rrelu_with_noise_functional", "made by functionalization only"},
      {"aten::_fused_sdp_choice", "draws nothing: chooses a kernel"},
      {"aten::_scaled_dot_product_flash_attention_for_cpu", "takes no dropout on CPU"},
      {"aten::_scaled_dot_product_attention_math", "scaled_dot_product_attention calls it"},
      {"aten::_scaled_dot_product_fused_attention_overrideable", "no kernel on CPU"},
      {"aten::gru.data", "packed sequences"},
      {"aten::lstm.data", "packed sequences"},
      {"aten::rnn_relu.data", "packed sequences"},
      {"aten::rnn_tanh.data", "packed sequences"},
      {"aten::gru.input", "dropout between layers"},
      {"aten::lstm.input", "dropout between layers"},
      {"aten::rnn_relu.input", "dropout between layers"},
      {"aten::rnn_tanh.input", "dropout between layers"},
  };
  return *all;
}

}  // namespace torchlift::testing
