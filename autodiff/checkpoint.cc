#include "autodiff/checkpoint.h"

#include <ATen/SequenceNumber.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/clone.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/tensor.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <limits>
#include <map>
#include <optional>
#include <typeinfo>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "autodiff/cotangents.h"
#include "autodiff/forward_mode.h"
#include "autodiff/kept_products.h"
#include "autodiff/run_context.h"
#include "core/autograd_node.h"
#include "core/derivative_code.h"
#include "core/error.h"
#include "core/grad_mode.h"
#include "core/lifted_tensor.h"
#include "core/random_state.h"
#include "core/recorder.h"

// NOTE [checkpoints]
// The function runs as it is, and autograd records it in every domain. Then the record is dropped:
// each domain gets one node, whose edges are those by which the record left the function, to the
// arguments and to whatever the function closes over (the boundary). When a gradient comes to that
// node, the function runs again in the context of the first run, on the same arguments; so the new
// record leaves it by the same edges, where it is cut off, and the engine pulls the gradient back
// to the cuts.
//
// Nothing has to be known of the function's insides: gradients in it, vmaps in it, other
// checkpoints. A backward pass that is itself recorded makes a graph through the new record, and
// goes on beyond the cuts.
//
// The tensors of one result that a domain may track: itself, its tangent, the values in both, of
// domains further outside. They are its components here.

namespace torchlift {
namespace checkpoint_internal {
namespace {

using at::Tensor;
using torch::autograd::AccumulateGrad;
using torch::autograd::CopySlices;
using torch::autograd::Edge;
using torch::autograd::edge_list;
using torch::autograd::Node;
using torch::autograd::variable_list;

constexpr uint64_t kLeafNumber = std::numeric_limits<uint64_t>::max();

// --- components ----------------------------------------------------------------------------------

using Components = std::map<int64_t, std::vector<Tensor>>;  // by the depth of their domain

// Calls visit(t) on the values in t, t, its tangent.
template <class Visit>
void for_each_component(const Tensor& t, const Visit& visit) {
  if (const LiftedTensorImpl* impl = as_lifted(t)) for_each_component(impl->value(), visit);
  visit(t);
  const Tensor& tangent = t._fw_grad(kDual);
  if (tangent.defined()) for_each_component(tangent, visit);
}

// Those that are tracked.
Components components_of(const Leaves& results) {
  Components found;
  for (const Tensor& result : results) {
    if (!result.defined()) continue;
    for_each_component(result, [&](const Tensor& t) {
      if (t.requires_grad()) found[depth_of(t)].push_back(t);
    });
  }
  return found;
}

template <class Test>
bool any_component(const Tensor& t, const Test& test) {
  bool found = false;
  for_each_component(t, [&](const Tensor& part) { found = found || test(part); });
  return found;
}

bool has_tangent(const Tensor& t) {
  return any_component(t, [](const Tensor& part) { return part._fw_grad(kDual).defined(); });
}

bool any_tracked(const Tensor& t) {
  return any_component(t, [](const Tensor& part) { return part.requires_grad(); });
}

// Whether operators on these tensors are written down. The graph has each operator once, whether or
// not it was to be computed again, and its own plan of what to keep.
bool any_traced(const Leaves& tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) {
    return t.defined() && any_component(t, [](const Tensor& part) { return is_recorded(part); });
  });
}

// A tensor like t, on the same memory, whose components have no graphs. Those that had are added to
// `cut`, in the order of components_of.
Tensor without_graphs(const Tensor& t, Components& cut) {
  const LiftedTensorImpl* impl = as_lifted(t);
  const auto alias = [&]() -> Tensor {
    if (impl == nullptr) {
      const DerivativeScope derivative;
      return t.detach();
    }
    return lift_alias(without_graphs(impl->value(), cut), impl->bdim(), impl->level_ptr());
  };
  Tensor fresh = alias();
  if (t.requires_grad()) cut[depth_of(t)].push_back(fresh);
  const Tensor& tangent = t._fw_grad(kDual);
  if (tangent.defined()) {
    fresh._set_fw_grad(without_graphs(tangent, cut), kDual, /*is_inplace_op=*/false);
  }
  return fresh;
}

// --- graphs --------------------------------------------------------------------------------------

// An edge of the boundary, by where it goes.
using Place = std::pair<Node*, uint32_t>;

struct PlaceHash {
  size_t operator()(const Place& place) const {
    return std::hash<Node*>()(place.first) * 31 + place.second;
  }
};

Place place_of(const Edge& edge) { return {edge.function.get(), edge.input_nr}; }

// Hands a gradient on: where the record of a second run ends, and does not end for those who
// differentiate the backward pass.
struct CutNode final : public Node {
  variable_list apply(variable_list&& grads) override { return std::move(grads); }
  std::string name() const override { return "CheckpointCut"; }
};

// Gives a node an input such as another has: what the engine makes of gradients that arrive there.
void expect_input_of(Node& node, const torch::autograd::InputMetadata& input) {
  if (input.was_default_constructed()) {
    node.add_input_metadata(Node::undefined_input());
    return;
  }
  node.add_input_metadata(input.options(), input.shape_as_dim_vector(), input.is_tensor_subclass(),
                          input.is_nested_tensor(), input.grad_dtype());
}

// The edges by which graphs leave a function.
class Boundary {
 public:
  // Nodes made since, on this thread, are the function's; of the edges of its arguments it is known
  // that they are not.
  Boundary(uint64_t first_node, const Leaves& arguments) : first_node_(first_node) {
    for (const Tensor& argument : arguments) {
      if (!argument.defined()) continue;
      for_each_component(argument, [&](const Tensor& t) {
        if (!t.requires_grad()) return;
        Edge edge = torch::autograd::impl::gradient_edge(t);
        if (argument_nodes_.insert(edge.function.get()).second) held_.push_back(std::move(edge));
      });
    }
  }

