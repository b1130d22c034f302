#include "autodiff/reverse.h"

#include <ATen/SequenceNumber.h>
#include <ATen/ops/alias.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/SmallVector.h>
#include <c10/util/flat_hash_map.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/tensor.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <limits>
#include <string>
#include <typeindex>
#include <typeinfo>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "autodiff/cotangents.h"
#include "autodiff/forward_mode.h"
#include "autodiff/reverse_formulas.h"
#include "core/dispatch.h"
#include "core/lifted_tensor.h"
#include "core/narrow.h"
#include "core/open_transforms.h"
#include "core/runtime.h"

namespace torchlift {
namespace {

using torch::autograd::AccumulateGrad;
using torch::autograd::CopySlices;
using torch::autograd::Node;

// Whether a node's formula does the same with GradMode off, see NOTE [derivatives of a backward
// pass]: those that models are made of, looked up in libtorch. Anything else may take a shortcut, a
// CopySlices too, for what it holds.
bool takes_no_shortcut(const std::string& name) {
  // clang-format off
  static const auto* known = new std::unordered_set<std::string>{
      "AbsBackward0", "AddBackward0", "AddmmBackward0", "AddmvBackward0", "AliasBackward0",
      "AsStridedBackward0", "BmmBackward0", "CatBackward0", "CloneBackward0",
      "ConvolutionBackward0", "CosBackward0", "CopyBackwards", "DivBackward0",
      "DotBackward0", "ExpBackward0", "ExpandBackward0", "GeluBackward0", "IndexBackward0",
      "LogBackward0", "LogSoftmaxBackward0", "MaxPool2DWithIndicesBackward0", "MeanBackward0",
      "MeanBackward1", "MmBackward0", "MulBackward0", "MvBackward0", "NegBackward0",
      "NllLossBackward0", "PermuteBackward0", "PowBackward0", "ReluBackward0",
      "ReshapeAliasBackward0", "RsubBackward1", "SelectBackward0", "SigmoidBackward0",
      "SinBackward0", "SliceBackward0", "SoftmaxBackward0", "SqueezeBackward0",
      "SqueezeBackward1", "StackBackward0", "SubBackward0", "SumBackward0", "SumBackward1",
      "TBackward0", "TanhBackward0", "TransposeBackward0", "UnsafeViewBackward0",
      "UnsqueezeBackward0", "ViewBackward0", "_LogSoftmaxBackward0", "FwPrimalBackward0",
      "torch::autograd::AccumulateGrad", "Identity", "torch::autograd::Identity",
      "GatherRowsBackward", "ScatterRowsBackward", "StatisticsBackward", "GhostNormBackward"};
  // clang-format on
  return known->count(name) > 0;
}

// The same of the node's type, since making its name takes a microsecond.
bool takes_no_shortcut(const Node& node) {
  static thread_local std::unordered_map<std::type_index, bool> seen;
  const auto [found, added] = seen.try_emplace(typeid(node), false);
  if (added) found->second = takes_no_shortcut(node.name());
  return found->second;
}

// NOTE [who can see the graph]
// A gradient needs a graph of its own (create_graph) only if somebody outside of f differentiates
// what f touched *in this domain*: a primal was tracked before f ran, or the graph of the outputs
// reaches a node that was there before, or a leaf that is not one of our primals (weights that f
// closes over). Outer domains are not concerned: they record what happens to the values, whatever
// this domain does (NOTE [grad mode of outer domains] in core/grad_mode.h). But see the next note.
//
// NOTE [derivatives of a backward pass]
// Without create_graph, GradMode is off in the formulas of a backward pass, and some of them then
// choose kernels that cannot be differentiated: silu_backward and logit_backward throw, while those
// of det and solve work with an LU factorization that autograd takes for a constant, and would lose
// an outer gradient or a tangent without a word. So where the outputs or cotangents are tracked in
// an outer domain, or carry a tangent in any (or parts that an interpreter differentiates: NOTE
// [interpreted levels] in core/interpreter.h), the pass runs as if its graph were wanted, and what
// this domain recorded is dropped; unless the formulas of all nodes are known to take no shortcut.
class GraphWalk {
 public:
  GraphWalk(uint64_t first_node, const std::vector<at::Tensor>& primals, bool look_for_shortcuts)
      : first_node_(first_node), primals_(primals), look_for_shortcuts_(look_for_shortcuts) {}

