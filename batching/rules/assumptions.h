#ifndef TORCHLIFT_BATCHING_RULES_ASSUMPTIONS_H_
#define TORCHLIFT_BATCHING_RULES_ASSUMPTIONS_H_

// File: batching/rules/assumptions.h
//
// NOTE [assumptions]
// Where what a trace writes down is right for some numbers alone (those of the run that is traced:
// how many elements a mask chooses, say), the graph has a node that looks at them in each run and
// throws where they are others. It calls an operator of ours:
//
//   torchlift::assume(Tensor numbers, int[] expected, str message, int number=0) -> ()
//
// The values of a graph have the shapes of their types whether the assumption holds or not. So its
// node is like every other that checks; only what comes after it in the graph must stay there.

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace torchlift {

inline constexpr const char* kAssumeOp = "torchlift::assume";

// What a run of a graph throws where an assumption does not hold. In Python
// torchlift.AssumptionError, a RuntimeError.
class AssumptionError : public c10::Error {
 public:
  // number: of the assumption, in the order of the trace. found: the numbers of the run.
  AssumptionError(const std::string& message, int64_t number, std::vector<int64_t> found)
      : Error(message, /*backtrace=*/nullptr), number_(number), found_(std::move(found)) {}

  int64_t number() const { return number_; }
  const std::vector<int64_t>& found() const { return found_; }

 private:
  int64_t number_;
  std::vector<int64_t> found_;
};

// The elements, one after the other, of a tensor without levels. Makes no other tensor, which would
// belong to a level that is open.
std::vector<int64_t> integers_in(const at::Tensor& numbers);

// Throws AssumptionError unless the numbers, integers or bools, are the expected ones; in a graph,
// each run does. In the message "{was}" stands for what is expected, "{is}" for what is found.
void assume(const at::Tensor& numbers, at::IntArrayRef expected, const std::string& message);

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_RULES_ASSUMPTIONS_H_
