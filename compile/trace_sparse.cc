#include "compile/trace_sparse.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/ivalue.h>
#include <c10/core/Layout.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "batching/sparse_results.h"
#include "compile/recording.h"
#include "core/error.h"
#include "core/lifted_tensor.h"

namespace torchlift::compile {
namespace {

using at::Tensor;
using c10::IValue;

[[noreturn]] void throw_compressed(const TracedCall& call, c10::Layout layout) {
  unsupported_error(call.recording.transform(), toString(call.op.operator_name()),
                    ": its result has the layout ", layout,
                    ", which a graph cannot give. Return x.to_sparse(), a COO tensor, and make it "
                    "another one outside; or compute with the dense tensor.");
}

// Of (self, sparse_dim), or (self, layout?, blocksize?, dense_dim?). Nothing: not asked for.
std::optional<int64_t> sparse_dims_asked(const TracedCall& call, const std::vector<IValue>& args) {
  if (call.op.schema().overload_name() == "sparse_dim") return args[1].toInt();
  const auto layout = args[1].toOptional<c10::Layout>().value_or(c10::kSparse);
  if (layout != c10::kSparse) throw_compressed(call, layout);
  TORCH_CHECK(args[2].isNone(), "to_sparse: a COO tensor has no blocksize.");
  if (args[3].isNone()) return std::nullopt;
  return args[0].toTensor().dim() - args[3].toInt();
}

// As libtorch checks them.
void check_sparse_dims(int64_t sparse_dims, int64_t rank) {
  TORCH_CHECK(sparse_dims > 0 || rank == 0,
              "dense_to_sparse: sparse_dim argument must be in >0 when self.dim()>0");
  TORCH_CHECK(0 <= sparse_dims && sparse_dims <= rank,
              "dense_to_sparse: sparse_dim argument must be in [0,", rank, "] range, but ",
              sparse_dims, " is given");
}

}  // namespace

bool trace_to_sparse(const TracedCall& call, torch::jit::Stack* stack) {
  const c10::AutoGradMode no_grad(false);
  const ReadsAsDense reading;
  const std::vector<IValue> args = torch::jit::pop(*stack, call.op.schema().arguments().size());
  const Tensor& t = args[0].toTensor();
  const std::optional<int64_t> asked = sparse_dims_asked(call, args);
  const std::optional<int64_t> before = sparse_dims_of_result(t);
  const int64_t sparse_dims = asked.value_or(before.value_or(t.dim()));
  check_sparse_dims(sparse_dims, t.dim());
  TORCH_CHECK(sparse_dims == before.value_or(sparse_dims),
              "to_sparse: conversion from Sparse to Sparse with sparse_dim argument "
              "!=self.sparse_dim() is not supported");
  Tensor copy = untracked(t, call.level).clone();
  if (is_marked_sparse(t)) {
    mark_sparse(copy, sparse_dims);  // of indices and values: it may have zeros, with gradients
  } else {
    mark_recorded_sparse(copy, sparse_dims);
  }
  stack->emplace_back(std::move(copy));
  return true;
}

bool refuse_to_compressed(const TracedCall& call, torch::jit::Stack* /*stack*/) {
  static const auto* const layouts = new std::unordered_map<std::string, c10::Layout>{
      {"aten::_to_sparse_csr", c10::kSparseCsr},
      {"aten::_to_sparse_csc", c10::kSparseCsc},
      {"aten::_to_sparse_bsr", c10::kSparseBsr},
      {"aten::_to_sparse_bsc", c10::kSparseBsc},
  };
  throw_compressed(call, layouts->at(call.op.schema().name()));
}

void check_is_dense(const Tensor& t, const std::string& reader, const Recording& recording) {
  if (ReadsAsDense::open() || !recorded_sparse_dims(t).has_value()) return;
  unsupported_error(recording.transform(), reader,
                    ": it was given a sparse tensor, a result of to_sparse. A graph returns those, "
                    "or makes them dense again, and has no other operators on them. Use "
                    "to_dense() before, or to_sparse() after.");
}

ValueId SparseResults::result(const Tensor& t, ValueId id) {
  const std::optional<int64_t> sparse_dims = sparse_dims_of_result(t);
  if (!sparse_dims.has_value()) return id;
  const auto [found, added] = made_.try_emplace(id, kNoValue);
  if (!added) return found->second;
  TensorType type = graph_.type(id);
  type.layout = c10::kSparse;
  type.strides.clear();
  found->second = graph_.add_value(std::move(type), "to_sparse");
  graph_.nodes.push_back({.op = "aten::_to_sparse",
                          .overload = "sparse_dim",
                          .args = {ValueRef{id}, IValue(*sparse_dims)},
                          .results = {{.ids = {found->second}}},
                          .subgraphs = {},
                          .source = ""});
  return found->second;
}

}  // namespace torchlift::compile
