#include "compile/captured_state.h"

#include <ATen/ops/empty.h>

#include <utility>

#include "compile/recording.h"
#include "core/error.h"

namespace torchlift::compile {
namespace {

constexpr int kMostRuns = 4;

}  // namespace

bool CapturedState::again() {
  Run run = std::exchange(run_, {});
  ++runs_;
  if (run.found.empty()) return false;
  // Those of the run before were the function's own, then, and so are these.
  const bool own = runs_ > 1 && !latest_.empty() && !run.met_latest;
  if (own && !run.found_recorded) return false;
  if (own || runs_ == kMostRuns) {
    put_back(run.written);
    unsupported_error(
        run.transform,
        "the function writes a value that depends on the arguments into a tensor of another memory "
        "each time it runs: one that it makes past torch's operators (of an array, say), or "
        "chooses anew. Make it by torch.zeros or clone() in the function, or pass it as an "
        "argument.");
  }
  put_back(run.written);
  before_.restore();
  known_.insert(known_.end(), run.found.begin(), run.found.end());
  latest_ = std::move(run.found);
  return true;
}

void CapturedState::put_back(const std::vector<Written>& written) {
  const UnrecordedScope unrecorded;  // What is put back is no write of a function's.
  // The latest first: of memory that two storages share, the first ones are the bytes to keep.
  for (auto found = written.rbegin(); found != written.rend(); ++found) {
    const Written& each = *found;
    auto alive = each.storage.lock();
    if (!alive || !each.bytes.defined()) continue;
    at::Tensor memory = at::empty({0}, each.bytes.options());
    memory.set_(c10::Storage(std::move(alive)), 0, each.bytes.sizes(), {1});
    memory.copy_(each.bytes);
  }
}

}  // namespace torchlift::compile
