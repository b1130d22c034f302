#include "compile/trace_control_flow.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "compile/hollow.h"
#include "compile/replay.h"
#include "compile/trace_sparse.h"
#include "core/dispatch.h"
#include "core/error.h"
#include "core/lifted_tensor.h"

// NOTE [tracing control flow]
// A condition that is one number for all examples becomes a node with a graph for each branch. Both
// branches run, each in a frame (NOTE [frames] in compile/recording.h), and their results get the
// same batch dims. Where the branches are differentiated (reverse or forward mode, inside of the
// traced function), or the condition differs from example to example, both are computed and
// torch.where chooses: the derivative of that is again operators. Operands are masked, so that a
// formula that is infinite on the other side leaves no NaN in a gradient.
//
// A scan is a node, too, where no step is differentiated; else its steps are written down one by
// one.
//
// A loop carries tensors of fixed types, so what it starts with gets the batch dims that its body
// gives; for that the body may run several times. Where the condition differs from example to
// example, the loop goes on while one of them is true, and the others keep what they have.

namespace torchlift::compile {
namespace {

using at::Tensor;
using Leaves = Recorder::Leaves;
using Levels = std::vector<LevelPtr>;  // from the outside to the inside

constexpr int64_t kDual = 0;

// --- tensors above a level -----------------------------------------------------------------------

// The tensor with the levels that it has no batch dim in taken off, down to `level`.
Tensor stripped(const Tensor& t, const Level& level) {
  Tensor value = t;
  for (const LiftedTensorImpl* impl = as_lifted(value);
       impl != nullptr && impl->level().depth() > level.depth() && !impl->bdim();
       impl = as_lifted(value)) {
    value = Tensor(impl->value());
  }
  return value;
}

// Those in which t has a batch dim.
Levels levels_above(const Tensor& t, const Level& level) {
  Levels levels;
  for (const LiftedTensorImpl* impl = as_lifted(t);
       impl != nullptr && impl->level().depth() > level.depth(); impl = as_lifted(impl->value())) {
    if (impl->bdim()) levels.insert(levels.begin(), impl->level_ptr());
  }
  return levels;
}

std::vector<Levels> levels_of_each(const Leaves& leaves, const Level& level) {
  std::vector<Levels> all;
  for (const Tensor& t : leaves) all.push_back(t.defined() ? levels_above(t, level) : Levels());
  return all;
}

bool batches_examples(const Levels& levels) {
  return std::all_of(levels.begin(), levels.end(),
                     [](const LevelPtr& level) { return level->kind() == LevelKind::kVmap; });
}

Levels merged(const Levels& a, const Levels& b) {
  Levels all = a;
  for (const LevelPtr& level : b) {
    if (std::find(all.begin(), all.end(), level) == all.end()) all.push_back(level);
  }
  std::sort(all.begin(), all.end(),
            [](const LevelPtr& x, const LevelPtr& y) { return x->depth() < y->depth(); });
  return all;
}

// t as a tensor of `level`, [batch dims of levels..., ...].
Tensor at_level(const Tensor& t, Levels levels, const Level& level) {
  const Tensor own = stripped(t, level);
  if (levels.empty()) return own;
  const LevelPtr last = std::move(levels.back());
  levels.pop_back();
  const LiftedTensorImpl* impl = as_lifted(own);
  if (impl != nullptr && &impl->level() == last.get()) {
    return at_level(impl->value().movedim(*impl->bdim(), 0), std::move(levels), level);
  }
  std::vector<int64_t> sizes = own.sizes().vec();
  sizes.insert(sizes.begin(), last->size());
  return at_level(own.expand(sizes), std::move(levels), level);
}

// The reverse.
Tensor with_levels(Tensor t, const Levels& levels) {
  for (const LevelPtr& level : levels) t = lift(std::move(t), 0, level);
  return t;
}

// Whether the traced function differentiates t.
bool is_differentiated(const Tensor& t, const Level& level) {
  Tensor part = t;
  while (true) {
    if (part.requires_grad() || part._fw_grad(kDual).defined()) return true;
    const LiftedTensorImpl* impl = as_lifted(part);
    if (impl == nullptr || impl->level().depth() <= level.depth()) return false;
    part = Tensor(impl->value());
  }
}

// Whether all of them are values of examples, and nothing more.
bool are_plain(const Leaves& leaves, const Level& level) {
  return std::all_of(leaves.begin(), leaves.end(), [&](const Tensor& t) {
    return !t.defined() ||
           (!is_differentiated(t, level) && batches_examples(levels_above(t, level)));
  });
}

// --- values of a frame ---------------------------------------------------------------------------

struct FrameValue {
  ValueId id;
  Tensor real;
};

class Emitter {
 public:
  explicit Emitter(const RecordingLevel& at) : at_(at) {}

