#include "compile/trace_scope.h"

#include <ATen/ExpandUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/stack.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <cctype>
#include <functional>
#include <utility>

#include "batching/rules/assumptions.h"
#include "batching/rules/numbers.h"
#include "compile/hollow.h"
#include "compile/passes/functional_variant.h"
#include "compile/recording.h"
#include "compile/state_filter.h"
#include "compile/trace_control_flow.h"
#include "compile/trace_rules.h"
#include "compile/trace_sparse.h"
#include "compile/uniform_constants.h"
#include "core/boxed.h"
#include "core/dispatch.h"
#include "core/error.h"
#include "core/interpreter.h"
#include "core/lifted_tensor.h"
#include "core/promotion.h"
#include "core/recorder.h"

namespace torchlift::compile {
namespace {

using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;

// "aten::mul_" -> "mul".
std::string base_name(const std::string& op) {
  std::string name = op.substr(op.rfind(':') + 1);
  while (name.size() > 1 && name.back() == '_') name.pop_back();
  return name;
}

bool is_tensor_list(const IValue& value) {
  return value.isTensorList() || value.isOptionalTensorList();
}

bool aliases(const c10::OperatorHandle& op, size_t result, bool write) {
  const auto* alias = op.schema().returns()[result].alias_info();
  return alias != nullptr && alias->isWrite() == write;
}

// One call of an operator that is being recorded.
class Call {
 public:
  Call(const OperatorHandle& op, const LevelPtr& level, Recording& recording)
      : op_(op), level_(level), recording_(recording) {
    node_.op = op.schema().name();
    node_.overload = op.schema().overload_name();
    node_.source = recording.source();
  }

  void run(Stack* stack) {
    const size_t count = op_.schema().arguments().size();
    args_.assign(stack->end() - static_cast<int64_t>(count), stack->end());
    torch::jit::drop(*stack, count);
    if (trains_statistics()) own_statistics();
    refuse();
    if (op_.schema().name() == kAssumeOp) args_.back() = recording_.take_assumption_number();
    for (size_t i = 0; i < count; ++i) stack->push_back(take(i));
    const WriteScopes writing(op_, args_);
    compute(stack);
    if (asks_for_metadata()) return;
    settle_targets();
    keep_results(stack);
    recording_.graph().nodes.push_back(std::move(node_));
  }

 private:
  std::string name() const { return toString(op_.operator_name()); }

  // --- what cannot be recorded -------------------------------------------------------------------

  void refuse() const {
    if (op_.hasTag(at::Tag::data_dependent_output)) throw_number();
    if (op_.hasTag(at::Tag::dynamic_output_shape) && shape_depends_on_numbers()) {
      throw_shape_of_numbers(op_, recording_);
    }
    if (op_.schema().name() == "aten::resize_" || op_.schema().name() == "aten::set_") {
      unsupported_error(recording_.transform(), name(),
                        ": gives a tensor other memory, which a graph cannot say. Make a new "
                        "tensor instead.");
    }
    if (op_.schema().name() == "aten::_sparse_mm_reduce_impl_backward" && reads_note()) {
      unsupported_error(recording_.transform(), name(),
                        ": the gradient of sparse.mm with the reduction amax or amin, for which "
                        "libtorch notes the largest elements only where a tensor requires a "
                        "gradient, as none does when a graph runs. Use to_dense().");
    }
  }

  // Of (self, grad_out, weight, reduce, arg_out, mask).
  bool reads_note() const {
    const std::string& reduce = args_[3].toStringRef();
    return reduce == "amax" || reduce == "amin";
  }

  // is_same_size: nothing that is computed, and the same in all runs.
  bool asks_for_metadata() const {
    const auto& returns = op_.schema().returns();
    return !returns.empty() && std::none_of(returns.begin(), returns.end(), [](const auto& each) {
      return each.type()->str().find("Tensor") != std::string::npos;
    });
  }

  bool shape_depends_on_numbers() const {
    if (find_trace_rule(op_) == nullptr) return true;
    if (op_.schema().name() != "aten::index") return false;  // rules have seen to it
    bool masks = false;
    for (size_t i = 1; i < args_.size(); ++i) {
      if (!args_[i].isOptionalTensorList() && !args_[i].isTensorList()) continue;
      for_each_tensor(args_[i], [&](const at::Tensor& t) { masks = masks || is_mask(t); });
    }
    return masks;
  }