  bool is_outside(const Node& node) const {
    if (node.sequence_nr() == kLeafNumber) return true;
    return node.sequence_nr() < first_node_ || argument_nodes_.count(const_cast<Node*>(&node)) > 0;
  }

  // Calls leave(edge) on the edges out of the function, of the graph below these tensors, which may
  // be changed; returns whether a node writes into a view.
  template <class Leave>
  bool walk(const std::vector<Tensor>& tensors, const Leave& leave) const {
    bool writes_views = false;
    std::unordered_set<Node*> seen;
    std::vector<Node*> todo;
    const auto push = [&](Node* node) {
      if (seen.insert(node).second) todo.push_back(node);
    };
    for (const Tensor& t : tensors) push(t.grad_fn().get());
    while (!todo.empty()) {
      Node* node = todo.back();
      todo.pop_back();
      writes_views = writes_views || typeid(*node) == typeid(CopySlices);
      for (Edge& edge : node->next_edges()) {
        if (!edge.is_valid()) continue;
        if (is_outside(*edge.function)) {
          leave(edge);
        } else {
          push(edge.function.get());
        }
      }
    }
    return writes_views;
  }

 private:
  uint64_t first_node_;
  std::unordered_set<Node*> argument_nodes_;
  edge_list held_;
};

// --- running -------------------------------------------------------------------------------------

std::optional<uint32_t> version_of(const Tensor& t) {
  if (!t.defined() || t.is_inference()) return std::nullopt;
  return t.unsafeGetTensorImpl()->version_counter().current_version();
}

using Versions = std::vector<std::optional<uint32_t>>;

Versions versions_of(const Leaves& tensors) {
  Versions versions;
  for (const Tensor& t : tensors) versions.push_back(version_of(t));
  return versions;
}

// All that it takes to run the function again.
struct Recipe {
  Function f;
  Leaves arguments;
  Versions versions;
  RunContext context;
  std::optional<RandomState> random;  // if the function draws random numbers
  KeptProducts products;
  Leaves weights;  // leaves that the function closes over...
  Versions weight_versions;
  bool tangents = false;  // whether results have some
};

// A result that is a tensor from outside, or a view, would share its history with others.
bool needs_copy(const Tensor& result, const Boundary& boundary) {
  return any_component(result, [&](const Tensor& t) {
    return t.requires_grad() &&
           (t.is_view() || t.grad_fn() == nullptr || boundary.is_outside(*t.grad_fn()));
  });
}

// One run: the results, and where their graphs end.
struct Run {
  Leaves results;
  Boundary boundary;
};

Run run_once(const Recipe& recipe, KeptProducts& products, const Leaves& arguments, bool first) {
  Boundary boundary(at::sequence_number::peek(), arguments);
  const KeptProducts::Scope keep(&products, first);
  const NoAutocastCache no_cache;
  Leaves results = recipe.f(arguments);
  for (Tensor& result : results) {
    if (result.defined() && needs_copy(result, boundary)) result = result.clone();
  }
  note_nodes();
  return {std::move(results), std::move(boundary)};
}

void check_unchanged(const Recipe& recipe) {
  if (versions_of(recipe.arguments) != recipe.versions ||
      versions_of(recipe.weights) != recipe.weight_versions) {
    unsupported_error("checkpoint",
                      "a tensor that the function takes or closes over was written into between "
                      "the function and its backward pass, which has to compute with what it was. "
                      "Write out of place, or later.");
  }
}

// What a function does in the second run, and has not done in the first.
[[noreturn]] void throw_differs(const std::string& what) {
  unsupported_error("checkpoint", "the function ran again for its gradient, and ", what,
                    ". It must do the same each time: nothing it reads may change in between, and "
                    "the tensors that it makes must not require gradients.");
}

// The function's results once more, recorded.
Run run_again(Recipe& recipe) {
  check_unchanged(recipe);
  if (recipe.tangents && !recipe.context.same_forward_mode()) {
    unsupported_error(
        "checkpoint",
        "the function ran in a jvp that has ended, so that it cannot run again as it "
        "did. Take the gradient inside of it (jvp of grad, not grad of jvp), or leave "
        "out the checkpoint.");
  }
  const ContextScope context(recipe.context);
  std::optional<RandomState> random;
  if (recipe.random.has_value()) {
    random = recipe.random->now();
    recipe.random->restore();
  }
  const auto finally = [&] {
    if (random.has_value()) random->restore();
  };
  try {
    Leaves arguments;
    for (const Tensor& argument : recipe.arguments) arguments.push_back(context.enter(argument));
    Run run = run_once(recipe, recipe.products, arguments, /*first=*/false);
    finally();
    return run;
  } catch (const std::exception& error) {
    finally();
    // Ours, or what Python made of it.
    const bool escaped = std::strstr(error.what(), "after that level had ended") != nullptr;
    if (!context.has_new_levels() || !escaped) throw;
    unsupported_error(
        "checkpoint",
        "the function closes over a tensor of a vmap that had ended when it ran again "
        "for a gradient outside of that. Pass it to checkpoint as an argument.");
  } catch (...) {
    finally();
    throw;
  }
}

// --- the node ------------------------------------------------------------------------------------

struct CheckpointBackward final : public Node {
  variable_list apply(variable_list&& grads) override;
  std::string name() const override { return "CheckpointBackward"; }
  void release_variables() override { recipe.reset(); }

