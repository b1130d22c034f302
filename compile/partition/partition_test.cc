#include "compile/partition/partition.h"

#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "compile/passes/functionalize.h"
#include "compile/passes/node_facts.h"
#include "compile/passes/testing.h"
#include "core/error.h"

namespace torchlift::compile {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

ValueId call(GraphBuilder& b, const std::string& op, ValueId x) {
  return b.call("aten::" + op, {{"self", ref(x)}});
}
ValueId mul(GraphBuilder& b, ValueId x, ValueId y) {
  return b.call("aten::mul.Tensor", {{"self", ref(x)}, {"other", ref(y)}});
}
ValueId mm(GraphBuilder& b, ValueId x, ValueId y) {
  return b.call("aten::mm", {{"self", ref(x)}, {"mat2", ref(y)}});
}

std::vector<std::string> names(const Partition& parts) {
  std::vector<std::string> all;
  for (const SavedValue& saved : parts.saved) all.push_back(saved.name);
  return all;
}

// Forward, then backward, gives what the joint graph gives.
void check(const Graph& joint, const Partition& parts, const PartitionOptions& options) {
  verify(parts.forward);
  verify(parts.backward);
  const std::vector<at::Tensor> inputs = random_inputs(joint, options.symbols);
  const auto expected = run_reference(joint, inputs, options.symbols);
  const auto primals = static_cast<std::ptrdiff_t>(options.primals);
  const auto outputs = static_cast<std::ptrdiff_t>(options.outputs);
  auto got =
      run_reference(parts.forward, {inputs.begin(), inputs.begin() + primals}, options.symbols);
  ASSERT_EQ(got.size(), options.outputs + parts.saved.size());
  std::vector<at::Tensor> backward_inputs(got.begin() + outputs, got.end());
  backward_inputs.insert(backward_inputs.end(), inputs.begin() + primals, inputs.end());
  const auto gradients = run_reference(parts.backward, backward_inputs, options.symbols);
  got.resize(options.outputs);
  got.insert(got.end(), gradients.begin(), gradients.end());
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_TRUE(identical(got[i], expected[i])) << i << "\n" << joint.str() << parts.backward.str();
  }
}

// sum(tanh(sin(x w))) and its gradient in x.
Graph small_joint() {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({8, 4}));
  const ValueId w = b.input(at::randn({4, 6}));
  const ValueId tangent = b.input(at::randn({8, 6}));
  const ValueId p = mm(b, x, w);
  const ValueId s = call(b, "sin", p);
  const ValueId t = call(b, "tanh", s);
  ValueId g = b.call("aten::tanh_backward", {{"grad_output", ref(tangent)}, {"output", ref(t)}});
  g = mul(b, g, call(b, "cos", p));
  const ValueId gradient = mm(b, g, call(b, "t", w));
  return b.finish({t, gradient});
}

TEST(PartitionTest, TheDefaultSavesWhatIsRead) {
  const Graph joint = small_joint();
  const PartitionOptions options{.primals = 2, .outputs = 1};
  const Partition parts = default_partition(joint, options);
  check(joint, parts, options);
  EXPECT_THAT(names(parts), ElementsAre("tanh", "mm", "x_1"));
  EXPECT_EQ(parts.saved_bytes, 4 * (48 + 24 + 48));
  EXPECT_EQ(parts.saved_activation_bytes, 4 * 96);
  EXPECT_EQ(parts.recomputed_nodes, 0);
}

TEST(PartitionTest, TheMinimumCutComputesCheapOperatorsAgain) {
  const Graph joint = small_joint();
  const PartitionOptions options{.primals = 2, .outputs = 1};
  const Partition parts = min_cut_partition(joint, options);
  check(joint, parts, options);
  // Not x: the product is not computed again.
  EXPECT_THAT(names(parts), ElementsAre("x_1", "mm"));
  EXPECT_EQ(parts.saved_bytes, 4 * (24 + 48));
  EXPECT_EQ(parts.recomputed_nodes, 2);
  EXPECT_EQ(parts.recomputed_elements, 96);
}

TEST(PartitionTest, RandomOperatorsRunOnce) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({8}));
  const ValueId tangent = b.input(at::randn({8}));
  const ValueId noise = b.call("aten::rand_like", {{"self", ref(x)}});
  const ValueId mask = b.call("aten::gt.Scalar", {{"self", ref(noise)}, {"other", number(0.5)}});
  const ValueId y = mul(b, x, mask);
  const Graph joint = b.finish({y, mul(b, tangent, mask)});
  const PartitionOptions options{.primals = 1, .outputs = 1};
  const Partition parts = min_cut_partition(joint, options);
  EXPECT_EQ(count(parts.forward, "aten::rand_like"), 1);
  EXPECT_EQ(count(parts.backward, "aten::rand_like"), 0);
  // The mask of bools is smaller than the noise.
  EXPECT_THAT(names(parts), ElementsAre("gt"));
  EXPECT_EQ(parts.saved_bytes, 8);
}

TEST(PartitionTest, DynamicDimsAreKnownToTheBackwardPass) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({8, 3}));
  b.dynamic(0, "n");
  const ValueId tangent = b.input(at::randn({3}));
  const ValueId y = b.call("aten::sum.dim_IntList", {{"self", ref(x)}, {"dim", ints({0})}});
  const ValueId rows = b.call("aten::expand_as", {{"self", ref(tangent)}, {"other", ref(x)}});
  const Graph joint = b.finish({y, call(b, "clone", rows)});
  const PartitionOptions options{.primals = 1, .outputs = 1, .symbols = {8}};
  check(joint, min_cut_partition(joint, options), options);
  check(joint, default_partition(joint, options), options);
}

