#include "compile/passes/functionalize.h"

#include <ATen/core/enum_tag.h>
#include <ATen/core/function_schema.h>
#include <ATen/core/jit_type.h>

#include <algorithm>
#include <array>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "compile/memory_range.h"
#include "compile/passes/evaluate.h"
#include "compile/passes/functional_variant.h"
#include "compile/passes/node_facts.h"
#include "compile/passes/written_memory.h"
#include "core/boxed.h"
#include "core/error.h"

namespace torchlift::compile {
namespace {

// NOTE [slots]
// While the nodes are read in order, each value of the program as it was has a slot: a tensor that
// views some storage. The slot without a parent is what the storage was made as; another one is its
// parent seen through one view operator. Writing gives a slot a new value; its parent's is then
// found by the inverse of the view, and so on up to the storage, whose version counts writes. Other
// slots of the storage are out of date then, and are made anew from their parent when they are
// read. A slot keeps its type, strides too, whatever is written.

// kState: an input that was a constant, and begins where its memory begins.
enum class Origin : uint8_t { kInput, kState, kConstant, kNode, kUnclear };

struct Storage {
  Origin origin = Origin::kNode;
  int64_t version = 0;
  std::string name;
};

// A node that gives a view of its argument `base`, and which of its results that is.
struct ViewStep {
  Node node;
  size_t base = 0;
  size_t result = 0;
  size_t element = 0;
};

struct Slot {
  int32_t storage = 0;
  int32_t parent = -1;
  std::shared_ptr<const ViewStep> step;  // none if there is no parent
  TensorType type;
  std::string name;
  ValueId value = kNoValue;
  int64_t version = 0;
};

[[noreturn]] void refuse(const Node& node, const std::string& why) {
  unsupported_error("compile", node.full_name(),
                    " cannot be written as an operator that does not "
                    "write: ",
                    why, node.source.empty() ? "" : " (" + node.source + ")");
}

// --- operators whose schemas do not tell ---------------------------------------------------------

// The same operator under a name whose schema tells.
Node told(const Node& node) {
  if (!writes_silently(node)) return node;
  if (node.op != "aten::native_batch_norm") {
    refuse(node, "it updates running statistics. Trace with native_batch_norm.");
  }
  Node honest = node;
  honest.op = "aten::_native_batch_norm_legit";
  return honest;
}

bool writes(const Node& node) { return effects_of(node).writes || writes_silently(node); }

bool any_writes(const Graph& graph) {
  for (const Node& node : graph.nodes) {
    if (writes(node)) return true;
    for (const auto& inner : node.subgraphs) {
      if (any_writes(*inner)) return true;
    }
  }
  return false;
}

SizeExpr numel(const TensorType& type) {
  SizeExpr result = 1;
  for (const SizeExpr& size : type.sizes) result = result * size;
  return result;
}

int64_t wrap(int64_t dim, int64_t dims) { return dim < 0 ? dim + dims : dim; }

// An int argument that does not depend on dynamic dims.
std::optional<int64_t> int_argument(const Node& node, const std::string& name) {
  const Argument* argument = find_argument(node, name);
  if (argument == nullptr) return std::nullopt;
  const auto* value = std::get_if<c10::IValue>(argument);
  if (value == nullptr || !value->isInt()) return std::nullopt;
  return value->toInt();
}

class Functionalizer {
 public:
  explicit Functionalizer(Graph graph) : graph_(std::move(graph)) {
    slot_of_.resize(graph_.values.size(), -1);
  }

  Functionalized run() {
    const size_t arguments = graph_.inputs.size();
    std::vector<at::Tensor> state = state_to_inputs();
    for (size_t i = 0; i < graph_.inputs.size(); ++i) {
      const bool owns = i >= arguments && state[i - arguments].storage_offset() == 0;
      add_root(graph_.inputs[i], graph_.inputs[i], owns ? Origin::kState : Origin::kInput);
    }
    for (const Constant& constant : graph_.constants) {
      add_root(constant.id, constant.id, Origin::kConstant);
    }
    const std::vector<Node> nodes = std::move(graph_.nodes);
    for (const Node& node : nodes) process(node);
    Functionalized done{.outputs = graph_.outputs.size(),
                        .updates = {},
                        .writes = writes_,
                        .state = std::move(state)};
    for (ValueId& id : graph_.outputs) {
      if (id != kNoValue) id = read(slot_index(id));
    }
    give_updates(&done);
    graph_.nodes = std::move(nodes_);
    compact(graph_);
    return done;
  }

