#include "core/tree.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>

#include "core/error.h"

// Every kind of place a struct can be registered in.
struct GlobalPair {
  at::Tensor a, b;
};
TORCHLIFT_PYTREE(GlobalPair, a, b);

namespace app {

struct Params {
  at::Tensor w, b;
  std::vector<at::Tensor> hidden;
  double scale = 1.0;
  std::string name;
};
TORCHLIFT_PYTREE(Params, w, b, hidden, scale, name);

struct Model {
  struct Inner {
    at::Tensor t;
  };
  Inner inner;
  std::map<std::string, Params> blocks;
  std::optional<GlobalPair> pair;
};
TORCHLIFT_PYTREE(Model::Inner, t);
TORCHLIFT_PYTREE(Model, inner, blocks, pair);

template <class T>
struct Layer {
  T weight;
  int stride = 1;
};
template <class T>
TORCHLIFT_PYTREE(Layer<T>, weight, stride);

struct Base {
  at::Tensor x;
};
TORCHLIFT_PYTREE(Base, x);
struct Derived : Base {
  at::Tensor y;
};

// More fields than a chain of macros would like.
struct Wide {
  at::Tensor f00, f01, f02, f03, f04, f05, f06, f07, f08, f09, f10, f11, f12, f13, f14, f15, f16,
      f17, f18, f19, f20, f21, f22, f23, f24, f25, f26, f27, f28, f29, f30, f31, f32, f33, f34, f35,
      f36, f37, f38, f39;
};
TORCHLIFT_PYTREE(Wide, f00, f01, f02, f03, f04, f05, f06, f07, f08, f09, f10, f11, f12, f13, f14,
                 f15, f16, f17, f18, f19, f20, f21, f22, f23, f24, f25, f26, f27, f28, f29, f30,
                 f31, f32, f33, f34, f35, f36, f37, f38, f39);

}  // namespace app

