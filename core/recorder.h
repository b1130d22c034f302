#ifndef TORCHLIFT_CORE_RECORDER_H_
#define TORCHLIFT_CORE_RECORDER_H_

// File: core/recorder.h
//
// NOTE [recording levels]
// An interpreted level (core/interpreter.h) whose interpreter only writes down which operators run.
// It changes nothing of what they mean: its batch dim has size 1 and holds the whole value. So
// functions with rules of their own work at it as they do outside.

#include "core/interpreter.h"
#include "core/level.h"

namespace torchlift {

class Recorder : public Interpreter {};

// The recorder of a level, or null.
inline const Recorder* recorder_of(const Level& level) {
  return dynamic_cast<const Recorder*>(level.interpreter());
}

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_RECORDER_H_
