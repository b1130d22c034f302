#ifndef TORCHLIFT_COMPILE_JIT_H_
#define TORCHLIFT_COMPILE_JIT_H_

// File: compile/jit.h
//
// jit: traces a function on its first call, and from then on replays the graph.
//
//   auto per_sample = tl::jit(tl::vmap(tl::grad(loss), {.in_dims = tl::in(tl::kNone, 0, 0)}));
//   Params g = per_sample(params, xs, ys);    // traced
//   g = per_sample(params, xs2, ys2);         // replayed: no call of loss, no autograd
//
// Graphs are cached by what the function could have looked at: the structure of the arguments, the
// shapes, strides, dtypes and devices of tensors, and all constants. Another signature is traced
// anew; the graphs used last are kept.
//
// The function must compute the same each time. It is called while it is traced, on copies of the
// arguments; tensors that it captures are constants of the graph. Those that it writes into
// (running statistics, a counter) are written by each call, once: NOTE [state] in
// compile/captured_state.h.
//
// NOTE [when jit replays]
// A graph holds what a function computes, not how it is to be differentiated or batched (a
// custom_vjp inside is gone). So where another transform is at work, or an argument requires a
// gradient, the function itself is called as if jit were not there, and everything nests. What is
// to be fast goes inside: jit(grad(f)).
//
// NOTE [graphs for other numbers]
// The graph of an operator whose result has a shape that depends on numbers (x[mask], nonzero,
// unique) is right for as many elements as there were when it was traced, and checks that
// (NOTE [assumptions] in batching/rules/assumptions.h). Where a call has another number, the run
// stops, with nothing written and no random numbers drawn, and the graph for that number is taken,
// or traced. kMaxGraphsOfNumbers such graphs are kept for one signature; then the calls that none
// of them fits run the function itself, as does, from then on, what a graph that was traced with
// the same arguments does not fit (a number that changes from step to step of a loop).
//
// A jit function can be copied, and called from several threads; copies share their cache.
//
// Throws UnsupportedError for what a graph cannot say (compile/trace.h).

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <typeindex>
#include <utility>
#include <vector>

#include "compile/assumptions.h"
#include "compile/executable.h"
#include "compile/graph.h"
#include "compile/trace.h"
#include "core/random_state.h"
#include "core/tree.h"

namespace torchlift {

struct JitOptions {
  size_t cache_size = 64;  // graphs
};

// What the cache of a jit function has done.
struct JitCounters {
  int64_t hits = 0;
  int64_t misses = 0;
  int64_t direct = 0;   // calls of the function itself: under a transform, tracked by autograd, or
                        // with numbers that no graph is for (NOTE [graphs for other numbers])
  int64_t evicted = 0;  // graphs dropped since the cache was full
};

namespace compile {

// See NOTE [graphs for other numbers].
inline constexpr size_t kMaxGraphsOfNumbers = 16;

// What of a tensor a graph depends on.
struct TensorSignature {
  at::ScalarType dtype;
  c10::Device device;
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;

  bool operator==(const TensorSignature& other) const {
    return dtype == other.dtype && device == other.device && sizes == other.sizes &&
           strides == other.strides;
  }
  std::string str() const;
};

TensorSignature signature_of(const at::Tensor& tensor);

// Whether a call on these is for the function itself. See NOTE [when jit replays].
bool calls_function(const std::vector<at::Tensor>& tensors);

// How the signature of a call differs from that of the one traced before.
std::string describe_change(const std::vector<TensorSignature>& before,
                            const std::vector<TensorSignature>& now, const std::string& structure);

// Says what the first constants of two trees are that differ; "" if all are the same. The trees
// have the same structure.
struct ConstantComparison {
  std::string found;

  void operator()(const Path&, const at::Tensor&, const at::Tensor&) {}
  template <class T>
  void operator()(const Path& path, const T& a, const T& b) {
    if (!found.empty()) return;
    if constexpr (std::is_same_v<T, c10::Scalar>) {
      if (a.type() == b.type() && c10::IValue(a) == c10::IValue(b)) return;
    } else if constexpr (!std::is_same_v<T, std::monostate>) {
      if (a == b) return;
    } else {
      return;
    }
    found = "the constant at " + path.str() + " is another one";
  }
};

template <class Args>
std::string structure_change(const Args& before, const Args& now) {
  std::string found = structure_mismatch(before, now);
  if (!found.empty()) return found;
  ConstantComparison compare;
  walk_trees(compare, Path{}, before, now);
  return compare.found;
}

// The graphs of a function for one type of arguments.
template <class Args, class R>
class JitCache {
 public:
  struct Key {
    std::vector<TensorSignature> tensors;
    Args arguments;  // their structure and constants
  };
  struct Entry {
    Key key;
    Answers answers;  // that the program assumes
    Executable program;
    R result;
  };

