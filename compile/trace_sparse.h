#ifndef TORCHLIFT_COMPILE_TRACE_SPARSE_H_
#define TORCHLIFT_COMPILE_TRACE_SPARSE_H_

// File: compile/trace_sparse.h
//
// Results of to_sparse in a trace.
//
//   trace([](const at::Tensor& x) { return x.sin().to_sparse(); }, x)
//
//   def graph(x: f32[3]):
//       sin = aten.sin(x)  # f32[3]
//       clone = aten.clone(sin)  # f32[3]
//       to_sparse = aten._to_sparse.sparse_dim(clone, 1)  # f32[3] Sparse
//       return to_sparse
//
// NOTE [sparse values in graphs]
// How many elements a sparse tensor has depends on numbers, so that none lies inside of a graph.
// to_sparse is written down as a copy, which stands for the sparse tensor while the function runs
// (NOTE [sparse tensors in a trace] in batching/sparse_results.h); where one is returned, the last
// nodes of the graph make COO tensors, which no other node reads. So passes and executors have to
// do with a result that is no strided tensor, and with no argument (but for constants).
//
// By the mark alone no operator, branch or loop is right about such a tensor: they are errors.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <unordered_map>

#include "compile/graph.h"
#include "compile/trace_rules.h"

namespace torchlift::compile {

// The rules of _to_sparse, and of the layouts that have no form in a graph. See
// compile/trace_rules.h.
bool trace_to_sparse(const TracedCall& call, torch::jit::Stack* stack);
bool refuse_to_compressed(const TracedCall& call, torch::jit::Stack* stack);

// Throws UnsupportedError if t, which `reader` ("aten::mul.Tensor") is to read, stands for a sparse
// tensor.
void check_is_dense(const at::Tensor& t, const std::string& reader, const Recording& recording);

// Makes sparse tensors of those results of a trace that stand for some.
class SparseResults {
 public:
  explicit SparseResults(Graph& graph) : graph_(graph) {}

  // What the graph is to return for `t`, whose value is `id`.
  ValueId result(const at::Tensor& t, ValueId id);

 private:
  Graph& graph_;
  std::unordered_map<ValueId, ValueId> made_;
};

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_TRACE_SPARSE_H_