  const Level& level() const { return *at_.level; }
  Recording& recording() const { return at_.recording; }

  FrameValue value_of(const Tensor& t) const {
    // Before it is copied: the copy of state (NOTE [state]) is a node.
    const Tensor own = recording().replaced(stripped(t, level()));
    const Lowered lowered = lower(own, level());
    if (!lowered.bdim) return constant(lowered.value);
    check_is_dense(own, "a branch or a loop", recording());
    return {recording().find(lowered.value), lowered.value.squeeze(0)};
  }

  // A value that is contiguous.
  FrameValue contiguous(const Tensor& t) const {
    const FrameValue value = value_of(t);
    return value.real.is_contiguous() ? value : copied(t);
  }

  // A contiguous value in memory that no other value lies in, and not one of `others`.
  FrameValue own(const Tensor& t, const std::vector<FrameValue>& others) const {
    const FrameValue value = value_of(t);
    const bool repeated = std::any_of(others.begin(), others.end(),
                                      [&](const FrameValue& each) { return each.id == value.id; });
    return repeated || !value.real.is_contiguous() || shares_memory(value) ? copied(t) : value;
  }

  // A value as a tensor of the level, in the frame on top.
  Tensor known(const FrameValue& value) const {
    Tensor inner = value.real.unsqueeze(0);
    recording().know(inner, value.id);
    return lift(std::move(inner), 0, at_.level);
  }

 private:
  FrameValue copied(const Tensor& t) const {
    return value_of(stripped(t, level()).clone(at::MemoryFormat::Contiguous));
  }

  FrameValue constant(const Tensor& t) const {
    if (is_lifted(t)) {
      unsupported_error(recording().transform(),
                        "a branch or a loop uses a tensor of a level around the function that is "
                        "traced. Pass it to the function as an argument.");
    }
    const Tensor inner = at_.recorder.spread(t, /*size=*/1);
    return {recording().find(inner), inner.squeeze(0)};
  }

  bool shares_memory(const FrameValue& value) const {
    const c10::StorageImpl* storage = value.real.storage().unsafeGetStorageImpl();
    const Frame& frame = recording().top();
    const auto owner = frame.owners.find(storage);
    return frame.outside.count(storage) > 0 || owner == frame.owners.end() ||
           owner->second.id != value.id;
  }