  [[noreturn]] void throw_number() const {
    unsupported_error(
        recording_.transform(), "a number was asked for (", name(),
        "; .item(), float(x), int(x), bool(x), if x:) that is computed from the inputs. It would "
        "be "
        "that of this one run for all later ones. Choose by torch.where or torchlift.cond, and "
        "compute with tensors; a number that does not change can be passed as one, not as a "
        "tensor.");
  }

  // --- batch norms -------------------------------------------------------------------------------
  //
  // In training they write running statistics, which the schemas of these do not say. Those that
  // the function makes are values of the graph from then on, not constants that keep what a run
  // wrote.

  // Of (input, weight, bias, running_mean, running_var, training...).
  bool trains_statistics() const {
    const std::string& op = op_.schema().name();
    return (op == "aten::native_batch_norm" || op == "aten::cudnn_batch_norm" ||
            op == "aten::miopen_batch_norm") &&
           args_[5].toBool();
  }

  void own_statistics() {
    for (const size_t i : {3, 4}) {
      if (!args_[i].isTensor() || !args_[i].toTensor().defined()) continue;
      const at::Tensor& t = args_[i].toTensor();
      const LiftedTensorImpl* impl = as_lifted(t);
      if (impl != nullptr && &impl->level() == level_.get() && !impl->bdim()) {
        give_memory(t);
      }
      recording_.note_silent_write(t);
    }
  }

  static bool is_mask(const at::Tensor& t) {
    return t.scalar_type() == at::kBool || t.scalar_type() == at::kByte;
  }

  // --- arguments ---------------------------------------------------------------------------------

  // Writes the argument down, and returns it as it is to be computed with.
  IValue take(size_t i) {
    const IValue& arg = args_[i];
    if (is_tensor_list(arg)) return take_list(i);
    if (arg.isTensor()) return take_tensor(i);
    if (arg.isNone()) {
      node_.args.emplace_back(std::monostate{});
    } else if (arg.isGenerator() || arg.isStorage() || arg.isStream() || arg.isObject() ||
               arg.isCustomClass()) {
      unsupported_error(recording_.transform(), name(), ": its argument ",
                        op_.schema().arguments()[i].name(), " is a ", arg.tagKind(),
                        ", which a graph cannot hold. (For random numbers use the default "
                        "generator; a run of the graph takes a seed.)");
    } else {
      node_.args.emplace_back(arg);
    }
    return arg;
  }

  IValue take_tensor(size_t i) {
    const at::Tensor& t = args_[i].toTensor();
    if (!t.defined()) {
      node_.args.emplace_back(std::monostate{});
      return args_[i];
    }
    if (!is_lifted(t) && t.dim() == 0 && t.unsafeGetTensorImpl()->is_wrapped_number()) {
      node_.args.emplace_back(IValue(t.item()));
      return args_[i];
    }
    at::Tensor real;
    node_.args.emplace_back(ValueRef{take_one(i, t, &real)});
    return real;
  }

  IValue take_list(size_t i) {
    std::vector<ValueRef> refs;
    IValue real = map_tensors(args_[i], [&](const at::Tensor& t) {
      at::Tensor each;
      refs.push_back({take_one(i, t, &each)});
      return each;
    });
    if (args_[i].isOptionalTensorList()) refs = with_gaps(args_[i], refs);
    node_.args.emplace_back(std::move(refs));
    return real;
  }

  static std::vector<ValueRef> with_gaps(const IValue& list, const std::vector<ValueRef>& refs) {
    std::vector<ValueRef> all;
    size_t next = 0;
    for (const std::optional<at::Tensor>& t : list.toOptionalTensorVector()) {
      all.push_back(t.has_value() && t->defined() ? refs[next++] : ValueRef{});
    }
    return all;
  }

