#include "compile/elementary.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "compile/vector_math.h"
#include "core/onlookers.h"

namespace torchlift::compile {
namespace {

// As many numbers as a thread computes at least.
constexpr int64_t kGrain = 16384;

// F on vectors of kBytes; the last of them is filled up.
template <int kBytes, class F, size_t... kInputs>
inline __attribute__((always_inline)) void compute(const float* const* inputs, float* y,
                                                   int64_t count, std::index_sequence<kInputs...>) {
  using V = Floats<kBytes>;
  constexpr auto kLanes = static_cast<int64_t>(kBytes / sizeof(float));
  V x[sizeof...(kInputs)];
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    (std::memcpy(&x[kInputs], inputs[kInputs] + i, kBytes), ...);
    const V result = F::of(x[kInputs]...);
    std::memcpy(y + i, &result, kBytes);
  }
  if (i == count) return;
  const size_t rest = static_cast<size_t>(count - i) * sizeof(float);
  ((x[kInputs] = V{}, std::memcpy(&x[kInputs], inputs[kInputs] + i, rest)), ...);
  const V result = F::of(x[kInputs]...);
  std::memcpy(y + i, &result, rest);
}

// F for each kind of vector. Fused operations are needed: NOTE [coefficients] in vector_math.h.
template <class F, size_t kArity>
struct For {
  using Kernels = std::vector<ElementaryFunction::Kernel>;
  static constexpr auto kAll = std::make_index_sequence<kArity>();

#if defined(__x86_64__)
  __attribute__((target("avx512f,avx512vl,avx512dq,fma,prefer-vector-width=512"))) static void
  on_512(const float* const* inputs, float* y, int64_t count) {
    compute<64, F>(inputs, y, count, kAll);
  }
  __attribute__((target("avx2,fma"))) static void on_256(const float* const* inputs, float* y,
                                                         int64_t count) {
    compute<32, F>(inputs, y, count, kAll);
  }
  static Kernels kernels() {
    Kernels all;
    if (__builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512vl") != 0 &&
        __builtin_cpu_supports("avx512dq") != 0) {
      all.push_back(&on_512);
    }
    if (__builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0) {
      all.push_back(&on_256);
    }
    return all;
  }
#elif defined(__aarch64__)
  static void on_128(const float* const* inputs, float* y, int64_t count) {
    compute<16, F>(inputs, y, count, kAll);
  }
  static Kernels kernels() { return {&on_128}; }
#else
  static Kernels kernels() { return {}; }
#endif
};

template <class F, size_t kArity = 1>
ElementaryFunction function_of(std::string_view name) {
  return {name, kArity, For<F, kArity>::kernels()};
}

const auto& all_functions() {
  static const auto* const functions = new std::array{
      function_of<Cos>("aten::cos"),   function_of<Erf>("aten::erf"),
      function_of<Exp>("aten::exp"),   function_of<Expm1>("aten::expm1"),
      function_of<Gelu>("aten::gelu"), function_of<GeluBackward, 2>("aten::gelu_backward"),
      function_of<Log>("aten::log"),   function_of<Sigmoid>("aten::sigmoid"),
      function_of<Silu>("aten::silu"), function_of<Sin>("aten::sin"),
      function_of<Tanh>("aten::tanh"),
  };
  return *functions;
}

bool is_served(const at::Tensor& t) {
  return t.is_cpu() && t.scalar_type() == at::kFloat && is_unfollowed(t) &&
         t.is_non_overlapping_and_dense();
}

}  // namespace

bool ElementaryFunction::serves(const torch::jit::Stack& arguments) const {
  const at::Tensor& first = arguments[0].toTensor();
  if (!is_served(first)) return false;
  for (size_t i = 1; i < arity_; ++i) {
    const at::Tensor& other = arguments[i].toTensor();
    if (!is_served(other) || other.sizes() != first.sizes() || other.strides() != first.strides()) {
      return false;
    }
  }
  // gelu(x, "tanh")
  return arguments.size() == arity_ || arguments[arity_].toStringView() == "none";
}

bool ElementaryFunction::serves(const torch::jit::Stack& arguments, const at::Tensor& out) const {
  if (!serves(arguments) || !is_served(out)) return false;
  const at::Tensor& first = arguments[0].toTensor();
  return out.sizes() == first.sizes() && out.strides() == first.strides();
}

void ElementaryFunction::write(const torch::jit::Stack& arguments, const at::Tensor& out) const {
  std::array<const float*, 2> inputs{};
  for (size_t i = 0; i < arity_; ++i) {
    inputs[i] = arguments[i].toTensor().const_data_ptr<float>();
  }
  TORCH_INTERNAL_ASSERT(out.numel() == arguments[0].toTensor().numel());
  auto* const y = out.mutable_data_ptr<float>();
  at::parallel_for(0, out.numel(), kGrain, [&](int64_t begin, int64_t end) {
    std::array<const float*, 2> from{};
    for (size_t i = 0; i < arity_; ++i) from[i] = inputs[i] + begin;
    kernels_.front()(from.data(), y + begin, end - begin);
  });
}

const ElementaryFunction* elementary_function(std::string_view name) {
  const auto& all = all_functions();
  const auto found = std::find_if(all.begin(), all.end(), [&](const ElementaryFunction& each) {
    return each.name() == name && !each.kernels().empty();
  });
  return found == all.end() ? nullptr : &*found;
}

}  // namespace torchlift::compile
