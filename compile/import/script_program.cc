#include "compile/import/script_program.h"

#include <ATen/core/class_type.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/jit_type.h>
#include <ATen/ops/copy_ops.h>
#include <c10/util/StringUtil.h>
#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/ir/ir.h>
#include <torch/csrc/jit/passes/inliner.h>
#include <torch/csrc/jit/runtime/operator.h>

#include <algorithm>
#include <optional>
#include <set>
#include <tuple>

#include "core/error.h"

namespace torchlift::compile {

using c10::IValue;
using torch::jit::Stack;

namespace {

constexpr const char* kCall = "imported module";

std::string place_of(const torch::jit::Node& node) {
  const auto place = node.sourceRange().file_line_col();
  if (!place.has_value()) return "";
  return c10::str(" (", std::get<0>(*place), ":", std::get<1>(*place), ")");
}

}  // namespace

// --- the module ----------------------------------------------------------------------------------

bool ScriptObjects::add(const IValue& value) {
  if (value.isTensor()) return own_.count(value.toTensor().unsafeGetTensorImpl()) > 0;
  if (value.isObject()) {
    if (objects_.insert(value.internalToPointer()).second) add_parts(value);
    return false;  // its attributes are read one by one
  }
  if (!value.isList() && !value.isGenericDict() && !value.isTuple()) return false;
  if (!value.isTuple()) objects_.insert(value.internalToPointer());
  const bool holds = add_parts(value);
  if (holds) holders_.insert(value.internalToPointer());
  return holds;
}

bool ScriptObjects::add_parts(const IValue& value) {
  bool holds = false;
  if (value.isObject()) {
    for (const IValue& slot : value.toObject()->slots()) add(slot);
  } else if (value.isList()) {
    for (const IValue& each : value.toList()) holds |= add(each);
  } else if (value.isGenericDict()) {
    for (const auto& item : value.toGenericDict()) holds |= add(item.value());
  } else {
    for (const IValue& each : value.toTupleRef().elements()) holds |= add(each);
  }
  return holds;
}

const at::Tensor* ScriptState::find(const IValue& value) const {
  if (!value.isTensor()) return nullptr;
  const auto found = tensors_.find(value.toTensor().unsafeGetTensorImpl());
  return found == tensors_.end() ? nullptr : &found->second;
}

IValue ScriptState::get(const IValue& object, const std::string& attribute) {
  const auto assigned = assigned_.find({object.internalToPointer(), attribute});
  if (assigned != assigned_.end()) return assigned->second.value;
  return replaced(object.toObjectRef().getAttr(attribute));
}

IValue ScriptState::replaced(const IValue& value) {
  if (const at::Tensor* given = find(value)) return *given;
  if (!objects_.holds_state(value)) return value;
  const auto found = replaced_.find(value.internalToPointer());
  if (found != replaced_.end()) return found->second;
  IValue copy = make_replaced(value);
  copies_.insert(copy.internalToPointer());
  return replaced_.emplace(value.internalToPointer(), std::move(copy)).first->second;
}

IValue ScriptState::make_replaced(const IValue& value) {
  if (value.isTuple()) {
    std::vector<IValue> elements;
    for (const IValue& each : value.toTupleRef().elements()) elements.push_back(replaced(each));
    const auto type = value.type()->expect<c10::TupleType>();
    return type->schema() != nullptr ? c10::ivalue::Tuple::createNamed(std::move(elements), type)
                                     : c10::ivalue::Tuple::create(std::move(elements));
  }
  if (value.isList()) {
    const auto own = value.toList();
    c10::impl::GenericList list(own.elementType());
    for (const IValue& each : own) list.push_back(replaced(each));
    return list;
  }
  const auto own = value.toGenericDict();
  c10::impl::GenericDict dict(own.keyType(), own.valueType());
  for (const auto& item : own) dict.insert(item.key(), replaced(item.value()));
  return dict;
}

void ScriptState::set(const IValue& object, const std::string& attribute, IValue value) {
  if (!objects_.has(object)) {  // made in this call
    object.toObject()->setAttr(attribute, std::move(value));
    return;
  }
  const at::Tensor* target = find(object.toObjectRef().getAttr(attribute));
  if (target == nullptr || !value.isTensor()) {
    unsupported_error(
        kCall, "the module assigns its attribute '", attribute,
        "', which is no parameter or buffer, and a call keeps nothing else. Make it a "
        "buffer, or return it.");
  }
  assigned_[{object.internalToPointer(), attribute}] = {*target, value.toTensor(), attribute};
}

void ScriptState::finish() const {
  for (const auto& [place, assigned] : assigned_) {
    const auto& [own, value, attribute] = assigned;
    at::Tensor target = own;
    if (target.sizes() != value.sizes() || target.scalar_type() != value.scalar_type()) {
      unsupported_error(kCall, "the module assigns a tensor of shape ", value.sizes(), ", ",
                        value.scalar_type(), " to '", attribute, "', which has shape ",
                        target.sizes(), ", ", target.scalar_type(),
                        ". A call keeps buffers as they are.");
    }
    at::_ops::copy_::call(target, value, /*non_blocking=*/false);
  }
}

void ScriptState::check_writable(const IValue& container, const std::string& by) const {
  const bool is_copy = container.isPtrType() && copies_.count(container.internalToPointer()) > 0;
  if (!objects_.has(container) && !is_copy) return;
  unsupported_error(kCall, by,
                    " changes a list or dict of the module, and a call keeps nothing but "
                    "buffers. Return it, or make it in forward().");
}

// --- programs ------------------------------------------------------------------------------------

struct ScriptProgram::Step {
  // What is done, with the inputs in their places.
  using Run = void (Runner::*)(const Step&);