  // NOTE [in-place writes into views]
  // The node of such a write, CopySlices, copies the gradient of the base and writes its part for
  // the view into the copy. Where a shared cotangent comes in, and the part depends on the example,
  // that is a batched value in a tensor without a batch dim. So a graph with such a node starts
  // from cotangents that have one.
  void run(const std::vector<at::Tensor>& outputs) {
    if (outputs.empty()) return;
    seen_.reserve(std::min(at::sequence_number::peek() - first_node_, kMaxReserved));
    for (const at::Tensor& output : outputs) {
      if (output.defined() && output.requires_grad()) {
        roots_.push_back(torch::autograd::impl::gradient_edge(output));
        push(roots_.back().function.get());
      }
    }
    while (!todo_.empty()) {
      Node* node = todo_.back();
      todo_.pop_back();
      if (is_outside(*node)) {
        reaches_outside_ = true;
        continue;
      }
      writes_views_ = writes_views_ || typeid(*node) == typeid(CopySlices);
      takes_shortcuts_ = takes_shortcuts_ || (look_for_shortcuts_ && !takes_no_shortcut(*node));
      for (const auto& edge : node->next_edges()) push(edge.function.get());
    }
  }

  bool reaches_outside() const { return reaches_outside_; }
  bool writes_views() const { return writes_views_; }
  bool takes_shortcuts() const { return takes_shortcuts_; }

 private:
  void push(Node* node) {
    if (node != nullptr && seen_.insert(node).second) todo_.push_back(node);
  }

  // Leaves have the largest number of all; the nodes f made lie between first_node_ and it.
  bool is_outside(const Node& node) const {
    if (node.sequence_nr() != kLeafNumber) return node.sequence_nr() < first_node_;
    const auto* leaf = dynamic_cast<const AccumulateGrad*>(&node);
    if (leaf == nullptr) return true;
    for (const at::Tensor& primal : primals_) {
      if (primal.is_same(leaf->variable)) return false;
    }
    return true;
  }

  static constexpr uint64_t kLeafNumber = std::numeric_limits<uint64_t>::max();
  // Many nodes may have been made, and few of them be part of the graph.
  static constexpr uint64_t kMaxReserved = 1024;

  uint64_t first_node_;
  const std::vector<at::Tensor>& primals_;
  // Held, since the node of an output that is a leaf (a primal handed back) belongs to nobody else.
  std::vector<torch::autograd::Edge> roots_;
  ska::flat_hash_set<Node*> seen_;
  std::vector<Node*> todo_;
  bool look_for_shortcuts_;
  bool reaches_outside_ = false;
  bool takes_shortcuts_ = false;
  bool writes_views_ = false;
};

bool any_tracked(const std::vector<at::Tensor>& tensors) {
  for (const at::Tensor& t : tensors) {
    if (t.defined() && is_tracked(t)) return true;
  }
  return false;
}

// Whether a graph of this domain leads to one of them; a tangent is no graph.
bool any_recorded(const std::vector<at::Tensor>& tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const at::Tensor& t) { return t.defined() && t.requires_grad(); });
}

// Whether somebody differentiates what is computed from t by other means than a graph of this
// domain: see NOTE [derivatives of a backward pass].
bool differentiated_elsewhere(const at::Tensor& t, bool outer_grad) {
  if (!t.defined()) return false;
  if (t._fw_grad(/*level=*/0).defined()) return true;
  for (const LiftedTensorImpl* impl = as_lifted(t); impl != nullptr;
       impl = as_lifted(impl->value())) {
    const at::Tensor& value = impl->value();
    if (impl->level().interpreter() != nullptr && impl->bdim().has_value()) return true;
    if ((outer_grad && value.requires_grad()) || value._fw_grad(/*level=*/0).defined()) return true;
  }
  return false;
}

