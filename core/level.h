#ifndef TORCHLIFT_CORE_LEVEL_H_
#define TORCHLIFT_CORE_LEVEL_H_

// File: core/level.h
//
// NOTE [levels]
// A level is one "meaning" that libtorch's autograd cannot keep apart by itself: one vmap, one jvp
// inside another, one trace. It is an object with identity, owned by an RAII scope, so an exception
// at any depth leaves none behind. Tensors that belong to a level are LiftedTensors
// (core/lifted_tensor.h); they hold the level by pointer and can outlive its scope, but the level
// is then no longer alive and every use of them throws.
//
// grad, vjp and everything else in reverse mode push no level: libtorch's autograd already nests.
// What autograd sees are tensors of one level at a time: the *domain* of that level.
//
//   {
//     LevelScope scope({.kind = LevelKind::kVmap, .size = 8});
//     at::Tensor x = lift(batch, /*bdim=*/0, scope.level());   // looks like one example
//     at::Tensor y = x.sin() * x;                              // runs once on the whole batch
//     Lowered out = lower(y, *scope.level());                  // {value [8, ...], bdim 0}
//   }
//
// Threads: the stack of levels is thread-local and only decides the depth of a new level. Two
// threads can be inside different transforms at once. A LiftedTensor can be used on another thread
// (libtorch does so in the backward pass on CUDA devices).

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/intrusive_ptr.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace torchlift {

class Interpreter;
class RandomStream;

// What a level means.
enum class LevelKind : uint8_t {
  kVmap,  // a batch of examples
  // A batch of tangents. The user's function does not see it: its own tensors belong to the level
  // around, and only their tangents are lifted. So it is no domain (current_level() skips it), and
  // random operators do not belong to it.
  kTangents,
  // A jvp inside another: keeps the two apart, and has no batch dims.
  kJvp,
  // Its batch dim holds parts of one value, and an interpreter says what operators do to them: see
  // NOTE [interpreted levels] in core/interpreter.h.
  kInterpreted,
  // One row of a batch that the user loops over: random operators draw that row's numbers
  // (batching/random_rows.h). No tensor the user sees belongs to it, and it is no domain.
  kRow,
};

// How random operators behave under vmap, as in torch.func.vmap.
enum class Randomness : uint8_t {
  kError,      // random operators throw
  kSame,       // every example sees the same random numbers
  kDifferent,  // every example sees its own
  // every example sees its own, which depend on the generator's seed, the call and the example
  // alone: see NOTE [reproducible numbers] in core/random_stream.h
  kReproducible,
};

// See NOTE [grad mode of outer domains] in core/grad_mode.h.
enum class OuterGradMode : uint8_t { kInherit, kOn, kOff };

class Level : public c10::intrusive_ptr_target {
 public:
  struct Options {
    LevelKind kind = LevelKind::kVmap;
    int64_t size = 1;  // number of examples, or of parts
    Randomness randomness = Randomness::kError;
    // With kReproducible: the call of vmap that the level is a part of, and the row that its first
    // example is. A level without a stream opens one of its own.
    std::shared_ptr<RandomStream> stream = nullptr;
    int64_t first_row = 0;
    // With kInterpreted.
    std::shared_ptr<const Interpreter> interpreter = nullptr;
  };

  Level(int64_t depth, Options options);

  // 1 for the outermost level. Deeper levels are interpreted first.
  int64_t depth() const { return depth_; }
  LevelKind kind() const { return options_.kind; }
  int64_t size() const { return options_.size; }
  Randomness randomness() const { return options_.randomness; }
  // Null for all other kinds.
  const Interpreter* interpreter() const { return options_.interpreter.get(); }
  const std::shared_ptr<RandomStream>& stream() const { return options_.stream; }
  int64_t first_row() const { return options_.first_row; }
  // With kReproducible: numbers the random operators and the inner levels that the function meets.
  int64_t take_call() const { return calls_.fetch_add(1, std::memory_order_relaxed); }
  int64_t calls() const { return calls_.load(std::memory_order_relaxed); }
  void set_calls(int64_t calls) const { calls_.store(calls, std::memory_order_relaxed); }
  // GradMode when the level was entered: whether outer domains record.
  bool grad_at_entry() const { return grad_at_entry_; }
  // Whether forward mode was on then: see NOTE [forward mode of outer domains] in core/grad_mode.h.
  bool forward_at_entry() const { return forward_at_entry_; }
  bool alive() const { return root_->alive_.load(std::memory_order_relaxed); }

  // See NOTE [narrowed levels] in core/narrow.h. The level some of whose examples are this one's,
  // or null.
  const Level* base() const { return base_.get(); }
  // Whether `other` is this level's base, or the base of that...
  bool narrows(const Level& other) const;
  // False where an operator must look closer at what the level means now: it has ended, it stands
  // for some of the examples of another, or another one stands for some of its own.
  bool usual() const { return unusual_.load(std::memory_order_relaxed) == 0; }

  OuterGradMode outer_grad_mode() const {
    return root_->outer_grad_mode_.load(std::memory_order_relaxed);
  }
  void set_outer_grad_mode(OuterGradMode mode) {
    root_->outer_grad_mode_.store(mode, std::memory_order_relaxed);
  }

  // Remembers a tensor of this level (a LiftedTensorImpl, held weakly) that all examples share:
  // see NOTE [what outlives a level] in core/lifted_tensor.h.
  void note_shared(c10::intrusive_ptr_target* shared);

  // "vmap", "jvp", "jacfwd": the transform to name in error messages.
  const char* transform() const;
  // "vmap level 2 (size 8)", for error messages.
  std::string describe() const;

 protected:
  // `size` of the examples of `base`.
  Level(c10::intrusive_ptr<Level> base, int64_t size);

 private:
  friend class LevelScope;
  friend class NarrowScope;

  void settle_shared();

  const int64_t depth_;
  const Options options_;
  const bool grad_at_entry_;
  const bool forward_at_entry_;
  const c10::intrusive_ptr<Level> base_;
  // Whose life and grad mode this level shares: its base's base..., or itself.
  Level* const root_;
  std::mutex shared_mutex_;
  std::vector<c10::weak_intrusive_ptr<c10::intrusive_ptr_target>> shared_;
  size_t shared_limit_ = 64;  // when to look for dead ones among them
  std::atomic<bool> alive_{true};
  mutable std::atomic<int64_t> calls_{0};
  std::atomic<OuterGradMode> outer_grad_mode_{OuterGradMode::kInherit};
  std::atomic<int32_t> unusual_;
};

using LevelPtr = c10::intrusive_ptr<Level>;

// Which levels are no domains for the code at work: those deeper than `depth` among the `open`
// outermost ones. See DomainScope in core/domain.h.
struct DomainLimit {
  int64_t depth = 0;
  int64_t open = 0;
};

// Pushes a level on this thread's stack; pops it, and ends the level's life, when it is destroyed.
// Throws if the runtime cannot be used (core/runtime.h) or a transform of torch.func is active.
class LevelScope {
 public:
  explicit LevelScope(Level::Options options);
  ~LevelScope();
  LevelScope(const LevelScope&) = delete;
  LevelScope& operator=(const LevelScope&) = delete;

  const LevelPtr& level() const { return level_; }

 private:
  LevelPtr level_;
  // Random operators and factories are routed to us while a level is open: see NOTE [mode key] in
  // core/keys.h.
  c10::impl::IncludeDispatchKeyGuard mode_guard_;
  // Of the rule that opens the level, if one does (by calling vmap on values): what runs in it is a
  // user's function again, of this level and of those around the rule's.
  const int64_t rule_depth_;
  DomainLimit domain_limit_;
};

// The innermost level open on this thread that is a domain, or null.
Level* current_level();

// Whether a level open on this thread is a domain for the code at work.
bool is_domain(const Level& level);

// Sets this thread's limit, and returns the one before.
DomainLimit exchange_domain_limit(DomainLimit limit);

// The levels open on this thread, outermost first.
const std::vector<LevelPtr>& level_stack();

// Puts a level in the place of the open one of its depth, and returns that (core/narrow.h).
LevelPtr exchange_level(LevelPtr level);

// Which vmap level a random operator that meets the mode key now belongs to: the innermost one,
// unless a rule of that level is already at work on it. Null when no level is left.
Level* random_level();

// The depth of the outermost level whose rule is at work on this thread: what is made now is made
// on behalf of the levels around that one. Larger than any depth when a user's function is at work.
int64_t& rule_depth();

// Held while a rule of a level works.
class RuleDepthScope {
 public:
  explicit RuleDepthScope(int64_t depth) : current_(rule_depth()), saved_(current_) {
    current_ = std::min(saved_, depth);
  }
  ~RuleDepthScope() { current_ = saved_; }
  RuleDepthScope(const RuleDepthScope&) = delete;
  RuleDepthScope& operator=(const RuleDepthScope&) = delete;

 private:
  int64_t& current_;
  const int64_t saved_;
};

// While it lives, random operators on this thread belong to the level around `handled`.
class RandomHandledScope {
 public:
  explicit RandomHandledScope(const Level& handled);
  ~RandomHandledScope();
  RandomHandledScope(const RandomHandledScope&) = delete;
  RandomHandledScope& operator=(const RandomHandledScope&) = delete;

 private:
  const RuleDepthScope within_;
  int64_t saved_;
};

// Throws UnsupportedError when a transform of torch.func is active on this thread: the two
// libraries give the same tensors different meanings, and mixing them could give wrong numbers.
void check_no_torch_func(const char* what);

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_LEVEL_H_