namespace torchlift {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

enum class Color { kRed };

static_assert(is_tree_v<at::Tensor> && is_tree_v<double> && is_tree_v<bool> && is_tree_v<Color>);
static_assert(is_tree_v<std::string> && is_tree_v<const char*> && is_tree_v<at::Scalar>);
static_assert(is_tree_v<app::Model> && is_tree_v<app::Layer<app::Params>> && is_tree_v<GlobalPair>);
static_assert(!is_tree_v<int*> && !is_tree_v<std::unique_ptr<at::Tensor>>);
// A derived class must not silently be walked as its base.
static_assert(is_tree_v<app::Base> && !is_tree_v<app::Derived>);
static_assert(Tree<std::vector<int64_t>>::kKind == TreeKind::kConstant);
static_assert(Tree<std::vector<bool>>::kKind == TreeKind::kConstant);

at::Tensor t(int64_t value) { return at::full({}, value, at::kLong); }

template <class T>
std::vector<std::string> paths(const T& tree) {
  std::vector<std::string> result;
  for_each_leaf(tree, [&](const at::Tensor&, const Path& path) { result.push_back(path.str()); });
  return result;
}

template <class T>
std::vector<int64_t> values(const T& tree) {
  std::vector<int64_t> result;
  for_each_leaf(tree, [&](const at::Tensor& leaf) {
    result.push_back(leaf.defined() ? leaf.item<int64_t>() : -1);
  });
  return result;
}

// tree_map touches every tensor, flatten and unflatten are inverse to each other.
template <class T>
void check_round_trip(const T& tree) {
  const auto negated = tree_map(tree, [](const at::Tensor& leaf) { return leaf.neg(); });
  std::vector<int64_t> expected = values(tree);
  for (int64_t& value : expected) value = -value;
  EXPECT_EQ(values(negated), expected);
  EXPECT_EQ(structure_mismatch(tree, negated), "");
  EXPECT_EQ(values(tree_unflatten(tree, tree_flatten(negated))), expected);
}

TEST(Tree, SingleTensor) {
  check_round_trip(t(3));
  EXPECT_THAT(paths(t(3)), ElementsAre(""));
}

TEST(Tree, Sequences) {
  const std::tuple tree(t(1), std::pair(t(2), 3.5), std::array{t(3), t(4)}, std::vector{t(5)});
  EXPECT_THAT(values(tree), ElementsAre(1, 2, 3, 4, 5));
  EXPECT_THAT(paths(tree), ElementsAre("[0]", "[1][0]", "[2][0]", "[2][1]", "[3][0]"));
  check_round_trip(tree);
}

TEST(Tree, MapsInTheOrderOfKeys) {
  std::unordered_map<std::string, at::Tensor> unordered;
  for (int64_t i = 9; i >= 0; --i) unordered["k" + std::to_string(i)] = t(i);
  EXPECT_THAT(values(unordered), ElementsAre(0, 1, 2, 3, 4, 5, 6, 7, 8, 9));
  EXPECT_EQ(paths(unordered)[3], "['k3']");
  check_round_trip(unordered);
  const std::map<int, at::Tensor> ordered{{7, t(1)}, {-2, t(2)}};
  EXPECT_THAT(values(ordered), ElementsAre(2, 1));
  EXPECT_THAT(paths(ordered), ElementsAre("[-2]", "[7]"));
  check_round_trip(ordered);
}

TEST(Tree, OptionalAddsNoStep) {
  const std::tuple tree(std::optional(t(1)), std::optional<at::Tensor>(), t(2));
  EXPECT_THAT(values(tree), ElementsAre(1, 2));
  EXPECT_THAT(paths(tree), ElementsAre("[0]", "[2]"));
  check_round_trip(tree);
}

TEST(Tree, Structs) {
  app::Model model;
  model.inner.t = t(1);
  model.blocks["enc"] = {t(2), t(3), {t(4), t(5)}, 0.5, "encoder"};
  model.pair = GlobalPair{t(6), t(7)};
  EXPECT_THAT(paths(model), ElementsAre(".inner.t", ".blocks['enc'].w", ".blocks['enc'].b",
                                        ".blocks['enc'].hidden[0]", ".blocks['enc'].hidden[1]",
                                        ".pair.a", ".pair.b"));
  EXPECT_THAT(values(model), ElementsAre(1, 2, 3, 4, 5, 6, 7));
  check_round_trip(model);
  const app::Model copy = tree_map(model, [](const at::Tensor& leaf) { return leaf; });
  EXPECT_EQ(copy.blocks.at("enc").scale, 0.5);
  EXPECT_EQ(copy.blocks.at("enc").name, "encoder");
}

TEST(Tree, TemplatesAndManyFields) {
  const app::Layer<std::vector<at::Tensor>> layer{{t(1), t(2)}, 4};
  EXPECT_THAT(paths(layer), ElementsAre(".weight[0]", ".weight[1]"));
  check_round_trip(layer);
  app::Wide wide;
  int64_t next = 0;
  for_each_leaf(wide, [&](at::Tensor& leaf) { leaf = t(next++); });
  EXPECT_EQ(next, 40);
  EXPECT_EQ(wide.f39.item<int64_t>(), 39);
  EXPECT_EQ(paths(wide)[17], ".f17");
}

TEST(Tree, EmptyTrees) {
  EXPECT_EQ(tree_flatten(std::tuple<>()).size(), 0);
  EXPECT_EQ(tree_flatten(std::vector<at::Tensor>()).size(), 0);
  EXPECT_EQ(tree_flatten(1.5).size(), 0);
  EXPECT_EQ(tree_flatten(std::pair(at::Tensor(), 1)).size(), 1);
}

TEST(Tree, MapWithPath) {
  const auto named =
      tree_map(std::vector{t(1), t(2)}, [](const at::Tensor& leaf, const Path& path) {
        return path.str() == "[1]" ? leaf.mul(10) : leaf;
      });
  EXPECT_THAT(values(named), ElementsAre(1, 20));
}

TEST(Tree, WalkSeveralTreesWithConstants) {
  const std::tuple a(t(1), 2), b(t(10), 20);
  int64_t tensors = 0, constants = 0;
  struct Sum {
    int64_t& tensors;
    int64_t& constants;
    void operator()(const Path&, const at::Tensor& x, const at::Tensor& y) const {
      tensors += x.add(y).item<int64_t>();
    }
    void operator()(const Path&, int x, int y) const { constants += x + y; }
  } sum{tensors, constants};
  walk_trees(sum, Path{}, a, b);
  EXPECT_EQ(tensors, 11);
  EXPECT_EQ(constants, 22);
}

TEST(Tree, LaterChangesDoNotReachACopy) {
  const std::vector<at::Tensor> tree{t(1)};
  tree_map(tree, [](const at::Tensor&) { return t(2); });
  EXPECT_THAT(values(tree), ElementsAre(1));
}

TEST(StructureMismatch, SaysWhereAndWhat) {
  using Vectors = std::tuple<std::vector<at::Tensor>, at::Tensor>;
  EXPECT_EQ(structure_mismatch(Vectors({t(1)}, t(2)), Vectors({t(3)}, t(4))), "");
  EXPECT_EQ(structure_mismatch(Vectors({t(1)}, t(2)), Vectors(std::vector<at::Tensor>(), t(4))),
            "at [0]: expected 1 elements, got 0");
  EXPECT_EQ(structure_mismatch(std::vector{t(1)}, std::vector{t(1), t(2)}),
            "expected 1 elements, got 2");

  using Map = std::map<std::string, at::Tensor>;
  EXPECT_EQ(structure_mismatch(Map{{"w", t(1)}}, Map{{"w", t(1)}}), "");
  EXPECT_EQ(structure_mismatch(Map{{"w", t(1)}, {"b", t(1)}}, Map{{"w", t(1)}, {"c", t(1)}}),
            "expected the keys 'b', 'w', got the keys 'c', 'w'");
  EXPECT_EQ(structure_mismatch(Map{{"w", t(1)}}, Map{}), "expected the keys 'w', got no keys");

  using Maybe = std::vector<std::optional<at::Tensor>>;
  EXPECT_EQ(structure_mismatch(Maybe{t(1)}, Maybe{std::nullopt}),
            "at [0]: expected a value, got an empty optional");
  EXPECT_EQ(structure_mismatch(Maybe{std::nullopt}, Maybe{t(1)}),
            "at [0]: expected an empty optional, got a value");

  app::Params a, b;
  a.hidden = {t(1), t(2)};
  EXPECT_EQ(structure_mismatch(a, b), "at .hidden: expected 2 elements, got 0");
}

TEST(TreeUnflatten, CountsLeaves) {
  const std::vector<at::Tensor> tree{t(1), t(2)};
  for (size_t count : {0, 1, 3}) {
    try {
      tree_unflatten(tree, std::vector<at::Tensor>(count));
      FAIL();
    } catch (const TransformError& error) {
      EXPECT_THAT(error.what_without_backtrace(),
                  HasSubstr("[tree_unflatten] got " + std::to_string(count) +
                            " tensors for a tree that has 2"));
    }
  }
}

}  // namespace
}  // namespace torchlift