bool any_differentiated_elsewhere(const std::vector<at::Tensor>& tensors, bool outer_grad) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [&](const at::Tensor& t) { return differentiated_elsewhere(t, outer_grad); });
}

// The tensor as one of `level`, so that autograd of that domain can use it.
at::Tensor in_domain(const at::Tensor& t, Level* level) {
  if (level == nullptr || !t.defined() || depth_of(t) >= level->depth()) return t;
  return lift_alias(t, std::nullopt, LevelPtr::reclaim_copy(level));
}

// x without its graph and its tangent in this domain. Not x.detach(): under vmap that detaches the
// value too, and with it all outer domains would lose their gradients.
at::Tensor constant_here(const at::Tensor& x) {
  const LiftedTensorImpl* impl = as_lifted(x);
  if (impl != nullptr) return lift_alias(impl->value(), impl->bdim(), impl->level_ptr());
  const DerivativeScope derivative;
  return x.detach();
}

// x without its graph in this domain. The tangent, if any, is kept.
at::Tensor detached_here(const at::Tensor& x) {
  at::Tensor detached = constant_here(x);
  const at::Tensor& tangent = x._fw_grad(/*level=*/0);
  if (tangent.defined()) {
    detached._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
  }
  return detached;
}

// An output of a differentiation that nobody outside can see: its tangent leaves the graph as well.
at::Tensor detached_output(const at::Tensor& x) {
  at::Tensor detached = constant_here(x);
  const at::Tensor& tangent = x._fw_grad(/*level=*/0);
  if (!tangent.defined()) return detached;
  const LiftedTensorImpl* impl = as_lifted(tangent);
  const bool batch = impl != nullptr && impl->level().kind() == LevelKind::kTangents;
  const at::Tensor alone =
      batch ? lift_alias(constant_here(impl->value()), impl->bdim(), impl->level_ptr())
            : constant_here(tangent);
  detached._set_fw_grad(alone, /*level=*/0, /*is_inplace_op=*/false);
  return detached;
}

// The tangents of the tensors that have one.
std::vector<at::Tensor> tangents_of(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> tangents;
  if (C10_LIKELY(!forward_mode_open())) return tangents;
  for (const at::Tensor& t : tensors) {
    if (!t.defined()) continue;
    const at::Tensor& tangent = t._fw_grad(/*level=*/0);
    if (tangent.defined()) tangents.push_back(tangent);
  }
  return tangents;
}

// Whether somebody outside differentiates the tangent of a tensor, which a backward pass without a
// graph would not record.
bool any_tangent_tracked(const std::vector<at::Tensor>& tensors) {
  return any_tracked(tangents_of(tensors));
}

// t, of the domain of this depth or a batch of such tensors, without its graph in that domain.
at::Tensor without_graph(const at::Tensor& t, int64_t depth) {
  const LiftedTensorImpl* impl = as_lifted(t);
  if (impl != nullptr && impl->level().depth() > depth) {
    return lift_alias(without_graph(impl->value(), depth), impl->bdim(), impl->level_ptr());
  }
  return t.requires_grad() ? detached_output(t) : t;
}

// `batches`: also in batches of tensors of the domain. Not if the values of the cotangents are
// differentiated there.
void drop_graphs(std::vector<at::Tensor>& tensors, const Level* domain, bool batches) {
  for (at::Tensor& t : tensors) {
    if (!t.defined()) continue;
    const int64_t depth = domain == nullptr ? 0 : domain->depth();
    t = without_graph(t, batches ? depth : depth_of(t));
  }
}

}  // namespace

