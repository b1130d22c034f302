#ifndef TORCHLIFT_BATCHING_FALLBACK_H_
#define TORCHLIFT_BATCHING_FALLBACK_H_

// File: batching/fallback.h
//
// The loop for operators that have no batching rule: the operator runs once an example and the
// results are stacked. It is right, slow, and never silent: each use is recorded, each operator
// warns once, and strict mode turns it into an error.
//
//   for (const FallbackRecord& r : fallback_report()) std::cout << r.op << ": " << r.count << "\n";
//
//   { StrictScope strict; vmap(f)(xs); }    // throws UnsupportedError if f needs the loop

#include <cstdint>
#include <string>
#include <vector>

namespace torchlift {

struct FallbackRecord {
  std::string op;        // "aten::ctc_loss.IntList"
  int64_t count = 0;     // times the loop was taken
  int64_t examples = 0;  // times the operator itself ran
  double seconds = 0;    // wall time in the loop
  int64_t bytes = 0;     // size of the results
};

// What the process looped over since the start, or since the last reset; slowest first.
// Thread-safe.
std::vector<FallbackRecord> fallback_report();
void reset_fallback_report();

// Whether the first loop over an operator warns. Returns the previous setting. (functorch's name
// for it in Python: _set_vmap_fallback_warning_enabled.)
bool set_fallback_warning_enabled(bool enabled);

// While it lives, an operator without a rule throws on this thread.
class StrictScope {
 public:
  explicit StrictScope(bool strict = true);
  ~StrictScope();
  StrictScope(const StrictScope&) = delete;
  StrictScope& operator=(const StrictScope&) = delete;

 private:
  bool saved_;
};
bool is_strict();

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_FALLBACK_H_