  Graph take() { return std::move(graph_); }

 private:
  // --- constants that are written into ---

  std::vector<at::Tensor> state_to_inputs() {
    std::vector<at::Tensor> state;
    for (const ValueId id : written_constants(graph_)) {
      const Constant* constant = graph_.find_constant(id);
      refuse_shared_memory(*constant);
      state.push_back(constant->tensor);
      graph_.inputs.push_back(id);
    }
    std::erase_if(graph_.constants, [&](const Constant& each) {
      return std::find(graph_.inputs.begin(), graph_.inputs.end(), each.id) != graph_.inputs.end();
    });
    return state;
  }

  void refuse_shared_memory(const Constant& written) const {
    for (const Constant& other : graph_.constants) {
      if (other.id == written.id || !may_share_memory(other.tensor, written.tensor)) continue;
      unsupported_error("compile", "the program writes into ", graph_.value(written.id).name,
                        ", a constant that shares memory with another one, ",
                        graph_.value(other.id).name,
                        ", which operators without writes cannot say. Let it use one of the two "
                        "tensors, and make views of it.");
    }
  }

  // --- slots ---

  Slot& slot(int32_t index) { return slots_[static_cast<size_t>(index)]; }
  Storage& storage(const Slot& slot) { return storages_[static_cast<size_t>(slot.storage)]; }

  int32_t slot_index(ValueId id) const { return slot_of_.at(static_cast<size_t>(id)); }
  void set_slot(ValueId id, int32_t index) {
    if (slot_of_.size() <= static_cast<size_t>(id))
      slot_of_.resize(static_cast<size_t>(id) + 1, -1);
    slot_of_[static_cast<size_t>(id)] = index;
  }

  // `id`, of the program as it was, has memory of its own, and its value now is `value`.
  void add_root(ValueId id, ValueId value, Origin origin) {
    storages_.push_back({.origin = origin, .version = 0, .name = graph_.value(id).name});
    slots_.push_back({.storage = static_cast<int32_t>(storages_.size()) - 1,
                      .parent = -1,
                      .step = nullptr,
                      .type = graph_.type(value),
                      .name = graph_.value(id).name,
                      .value = value,
                      .version = 0});
    set_slot(id, static_cast<int32_t>(slots_.size()) - 1);
  }

  void add_view(ValueId id, ValueId value, int32_t parent, std::shared_ptr<const ViewStep> step) {
    const int32_t of = slot(parent).storage;
    slots_.push_back({.storage = of,
                      .parent = parent,
                      .step = std::move(step),
                      .type = graph_.type(value),
                      .name = graph_.value(id).name,
                      .value = value,
                      .version = storages_[static_cast<size_t>(of)].version});
    set_slot(id, static_cast<int32_t>(slots_.size()) - 1);
  }

  // The value of the slot now.
  ValueId read(int32_t index) {
    const int64_t version = storage(slot(index)).version;
    if (slot(index).version == version) return slot(index).value;
    const ValueId parent = read(slot(index).parent);
    const ViewStep step = *slot(index).step;
    Node node = step.node;
    node.args[step.base] = ValueRef{parent};
    for (Result& result : node.results) {
      for (ValueId& id : result.ids) {
        if (id != kNoValue) id = graph_.add_value(graph_.type(id), graph_.value(id).name);
      }
    }
    const ValueId value = node.results[step.result].ids[step.element];
    nodes_.push_back(std::move(node));
    slot(index).value = value;
    slot(index).version = version;
    return value;
  }

  ValueId emit(Node node, const std::string& name) {
    if (node.source.empty()) node.source = source_;
    return append(graph_, &nodes_, std::move(node), name);
  }

  // --- nodes ---

  void process(const Node& given) {
    const Node node = told(given);
    source_ = node.source;
    if (writes(node)) {
      ++writes_;
      write(node);
    } else if (node.is_control_flow()) {
      control_flow(node);
    } else {
      plain(node);
    }
  }

