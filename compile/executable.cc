#include "compile/executable.h"

#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

#include "compile/memory_range.h"
#include "compile/passes/blocked_groups.h"
#include "compile/passes/channels_last.h"
#include "compile/passes/memory_plan.h"
#include "compile/passes/schedule.h"
#include "compile/passes/written_memory.h"
#include "compile/state_gate.h"

namespace torchlift::compile {
namespace {

bool is_static(const Graph& graph) { return graph.symbols.empty(); }

// A graph without writes computes all of its state anew, and copies it: of 1 MB, that takes 50 us
// where one row is written. Beyond it, the graph as it was traced writes into the state itself.
constexpr size_t kLargeState = 1 << 20;

}  // namespace

Program Executable::prepared(Graph graph, const ExecutableOptions& options,
                             OptimizeReport* report) {
  *report = optimize(graph);
  RunPlan plan;
  plan.chosen = channels_last(graph);
  if (is_static(graph)) {
    schedule_for_memory(graph);
    // Where layouts are assumed, each result is looked at by itself: NOTE [assumed layouts].
    if (options.blocks && !graph.layouts_assumed) plan.blocked = blocked_groups(graph);
    const MemoryPlan memory = memory_plan(graph);
    take_over_memory(graph, memory.in_place, &plan.blocked);
    for (const InPlace& each : memory.in_place)
      plan.in_place.emplace_back(each.node, each.argument);
  }
  return Program(std::move(graph), plan);
}

struct Executable::State {
  // Null if it has none.
  static std::shared_ptr<State> of(const Graph& graph) {
    const std::vector<ValueId> written = written_constants(graph);
    return written.empty() ? nullptr : std::make_shared<State>(graph, written);
  }

  State(const Graph& graph, const std::vector<ValueId>& written) : as_traced(graph) {
    for (const ValueId id : written) {
      tensors.push_back(graph.find_constant(id)->tensor);
      bytes += tensors.back().nbytes();
    }
  }

  StateGate gate;
  const Program as_traced;
  std::vector<at::Tensor> tensors;
  size_t bytes = 0;

  // In the gate.
  bool shares_memory_with(at::ArrayRef<at::Tensor> inputs) {
    find_memory();
    return overlap_ || std::any_of(inputs.begin(), inputs.end(), [&](const at::Tensor& input) {
             const MemoryRange range = memory_range(input);
             if (range.empty()) return false;
             const auto next = std::partition_point(
                 sorted_.begin(), sorted_.end(),
                 [&](const MemoryRange& each) { return each.end <= range.begin; });
             return next != sorted_.end() && next->overlaps(range);
           });
  }

 private:
  // The memory of a tensor may become another one (x.data = y).
  void find_memory() {
    bool same = memory_.size() == tensors.size();
    memory_.resize(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      const MemoryRange now = memory_range(tensors[i]);
      same = same && memory_[i] == now;
      memory_[i] = now;
    }
    if (same) return;
    sorted_ = memory_;
    std::erase_if(sorted_, [](const MemoryRange& each) { return each.empty(); });
    std::sort(sorted_.begin(), sorted_.end(),
              [](const MemoryRange& a, const MemoryRange& b) { return a.begin < b.begin; });
    const auto overlap = [](const MemoryRange& a, const MemoryRange& b) { return a.overlaps(b); };
    overlap_ = std::adjacent_find(sorted_.begin(), sorted_.end(), overlap) != sorted_.end();
  }

  std::vector<MemoryRange> memory_;  // of each tensor
  std::vector<MemoryRange> sorted_;
  bool overlap_ = false;
};

Executable::Executable(Graph graph, const ExecutableOptions& options)
    : state_(State::of(graph)),
      report_(std::make_shared<OptimizeReport>()),
      program_(prepared(std::move(graph), options, report_.get())) {}

std::vector<at::Tensor> Executable::run(at::ArrayRef<at::Tensor> inputs,
                                        const RunOptions& options) const {
  if (state_ == nullptr) return run_program(inputs, options);
  const StateGate::Run one(state_->gate);
  if (state_->bytes > kLargeState || state_->as_traced.needs_dispatch(inputs) ||
      state_->shares_memory_with(inputs)) {
    return state_->as_traced.run(inputs, options);
  }
  const StateGate::LateUpdate late(state_->gate);
  const std::vector<at::Tensor>& state = report_->functionalized.state;
  std::vector<at::Tensor> all = inputs.vec();
  all.insert(all.end(), state.begin(), state.end());
  return run_program(all, options);
}

std::vector<at::Tensor> Executable::run_program(at::ArrayRef<at::Tensor> inputs,
                                                const RunOptions& options) const {
  std::vector<at::Tensor> outputs = program_.run(inputs, options);
  const Functionalized& written = report_->functionalized;
  if (written.updates.empty()) return outputs;
  for (const InputUpdate& update : written.updates) {
    at::Tensor input = inputs[static_cast<size_t>(update.input)];
    input.copy_(outputs[static_cast<size_t>(update.output)]);
  }
  outputs.resize(written.outputs);
  return outputs;
}

}  // namespace torchlift::compile