  Run run = nullptr;
  const torch::jit::Node* node = nullptr;
  // Calling it changes nothing, as libtorch's interpreter relies on, too.
  mutable torch::jit::Operation operation = nullptr;
  bool counts_inputs = false;      // an operator of any number of arguments
  bool changes_container = false;  // append, and the like, of its first argument
  std::vector<size_t> inputs;
  std::vector<size_t> outputs;
  std::vector<size_t> dead;  // nobody reads them after this
  std::vector<std::shared_ptr<const Block>> blocks;
  std::shared_ptr<const ScriptProgram> callee;
  std::string attribute;
};

struct ScriptProgram::Block {
  std::vector<Step> steps;
  std::vector<size_t> inputs;
  std::vector<size_t> outputs;
};

// --- running -------------------------------------------------------------------------------------

class ScriptProgram::Runner {
 public:
  Runner(std::vector<IValue> frame, ScriptState& state) : frame_(std::move(frame)), state_(state) {}

  std::vector<IValue> run_block(const Block& block, std::vector<IValue> inputs) {
    for (size_t i = 0; i < inputs.size(); ++i) frame_[block.inputs[i]] = std::move(inputs[i]);
    for (const Step& step : block.steps) {
      run_step(step);
      for (const size_t place : step.dead) frame_[place] = IValue();
    }
    return values(block.outputs);
  }

  // --- one for each kind of step -----------------------------------------------------------------

  void run_operator(const Step& step) {
    Stack stack = values(step.inputs);
    if (step.changes_container) {
      state_.check_writable(stack[0], step.node->kind().toQualString());
    }
    if (step.counts_inputs) stack.emplace_back(static_cast<int64_t>(step.inputs.size()));
    step.operation(stack);
    keep(step, std::move(stack));
  }

  void run_get_attribute(const Step& step) {
    set(step, state_.get(frame_[step.inputs[0]], step.attribute));
  }

  void run_set_attribute(const Step& step) {
    state_.set(frame_[step.inputs[0]], step.attribute, frame_[step.inputs[1]]);
  }

  void run_if(const Step& step) {
    const bool condition = frame_[step.inputs[0]].toBool();
    keep(step, run_block(*step.blocks[condition ? 0 : 1], {}));
  }

  // (most steps, whether to begin, carried...); the body gives (whether to go on, carried...).
  void run_loop(const Step& step) {
    const int64_t most = frame_[step.inputs[0]].toInt();
    bool goes_on = frame_[step.inputs[1]].toBool();
    std::vector<IValue> carried = values(step.inputs);
    carried.erase(carried.begin(), carried.begin() + 2);
    for (int64_t i = 0; i < most && goes_on; ++i) {
      carried.insert(carried.begin(), IValue(i));
      carried = run_block(*step.blocks[0], std::move(carried));
      goes_on = carried[0].toBool();
      carried.erase(carried.begin());
    }
    keep(step, std::move(carried));
  }