  ValueId take_one(size_t i, const at::Tensor& t, at::Tensor* real) {
    const bool written = writes_argument(op_, i);
    const LiftedTensorImpl* impl = as_lifted(t);
    const bool own = impl != nullptr && &impl->level() == level_.get();
    if (written) {
      recording_.forget_dead_copies();
      if (!own) throw_write_to_unbatched(op_.schema().name().c_str(), t, *level_);
      if (!impl->bdim()) give_memory(t);
      impl = as_lifted(t);
    }
    if (!own || !impl->bdim()) {
      *real = own ? impl->value() : t;
      return take_constant(*real);
    }
    if (!keeps_tensor()) check_is_dense(t, name(), recording_);
    const ValueId id = recording_.find(impl->value());
    *real = impl->value().squeeze(0);
    if (written) {
      check_is_inside(*real);
      targets_.push_back({t, *real, id});
    }
    return id;
  }

  // The result is the tensor itself, as autograd and what is returned need it.
  bool keeps_tensor() const {
    const std::string& op = op_.schema().name();
    return op == "aten::alias" || op == "aten::detach";
  }

  // What the graph read of t so far, as a constant, does not change, nor does it hold t's memory:
  // the operator itself may have read it, as the formula of a tangent does.
  void give_memory(const at::Tensor& t) {
    {
      // Gone before the promotion, which counts who holds the memory.
      const at::Tensor plain = innermost(t);
      if (plain.has_storage()) {
        recording_.keep_constants(plain.storage().unsafeGetStorageImpl());
      }
    }
    promote(op_.schema().name().c_str(), t, level_);
  }

  // What a branch or loop body writes into must be its own: it may not run, or run often.
  void check_is_inside(const at::Tensor& real) const {
    if (recording_.top().outside.count(real.storage().unsafeGetStorageImpl()) == 0) return;
    unsupported_error(recording_.transform(), name(),
                      ": a branch or loop body writes in place into a tensor from outside of it, "
                      "an operand or one that it closes over. Write out of place, or into a "
                      "x.clone().");
  }

  ValueId take_constant(const at::Tensor& t) {
    if (is_lifted(t)) {
      unsupported_error(
          recording_.transform(), name(), ": one of its arguments belongs to ",
          as_lifted(t)->level().describe(),
          ", which is around the function that is traced. Pass the tensor to the function as an "
          "argument.");
    }
    return recording_.constant(t);
  }

  // --- the operator itself -----------------------------------------------------------------------

  // On values nobody differentiates: what is to be differentiated is inside of the function.
  void compute(Stack* stack) const {
    const RuleDepthScope within(1);
    const c10::AutoGradMode no_grad(false);
    if (recording_.by_shapes() && reads_memory()) {
      call_on_shapes(op_, recording_.transform(), stack);
    } else {
      op_.callBoxed(*stack);
    }
  }

  // Not views, and questions about metadata, which kernels of the device answer best:
  // _fused_sdp_choice is another one for each.
  bool reads_memory() const {
    if (asks_for_metadata() || op_.hasTag(at::Tag::inplace_view)) return false;
    for (size_t i = 0; i < op_.schema().returns().size(); ++i) {
      if (aliases(op_, i, /*write=*/false)) return false;
    }
    return true;
  }

  struct Target {
    at::Tensor seen;
    at::Tensor real;
    ValueId id;
  };

  // An operator that changes what a tensor shows (squeeze_) gives it another value.
  void settle_targets() {
    const bool other_view = op_.hasTag(at::Tag::inplace_view);
    for (Target& target : targets_) {
      LiftedTensorImpl* impl = as_lifted(target.seen);
      if (target.real.sizes() == impl->sizes() && target.real.strides() == impl->strides() &&
          !other_view) {
        continue;
      }
      if (!other_view) {
        unsupported_error(recording_.transform(), name(), ": gave its target the shape ",
                          target.real.sizes(), " in place of ", impl->sizes(),
                          ", which a graph cannot say. Make a new tensor instead.");
      }
      impl->replace_value(target.real.unsqueeze(0), 0);
      target.id = recording_.add_value(target.real, base_name(op_.schema().name()));
      recording_.know(impl->value(), target.id);
      const auto view = find_view_variant(op_);  // squeeze_ -> squeeze: a view like any other
      if (!view.has_value()) {
        unsupported_error(recording_.transform(), name(), " has no form that is not in place.");
      }
      node_.op = view->schema().name();
      node_.overload = view->schema().overload_name();
    }
  }

  // --- results -----------------------------------------------------------------------------------

