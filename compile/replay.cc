#include "compile/replay.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/stack.h>
#include <ATen/ops/diagonal.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/max_pool2d_with_indices.h>
#include <ATen/ops/select.h>
#include <ATen/ops/slice.h>
#include <ATen/ops/stack.h>
#include <c10/core/TensorImpl.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "batching/control_flow.h"
#include "batching/rules/narrow_products.h"
#include "batching/rules/narrow_softmax.h"
#include "batching/rules/plane_pools.h"
#include "compile/assumptions.h"
#include "compile/elementary.h"
#include "compile/graph.h"
#include "compile/index_rows.h"
#include "compile/own_copy.h"
#include "compile/passes/node_facts.h"
#include "compile/passes/written_memory.h"
#include "compile/seed_scope.h"
#include "compile/state_gate.h"
#include "compile/wrapped_number.h"
#include "core/boxed.h"
#include "core/dispatch.h"
#include "core/error.h"
#include "core/keys.h"
#include "core/lifted_tensor.h"
#include "core/onlookers.h"
#include "core/random_state.h"

namespace torchlift::compile {
namespace {

using c10::IValue;
using torch::jit::Stack;

// An argument that is not the same in every run.
struct Variable {
  size_t index;  // among the arguments
  Argument source;
};

struct InputLayout {
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
};

void multiply(Stack* stack) {
  at::Tensor result = product((*stack)[0].toTensor(), (*stack)[1].toTensor());
  stack->assign({std::move(result)});
}

void multiply_and_add(Stack* stack) {
  at::Tensor result =
      product_added_to((*stack)[0].toTensor(), (*stack)[1].toTensor(), (*stack)[2].toTensor(),
                       (*stack)[3].toScalar(), (*stack)[4].toScalar());
  stack->assign({std::move(result)});
}

template <at::Tensor (*softmax)(const at::Tensor&, int64_t, bool)>
void normalize(Stack* stack) {
  at::Tensor result = softmax((*stack)[0].toTensor(), (*stack)[1].toInt(), (*stack)[2].toBool());
  stack->assign({std::move(result)});
}

template <at::Tensor (*backward)(const at::Tensor&, const at::Tensor&, int64_t, at::ScalarType)>
void normalize_backward(Stack* stack) {
  at::Tensor result = backward((*stack)[0].toTensor(), (*stack)[1].toTensor(), (*stack)[2].toInt(),
                               (*stack)[3].toScalarType());
  stack->assign({std::move(result)});
}

void index(Stack* stack) {
  at::Tensor result = index_rows((*stack)[0].toTensor(), (*stack)[1].toOptionalTensorList());
  stack->assign({std::move(result)});
}

void nonzero(Stack* stack) {
  at::Tensor result =
      nonzero_places((*stack)[0].toTensor(), (*stack)[1].toInt(), (*stack)[2].toInt());
  stack->assign({std::move(result)});
}

void pool(Stack* stack) {
  const at::Tensor x = (*stack)[0].toTensor();
  const int64_t channels = planes_at_a_time(x);
  std::tuple<at::Tensor, at::Tensor> results;
  const auto dims = [&](size_t i) { return (*stack)[i].toIntVector(); };
  const bool ceil_mode = (*stack)[5].toBool();
  if (channels == 0 || x.dim() > 4) {
    results = at::max_pool2d_with_indices(x, dims(1), dims(2), dims(3), dims(4), ceil_mode);
  } else {
    results = max_pool_of_planes(x, channels, dims(1), dims(2), dims(3), dims(4), ceil_mode);
  }
  stack->assign({std::get<0>(std::move(results)), std::get<1>(std::move(results))});
}

// Takes the arguments of an operator from the stack and leaves its results there.
using Kernel = void (*)(Stack* stack);

// Products of matrices the quicker way round (batching/rules/narrow_products.h), softmax over few
// numbers (narrow_softmax.h), pools of contiguous planes (plane_pools.h), lists of places
// (index_rows.h): the rules of vmap choose by values, and a graph has the operators as they were
// called.
Kernel kernel_of(const Node& node) {
  static const auto* const all = new std::unordered_map<std::string, Kernel>{
      {"aten::mm", &multiply},
      {"aten::bmm", &multiply},
      {"aten::addmm", &multiply_and_add},
      {"aten::baddbmm", &multiply_and_add},
      {"aten::_softmax", &normalize<&softmax_along>},
      {"aten::_log_softmax", &normalize<&log_softmax_along>},
      {"aten::_softmax_backward_data", &normalize_backward<&softmax_backward_along>},
      {"aten::_log_softmax_backward_data", &normalize_backward<&log_softmax_backward_along>},
      {"aten::index.Tensor", &index},
      {"aten::nonzero_static", &nonzero},
      {"aten::max_pool2d_with_indices", &pool}};
  const auto found = all->find(node.full_name());
  return found == all->end() ? nullptr : found->second;
}

// The view of the first argument that an operator replaces, given its other arguments.
at::Tensor slice_of(const Stack& stack) {
  const auto bound = [&](size_t i) { return stack[i].toOptional<int64_t>(); };
  return at::slice(stack[0].toTensor(), stack[2].toInt(), bound(3), bound(4), stack[5].toInt());
}
at::Tensor selected(const Stack& stack) {
  return at::select(stack[0].toTensor(), stack[2].toInt(), stack[3].toInt());
}
at::Tensor diagonal_of(const Stack& stack) {
  return at::diagonal(stack[0].toTensor(), stack[2].toInt(), stack[3].toInt(), stack[4].toInt());
}

// The operator written over its first argument, which there is no operator for.
template <at::Tensor (*view)(const Stack&)>
void copy_into(Stack* stack) {
  view(*stack).copy_((*stack)[1].toTensor());
  stack->resize(1);
}

Kernel kernel_over_first(const Node& node) {
  static const auto* const all = new std::unordered_map<std::string, Kernel>{
      {"aten::slice_scatter", &copy_into<&slice_of>},
      {"aten::select_scatter", &copy_into<&selected>},
      {"aten::diagonal_scatter", &copy_into<&diagonal_of>}};
  const auto found = all->find(node.full_name());
  return found == all->end() ? nullptr : found->second;
}

struct Step {
  std::optional<c10::OperatorHandle> op;         // none: control flow
  Kernel kernel = nullptr;                       // in its place, if there is one
  const ElementaryFunction* function = nullptr;  // in place of both, where it serves
  std::optional<c10::OperatorHandle> in_place;   // the same, written over an argument
  Kernel kernel_over = nullptr;                  // or this does it
  size_t over = 0;                               // this one
  bool is_out = false;                           // in_place takes it once more, as the last
  std::vector<IValue> arguments;                 // with room for the variables
  std::vector<Variable> variables;
  std::vector<Result> results;
  std::vector<ValueId> dead;      // values nobody reads after this step
  std::vector<ValueId> hollowed;  // whose numbers nobody reads, but their shape
  bool settled = false;           // results may have other strides than their types: see there
  std::string control_flow;
  std::vector<Program> subprograms;