  std::shared_ptr<Recipe> recipe;
  int64_t depth = 0;   // of the domain
  size_t outputs = 0;  // components of that domain
  edge_list boundary;  // the next edges, whoever changes those
};

// Cuts the record of a second run off; the cuts are in the order of the boundary.
class Cuts {
 public:
  Cuts(const edge_list& boundary, bool open) : boundary_(boundary), open_(open) {
    for (size_t i = 0; i < boundary.size(); ++i) indices_.emplace(place_of(boundary[i]), i);
    cuts_.resize(boundary.size());
  }

  void cut(Edge& edge) {
    const auto found = indices_.find(place_of(edge));
    if (found == indices_.end()) throw_differs("used a tensor that it had not used before");
    Edge& cut = cuts_[found->second];
    if (!cut.is_valid()) cut = make_cut(boundary_[found->second]);
    edge = cut;
  }

  // Those that the record reaches, and which they are.
  edge_list reached(std::vector<size_t>& which) const {
    edge_list edges;
    for (size_t i = 0; i < cuts_.size(); ++i) {
      if (!cuts_[i].is_valid()) continue;
      edges.push_back(cuts_[i]);
      which.push_back(i);
    }
    return edges;
  }

 private:
  Edge make_cut(const Edge& beyond) const {
    auto node = make_node<CutNode>();
    expect_input_of(*node, beyond.function->input_metadata(beyond.input_nr));
    if (open_) node->add_next_edge(beyond);
    return Edge(std::move(node), 0);
  }