  void keep_results(Stack* stack) {
    size_t next = 0;
    const size_t count = op_.schema().returns().size();
    for (size_t r = 0; r < count; ++r) {
      IValue& value = (*stack)[stack->size() - count + r];
      if (aliases(op_, r, /*write=*/true) && next < targets_.size() && value.isTensor()) {
        node_.results.push_back({.ids = {targets_[next].id}});
        value = targets_[next++].seen;
        continue;
      }
      Result result{.ids = {}, .is_list = value.isTensorList()};
      const bool view = aliases(op_, r, /*write=*/false);
      value = map_tensors(value, [&](const at::Tensor& real) { return keep(real, view, &result); });
      if (!result.is_list && result.ids.empty()) result.ids.push_back(kNoValue);
      node_.results.push_back(std::move(result));
    }
  }

  at::Tensor keep(const at::Tensor& real, bool view, Result* result) {
    if (real.layout() != c10::kStrided) {
      unsupported_error(recording_.transform(), name(), ": its result has the layout ",
                        real.layout(),
                        ". Only strided tensors can be traced, and what to_sparse makes of one; "
                        "compute with x.to_dense().");
    }
    const ValueId id = recording_.add_value(real, base_name(op_.schema().name()));
    result->ids.push_back(id);
    at::Tensor inner = real.unsqueeze(0);
    recording_.know(inner, id);
    at::Tensor lifted = lift(std::move(inner), 0, level_);
    if (view) share_version(lifted);
    return lifted;
  }

  void share_version(const at::Tensor& view) const {
    if (!args_[0].isTensor()) return;
    const at::Tensor& base = args_[0].toTensor();
    const LiftedTensorImpl* impl = as_lifted(base);
    if (impl == nullptr || &impl->level() != level_.get() || base.is_inference()) return;
    view.unsafeGetTensorImpl()->set_version_counter(base.unsafeGetTensorImpl()->version_counter());
  }

  const OperatorHandle& op_;
  const LevelPtr& level_;
  Recording& recording_;
  Node node_;
  std::vector<IValue> args_;
  std::vector<Target> targets_;
};

void write_down(const OperatorHandle& op, const LevelPtr& level, Recording& recording,
                Stack* stack) {
  Call(op, level, recording).run(stack);
}

class TraceRecorder final : public Recorder {
 public:
  explicit TraceRecorder(std::shared_ptr<Recording> recording) : recording_(std::move(recording)) {}

  const char* transform() const override { return recording_->transform().c_str(); }

  bool run(const OperatorHandle& op, const LevelPtr& level, Stack* stack) const override {
    const TraceRule rule = find_trace_rule(op);
    if (rule != nullptr && rule({op, level, *recording_, &write_down}, stack)) return true;
    write_down(op, level, *recording_, stack);
    return true;
  }

  Leaves cond(const LevelPtr& level, const at::Tensor& pred, const Step& true_fn,
              const Step& false_fn, const Leaves& operands) const override {
    return record_cond({*this, *recording_, level}, pred, true_fn, false_fn, operands);
  }

  Leaves while_loop(const LevelPtr& level, const char* transform, const Test& test,
                    const Step& body, Leaves carry) const override {
    return record_while({*this, *recording_, level}, transform, test, body, std::move(carry));
  }

  std::optional<std::vector<Leaves>> scan(const LevelPtr& level, const Step& step,
                                          const Leaves& carry, const Leaves& xs,
                                          bool reverse) const override {
    return record_scan({*this, *recording_, level}, step, carry, xs, reverse);
  }

  void note_copy_for_view(const char* op, const at::Tensor& base,
                          const at::Tensor& copy) const override {
    recording_->note_copy_for_view(op, base, copy);
  }

  // Also called while no operator of the level is at work, as of the cotangents of a backward pass:
  // clone() must not make a tensor of the level (NOTE [factories] in core/factory.cc) then.
  at::Tensor spread(const at::Tensor& value, int64_t /*size*/) const override {
    const RuleDepthScope within(1);
    const c10::AutoGradMode no_grad(false);
    const at::Tensor real =
        recording_->by_shapes()
            ? hollow_like(at::empty(value.sizes(), value.options().device(c10::kMeta)),
                          value.device())
            : value.clone(at::MemoryFormat::Contiguous);
    Node node{.op = "aten::clone",
              .overload = "",
              .args = {ValueRef{recording_->constant(value)},
                       IValue(static_cast<int64_t>(at::MemoryFormat::Contiguous))},
              .results = {},
              .subgraphs = {},
              .source = recording_->source()};
    const ValueId id = recording_->add_value(real, "clone");
    node.results.push_back({.ids = {id}});
    recording_->graph().nodes.push_back(std::move(node));
    recording_->note_spread(id);
    at::Tensor inner = real.unsqueeze(0);
    recording_->know(inner, id);
    return inner;
  }