  bool is_written_over() const { return in_place.has_value() || kernel_over != nullptr; }
};

// Who looks on while a run computes.
struct Onlookers {
  bool exclusive = false;   // neither levels nor autograd: memory may be written over
  bool unobserved = false;  // nobody at all: operators need not be called as such
};

// A node of a blocked group.
struct BlockStep {
  Step step;
  ValueId output = kNoValue;               // if the result is one: the slot holds where it goes
  std::optional<c10::OperatorHandle> out;  // step.op, written to a tensor that is given last
};

struct BlockedSteps {
  BlockedGroup group;
  std::vector<BlockStep> steps;
};

bool is_tensor(const c10::OperatorHandle& op, size_t i) {
  return op.schema().arguments()[i].type()->kind() == c10::TypeKind::TensorType;
}

// "mul_" of "mul": the same arguments, and the result is written over the first of them.
std::optional<c10::OperatorHandle> in_place_variant(const c10::OperatorHandle& op) {
  const auto found = c10::Dispatcher::singleton().findSchema(
      {op.schema().name() + "_", op.schema().overload_name()});
  if (!found.has_value()) return std::nullopt;
  const auto& own = op.schema().arguments();
  const auto& others = found->schema().arguments();
  if (own.size() != others.size() || own.empty() || !writes_argument(*found, 0)) {
    return std::nullopt;
  }
  for (size_t i = 0; i < own.size(); ++i) {
    if (own[i].name() != others[i].name() || *own[i].type() != *others[i].type()) {
      return std::nullopt;
    }
  }
  return found;
}

// "mul.out" of "mul.Tensor": the same arguments, and after them a tensor that takes the result.
// None if that is only a copy of the result.
std::optional<c10::OperatorHandle> out_variant(const c10::OperatorHandle& op) {
  const auto& own = op.schema().arguments();
  for (const std::string& overload :
       {op.schema().overload_name() + "_out", std::string("out"), std::string("grad_input")}) {
    const auto found = c10::Dispatcher::singleton().findSchema({op.schema().name(), overload});
    if (!found.has_value() || !found->hasKernelForDispatchKey(c10::DispatchKey::CPU)) continue;
    const auto& others = found->schema().arguments();
    if (others.size() != own.size() + 1 || !writes_argument(*found, own.size())) continue;
    const bool same = std::equal(own.begin(), own.end(), others.begin(), [](auto& a, auto& b) {
      return a.name() == b.name() && *a.type() == *b.type();
    });
    if (same) return found;
  }
  return std::nullopt;
}

bool is_optional_list(const c10::Type& type) {
  return type.kind() == c10::TypeKind::ListType &&
         type.castRaw<c10::ListType>()->getElementType()->kind() == c10::TypeKind::OptionalType;
}

IValue list_of(const std::vector<ValueRef>& refs, const Slots& slots, bool optional) {
  if (optional) {
    c10::List<std::optional<at::Tensor>> list;
    list.reserve(refs.size());
    for (const ValueRef& ref : refs) {
      list.push_back(ref.id == kNoValue ? std::optional<at::Tensor>()
                                        : slots[static_cast<size_t>(ref.id)]);
    }
    return list;
  }
  c10::List<at::Tensor> list;
  list.reserve(refs.size());
  for (const ValueRef& ref : refs) list.push_back(slots[static_cast<size_t>(ref.id)]);
  return list;
}

std::vector<at::Tensor> tensors_of(const Argument& argument, const Slots& slots) {
  std::vector<at::Tensor> tensors;
  for (const ValueId id : values_in(argument)) tensors.push_back(slots[static_cast<size_t>(id)]);
  return tensors;
}

std::vector<int64_t> evaluated(const std::vector<SizeExpr>& sizes,
                               const std::vector<int64_t>& symbols) {
  std::vector<int64_t> result;
  result.reserve(sizes.size());
  for (const SizeExpr& size : sizes) result.push_back(size.evaluate(symbols));
  return result;
}

// Past autograd, for tensors that it does not see.
constexpr c10::DispatchKeySet kBelow = c10::autograd_dispatch_keyset_with_ADInplaceOrView;

// Whether autograd, or a level, must see the operators on t.
bool seen_by_dispatch(const at::Tensor& t) {
  return t.defined() && (is_lifted(t) || is_tracked(t));
}

// Whether two strides are the same where there is more than one element to step over.
bool same_strides(at::IntArrayRef sizes, at::IntArrayRef a, at::IntArrayRef b) {
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1 && a[d] != b[d]) return false;
  }
  return true;
}