  Node with_current_arguments(const Node& node) {
    Node current = node;
    for (Argument& argument : current.args) {
      if (auto* ref = std::get_if<ValueRef>(&argument)) update(ref);
      if (auto* refs = std::get_if<std::vector<ValueRef>>(&argument)) {
        for (ValueRef& ref : *refs) update(&ref);
      }
    }
    return current;
  }
  void update(ValueRef* ref) {
    if (ref->id != kNoValue) ref->id = read(slot_index(ref->id));
  }

  void plain(const Node& node) {
    Node current = with_current_arguments(node);
    const bool views = may_view(node);
    std::vector<std::vector<Inferred>> inferred;
    if (views && !infer_views(current, &inferred)) {
      for (const ValueId id : results_of(node)) add_root(id, id, Origin::kUnclear);
      nodes_.push_back(std::move(current));
      return;
    }
    nodes_.push_back(current);
    for (size_t i = 0; i < node.results.size(); ++i) {
      for (size_t k = 0; k < node.results[i].ids.size(); ++k) {
        const ValueId id = node.results[i].ids[k];
        if (id == kNoValue) continue;
        const bool view = views && inferred.at(i).at(k).shares != kNoValue;
        if (view) {
          define_view(node, current, i, k, inferred[i][k].shares);
        } else {
          add_root(id, id, Origin::kNode);
        }
      }
    }
  }

  // Gives false if the operator need not give a view, and nothing is known of its result.
  bool infer_views(const Node& node, std::vector<std::vector<Inferred>>* inferred) const {
    try {
      *inferred = infer(graph_, node);
      return true;
    } catch (const UnsupportedError&) {
      if (effects_of(node).views) throw;
      return false;
    }
  }

  void define_view(const Node& node, const Node& current, size_t i, size_t k, ValueId shares) {
    const ValueId id = node.results[i].ids[k];
    for (size_t a = 0; a < current.args.size(); ++a) {
      const auto* ref = std::get_if<ValueRef>(&current.args[a]);
      if (ref == nullptr || ref->id != shares) continue;
      const int32_t parent = slot_index(std::get<ValueRef>(node.args[a]).id);
      auto step = std::make_shared<ViewStep>(
          ViewStep{.node = current, .base = a, .result = i, .element = k});
      add_view(id, id, parent, std::move(step));
      return;
    }
    refuse(node, "its result shares memory with one of a list of tensors.");
  }

  void control_flow(const Node& node) {
    Node current = with_current_arguments(node);
    for (auto& inner : current.subgraphs) {
      Graph graph = *inner;
      const Functionalized done = functionalize(graph);
      if (!done.updates.empty() || !done.state.empty()) {
        refuse(node, "a branch or a body writes into what it is given. Return the new value.");
      }
      inner = std::make_shared<const Graph>(std::move(graph));
    }
    for (const ValueId id : results_of(node)) add_root(id, id, Origin::kUnclear);
    nodes_.push_back(std::move(current));
  }

  // --- writing ---

  void write(const Node& node) {
    const auto op = *find_operator(node);
    if (op.hasTag(at::Tag::inplace_view)) return change_shape(node, op);
    const auto variant = find_functional_variant(op);
    if (!variant.has_value()) {
      refuse(node,
             "this libtorch has no operator that computes the same without writing. Use "
             "operators that do not write.");
    }
    std::vector<std::vector<int32_t>> targets;
    for (const size_t i : variant->written) {
      targets.emplace_back();
      for (const ValueId id : values_in(node.args[i])) targets.back().push_back(slot_index(id));
    }
    for (const auto& list : targets) {
      for (const int32_t index : list) check_writable(node, slot(index));
    }
    const std::vector<std::vector<ValueId>> values =
        copies_tensor(node) ? copied(node, targets[0][0]) : computed(node, *variant, targets);
    for (size_t w = 0; w < targets.size(); ++w) {
      if (targets[w].size() != values[w].size()) {
        refuse(node, "its functional variant gives another number of tensors.");
      }
      for (size_t k = 0; k < targets[w].size(); ++k) {
        store(targets[w][k], fitted(node, values[w][k], targets[w][k]));
      }
    }
    name_results(node, op);
  }

