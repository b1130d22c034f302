#include "batching/batch_dims.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/ones.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <tuple>

#include "core/error.h"
#include "core/testing.h"
#include "core/tree.h"

namespace torchlift {
namespace {

using ::testing::HasSubstr;

struct Params {
  at::Tensor w, b;
};
TORCHLIFT_PYTREE(Params, w, b);

// What `dims` says about every leaf of a tree: "0", "None"; "~" in front where it was said for more
// than this leaf.
template <class T>
std::string dims_of(const Dims& dims, const T& tree) {
  std::string text;
  for_each_leaf(tree, [&](const at::Tensor&, const Path& path) {
    const LeafDim found = find_dim(dims, path, "out_dims");
    text += std::string(text.empty() ? "" : " ") + (found.exact ? "" : "~") +
            (found.dim.has_value() ? std::to_string(*found.dim) : "None");
  });
  return text;
}

at::Tensor t() { return at::ones({2, 3}); }

TEST(Dims, Text) {
  EXPECT_EQ(Dims().str(), "None");
  EXPECT_EQ(Dims(kNone).str(), "None");
  EXPECT_EQ(Dims(-1).str(), "-1");
  EXPECT_EQ(in(kNone, 0, in(0, int64_t{1}), in()).str(), "(None, 0, (0, 1), ())");
  EXPECT_EQ(named({{"w", 0}, {"b", in(kNone, 2)}}).str(), "{w: 0, b: (None, 2)}");
}

TEST(Dims, APrefixStandsForAllBelow) {
  const std::tuple tree(t(), std::pair(t(), Params{t(), t()}));
  EXPECT_EQ(dims_of(1, tree), "~1 ~1 ~1 ~1");
  EXPECT_EQ(dims_of(kNone, tree), "~None ~None ~None ~None");
  EXPECT_EQ(dims_of(in(0, kNone), tree), "0 ~None ~None ~None");
  EXPECT_EQ(dims_of(in(0, in(kNone, 2)), tree), "0 None ~2 ~2");
  EXPECT_EQ(dims_of(in(0, in(kNone, in(1, -1))), tree), "0 None 1 -1");
  EXPECT_EQ(dims_of(in(0, in(kNone, named({{"b", 1}, {"w", kNone}}))), tree), "0 None None 1");
  EXPECT_EQ(dims_of(3, t()), "3");
}

TEST(Dims, MapsByName) {
  const std::map<std::string, at::Tensor> by_string{{"a", t()}, {"b", t()}};
  EXPECT_EQ(dims_of(named({{"b", kNone}, {"a", 0}}), by_string), "0 None");
  const std::map<int, at::Tensor> by_number{{7, t()}, {8, t()}};
  EXPECT_EQ(dims_of(named({{"7", 1}, {"8", 2}}), by_number), "1 2");
}

TEST(Dims, OptionalAddsNoLevel) {
  EXPECT_EQ(dims_of(in(0, 1), std::pair(std::optional(t()), t())), "0 1");
}

TEST(Dims, WrongStructure) {
  const std::tuple tree(t(), Params{t(), t()});
  EXPECT_EQ(error_of<TransformError>([&] { dims_of(in(0), tree); }),
            "[vmap] out_dims has 1 entry, (0), where the result has 2 elements. Give one entry for "
            "each, or a "
            "single int or kNone for all.");
  EXPECT_EQ(error_of<TransformError>([&] { dims_of(in(in(0, 1), 0), tree); }),
            "[vmap] out_dims has 2 entries, (0, 1), for the result[0], which is a single leaf. "
            "Give one int "
            "or kNone for it.");
  EXPECT_EQ(error_of<TransformError>([&] {
              dims_of(in(0, named({{"w", 0}, {"bias", 0}})), tree);
            }),
            "[vmap] out_dims has no entry for 'b' of the result[1]; it has: w, bias. Give an int "
            "or kNone for "
            "every name, or a single one for all.");
  EXPECT_THAT(error_of<TransformError>([&] {
                dims_of(in(0, named({{"w", 0}, {"b", 0}, {"c", 0}})), tree);
              }),
              HasSubstr("has 3 entries, {w: 0, b: 0, c: 0}, where the result[1] has 2 fields"));
  EXPECT_THAT(
      error_of<TransformError>([&] {
        dims_of(named({{"w", 0}}), tree);
      }),
      HasSubstr("gives names, {w: 0}, where the result has 2 elements, which have no names. Use "
                "in(...)"));
  const std::map<std::string, at::Tensor> map{{"a", t()}};
  EXPECT_THAT(error_of<TransformError>([&] { dims_of(in(0), map); }),
              HasSubstr("is a map. Use named({{\"key\", 0}"));
}

}  // namespace
}  // namespace torchlift