// The numbers of t in the layout of `strides`, if that is dense: dims in the order of their
// strides.
at::Tensor laid_out(const at::Tensor& t, at::IntArrayRef strides) {
  std::vector<int64_t> order(strides.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return strides[static_cast<size_t>(a)] > strides[static_cast<size_t>(b)];
  });
  std::vector<int64_t> back(order.size());
  for (size_t i = 0; i < order.size(); ++i) {
    back[static_cast<size_t>(order[i])] = static_cast<int64_t>(i);
  }
  return t.permute(order).contiguous().permute(back);
}

// NOTE [assumed layouts]
// The trace of a function by shapes alone knows strides from meta kernels, which are not always
// those of the real ones (a permuted result, where the other is contiguous). Its views were chosen
// by them, and passes rely on them. So each result of such a graph is compared with its type when
// it runs: a result with other strides is copied into those that were assumed, one of another shape
// or dtype is an error. That holds after passes, too: what they did with a value relies on the type
// of values that are left, or on no types at all. A pass that chooses layouts (RunPlan::chosen) has
// the results of single nodes looked at in the same way.

// `got`, with the strides of its type.
at::Tensor as_assumed(at::Tensor got, at::ScalarType dtype, const InputLayout& layout, bool is_view,
                      const Node& node) {
  if (got.scalar_type() != dtype || got.sizes() != layout.sizes) {
    unsupported_error("compile", node.full_name(), " gave ", c10::toString(got.scalar_type()),
                      got.sizes(), " where the function, traced by shapes alone, was told ",
                      c10::toString(dtype), at::IntArrayRef(layout.sizes),
                      " by the operator's kernel for the meta device. Trace it with arguments that "
                      "have values.",
                      node.source.empty() ? "" : "\n  at " + node.source);
  }
  if (got.numel() == 0 || same_strides(got.sizes(), got.strides(), layout.strides)) return got;
  at::Tensor result = is_view ? got : laid_out(got, layout.strides);
  if (!same_strides(result.sizes(), result.strides(), layout.strides)) {
    unsupported_error(
        "compile", node.full_name(), " gave a tensor of shape ", got.sizes(), " with the strides ",
        got.strides(), " where the function, traced by shapes alone, was told ",
        at::IntArrayRef(layout.strides), ". Trace it with arguments that have values.",
        node.source.empty() ? "" : "\n  at " + node.source);
  }
  return result;
}

// Leaves its shape and layout. See numbers_read_by in compile/graph.h.
void drop_numbers(at::Tensor* t) {
  if (!t->defined() || !t->is_cpu() || t->layout() != c10::kStrided) return;
  at::Tensor shape = at::empty({0}, t->options());
  shape.unsafeGetTensorImpl()->set_sizes_and_strides(t->sizes(), t->strides());
  *t = std::move(shape);
}

std::string shape_str(const at::Tensor& t) {
  return c10::str(c10::toString(t.scalar_type()), t.sizes(), " on ", t.device());
}

}  // namespace

// What a run leaves as it was where an assumption does not hold (NOTE [assumptions]): it may be
// tried with another graph, or be called again.
struct Undo {
  bool assumes = false;
  std::vector<ValueId> written;  // inputs and constants, before an assumption was looked at
  bool draws = false;
};

// Takes back what a run has done.
class Attempt {
 public:
  void keep(const at::Tensor& written) { written_.emplace_back(written, written.clone()); }
  void keep_generators(const std::vector<c10::Device>& devices) { generators_.emplace(devices); }

  void take_back() const {
    const c10::AutoGradMode no_grad(false);
    for (const auto& [tensor, before] : written_) {
      at::Tensor now = tensor;
      if (now.requires_grad() && !now.is_view()) now.detach_();  // of what the run has written
      now.copy_(before);
    }
    if (generators_.has_value()) generators_->restore();
  }

 private:
  std::vector<std::pair<at::Tensor, at::Tensor>> written_;  // with what was in it
  std::optional<RandomState> generators_;
};

struct Program::Plan {
  Graph graph;
  std::vector<Step> steps;
  std::vector<BlockedSteps> blocked;  // in the order of their nodes
  bool tracked_constants = false;
  bool plain_constants = true;
  bool writes_inputs = false;
  Undo undo;
  std::vector<InputLayout> fixed_layouts;  // where no dim is dynamic
  std::vector<InputLayout> fixed_results;  // of all values, the same, where steps are settled
  std::vector<size_t> constant_outputs;    // places of those that may be constants
  // The constants that a run writes into, one run at a time.
  std::vector<at::Tensor> state;
  mutable StateGate gate;

  Plan(Graph given, const RunPlan& plan) : graph(std::move(given)) {
    verify(graph);
    for (const Node& node : graph.nodes) steps.push_back(step_of(node));
    for (const auto& [index, argument] : plan.in_place) {
      Step& step = steps.at(static_cast<size_t>(index));
      write_over(graph.nodes[static_cast<size_t>(index)], argument, &step);
    }
    find_dead();
    find_settled(plan.chosen);
    for (const BlockedGroup& group : plan.blocked) blocked.push_back(steps_of(group));
    follow_memory(plan.state);
    if (graph.symbols.empty()) {
      fixed_layouts = layouts({});
      if (graph.layouts_assumed || !plan.chosen.empty()) {
        for (const Value& value : graph.values) fixed_results.push_back(layout_of(value.type, {}));
      }
    }
    for (const Constant& constant : graph.constants) {
      plain_constants = plain_constants && kPlainKeys.has_all(constant.tensor.key_set());
      tracked_constants = tracked_constants || constant.tensor.requires_grad();
    }
  }

