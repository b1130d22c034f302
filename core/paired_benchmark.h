#ifndef TORCHLIFT_CORE_PAIRED_BENCHMARK_H_
#define TORCHLIFT_CORE_PAIRED_BENCHMARK_H_

// File: core/paired_benchmark.h
//
// Times a transform and what it is compared with by turns. What else a machine does lasts longer
// than a turn, so it slows both alike, and their ratio stays what it is.

#include <ATen/Parallel.h>
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <utility>
#include <vector>

namespace torchlift {

// The nanoseconds that f takes.
template <class F>
double nanoseconds_of(const F& f) {
  const auto start = std::chrono::steady_clock::now();
  benchmark::DoNotOptimize(f());
  return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count();
}

// The middle one of at least one value.
inline double median_of(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// Reports the medians of both, in nanoseconds a call, as the counters "plain" and "ours"; the
// benchmark's own time is that of `ours`. Both run on one thread.
template <class Plain, class Ours>
void run_by_turns(benchmark::State& state, const Plain& plain, const Ours& ours) {
  at::set_num_threads(1);
  std::vector<double> plain_times, our_times;
  for (auto _ : state) {
    plain_times.push_back(nanoseconds_of(plain));
    our_times.push_back(nanoseconds_of(ours));
    state.SetIterationTime(our_times.back() * 1e-9);
  }
  state.counters["plain"] = median_of(std::move(plain_times));
  state.counters["ours"] = median_of(std::move(our_times));
}

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_PAIRED_BENCHMARK_H_