struct Pullback::State {
  std::vector<at::Tensor> primals;
  std::vector<at::Tensor> outputs;       // with the graph
  std::vector<at::Tensor> seen_outputs;  // what the caller gets
  bool seen_outside;                     // see NOTE [who can see the graph]
  bool writes_views;                     // see NOTE [in-place writes into views]
  bool forward_cut;                      // made under no_grad, inside of a jvp
  bool shortcuts;                        // see NOTE [derivatives of a backward pass]
  LevelPtr level;                        // the domain of the graph; null for plain tensors
};

namespace {

// Held while the engine works on a graph of `domain`. The domains outside of it record all the
// same, whether it makes a graph or not (outer_grad). To levels inside of it, which the cotangents
// may belong to, the domain is one of those outside: what their rules do to its tensors is recorded
// only if it makes a graph, or if the values of the cotangents are differentiated.
class EngineScope {
 public:
  EngineScope(const Level* domain, bool record_inside, bool outer_grad) {
    const int64_t depth = domain != nullptr ? domain->depth() : 0;
    for (const LevelPtr& level : level_stack()) {
      if (level->depth() < depth) continue;
      const bool record = level->depth() == depth ? outer_grad : record_inside;
      saved_.emplace_back(level.get(), level->outer_grad_mode());
      level->set_outer_grad_mode(record ? OuterGradMode::kOn : OuterGradMode::kOff);
    }
  }
  ~EngineScope() {
    for (const auto& [level, mode] : saved_) level->set_outer_grad_mode(mode);
  }
  EngineScope(const EngineScope&) = delete;
  EngineScope& operator=(const EngineScope&) = delete;

 private:
  c10::SmallVector<std::pair<Level*, OuterGradMode>, 4> saved_;
};

}  // namespace

const std::vector<at::Tensor>& Pullback::outputs() const { return state_->seen_outputs; }

std::vector<at::Tensor> Pullback::operator()(std::vector<at::Tensor> cotangents,
                                             bool free_graph) const {
  return pulled(*state_, state_->primals, std::move(cotangents), free_graph);
}

std::vector<at::Tensor> Pullback::of_primals(const std::vector<size_t>& numbers,
                                             std::vector<at::Tensor> cotangents,
                                             bool free_graph) const {
  std::vector<at::Tensor> primals;
  primals.reserve(numbers.size());
  for (const size_t number : numbers) primals.push_back(state_->primals.at(number));
  return pulled(*state_, primals, std::move(cotangents), free_graph);
}

std::vector<at::Tensor> Pullback::pulled(const State& state, const std::vector<at::Tensor>& primals,
                                         std::vector<at::Tensor> cotangents, bool free_graph) {
  Level* level = current_level();
  const bool outer_grad =
      level != nullptr ? outer_grad_enabled(*level) : c10::GradMode::is_enabled();
  const bool grad_enabled = c10::GradMode::is_enabled();
  std::vector<at::Tensor> outputs;
  std::vector<at::Tensor> grads;
  for (size_t i = 0; i < state.outputs.size(); ++i) {
    if (!cotangents[i].defined() || !state.outputs[i].requires_grad()) continue;
    outputs.push_back(state.outputs[i]);
    grads.push_back(in_domain(cotangents[i], level));
    if (state.writes_views) grads.back() = batched_like(grads.back(), outputs.back());
  }
  std::vector<at::Tensor> result(primals.size());
  // Called under no_grad in a function under forward mode: what comes out is a constant.
  const bool cut = forward_mode_cut();
  if (!outputs.empty() && !primals.empty()) {
    const bool wants_graph =
        grad_enabled && (state.seen_outside || any_recorded(grads) || any_tangent_tracked(grads));
    const bool elsewhere = !cut && state.shortcuts &&
                           (any_differentiated_elsewhere(outputs, outer_grad) ||
                            any_differentiated_elsewhere(grads, outer_grad));
    const bool create_graph = wants_graph || elsewhere;
    std::optional<DerivativeScope> derivative;
    if (!cut) derivative.emplace();
    const bool own_cotangents = any_differentiated_elsewhere(grads, outer_grad);
    const EngineScope engine(state.level.get(), create_graph || own_cotangents, outer_grad);
    result = torch::autograd::grad(outputs, primals, grads,
                                   /*retain_graph=*/wants_graph || !free_graph, create_graph,
                                   /*allow_unused=*/true);
    if (create_graph && !wants_graph)
      drop_graphs(result, state.level.get(), /*batches=*/!own_cotangents);
  }
  for (size_t i = 0; i < result.size(); ++i) {
    if (!result[i].defined()) {
      const c10::NoGradGuard no_grad;
      result[i] = at::zeros_like(primals[i]);
    } else if (C10_UNLIKELY(state.forward_cut || cut)) {
      result[i] = constant_here(result[i]);
    }
  }
  return result;
}