  void check_writable(const Node& node, const Slot& target) {
    const Storage& memory = storage(target);
    if (memory.origin == Origin::kConstant) {
      refuse(node, "it writes into " + memory.name +
                       ", a constant of the graph, which would carry what one run wrote into "
                       "the next. Make that tensor an input of the function, or clone() it "
                       "before writing.");
    }
    if (memory.origin == Origin::kUnclear) {
      refuse(node, "it writes into " + memory.name +
                       ", which may be one of the arguments of what gave it (a branch, a loop, or "
                       "an operator made of others). clone() it before writing.");
    }
  }

  static bool copies_tensor(const Node& node) {
    return node.op == "aten::copy_" && std::holds_alternative<ValueRef>(node.args[1]);
  }

  // What copy_ writes: its source as a tensor of its own, of the target's shape.
  std::vector<std::vector<ValueId>> copied(const Node& node, int32_t target) {
    const TensorType type = slot(target).type;
    ValueId source = read(slot_index(std::get<ValueRef>(node.args[1]).id));
    if (graph_.type(source).sizes != type.sizes) {
      source = emit(make_node("aten::expand", "",
                              {{"self", ValueRef{source}}, {"size", sizes_argument(type.sizes)}}),
                    "expand");
    }
    const TensorType& given = graph_.type(source);
    if (given.dtype != type.dtype || given.device != type.device) {
      return {{converted(source, type)}};
    }
    return {{emit(make_node("aten::clone", "", {{"self", ValueRef{source}}}), "clone")}};
  }

  ValueId converted(ValueId value, const TensorType& type) {
    return emit(make_node("aten::_to_copy", "",
                          {{"self", ValueRef{value}},
                           {"dtype", c10::IValue(static_cast<int64_t>(type.dtype))},
                           {"device", c10::IValue(type.device)}}),
                "to");
  }

  static Argument sizes_argument(const std::vector<SizeExpr>& sizes) {
    std::vector<int64_t> numbers;
    for (const SizeExpr& size : sizes) {
      if (!size.is_constant()) return sizes;
      numbers.push_back(*size.constant());
    }
    return c10::IValue(std::move(numbers));
  }

  // Calls the functional variant. The values to write, for each written argument.
  std::vector<std::vector<ValueId>> computed(const Node& node, const FunctionalVariant& variant,
                                             const std::vector<std::vector<int32_t>>& targets) {
    const Node current = with_current_arguments(node);
    Node call = make_node(variant.op.schema().name(), variant.op.schema().overload_name(),
                          arguments_for(node, current, variant, targets));
    const std::string name = variant.op.schema().name();
    const size_t before = nodes_.size();
    emit(std::move(call), name.substr(name.find("::") + 2));
    const Node& emitted = nodes_.at(before);
    own_results(node, emitted);
    std::vector<std::vector<ValueId>> values;
    for (size_t w = 0; w < variant.written.size(); ++w) {
      values.emplace_back();
      for (const ValueId id : emitted.results.at(variant.own_results + w).ids) {
        // An undefined result for an optional argument that was not given.
        if (id != kNoValue && values[w].size() < targets[w].size()) values[w].push_back(id);
      }
    }
    return values;
  }

  std::vector<std::pair<std::string, Argument>> arguments_for(
      const Node& node, const Node& current, const FunctionalVariant& variant,
      const std::vector<std::vector<int32_t>>& targets) {
    const auto& schema = find_operator(node)->schema();
    std::vector<std::pair<std::string, Argument>> arguments;
    for (size_t i = 0; i < current.args.size(); ++i) {
      const bool written =
          std::find(variant.written.begin(), variant.written.end(), i) != variant.written.end();
      if (written && variant.out_form) continue;
      arguments.emplace_back(schema.arguments()[i].name(), current.args[i]);
    }
    if (!variant.out_form || targets[0].empty()) return arguments;
    // A factory gives what the tensor to write into is.
    for (const c10::Argument& argument : variant.op.schema().arguments()) {
      if (schema.argumentIndexWithName(argument.name()).has_value()) continue;
      const TensorType& type = slot(targets[0][0]).type;
      if (argument.name() == "dtype") {
        arguments.emplace_back("dtype", c10::IValue(static_cast<int64_t>(type.dtype)));
      } else if (argument.name() == "device") {
        arguments.emplace_back("device", c10::IValue(type.device));
      }
    }
    return arguments;
  }