  void run_tuple(const Step& step) {
    const auto type = step.node->output()->type()->cast<c10::TupleType>();
    std::vector<IValue> elements = values(step.inputs);
    set(step, type != nullptr && type->schema() != nullptr
                  ? c10::ivalue::Tuple::createNamed(std::move(elements), type)
                  : c10::ivalue::Tuple::create(std::move(elements)));
  }

  void run_tuple_unpack(const Step& step) {
    const auto& elements = frame_[step.inputs[0]].toTupleRef().elements();
    keep(step, std::vector<IValue>(elements.begin(), elements.end()));
  }

  void run_tuple_slice(const Step& step) {
    const auto& elements = frame_[step.inputs[0]].toTupleRef().elements();
    const auto begin = step.node->i(c10::attr::beg);
    const auto end = step.node->i(c10::attr::end);
    set(step, c10::ivalue::Tuple::create(
                  std::vector<IValue>(elements.begin() + begin, elements.begin() + end)));
  }

  void run_list(const Step& step) {
    const auto type = step.node->output()->type()->expect<c10::ListType>();
    c10::impl::GenericList list(type->getElementType());
    list.reserve(step.inputs.size());
    for (const size_t place : step.inputs) list.push_back(frame_[place]);
    set(step, std::move(list));
  }

  void run_list_unpack(const Step& step) {
    const auto list = frame_[step.inputs[0]].toListRef();
    if (list.size() != step.outputs.size()) {
      transform_error(kCall, "a list of ", list.size(), " is unpacked to ", step.outputs.size(),
                      " values.");
    }
    keep(step, list.vec());
  }

  void run_dict(const Step& step) {
    const auto type = step.node->output()->type()->expect<c10::DictType>();
    c10::impl::GenericDict dict(type->getKeyType(), type->getValueType());
    for (size_t i = 0; i + 1 < step.inputs.size(); i += 2) {
      dict.insert_or_assign(frame_[step.inputs[i]], frame_[step.inputs[i + 1]]);
    }
    set(step, std::move(dict));
  }

  void run_create_object(const Step& step) {
    const auto type = step.node->output()->type()->expect<c10::ClassType>();
    const c10::StrongTypePtr owner(type->compilation_unit(), type);
    set(step, c10::ivalue::Object::create(owner, type->numAttributes()));
  }

  void run_is_instance(const Step& step) {
    const c10::TypePtr type = frame_[step.inputs[0]].type();
    const std::vector<c10::TypePtr> candidates = step.node->tys(c10::attr::types);
    set(step, std::any_of(candidates.begin(), candidates.end(),
                          [&](const auto& candidate) { return type->isSubtypeOf(*candidate); }));
  }

  void run_cast(const Step& step) { set(step, frame_[step.inputs[0]]); }

  void run_uninitialized(const Step& step) { set(step, IValue::uninitialized()); }

  void run_enter(const Step& step) { set(step, call(*step.callee, {frame_[step.inputs[0]]})); }

  void run_exit(const Step& step) {
    set(step, call(*step.callee, {frame_[step.inputs[0]], IValue(), IValue(), IValue()}));
  }

  // At once, on this thread: levels belong to it.
  void run_fork(const Step& step) {
    auto future = c10::make_intrusive<c10::ivalue::Future>(
        step.node->output()->type()->expect<c10::FutureType>()->getElementType());
    future->markCompleted(call(*step.callee, values(step.inputs)));
    set(step, std::move(future));
  }

  // (message, class)
  [[noreturn]] void run_raise(const Step& step) {
    const IValue& message = frame_[step.inputs[0]];
    transform_error(kCall, "the module raises: ", message.isString() ? message.toStringRef() : "");
  }

  void run_wait(const Step& step) { set(step, frame_[step.inputs[0]].toFuture()->value()); }

 private:
  void run_step(const Step& step) {
    try {
      (this->*step.run)(step);
    } catch (c10::Error& error) {
      error.add_context(c10::str("in ", step.node->kind().toQualString(), place_of(*step.node)));
      throw;
    }
  }

