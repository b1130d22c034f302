#include <ATen/core/Tensor.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_renorm.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <gtest/gtest.h>

#include <vector>

#include "batching/testing/rule_check.h"
#include "batching/vmap.h"
#include "core/tensor_operators.h"

namespace torchlift::testing {
namespace {

RuleCase embedding_case(std::vector<int64_t> shape, int64_t padding_idx, bool scale_grad_by_freq) {
  return {.name = "embedding",
          .f =
              [=](const Tensors& in) {
                return Tensors{at::embedding(in[0], in[1], padding_idx, scale_grad_by_freq)};
              },
          .make =
              [=](int64_t) {
                return Tensors{randn({5, 3}), integers(0, 5, shape)};
              }};
}

TEST(EmbeddingRules, EveryShapeOfIndices) {
  check_rule(embedding_case({}, -1, false));
  check_rule(embedding_case({4}, -1, false));
  check_rule(embedding_case({2, 3}, -1, false));
  check_rule(embedding_case({0}, -1, false));
}

TEST(EmbeddingRules, PaddingAndCounts) {
  check_rule(embedding_case({6}, 2, false));
  check_rule(embedding_case({6}, -1, true));
  check_rule(embedding_case({2, 4}, 0, true));
}

TEST(EmbeddingRules, SecondOrder) {
  check_rule({.name = "embedding, squared",
              .f =
                  [](const Tensors& in) {
                    const at::Tensor out = at::embedding(in[0], in[1]);
                    return Tensors{out, out * out};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({5, 3}), integers(0, 5, {4})};
                  },
              .second_order = true});
}

// So many numbers that the tables become one, for some of the levels at least.
TEST(EmbeddingRules, Large) {
  for (const auto dtype : {at::kLong, at::kInt}) {
    check_rule(
        {.name = "embedding, large",
         .f = [=](const Tensors& in) { return Tensors{at::embedding(in[0], in[1].to(dtype))}; },
         .make =
             [](int64_t) {
               return Tensors{randn({5, 300}), integers(0, 5, {3, 4})};
             }});
  }
}

TEST(EmbeddingRules, LargeNested) {
  const at::Tensor tables = randn({2, 3, 5, 64}), indices = integers(0, 5, {2, 3, 50});
  const auto lookup = [](const at::Tensor& table, const at::Tensor& index) {
    return at::embedding(table, index);
  };
  const at::Tensor got = vmap(vmap(lookup))(tables, indices);
  const at::Tensor turned =
      vmap(vmap(lookup), {.in_dims = in(1, 0)})(tables.transpose(0, 1).contiguous(), indices);
  EXPECT_TRUE(at::equal(got, turned));
  for (int64_t i = 0; i < 2; ++i) {
    for (int64_t j = 0; j < 3; ++j) {
      EXPECT_TRUE(at::equal(got[i][j], lookup(tables[i][j], indices[i][j])));
    }
  }
}

// An index that is out of its own table, not out of all of them.
TEST(EmbeddingRules, IndicesOutOfATable) {
  const at::Tensor tables = randn({3, 5, 64});
  for (const int64_t wrong : {-1, 5, -5, 9}) {
    for (const int64_t count : {2, 50}) {
      at::Tensor indices = at::ones({3, count}, at::kLong);
      indices[1][1] = wrong;
      const auto lookup = [](const at::Tensor& table, const at::Tensor& index) {
        return at::embedding(table, index);
      };
      EXPECT_ANY_THROW(vmap(lookup)(tables, indices)) << wrong << " of " << count;
    }
  }
}

TEST(EmbeddingRules, Renorm) {
  check_rule({.name = "embedding_renorm_",
              .f =
                  [](const Tensors& in) {
                    at::Tensor table = in[0];
                    at::embedding_renorm_(table, in[1], 0.5, 2);
                    return Tensors{table};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({5, 3}), integers(0, 5, {4})};
                  },
              .always_batched = {0},
              .differentiable = false});
}

// A loop over the examples leaves a table from outside as this does.
TEST(EmbeddingRules, RenormOfATableFromOutside) {
  const at::Tensor table = randn({6, 3}) * 4, indices = integers(0, 4, {2, 3, 4});
  at::Tensor expected = table.clone(), got = table.clone(), nested = table.clone();
  std::vector<at::Tensor> rows;
  for (const at::Tensor& each : indices.flatten(0, 1).unbind()) {
    at::embedding_renorm_(expected, each, 0.5, 2);
    rows.push_back(at::embedding(expected, each));
  }
  const auto lookup = [](at::Tensor& shared) {
    return [&shared](const at::Tensor& each) {
      at::embedding_renorm_(shared, each, 0.5, 2);
      return at::embedding(shared, each);
    };
  };
  const at::Tensor found = vmap(lookup(got))(indices.flatten(0, 1));
  EXPECT_TRUE(at::allclose(found, at::stack(rows)));
  EXPECT_TRUE(at::allclose(got, expected));
  const at::Tensor twice = vmap(vmap(lookup(nested)))(indices);
  EXPECT_TRUE(at::allclose(twice.flatten(0, 1), found));
  EXPECT_TRUE(at::allclose(nested, expected));
  EXPECT_TRUE(at::equal(got.narrow(0, 4, 2), table.narrow(0, 4, 2)));
}

// Tables of the inner vmap that come from outside of the outer one, in any layout: a table for each
// inner example, which the outer ones share.
TEST(EmbeddingRules, RenormOfTablesThatTheOuterExamplesShare) {
  const at::Tensor indices = integers(0, 4, {2, 3, 4});
  for (const int64_t dim : {0, 1, 2}) {
    const at::Tensor tables = randn({3, 6, 3}) * 4;
    at::Tensor expected = tables.clone(), got = tables.movedim(0, dim).contiguous();
    std::vector<at::Tensor> rows;
    for (int64_t i = 0; i < 2; ++i) {
      for (int64_t j = 0; j < 3; ++j) {
        at::Tensor table = expected[j];
        at::embedding_renorm_(table, indices[i][j], 0.5, 2);
        rows.push_back(at::embedding(table, indices[i][j]));
      }
    }
    const auto lookup = [](at::Tensor table, const at::Tensor& each) {
      at::embedding_renorm_(table, each, 0.5, 2);
      return at::embedding(table, each);
    };
    const auto inner = vmap(lookup, {.in_dims = in(dim, 0)});
    const at::Tensor found = vmap(inner, {.in_dims = in(kNone, 0)})(got, indices);
    EXPECT_TRUE(at::allclose(found.flatten(0, 1), at::stack(rows))) << dim;
    EXPECT_TRUE(at::allclose(got.movedim(dim, 0), expected)) << dim;
  }
}

// A table that the function makes is every example's own.
TEST(EmbeddingRules, RenormOfATableOfTheFunction) {
  const at::Tensor indices = integers(0, 4, {3, 2});
  const auto f = [](const at::Tensor& each) {
    at::Tensor table = at::ones({4, 3});
    at::embedding_renorm_(table, each, 0.5, 2);
    return table;
  };
  std::vector<at::Tensor> expected;
  for (const at::Tensor& each : indices.unbind()) expected.push_back(f(each));
  EXPECT_TRUE(at::allclose(vmap(f)(indices), at::stack(expected)));
}

}  // namespace
}  // namespace torchlift::testing