  const RecordingLevel& at_;
};

// --- nodes ---------------------------------------------------------------------------------------

// The values of the frame below that any of the frames reads, and what they are in this run.
std::vector<FrameValue> captured_by(const std::vector<const Frame*>& frames) {
  std::vector<FrameValue> all;
  for (const Frame* frame : frames) {
    for (const Frame::Capture& each : frame->captures) {
      const bool seen = std::any_of(all.begin(), all.end(),
                                    [&](const FrameValue& v) { return v.id == each.outer; });
      if (!seen) all.push_back({each.outer, each.real});
    }
  }
  return all;
}

// The graph of a frame: of its own inputs, and of `captured`, which it need not read.
std::shared_ptr<const Graph> graph_of(Frame& frame, const std::vector<ValueId>& inputs,
                                      const std::vector<FrameValue>& captured, const Graph& below) {
  std::vector<ValueId> all = inputs;
  for (const FrameValue& each : captured) {
    const Frame::Capture* found = frame.find_capture(each.id);
    const Value& value = below.value(each.id);
    all.push_back(found != nullptr ? found->id : frame.graph.add_input(value.type, value.name));
  }
  frame.graph.inputs = std::move(all);
  return std::make_shared<const Graph>(std::move(frame.graph));
}

std::vector<ValueRef> refs(const std::vector<FrameValue>& values) {
  std::vector<ValueRef> all;
  for (const FrameValue& value : values) all.push_back({value.id});
  return all;
}

Leaves reals(const std::vector<FrameValue>& values) {
  Leaves all;
  for (const FrameValue& value : values) all.push_back(value.real);
  return all;
}

std::vector<ValueId> ids(const std::vector<FrameValue>& values) {
  std::vector<ValueId> all;
  for (const FrameValue& value : values) all.push_back(value.id);
  return all;
}

// Writes down a node whose results are these tensors in this run.
std::vector<FrameValue> add_node(Recording& recording, Node node, const Leaves& results) {
  std::vector<FrameValue> values;
  for (const Tensor& real : results) {
    values.push_back({recording.add_value(real, node.op.substr(node.op.rfind(':') + 1)), real});
  }
  node.results.push_back({.ids = ids(values), .is_list = true});
  node.source = recording.source();
  recording.graph().nodes.push_back(std::move(node));
  return values;
}

// The results of a loop by their types: those of what it carries, then rows of `length` steps, as
// outputs[carried...] of its body are.
Leaves shapes_of_loop(const std::vector<FrameValue>& carried, const Graph& body, int64_t length) {
  Leaves results;
  for (const FrameValue& each : carried) {
    results.push_back(hollow_like(each.real, each.real.device()));
  }
  for (size_t i = carried.size(); i < body.outputs.size(); ++i) {
    const TensorType& row = body.type(body.outputs[i]);
    std::vector<int64_t> sizes = row.concrete_sizes();
    sizes.insert(sizes.begin(), length);
    const Tensor like = at::empty(sizes, at::device(c10::kMeta).dtype(row.dtype));
    results.push_back(hollow_like(like, row.device));
  }
  return results;
}

// The same numbers in other memory.
Tensor apart(const Tensor& real, const Recording& recording) {
  if (recording.by_shapes()) return hollow_like(real, real.device());
  const UnrecordedScope unrecorded;
  return real.clone();
}

// What a node gives in this run, by itself, each in memory of its own (a loop without a step gives
// what it starts with): `operands` are its lists of tensors.
Leaves results_of_run(const Node& node, const std::vector<std::vector<FrameValue>>& operands,
                      size_t count) {
  Graph graph;
  Node alone = node;
  alone.args.clear();
  Leaves inputs;
  for (const std::vector<FrameValue>& list : operands) {
    std::vector<ValueRef> args;
    for (const FrameValue& each : list) {
      args.push_back({graph.add_input(type_of(each.real), "x")});
      inputs.push_back(each.real);
    }
    alone.args.emplace_back(std::move(args));
  }
  for (size_t i = 0; i < count; ++i) graph.outputs.push_back(graph.add_value({}, "y"));
  alone.results = {{.ids = graph.outputs, .is_list = true}};
  graph.nodes.push_back(std::move(alone));
  const RuleDepthScope within(1);
  const c10::AutoGradMode no_grad(false);
  Leaves results = Program(std::move(graph)).run(inputs);
  for (Tensor& result : results) {
    const bool lent = std::any_of(inputs.begin(), inputs.end(),
                                  [&](const Tensor& other) { return other.is_alias_of(result); });
    if (lent) result = result.clone();
    inputs.push_back(result);
  }
  return results;
}

// The leaves with the batch dims of `levels`, as the results of a node have them; undefined where
// `like` is.
Leaves leaves_of(const Emitter& emitter, const std::vector<FrameValue>& values,
                 const std::vector<Levels>& levels, const Leaves& like) {
  Leaves leaves;
  size_t next = 0;
  for (const auto i : c10::irange(like.size())) {
    leaves.push_back(like[i].defined() ? with_levels(emitter.known(values[next++]), levels[i])
                                       : Tensor());
  }
  return leaves;
}

// The leaves with the batch dims of `levels`, as what a loop starts with.
std::vector<FrameValue> operands_of(const Emitter& emitter, const Leaves& leaves,
                                    const std::vector<Levels>& levels) {
  std::vector<FrameValue> values;
  for (const auto i : c10::irange(leaves.size())) {
    if (!leaves[i].defined()) continue;
    values.push_back(emitter.contiguous(at_level(leaves[i], levels[i], emitter.level())));
  }
  return values;
}

// Inputs of a frame like these values. They have memory of their own: values are told apart by it
// where autograd makes other tensors of them, and the frame may read what it starts with, too.
std::vector<FrameValue> add_inputs(const Recording& recording, Frame& frame,
                                   const std::vector<FrameValue>& values, const char* name) {
  std::vector<FrameValue> inputs;
  for (const FrameValue& each : values) {
    const Tensor real = apart(each.real, recording);
    inputs.push_back({frame.graph.add_input(type_of(real), name), real});
    frame.outside.insert(real.storage().unsafeGetStorageImpl());
  }
  return inputs;
}

// The leaves with the batch dims of `levels` become the outputs of the frame, which is on top.
std::vector<FrameValue> set_outputs(const Emitter& emitter, Frame& frame, const Leaves& leaves,
                                    const std::vector<Levels>& levels) {
  std::vector<FrameValue> outputs;
  for (const auto i : c10::irange(leaves.size())) {
    if (!leaves[i].defined()) continue;
    outputs.push_back(emitter.own(at_level(leaves[i], levels[i], emitter.level()), outputs));
  }
  frame.graph.outputs = ids(outputs);
  return outputs;
}

// Adds the batch dims of the first of `next` to those that are carried; false if that are more.
bool covers(std::vector<Levels>& levels, const Leaves& next, const Level& level) {
  const std::vector<Levels> before = levels;
  for (const auto i : c10::irange(levels.size())) {
    if (next[i].defined()) levels[i] = merged(levels[i], levels_above(next[i], level));
  }
  return levels == before;
}

// --- cond ----------------------------------------------------------------------------------------

// The operand to those who take this branch, a constant to the others.
Leaves masked(const Leaves& operands, const Tensor& taken, const Level& level) {
  Leaves all = operands;
  for (Tensor& t : all) {
    const bool follows = t.defined() && (t.is_floating_point() || t.is_complex());
    if (follows && is_differentiated(t, level)) t = at::where(taken, t, t.detach());
  }
  return all;
}

Leaves choose(const Tensor& pred, const Recorder::Step& true_fn, const Recorder::Step& false_fn,
              const Leaves& operands, const Level& level) {
  Leaves results = true_fn(masked(operands, pred, level));
  const Leaves others = false_fn(masked(operands, pred.logical_not(), level));
  for (const auto i : c10::irange(results.size())) {
    if (results[i].defined()) results[i] = at::where(pred, results[i], others[i]);
  }
  return results;
}

struct Branch {
  Frame frame;
  Leaves results;
  std::vector<FrameValue> outputs;