  // What runs below autograd leaves versions as they are; a run that throws may have written, too.
  class NotedWrites {
   public:
    explicit NotedWrites(const std::vector<at::Tensor>& state) : state_(state) {}
    ~NotedWrites() {
      for (const at::Tensor& each : state_) {
        if (!each.is_inference()) each.unsafeGetTensorImpl()->bump_version();
      }
    }
    NotedWrites(const NotedWrites&) = delete;
    NotedWrites& operator=(const NotedWrites&) = delete;

   private:
    const std::vector<at::Tensor>& state_;
  };

  static Step step_of(const Node& node) {
    Step step{.op = find_operator(node),
              .kernel = kernel_of(node),
              .function = elementary_function(node.full_name()),
              .in_place = std::nullopt,
              .kernel_over = nullptr,
              .over = 0,
              .is_out = false,
              .arguments = {},
              .variables = {},
              .results = node.results,
              .dead = {},
              .hollowed = {},
              .settled = false,
              .control_flow = node.is_control_flow() ? node.op : "",
              .subprograms = {}};
    for (size_t i = 0; i < node.args.size(); ++i) {
      const auto* constant = std::get_if<IValue>(&node.args[i]);
      step.arguments.push_back(constant != nullptr ? *constant : IValue());
      if (constant != nullptr && step.op.has_value() && is_tensor(*step.op, i)) {
        step.arguments.back() = wrapped_number(constant->toScalar());
      }
      if (std::holds_alternative<std::monostate>(node.args[i])) {
        // Where a schema says "Tensor", an undefined one.
        if (step.op.has_value() && is_tensor(*step.op, i)) step.arguments.back() = at::Tensor();
      } else if (constant == nullptr) {
        step.variables.push_back({i, node.args[i]});
      }
    }
    for (const auto& subgraph : node.subgraphs) step.subprograms.emplace_back(*subgraph);
    return step;
  }

  // By the in-place variant, where there is one and it is the first argument; else by an out= form.
  static void write_over(const Node& node, ValueId argument, Step* step) {
    const auto is_it = [&](const Argument& each) {
      const auto* ref = std::get_if<ValueRef>(&each);
      return ref != nullptr && ref->id == argument;
    };
    const auto found = std::find_if(node.args.begin(), node.args.end(), is_it);
    if (found == node.args.end()) return;
    step->over = static_cast<size_t>(found - node.args.begin());
    if (step->over == 0) step->kernel_over = kernel_over_first(node);
    if (step->kernel_over != nullptr) return;
    if (step->over == 0) step->in_place = in_place_variant(*step->op);
    if (step->in_place.has_value() || replaces_elements(node)) return;
    step->in_place = out_variant(*step->op);
    step->is_out = step->in_place.has_value();
  }

  // What a run writes into, and has to take back, and which outputs may be constants.
  void follow_memory(const std::vector<ValueId>& state_of_others) {
    std::vector<ValueId> roots = graph.inputs;
    for (const Constant& each : graph.constants) roots.push_back(each.id);
    WrittenMemory memory(graph, roots);
    undo.assumes = assumes(graph);
    bool drawn = false;
    for (const Node& node : graph.nodes) {
      memory.add(node);
      if (!undo.assumes) continue;
      drawn = drawn || effects_of(node).draws;
      if (!assumes(node)) continue;
      undo.written.assign(memory.roots().begin(), memory.roots().end());
      undo.draws = drawn;
    }
    writes_inputs = std::any_of(graph.inputs.begin(), graph.inputs.end(),
                                [&](ValueId id) { return memory.contains(id); });
    for (const Constant& each : graph.constants) {
      if (memory.contains(each.id)) state.push_back(each.tensor);
    }
    constant_outputs = compile::constant_outputs(graph, memory, state_of_others);
  }

  // From the end to the start: when a value is seen first, it is read for the last time.
  void find_dead() {
    std::vector<bool> read(graph.values.size(), false), numbers_read(graph.values.size(), false);
    const auto note = [](ValueId id, std::vector<bool>* seen) {
      const bool is_first = id != kNoValue && !(*seen)[static_cast<size_t>(id)];
      if (is_first) (*seen)[static_cast<size_t>(id)] = true;
      return is_first;
    };
    for (const ValueId id : graph.outputs) {
      note(id, &read);
      note(id, &numbers_read);
    }
    // What is not made here (inputs and constants) stays in memory anyhow.
    const Uses uses(graph);
    for (size_t i = steps.size(); i-- > 0;) {
      std::vector<ValueId> ids = results_of(graph.nodes[i]);
      const std::vector<ValueId> of_numbers = numbers_read_by(graph.nodes[i]);
      ids.insert(ids.end(), of_numbers.begin(), of_numbers.end());
      for (const ValueId id : ids) {
        const bool is_last = note(id, &numbers_read);
        const bool is_made = uses.producer[static_cast<size_t>(id)] >= 0;
        if (is_last && is_made && read[static_cast<size_t>(id)]) steps[i].hollowed.push_back(id);
      }
      for (const ValueId id : results_of(graph.nodes[i])) {
        if (note(id, &read)) steps[i].dead.push_back(id);
      }
      for (const ValueId id : arguments_of(graph.nodes[i])) {
        if (note(id, &read)) steps[i].dead.push_back(id);
      }
    }
  }

  // All of them where layouts are assumed.
  void find_settled(const std::vector<ValueId>& chosen) {
    std::vector<bool> is_chosen(graph.values.size(), graph.layouts_assumed);
    for (const ValueId id : chosen) is_chosen.at(static_cast<size_t>(id)) = true;
    for (size_t i = 0; i < steps.size(); ++i) {
      for (const ValueId id : results_of(graph.nodes[i])) {
        steps[i].settled = steps[i].settled || is_chosen[static_cast<size_t>(id)];
      }
    }
  }

