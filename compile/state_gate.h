#ifndef TORCHLIFT_COMPILE_STATE_GATE_H_
#define TORCHLIFT_COMPILE_STATE_GATE_H_

// File: compile/state_gate.h
//
// Lets runs of a program with state (NOTE [state] in compile/captured_state.h) in one by one.
//
//   const StateGate::Run run(gate);        // waits for those of other threads
//   const StateGate::LateUpdate late(gate);  // of a run that writes into its state at its end
//
// An operator of the program may run it again (one in Python that calls the same jit function).
// What the inner run writes, an outer one that computes its state anew would write over: an error.

#include <mutex>

#include "core/error.h"

namespace torchlift::compile {

class StateGate {
 public:
  class Run {
   public:
    // Throws UnsupportedError inside of a run of this thread that writes late.
    explicit Run(StateGate& gate) : lock_(gate.mutex_) {
      if (!gate.late_) return;
      unsupported_error(
          "compile",
          "an operator of a program that writes into captured tensors runs the same program "
          "again, whose update the outer run would lose. Let the operator call the function "
          "itself, or pass the tensors as arguments and return the new ones.");
    }

   private:
    const std::lock_guard<std::recursive_mutex> lock_;
  };

  class LateUpdate {
   public:
    explicit LateUpdate(StateGate& gate) : gate_(gate) { gate_.late_ = true; }
    ~LateUpdate() { gate_.late_ = false; }
    LateUpdate(const LateUpdate&) = delete;
    LateUpdate& operator=(const LateUpdate&) = delete;

   private:
    StateGate& gate_;
  };

 private:
  std::recursive_mutex mutex_;
  bool late_ = false;  // by the thread that has the mutex
};

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_STATE_GATE_H_