  // The graphs of a signature.
  struct Found {
    std::vector<std::shared_ptr<const Entry>> entries;  // the one used last comes first
    bool may_trace = true;
  };

  explicit JitCache(size_t max_size) : max_size_(max_size) {}

  Found find(const Args& args, const std::vector<TensorSignature>& tensors) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    Found found;
    for (const auto& entry : entries_) {
      if (!is_for(entry->key, args, tensors)) continue;
      found.entries.push_back(entry);
      if (entry->answers.empty()) return found;  // for all numbers
    }
    found.may_trace = found.entries.size() < kMaxGraphsOfNumbers &&
                      std::none_of(refused_.begin(), refused_.end(),
                                   [&](const Key& key) { return is_for(key, args, tensors); });
    return found;
  }

  void count_hit(const std::shared_ptr<const Entry>& used) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++counters_.hits;
    const auto entry = std::find(entries_.begin(), entries_.end(), used);
    if (entry != entries_.end()) entries_.splice(entries_.begin(), entries_, entry);
  }

  void drop(const std::shared_ptr<const Entry>& entry) {
    const std::lock_guard<std::mutex> lock(mutex_);
    entries_.remove(entry);
  }

  // The graph of these arguments does not fit them.
  void refuse(std::vector<TensorSignature> tensors, const Args& args) {
    const std::lock_guard<std::mutex> lock(mutex_);
    refused_.push_back({std::move(tensors), args});
    if (refused_.size() > max_size_) refused_.pop_front();
  }

  // changed: how the numbers differ from those of other graphs of the signature.
  void add(std::shared_ptr<const Entry> entry, const std::string& changed) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++counters_.misses;
    reasons_.push_back(changed.empty() ? reason(*entry) : changed);
    entries_.push_front(std::move(entry));
    while (entries_.size() > max_size_) {
      entries_.pop_back();
      ++counters_.evicted;
    }
  }

  void count_direct() {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++counters_.direct;
  }

  JitCounters counters() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return counters_;
  }

  std::vector<std::string> reasons() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return reasons_;
  }

 private:
  static bool is_for(const Key& key, const Args& args,
                     const std::vector<TensorSignature>& tensors) {
    return key.tensors == tensors && structure_change(key.arguments, args).empty();
  }

  std::string reason(const Entry& entry) const {
    if (entries_.empty()) return "the first call";
    const Key& before = entries_.front()->key;
    return describe_change(before.tensors, entry.key.tensors,
                           structure_change(before.arguments, entry.key.arguments));
  }

  const size_t max_size_;
  mutable std::mutex mutex_;
  std::list<std::shared_ptr<const Entry>> entries_;  // the one used last comes first
  std::list<Key> refused_;
  JitCounters counters_;
  std::vector<std::string> reasons_;
};

}  // namespace compile

// What jit returns. One function may be called with arguments of several types; each has a cache.
template <class F>
class JitFunction {
 public:
  JitFunction(F f, JitOptions options)
      : shared_(std::make_shared<Shared>(std::move(f), std::move(options))) {}

  template <class... Args>
  auto operator()(const Args&... args) const {
    using R = std::decay_t<std::invoke_result_t<const F&, const Args&...>>;
    using Cache = compile::JitCache<std::tuple<Args...>, R>;
    const std::tuple<Args...> all(args...);
    const std::vector<at::Tensor> leaves = tree_flatten(all);
    Cache& cache = cache_for<Cache>();
    if (compile::calls_function(leaves)) {
      cache.count_direct();
      return R(shared_->f(args...));
    }
    std::vector<compile::TensorSignature> signatures;
    signatures.reserve(leaves.size());
    for (const at::Tensor& leaf : leaves) signatures.push_back(compile::signature_of(leaf));
    const std::vector<at::Tensor> inputs = defined(leaves);
    const typename Cache::Found found = cache.find(all, signatures);
    compile::KnownAnswers known;
    for (const auto& entry : found.entries) {
      if (!known.agree(entry->answers)) continue;
      if (auto outputs = attempt(*entry, inputs, &known)) {
        cache.count_hit(entry);
        return tree_unflatten(entry->result, *outputs);
      }
    }
    if (found.may_trace) {
      if (auto result = trace_and_run<Cache>(all, inputs, std::move(signatures), &known, &cache)) {
        return *std::move(result);
      }
    }
    cache.count_direct();
    return R(shared_->f(args...));
  }