  void run(const Emitter& emitter, const Recorder::Step& f, const Leaves& operands) {
    const FrameScope scope(emitter.recording(), frame);
    results = f(operands);
  }

  void finish(const Emitter& emitter, const std::vector<Levels>& levels) {
    const FrameScope scope(emitter.recording(), frame);
    outputs = set_outputs(emitter, frame, results, levels);
  }
};

// --- while_loop ----------------------------------------------------------------------------------

[[noreturn]] void throw_differentiated(const char* transform, const Recording& recording) {
  unsupported_error(
      recording.transform(), transform,
      ": what the loop carries is differentiated, and the condition depends on the inputs: a graph "
      "cannot tell how many steps to keep for the gradient. Use scan, or fori_loop with numbers as "
      "bounds; fixed_point or custom_root, which differentiate the solution; or stop_gradient.");
}

class LoopTrace {
 public:
  LoopTrace(const Emitter& emitter, const char* transform, const Recorder::Test& test,
            const Recorder::Step& body, Leaves carry)
      : emitter_(emitter),
        transform_(transform),
        test_(test),
        body_(body),
        carry_(std::move(carry)),
        levels_(levels_of_each(carry_, emitter.level())) {
    check(carry_);
  }

  Leaves run() {
    do {
      begin();
      record_test();
    } while (!record_body());
    return emit();
  }