  // What lies between the nodes of a group may be written over; the memory of its inputs may not,
  // but for an output that is to take it. Only what the group makes dies in a block.
  BlockedSteps steps_of(const BlockedGroup& group) const {
    BlockedSteps result{.group = group, .steps = {}};
    std::vector<bool> made(graph.values.size(), false);
    for (size_t i = group.first; i < group.first + group.count; ++i) {
      BlockStep each{.step = steps.at(i)};
      Step& step = each.step;
      const ValueId id = step.results.at(0).ids.at(0);
      for (const BlockedGroup::Output& output : group.outputs) {
        if (output.id != id) continue;
        each.output = id;
        each.out = out_variant(*step.op);
      }
      if (step.in_place.has_value() &&
          !made[static_cast<size_t>(std::get<ValueRef>(graph.nodes[i].args.at(step.over)).id)]) {
        step.in_place.reset();
      }
      made[static_cast<size_t>(id)] = true;
      step.hollowed.clear();
      std::erase_if(step.dead, [&](ValueId dead) { return !made[static_cast<size_t>(dead)]; });
      result.steps.push_back(std::move(each));
    }
    return result;
  }

  std::vector<c10::Device> devices(at::ArrayRef<at::Tensor> inputs) const {
    std::vector<at::Tensor> tensors = inputs.vec();
    for (const Constant& constant : graph.constants) tensors.push_back(constant.tensor);
    return devices_of(tensors);
  }

  // --- checks ------------------------------------------------------------------------------------

  std::vector<int64_t> symbols(at::ArrayRef<at::Tensor> inputs) const {
    std::vector<int64_t> sizes;
    sizes.reserve(graph.symbols.size());
    for (const Symbol& symbol : graph.symbols) {
      const at::Tensor& input = inputs[static_cast<size_t>(symbol.input)];
      if (symbol.dim >= input.dim()) throw_input(static_cast<size_t>(symbol.input), input);
      if (input.size(symbol.dim) < symbol.least) {
        transform_error("compile", "input ", symbol.input, " has size ", input.size(symbol.dim),
                        " along its dim ", symbol.dim, " (", symbol.name,
                        "); the program is another one for sizes below ", symbol.least, ".");
      }
      sizes.push_back(input.size(symbol.dim));
    }
    return sizes;
  }

  // What the inputs must be like, at these sizes of the dynamic dims.
  std::vector<InputLayout> layouts(const std::vector<int64_t>& sizes) const {
    std::vector<InputLayout> result;
    for (const ValueId id : graph.inputs) result.push_back(layout_of(graph.type(id), sizes));
    return result;
  }

  static InputLayout layout_of(const TensorType& type, const std::vector<int64_t>& sizes) {
    return {type.concrete_sizes(sizes), type.concrete_strides(sizes)};
  }

