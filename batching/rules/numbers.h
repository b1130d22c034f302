#ifndef TORCHLIFT_BATCHING_RULES_NUMBERS_H_
#define TORCHLIFT_BATCHING_RULES_NUMBERS_H_

// File: batching/rules/numbers.h
//
// For rules that look at the numbers in their arguments.
//
//   check_all(classes.ge(0), "Class values must be non-negative.");
//
// NOTE [numbers in rules]
// A rule may look at the numbers of all examples: to check them, or for a shape that all share.
// Where they are computed from the inputs of a trace (core/recorder.h) they are those of one run.
// What follows from them must hold in the later ones: a check becomes a node of the graph, an
// answer or a number is assumed, with a node that checks it (NOTE [assumptions] in
// batching/rules/assumptions.h), or the rule throws.

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace torchlift {

// The tensor without its levels: all examples of all of them.
at::Tensor innermost(const at::Tensor& t);

// False for tensors of a trace by shapes alone (NOTE [tracing by shapes] in compile/trace_scope.h),
// which have no numbers.
bool has_numbers(const at::Tensor& plain);

// The name of the transform that writes down how t's numbers are computed; null if they are not
// computed from inputs of one.
const char* recorded_by(const at::Tensor& t);

// Throws UnsupportedError, with the operator and what to do instead, if t's numbers are computed
// from inputs of a trace.
void refuse_recorded(const at::Tensor& t, const char* op, const char* fix);

// Throws `message`, as TORCH_CHECK does, where an element of `condition`, bools, is false in some
// example; in a graph, each run does.
void check_all(const at::Tensor& condition, const char* message);

// What the shape of a result depends on.
struct NumberOfRun {
  std::string op;    // "aten::nonzero"
  const char* what;  // "the number of elements that are not zero"
  const char* fix;   // "Use torchlift.nonzero(x, size=n), ..."
};

// The error of a run in which it is another one.
std::string assumption_message(const NumberOfRun& number);

// The number that `each` (integers) is for all elements of all examples; nothing where they differ,
// or where there are none. A number that is being recorded is assumed: a node of the graph checks
// it in each run. Throws UnsupportedError where it is recorded by shapes alone.
std::optional<int64_t> assumed_number(const at::Tensor& each, const NumberOfRun& number);

// For an operator that gives a view, but a copy where the place is computed from inputs of a trace:
// tells the trace of `place`, which throws when it ends if the base or the copy was written to
// while the copy lived (Recorder::note_copy_for_view in core/recorder.h).
void note_copy_for_view(const char* op, const at::Tensor& base, const at::Tensor& copy,
                        const at::Tensor& place);

// NOTE [assumed answers]
// Some of libtorch's composite operators ask one question of a number and go on by the answer:
// istft and cov by at::equal. While an AssumedAnswers is open on this thread, such a question of a
// tensor that is being recorded is answered by the number of this run, and a node of the graph
// (NOTE [assumptions]) checks that later runs give the same answer. By shapes alone the expected
// ones are assumed.
class AssumedAnswers {
 public:
  enum class Others : uint8_t { kAllowed, kErrors };

  // message: the error of a run that gives another answer. expected: of the questions that are
  // recorded, in their order; false beyond. others: whether the run that is traced may have other
  // answers than those.
  AssumedAnswers(const char* message, std::vector<bool> expected, Others others = Others::kAllowed);
  ~AssumedAnswers();
  AssumedAnswers(const AssumedAnswers&) = delete;
  AssumedAnswers& operator=(const AssumedAnswers&) = delete;

  static bool open();
  // The answer of all examples: `each` has a bool for each of them, which are recorded. Nothing
  // where they differ.
  static std::optional<bool> answer(const at::Tensor& each);

 private:
  const char* message_;
  std::vector<bool> expected_;
  Others others_;
  size_t next_ = 0;
  AssumedAnswers* outer_;
};

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_RULES_NUMBERS_H_