TEST(PartitionTest, NumbersThatDoNotFit) {
  const Graph joint = small_joint();
  const auto error_of = [&](const PartitionOptions& options) -> std::string {
    try {
      default_partition(joint, options);
    } catch (const TransformError& error) {
      return error.what_without_backtrace();
    }
    return "no error";
  };
  EXPECT_THAT(error_of({.primals = 4, .outputs = 1}),
              HasSubstr("the joint graph has 3 inputs and 2 outputs, which is less than the 4 "
                        "primals and 1 outputs"));
  EXPECT_THAT(error_of({.primals = 2, .outputs = 2}), HasSubstr("depends on a tangent"));
}

// --- all cuts ------------------------------------------------------------------------------------

// The least that any choice of values to save costs, where pointwise operators and views may be
// computed again, and others not.
class AllCuts {
 public:
  AllCuts(const Graph& joint, const PartitionOptions& options) : joint_(joint), uses_(joint) {
    std::set<ValueId> tangents(joint.inputs.begin() + static_cast<std::ptrdiff_t>(options.primals),
                               joint.inputs.end());
    for (size_t i = 0; i < options.primals; ++i) candidates_.push_back(joint.inputs[i]);
    for (const Node& node : joint.nodes) {
      bool backward = false;
      for (const ValueId id : arguments_of(node)) backward = backward || tangents.count(id) > 0;
      for (const ValueId id : results_of(node)) {
        if (backward) {
          tangents.insert(id);
        } else if (!may_view(node)) {
          candidates_.push_back(id);
        }
      }
      if (!backward) continue;
      for (const ValueId id : arguments_of(node)) {
        if (tangents.count(id) == 0) wanted_.insert(id);
      }
    }
    for (size_t i = options.outputs; i < joint.outputs.size(); ++i) {
      if (tangents.count(joint.outputs[i]) == 0) wanted_.insert(joint.outputs[i]);
    }
  }

  size_t candidates() const { return candidates_.size(); }

  int64_t least() const {
    int64_t best = INT64_MAX;
    for (uint64_t bits = 0; bits < uint64_t{1} << candidates_.size(); ++bits) {
      std::set<ValueId> saved;
      int64_t bytes = 0;
      for (size_t i = 0; i < candidates_.size(); ++i) {
        if ((bits >> i & 1) == 0) continue;
        saved.insert(candidates_[i]);
        bytes += joint_.type(candidates_[i]).sizes.empty() ? 8 : bytes_of(candidates_[i]);
      }
      if (bytes < best && feasible(saved)) best = bytes;
    }
    return best;
  }

 private:
  int64_t bytes_of(ValueId id) const {
    int64_t bytes = 8;
    for (const int64_t size : joint_.type(id).concrete_sizes()) bytes *= size;
    return bytes;
  }

  bool feasible(const std::set<ValueId>& saved) const {
    std::vector<ValueId> stack(wanted_.begin(), wanted_.end());
    std::set<ValueId> seen;
    while (!stack.empty()) {
      const ValueId id = stack.back();
      stack.pop_back();
      if (saved.count(id) > 0 || !seen.insert(id).second) continue;
      if (joint_.find_constant(id) != nullptr) continue;
      const int32_t producer = uses_.producer[static_cast<size_t>(id)];
      if (producer < 0) return false;
      const Node& node = joint_.nodes[static_cast<size_t>(producer)];
      if (!may_view(node) && !is_pointwise(node) && node.op != "aten::zeros_like") return false;
      for (const ValueId argument : arguments_of(node)) stack.push_back(argument);
    }
    return true;
  }

  const Graph& joint_;
  const Uses uses_;
  std::vector<ValueId> candidates_;
  std::set<ValueId> wanted_;
};

// A random program whose last input is a tangent: what depends on it are gradients.
struct RandomJoint {
  Graph graph;
  PartitionOptions options;
};
RandomJoint random_joint(uint64_t seed, int nodes) {
  Graph graph = random_graph(seed, {.nodes = nodes, .writes = false});
  std::set<ValueId> tangents = {graph.inputs.back()};
  std::vector<ValueId> outputs, gradients;
  for (const Node& node : graph.nodes) {
    bool any = false;
    for (const ValueId id : arguments_of(node)) any = any || tangents.count(id) > 0;
    for (const ValueId id : results_of(node)) {
      if (any) tangents.insert(id);
      // Every node is needed, so that each is of one of the two passes.
      (any ? gradients : outputs).push_back(id);
    }
  }
  RandomJoint joint{.graph = std::move(graph),
                    .options = {.primals = 3, .outputs = outputs.size()}};
  outputs.insert(outputs.end(), gradients.begin(), gradients.end());
  joint.graph.outputs = std::move(outputs);
  return joint;
}

TEST(PartitionTest, RandomProgramsGiveTheSame) {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    const auto [joint, options] = random_joint(seed, 40);
    const Partition all = default_partition(joint, options);
    const Partition least = min_cut_partition(joint, options);
    check(joint, all, options);
    check(joint, least, options);
    EXPECT_LE(least.saved_bytes, all.saved_bytes) << joint.str();
    if (HasFailure()) FAIL() << "seed " << seed;
  }
}

TEST(PartitionTest, NoOtherChoiceSavesLess) {
  int compared = 0;
  for (uint64_t seed = 0; seed < 60; ++seed) {
    const auto [joint, options] = random_joint(seed, 12);
    const AllCuts cuts(joint, options);
    if (cuts.candidates() > 12) continue;
    const Partition parts = min_cut_partition(joint, options, {.recompute_reductions = false});
    EXPECT_EQ(parts.saved_bytes, cuts.least()) << "seed " << seed << "\n" << joint.str();
    ++compared;
  }
  EXPECT_GT(compared, 20);
}

}  // namespace
}  // namespace torchlift::compile