  const edge_list& boundary_;
  const bool open_;
  std::unordered_map<Place, size_t, PlaceHash> indices_;
  edge_list cuts_;
};

variable_list CheckpointBackward::apply(variable_list&& grads) {
  const std::shared_ptr<Recipe> held = recipe;
  if (held == nullptr) {
    unsupported_error("checkpoint",
                      "backward through a checkpoint for a second time, after the first has freed "
                      "the graph. Keep it (retain_graph).");
  }
  variable_list result(boundary.size());
  Run run = run_again(*held);
  const Components components = components_of(run.results);
  const auto found = components.find(depth);
  if (found == components.end() || found->second.size() != outputs) {
    throw_differs("its results had other derivatives");
  }
  const bool create_graph = c10::GradMode::is_enabled();
  Cuts cuts(boundary, create_graph);
  const bool writes_views = run.boundary.walk(found->second, [&](Edge& edge) { cuts.cut(edge); });
  edge_list roots;
  variable_list cotangents;
  for (size_t i = 0; i < outputs; ++i) {
    if (!grads[i].defined()) continue;
    const Tensor& output = found->second[i];
    roots.push_back(torch::autograd::impl::gradient_edge(output));
    cotangents.push_back(writes_views ? batched_like(grads[i], output) : grads[i]);
  }
  std::vector<size_t> which;
  const edge_list targets = cuts.reached(which);
  if (roots.empty() || targets.empty()) return result;
  run.results.clear();
  variable_list gradients = torch::autograd::Engine::get_default_engine().execute(
      roots, cotangents, /*keep_graph=*/create_graph, create_graph, /*accumulate_grad=*/false,
      targets);
  for (size_t i = 0; i < which.size(); ++i) result[which[i]] = std::move(gradients[i]);
  return result;
}

// The node of a domain: its edges are where the record of these tensors leaves the function.
auto make_checkpoint(const std::shared_ptr<Recipe>& recipe, int64_t depth,
                     const std::vector<Tensor>& tensors, const Boundary& boundary) {
  auto node = make_node<CheckpointBackward>();
  node->recipe = recipe;
  node->depth = depth;
  node->outputs = tensors.size();
  std::unordered_set<Place, PlaceHash> seen;
  boundary.walk(tensors, [&](const Edge& edge) {
    if (!seen.insert(place_of(edge)).second) return;
    node->boundary.push_back(edge);
    node->add_next_edge(edge);
    if (const auto* leaf = dynamic_cast<const AccumulateGrad*>(edge.function.get())) {
      recipe->weights.push_back(leaf->variable);
    }
  });
  return node;
}

}  // namespace

Leaves run(Function f, Leaves arguments, const CheckpointPolicy& policy) {
  using Keep = CheckpointPolicy::Keep;
  using Which = KeptProducts::Which;
  const Which which = policy.keep == Keep::kNothing    ? Which::kNone
                      : policy.keep == Keep::kProducts ? Which::kAll
                                                       : Which::kNamed;
  const Versions versions = versions_of(arguments);
  const RandomState random(devices_of(arguments));
  auto recipe = std::shared_ptr<Recipe>(new Recipe{.f = std::move(f),
                                                   .arguments = std::move(arguments),
                                                   .versions = versions,
                                                   .context = RunContext(),
                                                   .random = std::nullopt,
                                                   .products = KeptProducts(which, policy.names),
                                                   .weights = {},
                                                   .weight_versions = {}});
  Run run = run_once(*recipe, recipe->products, recipe->arguments, /*first=*/true);
  if (versions_of(recipe->arguments) != versions) {
    unsupported_error("checkpoint",
                      "the function writes into one of its arguments in place, and would do so "
                      "again when it runs again. Use the out-of-place operator.");
  }
  const Components components = components_of(run.results);
  // Where nobody differentiates there is nothing to compute again; see also docs/checkpoint.md.
  if (components.empty() || recipe->context.narrowed() || any_traced(run.results)) {
    return std::move(run.results);
  }
  if (!(random.now() == random)) recipe->random = random;
  std::map<int64_t, decltype(make_node<CheckpointBackward>())> nodes;
  for (const auto& [depth, tensors] : components) {
    nodes.emplace(depth, make_checkpoint(recipe, depth, tensors, run.boundary));
  }
  recipe->weight_versions = versions_of(recipe->weights);
  Components cut;
  for (Tensor& result : run.results) {
    if (!result.defined()) continue;
    recipe->tangents = recipe->tangents || has_tangent(result);
    if (any_tracked(result)) result = without_graphs(result, cut);
  }
  for (const auto& [depth, tensors] : cut) {
    for (const Tensor& t : tensors) torch::autograd::set_history(t, nodes.at(depth));
  }
  note_nodes();
  return std::move(run.results);
}

}  // namespace checkpoint_internal

const at::Tensor& checkpoint_name(const at::Tensor& x, const std::string& name) {
  KeptProducts::name(x, name);
  return x;
}

}  // namespace torchlift