  void check_defined(at::ArrayRef<at::Tensor> inputs) const {
    if (inputs.size() != graph.inputs.size()) {
      transform_error("compile", "the program takes ", graph.inputs.size(), " tensors, and got ",
                      inputs.size(), ".");
    }
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (!inputs[i].defined()) {
        transform_error("compile", "input ", i, " (", graph.value(graph.inputs[i]).name,
                        ") is an undefined tensor.");
      }
    }
  }

  void check(at::ArrayRef<at::Tensor> inputs, const std::vector<InputLayout>& layouts) const {
    for (size_t i = 0; i < inputs.size(); ++i) {
      const TensorType& type = graph.type(graph.inputs[i]);
      if (inputs[i].scalar_type() != type.dtype || inputs[i].device() != type.device ||
          inputs[i].sizes() != layouts[i].sizes) {
        throw_input(i, inputs[i]);
      }
    }
  }

  // Operators that look at strides (as_strided, view) were traced with those of the graph's inputs.
  std::vector<at::Tensor> with_traced_strides(at::ArrayRef<at::Tensor> inputs,
                                              const std::vector<InputLayout>& layouts) const {
    std::vector<at::Tensor> result = inputs.vec();
    for (size_t i = 0; i < result.size(); ++i) {
      if (graph.type(graph.inputs[i]).layout != c10::kStrided) continue;
      const std::vector<int64_t>& strides = layouts[i].strides;
      if (same_strides(result[i].sizes(), result[i].strides(), strides)) continue;
      const at::IntArrayRef got = inputs[i].strides();
      if (!writes_inputs) result[i] = laid_out(result[i], strides);
      if (!same_strides(result[i].sizes(), result[i].strides(), strides)) {
        transform_error("compile", "input ", i, " (", graph.value(graph.inputs[i]).name,
                        ") has the strides ", got, "; the program was traced with ",
                        at::IntArrayRef(strides),
                        writes_inputs ? ", and writes into its inputs" : "",
                        ". Trace it anew with such inputs, or pass a tensor of these strides.");
      }
    }
    return result;
  }

  // Checked, and with the strides that the graph was traced with.
  std::vector<at::Tensor> prepared(at::ArrayRef<at::Tensor> inputs,
                                   const std::vector<int64_t>& sizes) const {
    std::vector<InputLayout> made;
    if (!sizes.empty()) made = layouts(sizes);
    const std::vector<InputLayout>& wanted = sizes.empty() ? fixed_layouts : made;
    check(inputs, wanted);
    return with_traced_strides(inputs, wanted);
  }

  [[noreturn]] void throw_input(size_t i, const at::Tensor& input) const {
    transform_error("compile", "input ", i, " (", graph.value(graph.inputs[i]).name, ") is ",
                    shape_str(input), "; the program was traced with ",
                    graph.type(graph.inputs[i]).str(graph.symbol_names()),
                    ". Trace it anew with such inputs, or mark the dims that differ as dynamic.");
  }

  // --- running -----------------------------------------------------------------------------------

  // execute(), after which, if an assumption does not hold, everything is as it was.
  std::vector<at::Tensor> attempt(at::ArrayRef<at::Tensor> inputs,
                                  const std::vector<int64_t>& sizes, bool exclusive) const {
    if (!undo.assumes) return execute(inputs, sizes, exclusive);
    Attempt run;
    // What belongs to a level, or to autograd, may not be written to by others.
    for (const ValueId id : undo.written) {
      const at::Tensor& written = external(id, inputs);
      if (exclusive || !seen_by_dispatch(written)) run.keep(written);
    }
    if (undo.draws) run.keep_generators(devices(inputs));
    try {
      return execute(inputs, sizes, exclusive);
    } catch (const AssumptionError& error) {
      run.take_back();
      throw_with_source(error);
    }
  }

  const at::Tensor& external(ValueId id, at::ArrayRef<at::Tensor> inputs) const {
    if (const Constant* constant = graph.find_constant(id)) return constant->tensor;
    const auto found = std::find(graph.inputs.begin(), graph.inputs.end(), id);
    return inputs[static_cast<size_t>(found - graph.inputs.begin())];
  }

  [[noreturn]] void throw_with_source(const AssumptionError& error) const {
    const Node* node = find_assumption(graph, error.number());
    const std::string message = error.what_without_backtrace();
    if (node == nullptr || node->source.empty() || message.find("\n  at ") != std::string::npos) {
      throw error;
    }
    throw AssumptionError(message + "\n  at " + node->source, error.number(), error.found());
  }

  // See `Onlookers`.
  bool is_unobserved(at::ArrayRef<at::Tensor> inputs) const {
    if (!plain_constants || !has_no_modes() || is_profiled()) return false;
    return std::all_of(inputs.begin(), inputs.end(),
                       [](const at::Tensor& t) { return kPlainKeys.has_all(t.key_set()); });
  }

  // exclusive: nobody else sees intermediate values.
  std::vector<at::Tensor> execute(at::ArrayRef<at::Tensor> inputs,
                                  const std::vector<int64_t>& sizes, bool exclusive) const {
    const bool unobserved = exclusive && is_unobserved(inputs);
    Slots slots(graph.values.size());
    for (size_t i = 0; i < inputs.size(); ++i) {
      slots[static_cast<size_t>(graph.inputs[i])] = inputs[i];
    }
    for (const Constant& constant : graph.constants) {
      slots[static_cast<size_t>(constant.id)] = constant.tensor;
    }
    Stack stack;
    auto next_blocked = blocked.begin();
    for (size_t i = 0; i < steps.size(); ++i) {
      if (exclusive && next_blocked != blocked.end() && next_blocked->group.first == i) {
        const size_t last = i + next_blocked->group.count - 1;
        run_group(*next_blocked++, unobserved, sizes, &slots);
        for (; i <= last; ++i) drop(steps[i], unobserved, &slots);
        --i;
        continue;
      }
      const Step& step = steps[i];
      if (step.op.has_value()) {
        call(step, {.exclusive = exclusive, .unobserved = unobserved}, sizes, &stack, &slots);
      } else {
        run_control_flow(step, exclusive, &slots);
      }
      if (step.settled) settle_layouts(i, sizes, &slots);
      drop(step, unobserved, &slots);
    }
    std::vector<at::Tensor> outputs;
    outputs.reserve(graph.outputs.size());
    for (const ValueId id : graph.outputs) {
      outputs.push_back(id == kNoValue ? at::Tensor() : slots[static_cast<size_t>(id)]);
    }
    copy_constants(&outputs);
    return outputs;
  }

  // One value is one tensor, as often as it is given.
  void copy_constants(std::vector<at::Tensor>* outputs) const {
    for (const size_t i : constant_outputs) {
      const at::Tensor given = (*outputs)[i];
      if (!given.defined() || !shows_constant(given)) continue;
      const at::Tensor copy = own_copy(given);
      for (size_t k = 0; k < outputs->size(); ++k) {
        if (graph.outputs[k] == graph.outputs[i]) (*outputs)[k] = copy;
      }
    }
  }

  // Of those that may: what reshape and a branch give is known when they have run.
  bool shows_constant(const at::Tensor& t) const {
    if (is_lifted(t) || !t.has_storage()) return true;
    return std::any_of(graph.constants.begin(), graph.constants.end(), [&](const Constant& each) {
      return each.tensor.has_storage() && each.tensor.is_alias_of(t);
    });
  }

  static void drop(const Step& step, bool unobserved, Slots* slots) {
    drop_dead(step, slots);
    if (!unobserved) return;
    for (const ValueId id : step.hollowed) drop_numbers(&(*slots)[static_cast<size_t>(id)]);
  }

  static void drop_dead(const Step& step, Slots* slots) {
    for (const ValueId id : step.dead) (*slots)[static_cast<size_t>(id)].reset();
  }

  void run_group(const BlockedSteps& blocked_steps, bool unobserved,
                 const std::vector<int64_t>& symbols, Slots* slots) const {
    const auto run_block = [&](Slots* block) {
      Stack stack;
      for (const BlockStep& each : blocked_steps.steps) {
        run_on_block(each, unobserved, symbols, &stack, block);
        drop_dead(each.step, block);
      }
    };
    run_blocks(blocked_steps.group, graph, run_block, slots);
  }

  static void run_on_block(const BlockStep& each, bool unobserved,
                           const std::vector<int64_t>& symbols, Stack* stack, Slots* slots) {
    if (each.output == kNoValue) {
      return call(each.step, {.exclusive = true, .unobserved = unobserved}, symbols, stack, slots);
    }
    const at::Tensor target = (*slots)[static_cast<size_t>(each.output)];
    if (unobserved && each.step.function != nullptr) {
      push_arguments(each.step, symbols, *slots, stack);
      if (each.step.function->serves(*stack, target)) {
        return each.step.function->write(*stack, target);
      }
    }
    if (!each.out.has_value()) {
      call(each.step, {}, symbols, stack, slots);
      target.copy_((*slots)[static_cast<size_t>(each.output)]);
      (*slots)[static_cast<size_t>(each.output)] = target;
      return;
    }
    push_arguments(each.step, symbols, *slots, stack);
    stack->emplace_back(target);
    each.out->callBoxed(*stack);
  }

  static void push_arguments(const Step& step, const std::vector<int64_t>& symbols,
                             const Slots& slots, Stack* stack) {
    stack->assign(step.arguments.begin(), step.arguments.end());
    for (const Variable& variable : step.variables) {
      (*stack)[variable.index] = value_of(step, variable, symbols, slots);
    }
  }

  static void call(const Step& step, Onlookers onlookers, const std::vector<int64_t>& symbols,
                   Stack* stack, Slots* slots) {
    push_arguments(step, symbols, *slots, stack);
    const bool exclusive = onlookers.exclusive;
    if (onlookers.unobserved && step.function != nullptr && step.function->serves(*stack)) {
      call_function(step, stack);
    } else if (exclusive && step.is_written_over() &&
               can_be_written_over((*stack)[step.over].toTensor())) {
      call_over(step, stack);
    } else if (step.kernel != nullptr) {
      step.kernel(stack);
    } else {
      step.op->callBoxed(*stack);
    }
    for (size_t i = 0; i < step.results.size(); ++i) keep(step.results[i], (*stack)[i], slots);
  }

  static void call_over(const Step& step, Stack* stack) {
    if (step.kernel_over != nullptr) return step.kernel_over(stack);
    if (step.is_out) stack->push_back((*stack)[step.over]);
    step.in_place->callBoxed(*stack);
  }

  static void call_function(const Step& step, Stack* stack) {
    at::Tensor out = step.in_place.has_value() ? (*stack)[step.over].toTensor()
                                               : at::empty_like((*stack)[0].toTensor());
    step.function->write(*stack, out);
    stack->assign({std::move(out)});
  }

  // See NOTE [assumed layouts].
  void settle_layouts(size_t n, const std::vector<int64_t>& sizes, Slots* slots) const {
    const Step& step = steps[n];
    for (size_t r = 0; r < step.results.size(); ++r) {
      const bool is_view =
          step.op.has_value() && step.op->schema().returns()[r].alias_info() != nullptr;
      for (const ValueId id : step.results[r].ids) {
        if (id == kNoValue) continue;
        at::Tensor& slot = (*slots)[static_cast<size_t>(id)];
        const TensorType& type = graph.type(id);
        if (!slot.defined() || type.layout != c10::kStrided) continue;
        slot = as_assumed(
            std::move(slot), type.dtype,
            fixed_results.empty() ? layout_of(type, sizes) : fixed_results[static_cast<size_t>(id)],
            is_view, graph.nodes[n]);
      }
    }
  }

  static IValue value_of(const Step& step, const Variable& variable,
                         const std::vector<int64_t>& symbols, const Slots& slots) {
    if (const auto* ref = std::get_if<ValueRef>(&variable.source)) {
      return slots[static_cast<size_t>(ref->id)];
    }
    const c10::Type& type = *step.op->schema().arguments()[variable.index].type();
    if (const auto* refs = std::get_if<std::vector<ValueRef>>(&variable.source)) {
      return list_of(*refs, slots, is_optional_list(type));
    }
    if (const auto* size = std::get_if<SizeExpr>(&variable.source)) {
      return number_as(type, size->evaluate(symbols));
    }
    if (const auto* all = std::get_if<std::vector<SizeExpr>>(&variable.source)) {
      return evaluated(*all, symbols);
    }
    return number_as(type, std::get<SizeRatio>(variable.source).evaluate(symbols));
  }

  static void keep(const Result& result, IValue& value, Slots* slots) {
    if (!result.is_list) {
      if (result.ids[0] != kNoValue) {
        (*slots)[static_cast<size_t>(result.ids[0])] = std::move(value).toTensor();
      }
      return;
    }
    keep_all(result, value.toTensorVector(), slots);
  }

  static void keep_all(const Result& result, std::vector<at::Tensor> tensors, Slots* slots) {
    if (tensors.size() != result.ids.size()) {
      transform_error("compile", "an operator gave a list of ", tensors.size(),
                      " tensors, and gave ", result.ids.size(), " when it was traced.");
    }
    for (size_t k = 0; k < tensors.size(); ++k) {
      if (result.ids[k] == kNoValue) continue;
      (*slots)[static_cast<size_t>(result.ids[k])] = std::move(tensors[k]);
    }
  }

  static void run_control_flow(const Step& step, bool exclusive, Slots* slots) {
    std::vector<at::Tensor> results;
    const bool is_empty = step.control_flow == kScanOp && scan_length(step, *slots) == 0;
    if (!exclusive && !is_empty) {
      results = run_under_transforms(step, *slots);
    } else if (step.control_flow == kCondOp) {
      results = run_cond(step, *slots);
    } else if (step.control_flow == kWhileOp) {
      results = run_while(step, *slots);
    } else {
      results = run_scan(step, *slots);
    }
    keep_all(step.results[0], std::move(results), slots);
  }

  static int64_t scan_length(const Step& step, const Slots& slots) {
    const std::vector<at::Tensor> xs = tensors_of(step.variables[1].source, slots);
    return xs.empty() ? 0 : xs[0].size(0);
  }

  // Conditions may differ from example to example, or are to be traced again.
  static std::vector<at::Tensor> run_under_transforms(const Step& step, const Slots& slots) {
    namespace flow = control_flow_internal;
    const auto run = [&step](size_t i, flow::Leaves inputs, const flow::Leaves& captured) {
      inputs.insert(inputs.end(), captured.begin(), captured.end());
      return step.subprograms[i].run(inputs);
    };
    const auto condition = [](const at::Tensor& t) {
      const at::Tensor one = t.dim() == 0 ? t : t.reshape({});
      return one.scalar_type() == at::kBool ? one : one.ne(0);
    };
    std::vector<flow::Leaves> lists;
    for (const Variable& variable : step.variables) {
      lists.push_back(tensors_of(variable.source, slots));
    }
    if (step.control_flow == kCondOp) {
      return flow::cond_leaves(
          "cond", condition(lists[0][0]), [&](const flow::Leaves& all) { return run(0, all, {}); },
          [&](const flow::Leaves& all) { return run(1, all, {}); }, lists[1]);
    }
    if (step.control_flow == kWhileOp) {
      return flow::while_leaves(
          "while_loop",
          [&](const flow::Leaves& carry) { return condition(run(0, carry, lists[1])[0]); },
          [&](const flow::Leaves& carry) { return run(1, carry, lists[1]); }, lists[0]);
    }
    flow::Scanned scanned =
        flow::scan_leaves([&](const flow::Leaves& all) { return run(0, all, lists[2]); }, lists[0],
                          lists[1], lists[1][0].size(0), /*reverse=*/false);
    scanned.carry.insert(scanned.carry.end(), scanned.ys.begin(), scanned.ys.end());
    return std::move(scanned.carry);
  }

  static std::vector<at::Tensor> run_cond(const Step& step, const Slots& slots) {
    const at::Tensor predicate = tensors_of(step.variables[0].source, slots)[0];
    const std::vector<at::Tensor> operands = tensors_of(step.variables[1].source, slots);
    return step.subprograms[predicate.item().toBool() ? 0 : 1].run(operands);
  }

  static std::vector<at::Tensor> run_while(const Step& step, const Slots& slots) {
    std::vector<at::Tensor> carried = tensors_of(step.variables[0].source, slots);
    const std::vector<at::Tensor> captured = tensors_of(step.variables[1].source, slots);
    const auto with_captured = [&] {
      std::vector<at::Tensor> all = carried;
      all.insert(all.end(), captured.begin(), captured.end());
      return all;
    };
    while (step.subprograms[0].run(with_captured())[0].item().toBool()) {
      carried = step.subprograms[1].run(with_captured());
    }
    return carried;
  }

  static std::vector<at::Tensor> run_scan(const Step& step, const Slots& slots) {
    std::vector<at::Tensor> carried = tensors_of(step.variables[0].source, slots);
    const std::vector<at::Tensor> xs = tensors_of(step.variables[1].source, slots);
    const std::vector<at::Tensor> captured = tensors_of(step.variables[2].source, slots);
    const size_t count = carried.size();
    std::vector<std::vector<at::Tensor>> rows(step.results[0].ids.size() - count);
    const int64_t length = xs.empty() ? 0 : xs[0].size(0);
    for (int64_t t = 0; t < length; ++t) {
      std::vector<at::Tensor> all = carried;
      for (const at::Tensor& x : xs) all.push_back(x.select(0, t));
      all.insert(all.end(), captured.begin(), captured.end());
      std::vector<at::Tensor> results = step.subprograms[0].run(all);
      for (size_t k = 0; k < count; ++k) carried[k] = std::move(results[k]);
      for (size_t k = 0; k < rows.size(); ++k) rows[k].push_back(std::move(results[count + k]));
    }
    for (const auto& each : rows) carried.push_back(at::stack(each));
    return carried;
  }
};

