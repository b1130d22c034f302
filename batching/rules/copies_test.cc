#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "batching/testing/call_op.h"
#include "batching/testing/rule_check.h"
#include "core/lifted_tensor.h"

namespace torchlift::testing {
namespace {

using Shape = std::vector<int64_t>;

TEST(CopyRules, Clone) {
  check_rule({.name = "clone",
              .f = [](const Tensors& in) { return Tensors{in[0].clone()}; },
              .make =
                  [](int64_t) {
                    return Tensors{randn({2, 3})};
                  },
              .second_order = true});
  check_rule({.name = "contiguous",
              .f = [](const Tensors& in) { return Tensors{in[0].t().contiguous()}; },
              .make =
                  [](int64_t) {
                    return Tensors{randn({2, 3})};
                  }});
}

TEST(CopyRules, Conversions) {
  for (const auto dtype : {at::kFloat, at::kLong, at::kBool, at::kComplexDouble}) {
    check_rule({.name = "to",
                .f = [&](const Tensors& in) { return Tensors{in[0].to(dtype)}; },
                .make =
                    [](int64_t) {
                      return Tensors{randn({2, 3})};
                    },
                .differentiable = dtype == at::kFloat,
                .tolerance = 1e-6});
  }
  check_rule({.name = "type_as",
              .f = [](const Tensors& in) { return Tensors{in[0].type_as(in[1])}; },
              .make =
                  [](int64_t) {
                    return Tensors{randn({2, 3}), integers(0, 2, {})};
                  },
              .differentiable = false});
}

// Each example has the layout asked for, wherever the batch dim is.
TEST(CopyRules, MemoryFormatIsThatOfAnExample) {
  LevelScope scope({.size = 2, .randomness = Randomness::kSame});
  for (const int64_t bdim : {0, 2, 4}) {
    Shape sizes{3, 4, 5, 6};
    sizes.insert(sizes.begin() + bdim, 2);
    const at::Tensor value = randn(sizes);
    const at::Tensor x = lift(value, bdim, scope.level());
    for (const auto format : {at::MemoryFormat::Contiguous, at::MemoryFormat::ChannelsLast}) {
      for (const at::Tensor& y :
           {x.clone(format), x.contiguous(format), at::zeros_like(x, {}, format),
            x.to(at::kFloat, /*non_blocking=*/false, /*copy=*/true, format)}) {
        EXPECT_TRUE(y.is_contiguous(format)) << format;
        EXPECT_EQ(y.sizes(), x.sizes());
      }
      const Lowered copy = lower(x.clone(format), *scope.level());
      EXPECT_TRUE(copy.value.movedim(*copy.bdim, bdim).equal(value));
    }
  }
}

TEST(CopyRules, ChannelsLastWantsFourDims) {
  LevelScope scope({.size = 2, .randomness = Randomness::kSame});
  const at::Tensor x = lift(randn({2, 3, 4, 5}), 0, scope.level());
  try {
    x.clone(at::MemoryFormat::ChannelsLast);
    FAIL() << "a 3-d example was accepted";
  } catch (const c10::Error& e) {
    EXPECT_THAT(e.what_without_backtrace(),
                ::testing::HasSubstr("required rank 4 tensor to use channels_last format, got "
                                     "shape [3, 4, 5]"));
  }
}

TEST(CopyRules, CopyInto) {
  for (const Shape& src : {Shape{2, 3}, Shape{3}, Shape{2, 1}, Shape{}}) {
    for (const auto dtype : {at::kDouble, at::kFloat, at::kLong}) {
      check_rule({.name = "copy_",
                  .f =
                      [](const Tensors& in) {
                        at::Tensor target = in[0];
                        target.copy_(in[1]);
                        return Tensors{target};
                      },
                  .make =
                      [&](int64_t) {
                        return Tensors{randn({2, 3}), positive(src).mul(9).to(dtype)};
                      },
                  .always_batched = {0},
                  .tolerance = 1e-6});
    }
  }
}

TEST(CopyRules, Fill) {
  for (const char* op : {"aten::fill_.Tensor", "aten::fill.Tensor"}) {
    const bool in_place = op[10] == '_';
    check_rule({.name = op,
                .f =
                    [op](const Tensors& in) {
                      return call_op(op, {in[0], in[1]});
                    },
                .make =
                    [](int64_t) {
                      return Tensors{randn({2, 3}), randn({})};
                    },
                .always_batched = in_place ? std::vector<size_t>{0} : std::vector<size_t>{}});
    check_rule({.name = op,
                .f =
                    [op](const Tensors& in) {
                      return call_op(op, {in[0], in[1]});
                    },
                .make =
                    [](int64_t) {
                      return Tensors{randn({}), randn({})};
                    },
                .always_batched = in_place ? std::vector<size_t>{0} : std::vector<size_t>{}});
  }
}

TEST(CopyRules, CopyIntoUnbatchedThrows) {
  at::Tensor target = at::zeros({3});
  LevelScope scope({.size = 4, .randomness = Randomness::kSame});
  const at::Tensor x = lift(randn({4, 3}), 0, scope.level());
  try {
    target.copy_(x);
    FAIL() << "the write was accepted";
  } catch (const c10::Error& e) {
    EXPECT_THAT(e.what_without_backtrace(), ::testing::HasSubstr("that has no batch dimension"));
  }
}

}  // namespace
}  // namespace torchlift::testing
