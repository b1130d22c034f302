#ifndef TORCHLIFT_COMPILE_TRACE_CONTROL_FLOW_H_
#define TORCHLIFT_COMPILE_TRACE_CONTROL_FLOW_H_

// File: compile/trace_control_flow.h
//
// Writes down branches and loops whose condition is computed from the inputs, and scans: what
// core/recorder.h says. Not for users.

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "compile/recording.h"
#include "core/level.h"
#include "core/recorder.h"

namespace torchlift::compile {

// A level that records, and what it records into.
struct RecordingLevel {
  const Recorder& recorder;
  Recording& recording;
  const LevelPtr& level;
};

Recorder::Leaves record_cond(const RecordingLevel& at, const at::Tensor& pred,
                             const Recorder::Step& true_fn, const Recorder::Step& false_fn,
                             const Recorder::Leaves& operands);

Recorder::Leaves record_while(const RecordingLevel& at, const char* transform,
                              const Recorder::Test& test, const Recorder::Step& body,
                              Recorder::Leaves carry);

// Nothing where a step is differentiated.
std::optional<std::vector<Recorder::Leaves>> record_scan(const RecordingLevel& at,
                                                         const Recorder::Step& step,
                                                         const Recorder::Leaves& carry,
                                                         const Recorder::Leaves& xs, bool reverse);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_TRACE_CONTROL_FLOW_H_