  // What the operator gave besides what it wrote.
  void own_results(const Node& node, const Node& emitted) {
    const auto& returns = find_operator(node)->schema().returns();
    size_t own = 0;
    for (size_t i = 0; i < returns.size(); ++i) {
      if (returns[i].alias_info() != nullptr) continue;
      const std::vector<ValueId>& ids = emitted.results.at(own++).ids;
      for (size_t k = 0; k < node.results[i].ids.size(); ++k) {
        if (node.results[i].ids[k] != kNoValue) {
          add_root(node.results[i].ids[k], ids.at(k), Origin::kNode);
        }
      }
    }
  }

  // Where a result of an operator that writes has a number of its own, it is its target.
  void name_results(const Node& node, const c10::OperatorHandle& op) {
    const auto& schema = op.schema();
    for (size_t i = 0; i < node.results.size(); ++i) {
      const auto* alias = schema.returns()[i].alias_info();
      if (alias == nullptr) continue;
      for (size_t a = 0; a < node.args.size(); ++a) {
        const auto* other = schema.arguments()[a].alias_info();
        if (other == nullptr || other->beforeSets() != alias->beforeSets()) continue;
        const std::vector<ValueId> targets = values_in(node.args[a]);
        for (size_t k = 0; k < node.results[i].ids.size() && k < targets.size(); ++k) {
          const ValueId id = node.results[i].ids[k];
          if (id != kNoValue) set_slot(id, slot_index(targets[k]));
        }
      }
    }
  }

  // The value in the type that the slot needs: exactly, if it has no parent; else its view is made
  // anew when strides differ.
  ValueId fitted(const Node& node, ValueId value, int32_t index) {
    const TensorType type = slot(index).type;
    const TensorType& given = graph_.type(value);
    if (given.sizes != type.sizes) {
      refuse(node, "it gives " + slot(index).name + ", of shape " + type.str() + ", the shape " +
                       given.str() + ". Write into a tensor that has the shape of the result.");
    }
    if (given == type) return value;
    if (slot(index).parent >= 0) {
      const bool same = given.dtype == type.dtype && given.device == type.device;
      return same ? value : converted(value, type);
    }
    return retyped(value, index);
  }

  // aten::copy keeps dtype and strides of what is overwritten.
  ValueId retyped(ValueId value, int32_t index) {
    return emit(
        make_node("aten::copy", "", {{"self", ValueRef{read(index)}}, {"src", ValueRef{value}}}),
        slot(index).name);
  }

  void store(int32_t index, ValueId value) {
    std::vector<std::pair<int32_t, ValueId>> known;
    while (slot(index).parent >= 0) {
      if (graph_.type(value) == slot(index).type) known.emplace_back(index, value);
      const int32_t parent = slot(index).parent;
      value = inverted(*slot(index).step, read(parent), value, owns_memory(parent));
      index = parent;
    }
    if (graph_.type(value) != slot(index).type) value = retyped(value, index);
    known.emplace_back(index, value);
    const int64_t version = ++storage(slot(index)).version;
    for (const auto& [each, its_value] : known) {
      slot(each).value = its_value;
      slot(each).version = version;
    }
  }

  // --- inverses of views ---

  // Whether the value begins where its memory begins, whatever is written into it.
  bool owns_memory(int32_t index) {
    const Origin origin = storage(slot(index)).origin;
    return slot(index).parent < 0 && (origin == Origin::kNode || origin == Origin::kState);
  }

