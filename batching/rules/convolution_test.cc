#include <ATen/core/Tensor.h>
#include <ATen/ops/_convolution.h>
#include <ATen/ops/conv1d.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/conv3d.h>
#include <ATen/ops/conv_transpose1d.h>
#include <ATen/ops/conv_transpose2d.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/ones.h>
#include <ATen/record_function.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "batching/testing/rule_check.h"
#include "core/level.h"
#include "core/lifted_tensor.h"

namespace torchlift {
namespace {

using testing::check_rule;
using testing::randn;
using testing::RuleCase;
using testing::Tensors;

struct Conv {
  const char* name;
  std::vector<int64_t> input;
  std::vector<int64_t> weight;
  std::vector<int64_t> bias;
  std::vector<int64_t> stride = {1};
  std::vector<int64_t> padding = {0};
  std::vector<int64_t> dilation = {1};
  bool transposed = false;
  std::vector<int64_t> output_padding = {0};
  int64_t groups = 1;
  bool second_order = false;
};

// With its square, whose gradient differs from example to example.
Tensors with_square(const at::Tensor& out) { return {out, out.mul(out)}; }

RuleCase as_case(const Conv& c) {
  return {
      .name = c.name,
      .f =
          [c](const Tensors& in) {
            return with_square(at::convolution(in[0], in[1], in[2], c.stride, c.padding, c.dilation,
                                               c.transposed, c.output_padding, c.groups));
          },
      .make =
          [c](int64_t) {
            return Tensors{randn(c.input), randn(c.weight), randn(c.bias)};
          },
      .second_order = c.second_order};
}

void check_all(const std::vector<Conv>& cases) {
  for (const Conv& c : cases) check_rule(as_case(c));
}

TEST(ConvolutionRules, Plain) {
  check_all({
      {.name = "conv1d", .input = {2, 3, 7}, .weight = {4, 3, 3}, .bias = {4}},
      {.name = "conv2d",
       .input = {2, 3, 5, 6},
       .weight = {4, 3, 3, 2},
       .bias = {4},
       .second_order = true},
      {.name = "conv2d of one", .input = {1, 1, 5, 6}, .weight = {2, 1, 3, 3}, .bias = {2}},
      {.name = "conv3d", .input = {1, 2, 4, 3, 5}, .weight = {2, 2, 2, 2, 3}, .bias = {2}},
      {.name = "1x1", .input = {2, 3, 4, 4}, .weight = {2, 3, 1, 1}, .bias = {2}},
  });
}

TEST(ConvolutionRules, StridePaddingDilation) {
  check_all({
      {.name = "stride",
       .input = {2, 2, 7, 8},
       .weight = {3, 2, 3, 2},
       .bias = {3},
       .stride = {2, 3}},
      {.name = "padding",
       .input = {2, 2, 4, 5},
       .weight = {3, 2, 3, 3},
       .bias = {3},
       .padding = {1, 2}},
      {.name = "all",
       .input = {2, 2, 9, 8},
       .weight = {3, 2, 3, 2},
       .bias = {3},
       .stride = {2, 1},
       .padding = {2, 1},
       .dilation = {2, 3}},
      {.name = "one value for all dims",
       .input = {1, 2, 9, 8},
       .weight = {3, 2, 3, 2},
       .bias = {3},
       .stride = {2},
       .padding = {1},
       .dilation = {2}},
  });
}

// The weight gradients of samples with many channels are grouped convolutions.
TEST(ConvolutionRules, ManyChannels) {
  check_all({
      {.name = "many channels", .input = {1, 14, 4, 4}, .weight = {2, 14, 3, 3}, .bias = {2}},
      {.name = "many channels, padded",
       .input = {2, 14, 4, 4},
       .weight = {2, 14, 3, 3},
       .bias = {2},
       .stride = {2},
       .padding = {1}},
  });
}

TEST(ConvolutionRules, Groups) {
  check_all({
      {.name = "groups", .input = {2, 4, 5, 5}, .weight = {6, 2, 3, 3}, .bias = {6}, .groups = 2},
      {.name = "depthwise",
       .input = {2, 3, 5, 5},
       .weight = {3, 1, 2, 2},
       .bias = {3},
       .padding = {1},
       .groups = 3},
  });
}

TEST(ConvolutionRules, Transposed) {
  check_all({
      {.name = "transposed",
       .input = {2, 3, 4, 5},
       .weight = {3, 2, 3, 2},
       .bias = {2},
       .transposed = true,
       .second_order = true},
      {.name = "transposed, strided",
       .input = {2, 3, 4, 4},
       .weight = {3, 2, 3, 3},
       .bias = {2},
       .stride = {2},
       .padding = {1},
       .transposed = true,
       .output_padding = {1}},
      {.name = "transposed, groups",
       .input = {2, 4, 4, 4},
       .weight = {4, 3, 3, 3},
       .bias = {6},
       .transposed = true,
       .groups = 2},
  });
}

TEST(ConvolutionRules, WithoutBias) {
  check_rule({.name = "no bias",
              .f = [](const Tensors& in) { return with_square(at::conv2d(in[0], in[1])); },
              .make =
                  [](int64_t) {
                    return Tensors{randn({2, 3, 5, 5}), randn({2, 3, 2, 2})};
                  },
              .second_order = true});
}

TEST(ConvolutionRules, WithoutN) {
  check_rule({.name = "conv2d of [C, H, W]",
              .f = [](const Tensors& in) { return with_square(at::conv2d(in[0], in[1], in[2])); },
              .make =
                  [](int64_t) {
                    return Tensors{randn({3, 5, 5}), randn({2, 3, 2, 2}), randn({2})};
                  }});
  check_rule(
      {.name = "conv1d, same",
       .f = [](const Tensors& in) { return Tensors{at::conv1d(in[0], in[1], in[2], 1, "same")}; },
       .make =
           [](int64_t) {
             return Tensors{randn({2, 3, 6}), randn({2, 3, 3}), randn({2})};
           }});
  check_rule(
      {.name = "conv_transpose1d",
       .f = [](const Tensors& in) { return Tensors{at::conv_transpose1d(in[0], in[1], in[2])}; },
       .make =
           [](int64_t) {
             return Tensors{randn({3, 6}), randn({3, 2, 3}), randn({2})};
           }});
}

TEST(ConvolutionRules, OldForm) {
  check_rule({.name = "_convolution",
              .f =
                  [](const Tensors& in) {
                    return Tensors{at::_convolution(in[0], in[1], in[2], 1, 0, 1, false, 0, 1,
                                                    false, false, true, true)};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({2, 3, 6}), randn({2, 3, 3}), randn({2})};
                  }});
}

// How many calls of libtorch's convolution had a bias.
int& biased_calls() {
  static int calls = 0;
  return calls;
}

// The kernel for transposed ones is slow with a bias for the channels of all examples.
TEST(ConvolutionRules, TheBiasIsAddedAfterTransposedOnes) {
  LevelScope scope({.size = 7});
  const at::Tensor x = lift(at::ones({7, 1, 2, 5}), 0, scope.level());
  const at::Tensor w = lift(at::ones({7, 2, 2, 3}), 0, scope.level());
  const at::Tensor b = lift(at::ones({7, 2}), 0, scope.level());
  biased_calls() = 0;
  const auto handle = at::addThreadLocalCallback(
      at::RecordFunctionCallback(
          [](const at::RecordFunction& call) -> std::unique_ptr<at::ObserverContext> {
            if (std::string(call.name()) == "aten::_convolution") {
              const c10::IValue& bias = call.inputs()[2];
              biased_calls() += bias.isTensor() && bias.toTensor().defined() ? 1 : 0;
            }
            return nullptr;
          })
          .needsInputs(true)
          .scopes({at::RecordScope::FUNCTION}));
  for (const at::Tensor& bias : {b, at::ones({2})}) {
    at::conv_transpose1d(x, w, bias);
    at::conv_transpose1d(at::ones({1, 2, 5}), w, bias);
  }
  at::removeCallback(handle);
  EXPECT_EQ(biased_calls(), 0);
}

TEST(ConvolutionRules, ABiasMustFit) {
  LevelScope scope({.size = 7});
  const at::Tensor w = lift(at::ones({7, 2, 2, 3}), 0, scope.level());
  const auto message = [&](const at::Tensor& bias) -> std::string {
    try {
      at::convolution(at::ones({1, 2, 5}), w, bias, {1}, {0}, {1}, true, {0}, 1);
    } catch (const c10::Error& e) {
      return e.what_without_backtrace();
    }
    return "nothing was thrown";
  };
  EXPECT_THAT(message(at::ones({1})),
              ::testing::HasSubstr("expected a bias of shape [2], one number for each output "
                                   "channel, but got shape [1]"));
  EXPECT_THAT(message(at::ones({2, 1})), ::testing::HasSubstr("but got shape [2, 1]"));
  EXPECT_THAT(message(at::ones({2}, at::kDouble)),
              ::testing::HasSubstr("expected a bias of the input's dtype, Float, but got Double"));
}

TEST(ConvolutionRules, RanksMustAgree) {
  LevelScope scope({.size = 7});
  const at::Tensor x = lift(at::ones({7, 2, 3, 5}), 0, scope.level());
  try {
    at::convolution(x, at::ones({2, 3, 3, 3}), {}, {1}, {0}, {1}, false, {0}, 1);
    FAIL() << "nothing was thrown";
  } catch (const c10::Error& e) {
    EXPECT_THAT(e.what_without_backtrace(),
                ::testing::HasSubstr("but got [2, 3, 5] and [2, 3, 3, 3]"));
  }
}

}  // namespace
}  // namespace torchlift