  IValue call(const ScriptProgram& program, std::vector<IValue> inputs) {
    std::vector<IValue> outputs = program.run(std::move(inputs), state_);
    return outputs.empty() ? IValue() : std::move(outputs[0]);
  }

  std::vector<IValue> values(const std::vector<size_t>& places) const {
    std::vector<IValue> found;
    found.reserve(places.size() + 1);
    for (const size_t place : places) found.push_back(frame_[place]);
    return found;
  }

  void keep(const Step& step, std::vector<IValue> results) {
    const size_t count = step.outputs.size();
    TORCH_INTERNAL_ASSERT(results.size() >= count);
    const size_t first = results.size() - count;
    for (size_t i = 0; i < count; ++i) frame_[step.outputs[i]] = std::move(results[first + i]);
  }

  void set(const Step& step, IValue value) {
    if (!step.outputs.empty()) frame_[step.outputs[0]] = std::move(value);
  }

  std::vector<IValue> frame_;
  ScriptState& state_;
};

// --- compiling -----------------------------------------------------------------------------------

class ScriptProgram::Compiler {
 public:
  explicit Compiler(std::vector<IValue>& frame) : frame_(frame) {}

  std::shared_ptr<const Block> block(const torch::jit::Block& block) {
    auto result = std::make_shared<Block>();
    for (const auto* input : block.inputs()) result->inputs.push_back(place_of_value(input));
    for (const auto* node : block.nodes()) {
      if (node->kind() == c10::prim::Constant) {
        frame_[place_of_value(node->output())] = constant(*node);
      } else {
        result->steps.push_back(step(*node));
      }
    }
    for (const auto* output : block.outputs()) result->outputs.push_back(place_of_value(output));
    find_dead(*result);
    return result;
  }

 private:
  using NodeKind = torch::jit::NodeKind;

  size_t place_of_value(const torch::jit::Value* value) {
    const auto [found, is_new] = places_.emplace(value, frame_.size());
    if (is_new) frame_.emplace_back();
    return found->second;
  }

  static IValue constant(const torch::jit::Node& node) {
    auto value = torch::jit::toIValue(node.output());
    if (value.has_value()) return *value;
    // A function that was called, whose body is there in place of the call.
    if (node.output()->type()->kind() == c10::TypeKind::FunctionType) return IValue();
    throw_unknown(node);
  }

  [[noreturn]] static void throw_unknown(const torch::jit::Node& node) {
    unsupported_error("import", "the TorchScript program has ", node.kind().toQualString(),
                      place_of(node), ", which cannot be run operator by operator.");
  }

  static Step::Run find_kind(NodeKind kind) {
    static const std::map<NodeKind, Step::Run> kKinds = {
        {c10::prim::GetAttr, &Runner::run_get_attribute},
        {c10::prim::SetAttr, &Runner::run_set_attribute},
        {c10::prim::If, &Runner::run_if},
        {c10::prim::Loop, &Runner::run_loop},
        {c10::prim::TupleConstruct, &Runner::run_tuple},
        {c10::prim::TupleUnpack, &Runner::run_tuple_unpack},
        {c10::prim::TupleSlice, &Runner::run_tuple_slice},
        {c10::prim::ListConstruct, &Runner::run_list},
        {c10::prim::ListUnpack, &Runner::run_list_unpack},
        {c10::prim::DictConstruct, &Runner::run_dict},
        {c10::prim::CreateObject, &Runner::run_create_object},
        {c10::prim::isinstance, &Runner::run_is_instance},
        {c10::prim::unchecked_cast, &Runner::run_cast},
        {c10::prim::Uninitialized, &Runner::run_uninitialized},
        {c10::prim::Enter, &Runner::run_enter},
        {c10::prim::Exit, &Runner::run_exit},
        {c10::prim::RaiseException, &Runner::run_raise},
        {c10::prim::fork, &Runner::run_fork},
        {c10::aten::wait, &Runner::run_wait},
    };
    const auto found = kKinds.find(kind);
    return found == kKinds.end() ? nullptr : found->second;
  }