 private:
  const std::shared_ptr<Recording> recording_;
};

}  // namespace

std::string input_name(const std::string& path) {
  std::string name;
  for (const char c : path) {
    const bool fits = std::isalnum(static_cast<unsigned char>(c)) != 0;
    if (fits) name += c;
    if (!fits && !name.empty() && name.back() != '_') name += '_';
  }
  while (!name.empty() && name.back() == '_') name.pop_back();
  const bool number = name.empty() || std::isdigit(static_cast<unsigned char>(name[0])) != 0;
  return number ? "x" + name : name;
}

Known known_of(const std::vector<at::Tensor>& tensors) {
  const bool meta = std::any_of(tensors.begin(), tensors.end(),
                                [](const at::Tensor& t) { return t.defined() && t.is_meta(); });
  return meta ? Known::kShapes : Known::kValues;
}

TraceScope::TraceScope(std::string transform, std::function<std::string()> source, Known known,
                       CapturedState* state)
    : recording_(std::make_shared<Recording>(std::move(transform), std::move(source),
                                             known == Known::kShapes)) {
  level_scope_.emplace(
      Level::Options{.kind = LevelKind::kInterpreted,
                     .size = 1,
                     .interpreter = std::make_shared<const TraceRecorder>(recording_)});
  if (recording_->by_shapes()) uniform_ = std::make_unique<UniformConstantsScope>();
  if (state != nullptr) {
    state_ = std::make_unique<StateFilter>(*state, *recording_, level_scope_->level());
  }
}

TraceScope::~TraceScope() = default;

namespace {

// With the strides of a clone.
at::Tensor hollow_clone(const at::Tensor& x, c10::Device device) {
  const std::vector<int64_t> strides = x.is_non_overlapping_and_dense()
                                           ? x.strides().vec()
                                           : at::infer_dense_strides(x.sizes(), x.strides());
  return hollow_tensor(x.sizes(), strides, x.scalar_type(), device);
}

}  // namespace

at::Tensor TraceScope::input(const at::Tensor& x, const std::string& name,
                             c10::Device meta_device) {
  if (x.layout() != c10::kStrided) {
    unsupported_error(recording_->transform(), "the input ", name, " has the layout ", x.layout(),
                      ". Only strided tensors can be inputs; sparse ones can be constants.");
  }
  const at::Tensor real = recording_->by_shapes()
                              ? hollow_clone(x, x.is_meta() ? meta_device : x.device())
                              : x.detach();
  const ValueId id = recording_->graph().add_input(type_of(real), name);
  at::Tensor inner = real.unsqueeze(0);
  recording_->know(inner, id);
  return lift(std::move(inner), 0, level_scope_->level());
}

Graph TraceScope::finish(const std::vector<at::Tensor>& outputs) {
  recording_->check_copies();
  SparseResults sparse(recording_->graph());
  for (const at::Tensor& given : outputs) {
    const at::Tensor output = state_ == nullptr ? given : state_->in_place_of(given);
    if (!output.defined()) {
      recording_->graph().outputs.push_back(kNoValue);
      continue;
    }
    const Lowered lowered = lower(output, *level_scope_->level());
    if (!lowered.bdim && is_lifted(lowered.value)) {
      unsupported_error(recording_->transform(),
                        "an output belongs to a level around the function that is traced.");
    }
    const ValueId id =
        lowered.bdim ? recording_->find(lowered.value) : recording_->constant(lowered.value);
    recording_->graph().outputs.push_back(sparse.result(output, id));
  }
  if (state_ != nullptr) state_->finish(recording_->graph());
  state_.reset();
  uniform_.reset();
  level_scope_.reset();
  return std::move(recording_->graph());
}

}  // namespace torchlift::compile