Program::Program(Graph graph, const RunPlan& plan)
    : plan_(std::make_shared<const Plan>(std::move(graph), plan)) {}

const Graph& Program::graph() const { return plan_->graph; }

bool Program::needs_dispatch(at::ArrayRef<at::Tensor> inputs) const {
  if (plan_->tracked_constants && c10::GradMode::is_enabled()) return true;
  return std::any_of(inputs.begin(), inputs.end(),
                     [](const at::Tensor& t) { return seen_by_dispatch(t); });
}

std::vector<at::Tensor> Program::prepared(at::ArrayRef<at::Tensor> inputs) const {
  plan_->check_defined(inputs);
  return plan_->prepared(inputs, plan_->symbols(inputs));
}

std::vector<at::Tensor> Program::run(at::ArrayRef<at::Tensor> inputs,
                                     const RunOptions& options) const {
  plan_->check_defined(inputs);
  const std::vector<int64_t> sizes = plan_->symbols(inputs);
  const bool dispatch = needs_dispatch(inputs);
  std::optional<c10::impl::ExcludeDispatchKeyGuard> below;
  if (!dispatch) below.emplace(kBelow);
  // The casts were recorded.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  std::optional<SeedScope> seeded;
  if (options.seed.has_value()) seeded.emplace(*options.seed, plan_->devices(inputs));
  const std::vector<at::Tensor> prepared = plan_->prepared(inputs, sizes);
  if (plan_->state.empty()) return plan_->attempt(prepared, sizes, !dispatch);
  const StateGate::Run one(plan_->gate);
  std::optional<Plan::NotedWrites> noted;
  if (!dispatch) noted.emplace(plan_->state);
  return plan_->attempt(prepared, sizes, !dispatch);
}

}  // namespace torchlift::compile
