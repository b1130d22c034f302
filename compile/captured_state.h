#ifndef TORCHLIFT_COMPILE_CAPTURED_STATE_H_
#define TORCHLIFT_COMPILE_CAPTURED_STATE_H_

// File: compile/captured_state.h
//
// Tensors that a traced function captures and writes into. Not for users; see compile/trace.h.
//
//   CapturedState state(devices_of(inputs));
//   do {
//     TraceScope scope("trace", {}, Known::kValues, &state);
//     ...                                       // the function, on copies of the inputs
//     graph = scope.finish(outputs);
//   } while (state.again());
//
// NOTE [state]
// Running statistics, counters, moving averages: tensors from outside of the function that it
// writes into. In the graph they are constants that nodes write into: a run reads what they hold by
// then, and leaves what it wrote to the next. Tracing itself leaves them as they were.
//
// What is computed from captured tensors alone is not written down (NOTE [tracing] in
// compile/trace_scope.h), and must be if one of them is state; but that a tensor is state is known
// when it is written, and it may have been read before. So the function runs once to find out, and
// if there is state once more, with tensors of the trace's level in its place, from the first time
// on that an operator meets it. These have memory of their own. In the first run an operator that
// reads values of the trace writes into such a tensor, too; any other one writes into the memory
// that it is given, whose bytes are kept, and put back afterwards.
//
// Known by its storage: a tensor may be met as x, x.data or as a view that was made outside. So the
// graph has one constant for each storage, all of it, and what is no more than a part, or of other
// strides, is a view of that. Storages of the same memory (two that torch.from_numpy made of one
// array) are one; of memory that overlaps in part, an error.
//
// A trace inside of another one (functionalize) takes the state of that for its own, whether it
// writes into it or not: then nothing is computed from it that is not written down, and what runs
// its graph in the other trace finds the state there.
//
// A storage that no operator made while the function ran may still be its own (the memory of an
// array of numpy, say). It is if nobody else holds it when the function has returned, or if the
// function, when it runs again, does not meet it again.

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/Storage.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/intrusive_ptr.h>

#include <string>
#include <vector>

#include "compile/graph.h"
#include "core/random_state.h"

namespace torchlift::compile {

// What the runs of one trace know of state.
class CapturedState {
 public:
  // A run that is not the last one leaves the generators of these devices as they were.
  explicit CapturedState(const std::vector<c10::Device>& devices) : before_(devices) {}

  // To be called after each run: whether another one is needed, on the inputs as they were. Throws
  // UnsupportedError if the function finds other tensors to write into each time.
  bool again();

 private:
  friend class StateFilter;

  // Memory that was written as if no trace were there, and its bytes before that.
  struct Written {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    at::Tensor bytes;
  };
  // Of one run.
  struct Run {
    std::string transform;
    std::vector<Written> written;
    std::vector<c10::Storage> found;  // not known before, and held by others than the function
    bool found_recorded = false;      // whether values of the trace were written into one
    bool met_latest = false;          // whether it met one of those that the run before found
  };

  static void put_back(const std::vector<Written>& written);

  const RandomState before_;
  std::vector<c10::Storage> known_;
  std::vector<c10::Storage> latest_;  // those that the latest run found
  Run run_;
  int runs_ = 0;
};

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_CAPTURED_STATE_H_
