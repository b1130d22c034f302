// Traces the gradients of every example's own loss, and saves the graph: make_graph FILE.
//
// What this program is made of (the loss, vmap, grad) is not needed to run the graph.

#include <ATen/TensorOperators.h>
#include <ATen/ops/dot.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/square.h>
#include <ATen/ops/zeros.h>

#include <iostream>

#include "autodiff/grad.h"
#include "batching/vmap.h"
#include "compile/artifact/artifact.h"
#include "compile/trace.h"

namespace tl = torchlift;

struct Params {
  at::Tensor w, b;
};
TORCHLIFT_PYTREE(Params, w, b);

// The loss of one example.
at::Tensor loss(const Params& p, const at::Tensor& x, const at::Tensor& y) {
  return at::square(at::dot(x, p.w) + p.b - y);
}

int main(int count, char** words) {
  if (count != 2) {
    std::cerr << "usage: make_graph FILE\n";
    return 2;
  }
  const Params params{at::ones({3}), at::zeros({})};
  const auto per_sample = tl::vmap(tl::grad(loss), {.in_dims = tl::in(tl::kNone, 0, 0)});

  using namespace tl::compile;
  Artifact artifact;
  artifact.name = "per_sample_gradients";
  artifact.graph = tl::trace(per_sample, params, at::ones({8, 3}), at::ones({8}));
  artifact.signature.inputs =
      tuple_of({dict_of({tensor("w"), tensor("b")}, "params"), tensor("xs"), tensor("ys")});
  artifact.signature.outputs = dict_of({tensor("w"), tensor("b")});
  save_artifact(artifact, words[1]);
  std::cout << artifact.graph.str();
  return 0;
}
