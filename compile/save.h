#ifndef TORCHLIFT_COMPILE_SAVE_H_
#define TORCHLIFT_COMPILE_SAVE_H_

// File: compile/save.h
//
// Functions in files: traced here, run elsewhere, without the function's code and without Python.
//
//   tl::save(tl::vmap(tl::grad(loss)), "per_sample.tlc", params, xs, ys);    // example arguments
//
// Those may be tensors on the meta device, which stand for tensors on the CPU (compile/trace.h).
//
//   const tl::LoadedFunction f = tl::load("per_sample.tlc");
//   std::cout << f.signature().str();
//   std::vector<at::Tensor> outputs = f.run(inputs);           // tensors in the signature's order
//   auto g = f.as<Params(Params, at::Tensor, at::Tensor)>();   // or with types of one's own
//   Params gradients = g(params, xs, ys);
//
// What a file holds, and how safe it is to load one: docs/artifacts.md. What can be traced:
// compile/trace.h. A loaded function can be copied, called from several threads, and transformed.
// What the function writes into tensors that it captured is written into those of the loaded one,
// which begin as they were when it was saved. Its copies share them; another load has its own.
//
// A file that Python saved with backend="inductor" holds machine code, which load runs only if it
// is told to: tl::load("f.tlc", {.allow_native_code = true}) (docs/artifacts.md, "Machine code").
//
// load throws TransformError for a file that is no artifact or is damaged, or whose machine code is
// not allowed or not for this machine.

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "compile/artifact/loaded_program.h"
#include "compile/artifact/signature.h"
#include "compile/graph.h"
#include "compile/replay.h"
#include "compile/trace.h"
#include "core/tree.h"

namespace torchlift {
namespace compile {

void save_graph(Graph graph, const std::string& name, const std::string& path);
[[noreturn]] void throw_output_count(size_t expected, size_t got);

}  // namespace compile

template <class Function>
class TypedFunction;

class LoadedFunction {
 public:
  LoadedFunction(compile::LoadedProgram program, compile::Signature signature)
      : program_(std::move(program)),
        signature_(std::make_shared<const compile::Signature>(std::move(signature))) {}

  std::vector<at::Tensor> run(at::ArrayRef<at::Tensor> inputs,
                              const compile::RunOptions& options = {}) const {
    return program_.run(inputs, options);
  }
  const compile::Signature& signature() const { return *signature_; }
  const compile::Graph& graph() const { return program_.graph(); }
  // What runs: "eager" (the graph), or "inductor".
  const std::string& backend() const { return program_.backend(); }

  // As a function of trees: R(Args...). The tensors of the arguments, in the order of tree_flatten,
  // are the inputs; those of a default-made R the outputs. Throws TransformError when it is called
  // and their numbers are others.
  template <class Function>
  TypedFunction<Function> as() const {
    return TypedFunction<Function>(*this);
  }

 private:
  compile::LoadedProgram program_;
  std::shared_ptr<const compile::Signature> signature_;
};

template <class R, class... Args>
class TypedFunction<R(Args...)> {
 public:
  explicit TypedFunction(LoadedFunction function) : function_(std::move(function)) {}

  R operator()(const Args&... args) const {
    const std::vector<at::Tensor> outputs =
        function_.run(tree_flatten(std::tuple<const Args&...>(args...)));
    R result{};
    const size_t expected = tree_flatten(result).size();
    if (expected != outputs.size()) compile::throw_output_count(expected, outputs.size());
    return tree_unflatten(std::move(result), outputs);
  }

 private:
  LoadedFunction function_;
};

// Traces f on the arguments, and saves the graph.
template <class F, class... Args>
void save(const F& f, const std::string& path, const Args&... args) {
  compile::save_graph(trace(f, args...), "function", path);
}

using compile::LoadOptions;

LoadedFunction load(const std::string& path, const LoadOptions& options = {});

}  // namespace torchlift

#endif  // TORCHLIFT_COMPILE_SAVE_H_
