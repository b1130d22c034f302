#include "compile/executable.h"

#include <ATen/core/grad_mode.h>

#include <utility>

#include "compile/passes/blocked_groups.h"
#include "compile/passes/channels_last.h"
#include "compile/passes/memory_plan.h"
#include "compile/passes/schedule.h"

namespace torchlift::compile {
namespace {

bool is_static(const Graph& graph) { return graph.symbols.empty(); }

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

Executable::Executable(Graph graph, const ExecutableOptions& options)
    : report_(std::make_shared<OptimizeReport>()),
      program_(prepared(std::move(graph), options, report_.get())) {}

std::vector<at::Tensor> Executable::run(at::ArrayRef<at::Tensor> inputs,
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