 private:
  void check(const Leaves& leaves) const {
    if (!are_plain(leaves, emitter_.level())) {
      throw_differentiated(transform_, emitter_.recording());
    }
  }

  // What it starts with, in the frame around.
  void begin() {
    test_frame_ = Frame();
    body_frame_ = Frame();
    start_ = operands_of(emitter_, carry_, levels_);
  }

  // The inputs of a frame, as the function sees them.
  Leaves enter(Frame& frame, std::vector<ValueId>& inputs) const {
    const std::vector<FrameValue> values = add_inputs(emitter_.recording(), frame, start_, "carry");
    inputs = ids(values);
    return leaves_of(emitter_, values, levels_, carry_);
  }

  void record_test() {
    const FrameScope scope(emitter_.recording(), test_frame_);
    const Tensor pred = test_(enter(test_frame_, test_inputs_));
    check({pred});
    differs_ = levels_above(pred, emitter_.level());
    Tensor goes_on = at_level(pred, differs_, emitter_.level());
    if (!differs_.empty()) goes_on = goes_on.any();
    test_frame_.graph.outputs = {emitter_.own(goes_on, {}).id};
  }

  // False if what is carried needs more batch dims, which levels_ then has.
  bool record_body() {
    const FrameScope scope(emitter_.recording(), body_frame_);
    const Leaves before = enter(body_frame_, body_inputs_);
    std::optional<Tensor> active;
    if (!differs_.empty()) active = test_(before);
    Leaves next = body_(before);
    check(next);
    for (const auto i : c10::irange(next.size())) {
      if (active.has_value() && next[i].defined()) {
        next[i] = at::where(*active, next[i], before[i]);
      }
    }
    if (!covers(levels_, next, emitter_.level())) return false;
    set_outputs(emitter_, body_frame_, next, levels_);
    return true;
  }

  Leaves emit() {
    Recording& recording = emitter_.recording();
    const std::vector<FrameValue> captured = captured_by({&test_frame_, &body_frame_});
    Node node{.op = kWhileOp,
              .overload = "",
              .args = {refs(start_), refs(captured)},
              .results = {},
              .subgraphs = {},
              .source = ""};
    node.subgraphs.push_back(graph_of(test_frame_, test_inputs_, captured, recording.graph()));
    node.subgraphs.push_back(graph_of(body_frame_, body_inputs_, captured, recording.graph()));
    const Leaves results = recording.by_shapes()
                               ? shapes_of_loop(start_, *node.subgraphs[1], 0)
                               : results_of_run(node, {start_, captured}, start_.size());
    return leaves_of(emitter_, add_node(recording, std::move(node), results), levels_, carry_);
  }