  Step step(const torch::jit::Node& node) {
    Step step;
    step.node = &node;
    for (const auto* input : node.inputs()) step.inputs.push_back(place_of_value(input));
    for (const auto* output : node.outputs()) step.outputs.push_back(place_of_value(output));
    step.run = find_kind(node.kind());
    if (step.run == nullptr) {
      set_operator(node, step);
    } else {
      set_parts(node, step);
    }
    return step;
  }

  static void set_operator(const torch::jit::Node& node, Step& step) {
    // What calls of methods are left: the method is known only when the program runs.
    if (node.kind() == c10::prim::CallMethod || node.kind() == c10::prim::CallFunction) {
      throw_unknown(node);
    }
    const torch::jit::Operator* op = node.maybeOperator();
    if (op == nullptr || !op->hasOperation()) throw_unknown(node);
    step.run = &Runner::run_operator;
    step.operation = op->getOperation(&node);
    step.counts_inputs = op->schema().is_vararg();
    const auto& arguments = op->schema().arguments();
    step.changes_container = !arguments.empty() && arguments[0].alias_info() != nullptr &&
                             arguments[0].alias_info()->isWrite() &&
                             arguments[0].type()->kind() != c10::TypeKind::TensorType;
  }

  void set_parts(const torch::jit::Node& node, Step& step) {
    for (const auto* inner : node.blocks()) step.blocks.push_back(block(*inner));
    if (node.hasAttribute(c10::attr::name)) step.attribute = node.s(c10::attr::name);
    if (node.kind() == c10::prim::fork) {
      step.callee = std::make_shared<const ScriptProgram>(node.g(c10::attr::Subgraph)->copy());
    }
    if (node.kind() == c10::prim::Enter) step.callee = method(node, "__enter__");
    if (node.kind() == c10::prim::Exit) step.callee = method(node, "__exit__");
  }

  static std::shared_ptr<const ScriptProgram> method(const torch::jit::Node& node,
                                                     const std::string& name) {
    const auto type = node.input(0)->type()->cast<c10::ClassType>();
    torch::jit::Function* function = type == nullptr ? nullptr : type->findMethod(name);
    auto* graph = function == nullptr ? nullptr : torch::jit::tryToGraphFunction(*function);
    // Its methods do nothing: libtorch's executor rewrites what is in the block.
    const bool is_autocast = graph != nullptr && type->name()->name() == "autocast";
    if (graph == nullptr || is_autocast) {
      unsupported_error("import", "the TorchScript program has a 'with' block of ",
                        node.input(0)->type()->repr_str(), place_of(node),
                        ", which cannot be run operator by operator.");
    }
    graph->ensure_defined();
    return std::make_shared<const ScriptProgram>(graph->graph()->copy());
  }

  // What is made in the block and not read after a step, or in none.
  void find_dead(Block& result) {
    std::set<size_t> own(result.inputs.begin(), result.inputs.end());
    for (const Step& step : result.steps) own.insert(step.outputs.begin(), step.outputs.end());
    for (const size_t output : result.outputs) own.erase(output);
    for (size_t i = result.steps.size(); i-- > 0;) {
      Step& step = result.steps[i];
      std::set<size_t> touched(step.outputs.begin(), step.outputs.end());
      read_in(*step.node, touched);
      for (const size_t place : touched) {
        if (own.erase(place) > 0) step.dead.push_back(place);
      }
    }
  }

  void read_in(const torch::jit::Node& node, std::set<size_t>& places) {
    for (const auto* input : node.inputs()) places.insert(place_of_value(input));
    for (const auto* inner : node.blocks()) {
      for (const auto* each : inner->nodes()) read_in(*each, places);
      for (const auto* output : inner->outputs()) places.insert(place_of_value(output));
    }
  }

  std::vector<IValue>& frame_;
  std::unordered_map<const torch::jit::Value*, size_t> places_;
};

ScriptProgram::ScriptProgram(std::shared_ptr<torch::jit::Graph> graph) : graph_(std::move(graph)) {
  torch::jit::Inline(*graph_);
  block_ = Compiler(frame_).block(*graph_->block());
}

std::vector<IValue> ScriptProgram::run(std::vector<IValue> inputs, ScriptState& state) const {
  return Runner(frame_, state).run_block(*block_, std::move(inputs));
}

}  // namespace torchlift::compile