  // Of the calls with arguments of these types.
  template <class... Args>
  JitCounters counters() const {
    return cache_of<Args...>().counters();
  }
  // Why each graph was traced: how the call differed from the one before.
  template <class... Args>
  std::vector<std::string> explain() const {
    return cache_of<Args...>().reasons();
  }

 private:
  struct Shared {
    Shared(F function, JitOptions chosen) : f(std::move(function)), options(chosen) {}
    const F f;
    const JitOptions options;
    std::mutex mutex;
    std::vector<std::pair<std::type_index, std::shared_ptr<void>>> caches;
  };

  template <class... Args>
  auto& cache_of() const {
    using R = std::decay_t<std::invoke_result_t<const F&, const Args&...>>;
    return cache_for<compile::JitCache<std::tuple<Args...>, R>>();
  }

  template <class Cache>
  Cache& cache_for() const {
    const std::lock_guard<std::mutex> lock(shared_->mutex);
    for (const auto& [type, cache] : shared_->caches) {
      if (type == typeid(Cache)) return *static_cast<Cache*>(cache.get());
    }
    auto cache = std::make_shared<Cache>(shared_->options.cache_size);
    shared_->caches.emplace_back(typeid(Cache), cache);
    return *cache;
  }

  // Nothing if the graph of these arguments does not fit them.
  template <class Cache, class Args>
  auto trace_and_run(const Args& all, const std::vector<at::Tensor>& inputs,
                     std::vector<compile::TensorSignature> signatures, compile::KnownAnswers* known,
                     Cache* cache) const
      -> std::optional<std::decay_t<decltype(std::apply(std::declval<const F&>(), all))>> {
    const RandomState generators(devices_of(inputs));
    std::shared_ptr<const typename Cache::Entry> entry;
    try {
      auto traced = compile::trace_tuple(shared_->f, all, "jit");
      compile::Answers answers = compile::answers_of(traced.graph);
      entry = std::make_shared<const typename Cache::Entry>(
          typename Cache::Entry{{signatures, all},
                                std::move(answers),
                                compile::Executable(std::move(traced.graph)),
                                std::move(traced.structure)});
      generators.restore();  // the run that is recorded draws no numbers for the caller
    } catch (const AssumptionError&) {
      generators.restore();
      cache->refuse(std::move(signatures), all);
      return std::nullopt;
    }
    cache->add(entry, known->reason());
    if (auto outputs = attempt(*entry, inputs, known)) {
      return tree_unflatten(entry->result, *outputs);
    }
    cache->drop(entry);
    cache->refuse(std::move(signatures), all);
    return std::nullopt;
  }

  // Nothing if the graph is not for the numbers of this call.
  template <class Entry>
  static std::optional<std::vector<at::Tensor>> attempt(const Entry& entry,
                                                        const std::vector<at::Tensor>& inputs,
                                                        compile::KnownAnswers* known) {
    if (entry.answers.empty()) return entry.program.run(inputs);
    try {
      return entry.program.run(inputs);
    } catch (const AssumptionError& error) {
      known->note(entry.answers, error);
      return std::nullopt;
    }
  }

  static std::vector<at::Tensor> defined(const std::vector<at::Tensor>& leaves) {
    std::vector<at::Tensor> kept;
    kept.reserve(leaves.size());
    for (const at::Tensor& leaf : leaves) {
      if (leaf.defined()) kept.push_back(leaf);
    }
    return kept;
  }

  std::shared_ptr<Shared> shared_;
};

template <class F>
JitFunction<F> jit(F f, JitOptions options = {}) {
  return JitFunction<F>(std::move(f), options);
}

}  // namespace torchlift

#endif  // TORCHLIFT_COMPILE_JIT_H_