  const Emitter& emitter_;
  const char* transform_;
  const Recorder::Test& test_;
  const Recorder::Step& body_;
  const Leaves carry_;
  std::vector<Levels> levels_;  // of each leaf
  std::vector<FrameValue> start_;
  Frame test_frame_, body_frame_;
  std::vector<ValueId> test_inputs_, body_inputs_;
  Levels differs_;  // in which the condition differs from example to example
};

// --- scan ----------------------------------------------------------------------------------------

class ScanTrace {
 public:
  ScanTrace(const Emitter& emitter, const Recorder::Step& step, const Leaves& carry,
            const Leaves& xs, bool reverse)
      : emitter_(emitter),
        step_(step),
        carry_(carry),
        xs_(xs),
        reverse_(reverse),
        carry_levels_(levels_of_each(carry, emitter.level())),
        x_levels_(levels_of_each(xs, emitter.level())) {}

  std::optional<std::vector<Leaves>> run() {
    const auto defined = [](const Tensor& t) { return t.defined(); };
    const bool has_rows = std::any_of(xs_.begin(), xs_.end(), defined);  // they tell the length
    if (!has_rows || !are_plain(carry_, level()) || !are_plain(xs_, level())) return std::nullopt;
    begin();
    while (true) {
      const std::optional<bool> settled = record_step();
      if (!settled.has_value()) return std::nullopt;
      if (*settled) return emit();
    }
  }

 private:
  const Level& level() const { return emitter_.level(); }

  // xs with the steps in front, then the batch dims.
  void begin() {
    for (const auto i : c10::irange(xs_.size())) {
      if (!xs_[i].defined()) continue;
      const auto dim = static_cast<int64_t>(x_levels_[i].size());
      const Tensor rows = at_level(xs_[i], x_levels_[i], level()).movedim(dim, 0);
      rows_.push_back(emitter_.contiguous(reverse_ ? rows.flip(0) : rows));
    }
  }

  // Nothing if the step is differentiated; false if what is carried needs more batch dims.
  std::optional<bool> record_step() {
    start_ = operands_of(emitter_, carry_, carry_levels_);
    frame_ = Frame();
    const FrameScope scope(emitter_.recording(), frame_);
    const std::vector<FrameValue> carried =
        add_inputs(emitter_.recording(), frame_, start_, "carry");
    std::vector<FrameValue> slices;
    for (const FrameValue& each : rows_) slices.push_back({each.id, each.real.select(0, 0)});
    slices = add_inputs(emitter_.recording(), frame_, slices, "x");
    inputs_ = ids(carried);
    for (const FrameValue& each : slices) inputs_.push_back(each.id);
    Leaves given = leaves_of(emitter_, carried, carry_levels_, carry_);
    const Leaves slice = leaves_of(emitter_, slices, x_levels_, xs_);
    given.insert(given.end(), slice.begin(), slice.end());
    const Leaves next = step_(given);
    if (!are_plain(next, level())) return std::nullopt;
    if (!covers(carry_levels_, next, level())) return false;
    finish(next);
    return true;
  }

  void finish(const Leaves& next) {
    const auto middle = next.begin() + static_cast<int64_t>(carry_.size());
    like_.assign(middle, next.end());
    y_levels_ = levels_of_each(like_, level());
    std::vector<Levels> levels = carry_levels_;
    levels.insert(levels.end(), y_levels_.begin(), y_levels_.end());
    set_outputs(emitter_, frame_, next, levels);
  }

  std::vector<Leaves> emit() {
    Recording& recording = emitter_.recording();
    const std::vector<FrameValue> captured = captured_by({&frame_});
    Node node{.op = kScanOp,
              .overload = "",
              .args = {refs(start_), refs(rows_), refs(captured)},
              .results = {},
              .subgraphs = {graph_of(frame_, inputs_, captured, recording.graph())},
              .source = ""};
    const Graph& body = *node.subgraphs[0];
    const Leaves results =
        recording.by_shapes()
            ? shapes_of_loop(start_, body, rows_[0].real.size(0))
            : results_of_run(node, {start_, rows_, captured}, body.outputs.size());
    const std::vector<FrameValue> values = add_node(recording, std::move(node), results);
    const auto middle = values.begin() + static_cast<int64_t>(start_.size());
    return {leaves_of(emitter_, {values.begin(), middle}, carry_levels_, carry_),
            stacks({middle, values.end()})};
  }

