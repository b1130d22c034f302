#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "batching/testing/call_op.h"
#include "batching/testing/rule_check.h"

namespace torchlift::testing {
namespace {

struct Row {
  std::string op;
  std::vector<c10::IValue> more = {};
};

void check(const Row& row, const std::vector<int64_t>& shape, bool second_order = false) {
  const bool in_place = row.op.back() == '_';
  check_rule({.name = row.op,
              .f =
                  [&](const Tensors& in) {
                    std::vector<c10::IValue> args{in_place ? in[0].clone() : in[0]};
                    args.insert(args.end(), row.more.begin(), row.more.end());
                    return call_op("aten::" + row.op, args);
                  },
              .make = [&](int64_t) { return Tensors{randn(shape)}; },
              .always_batched = in_place ? std::vector<size_t>{0} : std::vector<size_t>{},
              .second_order = second_order});
}

TEST(ActivationRules, ForwardAndBackward) {
  for (const Row& row : std::vector<Row>{{"relu"},
                                         {"gelu"},
                                         {"gelu", {"tanh"}},
                                         {"silu"},
                                         {"elu", {1.5}},
                                         {"celu", {1.5}},
                                         {"selu"},
                                         {"leaky_relu", {0.2}},
                                         {"softplus", {2.0}},
                                         {"hardtanh"},
                                         {"relu6"},
                                         {"hardswish"},
                                         {"hardsigmoid"},
                                         {"hardshrink"},
                                         {"softshrink"},
                                         {"mish"},
                                         {"threshold", {0.1, 2.0}},
                                         {"log_sigmoid"},
                                         {"relu_"},
                                         {"silu_"},
                                         {"elu_"},
                                         {"celu_"},
                                         {"leaky_relu_"},
                                         {"hardtanh_"},
                                         {"hardswish_"},
                                         {"hardsigmoid_"},
                                         {"mish_"},
                                         {"threshold_", {0.1, 2.0}},
                                         {"gelu_"}}) {
    check(row, {2, 3});
    check(row, {});
  }
}

TEST(ActivationRules, SecondOrder) {
  for (const char* op : {"relu", "gelu", "silu", "softplus", "mish", "elu", "log_sigmoid"}) {
    check({op}, {2, 3}, /*second_order=*/true);
  }
}

TEST(ActivationRules, Prelu) {
  check_rule({.name = "prelu",
              .f =
                  [](const Tensors& in) {
                    return call_op("aten::prelu", {in[0], in[1]});
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({2, 3}), positive({3})};
                  }});
  check_rule({.name = "prelu, one weight",
              .f =
                  [](const Tensors& in) {
                    return call_op("aten::prelu", {in[0], in[1]});
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({4}), positive({1})};
                  }});
}

TEST(ActivationRules, Glu) {
  for (const int64_t dim : {int64_t{0}, int64_t{1}, int64_t{-1}}) {
    check({"glu", {dim}}, {2, 4});
  }
}

// The operators that formulas call, with each subset of their arguments batched.
TEST(ActivationRules, BackwardOperators) {
  for (const char* op : {"tanh_backward", "sigmoid_backward", "gelu_backward", "silu_backward",
                         "hardswish_backward", "hardsigmoid_backward", "mish_backward"}) {
    check_rule({.name = op,
                .f =
                    [op](const Tensors& in) {
                      return call_op(std::string("aten::") + op, {in[0], in[1]});
                    },
                .make =
                    [](int64_t) {
                      return Tensors{randn({2, 3}), randn({2, 3})};
                    },
                .differentiable = false});
  }
  check_rule({.name = "threshold_backward",
              .f =
                  [](const Tensors& in) {
                    return call_op("aten::threshold_backward", {in[0], in[1], 0});
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({2, 3}), randn({2, 3})};
                  },
              .second_order = true});
  check_rule({.name = "_prelu_kernel_backward",
              .f =
                  [](const Tensors& in) {
                    return call_op("aten::_prelu_kernel_backward", {in[0], in[1], in[2]});
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({2, 3}), randn({2, 3}), randn({3})};
                  },
              .differentiable = false});
}

}  // namespace
}  // namespace torchlift::testing