  // `parent` with what the view shows of it replaced by `value`.
  ValueId inverted(const ViewStep& step, ValueId parent, ValueId value, bool owns_memory) {
    const Node& view = step.node;
    const TensorType type = graph_.type(parent);
    const std::string name = "scatter";
    const std::string& op = view.op;
    const auto self = [&](const std::string& function, const std::string& overload,
                          std::vector<std::pair<std::string, Argument>> more) {
      more.emplace_back("self", ValueRef{value});
      return emit(make_node(function, overload, std::move(more)), name);
    };
    if (op == "aten::slice" || op == "aten::select" || op == "aten::diagonal") {
      return scattered(view, op + "_scatter", parent, value);
    }
    if (op == "aten::as_strided" && owns_memory) {
      return scattered(view, "aten::as_strided_scatter", parent, value);
    }
    if (op == "aten::t") return self("aten::t", "", {});
    if (op == "aten::transpose" && view.overload == "int") {
      return self("aten::transpose", "int",
                  {{"dim0", *find_argument(view, "dim0")}, {"dim1", *find_argument(view, "dim1")}});
    }
    if (op == "aten::permute") {
      const std::vector<int64_t> dims =
          std::get<c10::IValue>(*find_argument(view, "dims")).toIntVector();
      std::vector<int64_t> inverse(dims.size());
      const auto rank = static_cast<int64_t>(dims.size());
      for (int64_t d = 0; d < rank; ++d) {
        inverse[static_cast<size_t>(wrap(dims[static_cast<size_t>(d)], rank))] = d;
      }
      return self("aten::permute", "", {{"dims", c10::IValue(inverse)}});
    }
    if (op == "aten::view_as_real") return self("aten::view_as_complex", "", {});
    if (op == "aten::view_as_complex") return self("aten::view_as_real", "", {});
    // What was written into is no view that conjugates or negates itself.
    if (op == "aten::_conj") return self("aten::conj_physical", "", {});
    if (op == "aten::_neg_view") return self("aten::neg", "", {});
    if (op == "aten::view" && view.overload == "dtype") {
      return self("aten::view", "dtype",
                  {{"dtype", c10::IValue(static_cast<int64_t>(type.dtype))}});
    }
    if (keeps_order(view, type, graph_.type(value))) {
      return self("aten::reshape", "", {{"shape", sizes_argument(type.sizes)}});
    }
    if (view.results[step.result].is_list) {
      if (const auto dim = int_argument(view, "dim")) return piece(step, *dim, parent, value);
    }
    return scattered_by_strides(step, parent, value);
  }

  // Whether the view has all elements of its argument in their order.
  bool keeps_order(const Node& view, const TensorType& type, const TensorType& shown) const {
    constexpr std::array<std::string_view, 18> kKeepOrder = {
        "aten::view",       "aten::reshape",    "aten::_reshape_alias", "aten::unsqueeze",
        "aten::squeeze",    "aten::flatten",    "aten::unflatten",      "aten::alias",
        "aten::detach",     "aten::expand",     "aten::view_as",        "aten::reshape_as",
        "aten::expand_as",  "aten::contiguous", "aten::ravel",          "aten::_unsafe_view",
        "aten::lift_fresh", "aten::to"};
    return std::find(kKeepOrder.begin(), kKeepOrder.end(), view.op) != kKeepOrder.end() &&
           type.dtype == shown.dtype && numel(type) == numel(shown);
  }

  // slice_scatter and its like take the arguments of slice after the source.
  ValueId scattered(const Node& view, const std::string& op, ValueId parent, ValueId value) {
    std::vector<std::pair<std::string, Argument>> arguments = {{"self", ValueRef{parent}},
                                                               {"src", ValueRef{value}}};
    const auto& schema = find_operator(view)->schema();
    for (size_t i = 1; i < view.args.size(); ++i) {
      arguments.emplace_back(schema.arguments()[i].name(), view.args[i]);
    }
    return emit(make_node(op, "", std::move(arguments)), "scatter");
  }

  // One of the tensors that split, chunk, unbind and others give, which follow each other along a
  // dim.
  ValueId piece(const ViewStep& step, int64_t dim, ValueId parent, ValueId value) {
    const std::vector<ValueId>& pieces = step.node.results[step.result].ids;
    const TensorType& type = graph_.type(parent);
    dim = wrap(dim, type.dim());
    if (graph_.type(value).dim() < type.dim()) {  // unbind
      return emit(make_node("aten::select_scatter", "",
                            {{"self", ValueRef{parent}},
                             {"src", ValueRef{value}},
                             {"dim", c10::IValue(dim)},
                             {"index", c10::IValue(static_cast<int64_t>(step.element))}}),
                  "scatter");
    }
    const auto size_of = [&](size_t k) {
      return graph_.type(pieces[k]).sizes[static_cast<size_t>(dim)];
    };
    SizeExpr start = 0;
    for (size_t k = 0; k < step.element; ++k) start = start + size_of(k);
    const SizeExpr end = start + size_of(step.element);
    return emit(make_node("aten::slice_scatter", "",
                          {{"self", ValueRef{parent}},
                           {"src", ValueRef{value}},
                           {"dim", c10::IValue(dim)},
                           {"start", size_argument(start)},
                           {"end", size_argument(end)}}),
                "scatter");
  }

