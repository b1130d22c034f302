#ifndef TORCHLIFT_COMPILE_PASSES_TESTING_H_
#define TORCHLIFT_COMPILE_PASSES_TESTING_H_

// File: compile/passes/testing.h
//
// For the tests of passes: graphs built operator by operator while they run eagerly, random ones,
// and a plain interpreter to compare graphs with.
//
//   GraphBuilder b;
//   const ValueId x = b.input(at::randn({3, 4}));
//   const ValueId y = b.call("aten::mul.Tensor", {{"self", ref(x)}, {"other", ref(x)}});
//   const Graph graph = b.finish({y});
//   expect_same(graph, optimized);

#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "compile/graph.h"
#include "compile/passes/evaluate.h"

namespace torchlift::compile {

inline Argument ref(ValueId id) { return ValueRef{id}; }
inline Argument refs(const std::vector<ValueId>& ids) {
  std::vector<ValueRef> all;
  for (const ValueId id : ids) all.push_back({id});
  return all;
}
inline Argument number(const c10::IValue& value) { return value; }
inline Argument ints(std::vector<int64_t> values) { return c10::IValue(std::move(values)); }

class GraphBuilder {
 public:
  using Named = std::vector<std::pair<std::string, Argument>>;

  ValueId input(const at::Tensor& example);
  ValueId constant(const at::Tensor& tensor);
  // Makes dim `dim` of the last input dynamic. All inputs come first.
  void dynamic(int32_t dim, const std::string& name);
  // Runs the operator ("aten::mul.Tensor") on the examples. The first result.
  ValueId call(const std::string& name, Named arguments);
  std::vector<ValueId> call_all(const std::string& name, Named arguments);
  const at::Tensor& example(ValueId id) const { return examples_[static_cast<size_t>(id)]; }
  Graph finish(std::vector<ValueId> outputs);

 private:
  ValueId define(TensorType type, const at::Tensor& example, const std::string& name);

  Graph graph_;
  std::vector<at::Tensor> examples_;
  std::vector<int64_t> symbols_;
};

// Runs the nodes one after the other. Writes go where eager ones would: into the inputs too. Fails
// the test if a tensor has not the type that the graph says, unless check_types is false (values
// whose shape was changed in place have only one type).
std::vector<at::Tensor> run_reference(const Graph& graph, const std::vector<at::Tensor>& inputs,
                                      const std::vector<int64_t>& symbols = {},
                                      bool check_types = true);

// Of the types of the graph's inputs: normal numbers, small integers, or bools.
std::vector<at::Tensor> random_inputs(const Graph& graph, const std::vector<int64_t>& symbols = {});

// Whether they hold the same numbers bit for bit, in the same type; NaNs are alike.
bool identical(const at::Tensor& a, const at::Tensor& b);

// Both verified; on random inputs, `after` gives what `before` gives: bit for bit, or within
// tolerance.
void expect_same(const Graph& before, const Graph& after, const std::vector<int64_t>& symbols = {},
                 double tolerance = 0);

// A random straight-line program on matrices: pointwise operators, sums, products, views,
// constants, factories; with `writes`, also in-place operators, views written through, and out=
// forms.
struct RandomGraphOptions {
  int nodes = 30;
  bool writes = false;
};
Graph random_graph(uint64_t seed, const RandomGraphOptions& options = {});

// How many nodes call the operator ("aten::mul").
int64_t count(const Graph& graph, const std::string& op);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_PASSES_TESTING_H_
