#ifndef TORCHLIFT_COMPILE_TRACE_H_
#define TORCHLIFT_COMPILE_TRACE_H_

// File: compile/trace.h
//
// trace: runs a function once and writes down which operators it was, transforms and all.
//
//   auto loss = [](const Params& p, const at::Tensor& x) { ... };
//   compile::Graph graph = tl::trace(tl::vmap(tl::grad(loss), {.in_dims = ...}), params, xs);
//   std::cout << graph.str();
//   std::vector<at::Tensor> outputs = compile::Program(graph).run(tree_flatten(...));
//
// The inputs of the graph are the tensors among the arguments, in the order of tree_flatten; its
// outputs are those of the result. Numbers, and tensors that the function captures, are constants
// of the graph. See NOTE [tracing] in compile/trace_scope.h.
//
// Captured tensors that f writes into (running statistics, a counter) are written by each run of
// the graph, and read as they are then; tracing leaves them as they are. f is called twice if there
// are any: NOTE [state] in compile/captured_state.h.
//
//   at::Tensor calls = at::zeros({}, at::kLong);
//   compile::Program program(tl::trace([&](const at::Tensor& x) { calls.add_(1); return x.sin(); },
//   x)); program.run({x});                          // calls is 1
//
// Arguments may be tensors on the meta device, of which only shapes are known:
//
//   const auto meta = [](at::IntArrayRef sizes) { return at::empty(sizes, at::kMeta); };
//   compile::Graph graph = tl::trace(loss, meta({100000, 100000}), meta({100000}));
//
// The graph is that of tensors on the CPU (or TraceOptions::meta_device) of these shapes. If one
// is, all are taken so, nothing is computed, and f gets no copies. See NOTE [tracing by shapes]
// there.
//
// Throws UnsupportedError for what a graph cannot say: a number computed from the inputs (item(),
// if), a shape that depends on one (nonzero), sparse tensors other than results of to_sparse that f
// returns (compile/trace_sparse.h); by shapes, an operator on large tensors without a meta kernel,
// of which libtorch has fewer where no Python runs. Nothing is recorded of f's side effects beyond
// tensors; f gets copies of the inputs.

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "compile/captured_state.h"
#include "compile/graph.h"
#include "compile/trace_scope.h"
#include "core/tree.h"

namespace torchlift {

struct TraceOptions {
  // What tensors on the meta device stand for.
  c10::Device meta_device = c10::kCPU;
};

namespace compile {

// A graph, and what f returned, whose tensors mean nothing any more: the structure of the result.
template <class R>
struct Traced {
  Graph graph;
  R structure;
};

// f of a tuple of arguments. `transform` is the name in error messages. By shapes, an argument on
// the meta device stands for one on `meta_device`.
template <class F, class Args>
auto trace_tuple(const F& f, const Args& args, const char* transform = "trace",
                 Known known = Known::kValues, c10::Device meta_device = c10::kCPU) {
  using R = std::decay_t<decltype(std::apply(f, args))>;
  static_assert(is_tree_v<R>,
                "torchlift: the function must return a tensor, or a tree of them (core/tree.h).");
  CapturedState state(devices_of(tree_flatten(args)));
  std::optional<Traced<R>> done;
  do {
    done.reset();
    Args traced = args;
    // Before the scope, which would take the copy of an argument that is state for one of f's.
    for_each_leaf(traced, [&](at::Tensor& leaf, const Path&) {
      if (leaf.defined() && known != Known::kShapes) leaf = leaf.detach().clone();
    });
    TraceScope scope(transform, /*source=*/{}, known, &state);
    for_each_leaf(traced, [&](at::Tensor& leaf, const Path& path) {
      if (leaf.defined()) leaf = scope.input(leaf, input_name(path.str()), meta_device);
    });
    R result = std::apply(f, traced);
    Graph graph = scope.finish(tree_flatten(result));
    done.emplace(Traced<R>{std::move(graph), std::move(result)});
  } while (state.again());
  return std::move(*done);
}

}  // namespace compile

template <class F, class... Args>
compile::Graph trace(TraceOptions options, const F& f, const Args&... args) {
  const std::tuple<Args...> all(args...);
  const compile::Known known = compile::known_of(tree_flatten(all));
  return compile::trace_tuple(f, all, "trace", known, options.meta_device).graph;
}

template <class F, class... Args>
compile::Graph trace(const F& f, const Args&... args) {
  return trace(TraceOptions(), f, args...);
}

}  // namespace torchlift

#endif  // TORCHLIFT_COMPILE_TRACE_H_