  // Results of the steps: [steps, batch dims..., ...] -> one with the steps in front for each
  // example.
  Leaves stacks(const std::vector<FrameValue>& values) const {
    Leaves leaves;
    size_t next = 0;
    for (const auto i : c10::irange(like_.size())) {
      if (!like_[i].defined()) {
        leaves.emplace_back();
        continue;
      }
      Tensor all = emitter_.known(values[next++]);
      if (reverse_) all = all.flip(0);
      all = all.movedim(0, static_cast<int64_t>(y_levels_[i].size()));
      leaves.push_back(with_levels(std::move(all), y_levels_[i]));
    }
    return leaves;
  }

  const Emitter& emitter_;
  const Recorder::Step& step_;
  const Leaves& carry_;
  const Leaves& xs_;
  const bool reverse_;
  std::vector<Levels> carry_levels_, x_levels_, y_levels_;
  std::vector<FrameValue> start_, rows_;
  Frame frame_;
  std::vector<ValueId> inputs_;
  Leaves like_;  // the results of a step
};

}  // namespace

Leaves record_cond(const RecordingLevel& at, const Tensor& pred, const Recorder::Step& true_fn,
                   const Recorder::Step& false_fn, const Leaves& operands) {
  const Emitter emitter(at);
  const Level& level = *at.level;
  if (!levels_above(pred, level).empty() || !are_plain(operands, level)) {
    return choose(pred, true_fn, false_fn, operands, level);
  }
  Branch yes, no;
  yes.run(emitter, true_fn, operands);
  no.run(emitter, false_fn, operands);
  if (!are_plain(yes.results, level) || !are_plain(no.results, level)) {
    return choose(pred, true_fn, false_fn, operands, level);
  }
  std::vector<Levels> levels;
  for (const auto i : c10::irange(yes.results.size())) {
    const bool defined = yes.results[i].defined();
    levels.push_back(
        defined ? merged(levels_above(yes.results[i], level), levels_above(no.results[i], level))
                : Levels());
  }
  yes.finish(emitter, levels);
  no.finish(emitter, levels);
  const FrameValue condition = emitter.value_of(pred);
  const std::vector<FrameValue> captured = captured_by({&yes.frame, &no.frame});
  Node node{.op = kCondOp,
            .overload = "",
            .args = {ValueRef{condition.id}, refs(captured)},
            .results = {},
            .subgraphs = {},
            .source = ""};
  for (Branch* branch : {&yes, &no}) {
    node.subgraphs.push_back(graph_of(branch->frame, {}, captured, at.recording.graph()));
  }
  const bool goes_first = at.recording.by_shapes() || condition.real.item<bool>();
  const std::vector<FrameValue> results =
      add_node(at.recording, std::move(node), reals(goes_first ? yes.outputs : no.outputs));
  return leaves_of(emitter, results, levels, yes.results);
}

Leaves record_while(const RecordingLevel& at, const char* transform, const Recorder::Test& test,
                    const Recorder::Step& body, Leaves carry) {
  const Emitter emitter(at);
  return LoopTrace(emitter, transform, test, body, std::move(carry)).run();
}

std::optional<std::vector<Leaves>> record_scan(const RecordingLevel& at, const Recorder::Step& step,
                                               const Leaves& carry, const Leaves& xs,
                                               bool reverse) {
  const Emitter emitter(at);
  return ScanTrace(emitter, step, carry, xs, reverse).run();
}

}  // namespace torchlift::compile