  static Argument size_argument(const SizeExpr& size) {
    if (const auto number = size.constant()) return c10::IValue(*number);
    return size;
  }

  // Any other view: where it lies in a contiguous copy of its argument.
  ValueId scattered_by_strides(const ViewStep& step, ValueId parent, ValueId value) {
    if (step.node.op == "aten::as_strided") {
      refuse(step.node,
             "something was written through it, and it does not say by its dims which "
             "elements it shows. Use slice, select, diagonal, unfold or index.");
    }
    if (graph_.type(parent).dtype != graph_.type(value).dtype) {
      refuse(step.node,
             "something was written through it, and it shows its argument in another "
             "dtype.");
    }
    const auto contiguous = static_cast<int64_t>(c10::MemoryFormat::Contiguous);
    const ValueId base =
        emit(make_node("aten::clone", "",
                       {{"self", ValueRef{parent}}, {"memory_format", c10::IValue(contiguous)}}),
             "clone");
    Node view = step.node;
    view.args[step.base] = ValueRef{base};
    const Inferred where = infer(graph_, view).at(step.result).at(step.element);
    if (where.shares != base) {
      refuse(step.node,
             "something was written through it, and it is no view of a contiguous "
             "tensor.");
    }
    return emit(make_node("aten::as_strided_scatter", "",
                          {{"self", ValueRef{base}},
                           {"src", ValueRef{value}},
                           {"size", sizes_argument(where.type->sizes)},
                           {"stride", sizes_argument(where.type->strides)},
                           {"storage_offset", size_argument(where.offset)}}),
                "scatter");
  }

  // --- changing shapes in place ---

  void change_shape(const Node& node, const c10::OperatorHandle& op) {
    const auto view = find_view_variant(op);
    const auto* target = node.args.empty() ? nullptr : std::get_if<ValueRef>(&node.args[0]);
    if (!view.has_value() || target == nullptr) {
      refuse(node, "it gives its argument other memory. Make a new tensor of the size wanted.");
    }
    const int32_t parent = slot_index(target->id);
    Node call = with_current_arguments(node);
    call.op = view->schema().name();
    call.overload = view->schema().overload_name();
    call.results.clear();
    const ValueId value = emit(std::move(call), graph_.value(target->id).name);
    auto step = std::make_shared<ViewStep>(
        ViewStep{.node = nodes_.back(), .base = 0, .result = 0, .element = 0});
    add_view(target->id, value, parent, std::move(step));
    name_results(node, op);
  }

  // --- inputs ---

  void give_updates(Functionalized* done) {
    for (size_t i = 0; i < graph_.inputs.size(); ++i) {
      const Slot now = slot(slot_index(graph_.inputs[i]));
      if (now.parent >= 0) {
        unsupported_error("compile", "the program changes the shape of its input ", now.name,
                          " in place by ", now.step->node.op,
                          "_, which a caller cannot be given. Use ", now.step->node.op, ".");
      }
      if (storage(now).version == 0) continue;
      done->updates.push_back({.input = static_cast<int32_t>(i),
                               .output = static_cast<int32_t>(graph_.outputs.size())});
      graph_.outputs.push_back(now.value);
    }
  }

  Graph graph_;
  std::vector<Node> nodes_;
  std::string source_;  // of the node that is processed: what it becomes has the same
  std::vector<Storage> storages_;
  std::vector<Slot> slots_;
  std::vector<int32_t> slot_of_;  // by the ids of the program as it was
  int64_t writes_ = 0;
};

}  // namespace

Functionalized functionalize(Graph& graph) {
  if (!any_writes(graph)) return {.outputs = graph.outputs.size(), .updates = {}};
  Functionalizer functionalizer(graph);
  const Functionalized done = functionalizer.run();
  graph = functionalizer.take();
  return done;
}

}  // namespace torchlift::compile