namespace {

void note_function_ended() {
  note_transform_closed();
  close_reverse_formulas();
}

}  // namespace

ReverseScope::ReverseScope()
    : level_(current_level()),
      outer_grad_(c10::GradMode::is_enabled()),
      forward_cut_(forward_mode_cut()),
      first_node_(at::sequence_number::peek()) {
  initialize_runtime();
  check_no_torch_func("a gradient transform");
  if (!outer_grad_) outer_guard_.emplace(level_, OuterGradMode::kOff);
  grad_guard_.emplace(true);
  open_reverse_formulas();
  note_transform_opened("reverse mode");
}

ReverseScope::~ReverseScope() {
  if (grad_guard_.has_value()) note_function_ended();
}

at::Tensor ReverseScope::primal(const at::Tensor& input) {
  check_alive(input);
  const bool narrows = level_ != nullptr && narrows_level_of(*level_, input);
  const at::Tensor x = narrows ? narrow(input, LevelPtr::reclaim_copy(level_)) : input;
  at::Tensor p;
  if (level_ != nullptr && depth_of(x) < level_->depth()) {
    // A tensor from outside: in this domain it is a fresh leaf, the same for all examples.
    p = lift_alias(x, std::nullopt, LevelPtr::reclaim_copy(level_));
  } else if (outer_grad_ && x.requires_grad()) {
    p = at::alias(x);
    primal_tracked_outside_ = true;
    primals_.push_back(p);
    return p;
  } else if (x.is_inference()) {
    p = x.clone();  // which can require a gradient
  } else {
    p = forward_cut_ ? constant_here(x) : detached_here(x);
  }
  p.set_requires_grad(true);
  primals_.push_back(p);
  return p;
}

Pullback ReverseScope::finish(const std::vector<at::Tensor>& outputs) {
  note_function_ended();
  grad_guard_.reset();
  outer_guard_.reset();
  auto state = std::make_shared<Pullback::State>();
  // Where only a cotangent will be differentiated elsewhere, shortcuts are taken for granted.
  const bool watched = any_differentiated_elsewhere(outputs, outer_grad_);
  GraphWalk graph(first_node_, primals_, /*look_for_shortcuts=*/watched);
  graph.run(outputs);
  GraphWalk tangents(first_node_, primals_, /*look_for_shortcuts=*/false);
  tangents.run(tangents_of(outputs));
  state->seen_outside = outer_grad_ && (primal_tracked_outside_ || graph.reaches_outside() ||
                                        tangents.reaches_outside());
  state->writes_views = graph.writes_views();
  state->shortcuts = !watched || graph.takes_shortcuts();
  state->forward_cut = forward_cut_;
  if (level_ != nullptr) state->level = LevelPtr::reclaim_copy(level_);
  state->primals = std::move(primals_);
  state->outputs = outputs;
  state->seen_outputs.reserve(outputs.size());
  for (const at::Tensor& output : outputs) {
    const bool keep = state->seen_outside || !output.defined() || !output.requires_grad();
    state->seen_outputs.push_back(keep ? output
                                       : (forward_cut_ ? constant_here : detached_output)(output));
  }
  Pullback pullback;
  pullback.state_ = std::move(state);
  return pullback;
}

}  // namespace torchlift
