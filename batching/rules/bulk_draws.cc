#include "batching/rules/bulk_draws.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Dispatch.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/bernoulli_ops.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <mutex>

namespace torchlift {
namespace {

// --- the words of a Mersenne twister (Matsumoto and Nishimura, 1998) -----------------------------

constexpr size_t kStateSize = at::MERSENNE_STATE_N;
constexpr size_t kMiddle = at::MERSENNE_STATE_M;
using State = std::array<uint32_t, kStateSize>;

uint32_t twist(uint32_t u, uint32_t v) {
  const uint32_t mixed = (u & 0x80000000U) | (v & 0x7fffffffU);
  return (mixed >> 1) ^ ((0U - (v & 1U)) & 0x9908b0dfU);
}

// Each loop reads what it writes 227 steps later at the earliest, so that it is done by vectors.
void next_state(State& state) {
  const State old = state;
  constexpr size_t kFirst = kStateSize - kMiddle;
  for (size_t i = 0; i < kFirst; ++i) state[i] = old[i + kMiddle] ^ twist(old[i], old[i + 1]);
  for (size_t i = kFirst; i + 1 < kStateSize; ++i) {
    state[i] = state[i - kFirst] ^ twist(old[i], old[i + 1]);
  }
  state[kStateSize - 1] = state[kMiddle - 1] ^ twist(old[kStateSize - 1], state[0]);
}

// The words that a generator gives next. It stands as if they had been asked for one by one, once
// this has gone.
class Words {
 public:
  explicit Words(at::CPUGeneratorImpl& generator)
      : generator_(generator), engine_(generator.engine()), data_(engine_.data()) {}
  ~Words() {
    engine_.set_data(data_);
    generator_.set_engine(engine_);
  }
  Words(const Words&) = delete;
  Words& operator=(const Words&) = delete;

  void take(uint32_t* out, size_t count) {
    while (count > 0) {
      // `left_` is one more than there are words left: it is counted down before it is compared
      // with 0.
      if (data_.left_ == 1) {
        next_state(data_.state_);
        data_.next_ = 0;
        data_.left_ = static_cast<int>(kStateSize) + 1;
      }
      const size_t ready = std::min(count, static_cast<size_t>(data_.left_ - 1));
      temper(data_.state_.data() + data_.next_, out, ready);
      data_.next_ += static_cast<uint32_t>(ready);
      data_.left_ -= static_cast<int>(ready);
      out += ready;
      count -= ready;
    }
  }

 private:
  static void temper(const uint32_t* state, uint32_t* __restrict out, size_t count) {
    for (size_t i = 0; i < count; ++i) {
      uint32_t y = state[i];
      y ^= y >> 11;
      y ^= (y << 7) & 0x9d2c5680U;
      y ^= (y << 15) & 0xefc60000U;
      y ^= y >> 18;
      out[i] = y;
    }
  }

  at::CPUGeneratorImpl& generator_;
  at::mt19937 engine_;
  at::mt19937_data_pod data_;
};

// --- masks ---------------------------------------------------------------------------------------

constexpr size_t kBlock = 256;

// libtorch compares 53 bits, of two words, times 2^-53 with p. The 21 upper ones, which come first,
// decide but for one element in two millions.
template <class T>
void fill(Words& words, T* out, int64_t count, double p) {
  constexpr uint32_t kUpper = (1U << 21) - 1;
  const auto limit = static_cast<uint64_t>(std::ceil(p * 0x1p53));
  const auto upper_limit = static_cast<int32_t>(limit >> 32);
  std::array<uint32_t, 2 * kBlock> drawn;
  for (int64_t start = 0; start < count; start += kBlock) {
    const auto size = std::min<size_t>(kBlock, static_cast<size_t>(count - start));
    words.take(drawn.data(), 2 * size);
    int32_t undecided = 0;
    for (size_t i = 0; i < size; ++i) {
      const auto upper = static_cast<int32_t>(drawn[2 * i] & kUpper);
      out[i] = static_cast<T>(upper < upper_limit ? 1 : 0);
      undecided |= upper == upper_limit ? 1 : 0;
    }
    for (size_t i = 0; undecided != 0 && i < size; ++i) {
      const uint64_t bits = (uint64_t{drawn[2 * i] & kUpper} << 32) | drawn[2 * i + 1];
      out[i] = static_cast<T>(bits < limit ? 1 : 0);
    }
    out += size;
  }
}

void fill(Words& words, const at::Tensor& target, double p) {
  AT_DISPATCH_ALL_TYPES_AND3(
      at::kBool, at::kHalf, at::kBFloat16, target.scalar_type(), "draw_bernoulli",
      [&] { fill(words, target.mutable_data_ptr<scalar_t>(), target.numel(), p); });
}

at::CPUGeneratorImpl& impl_of(const at::Generator& generator) {
  return *at::check_generator<at::CPUGeneratorImpl>(generator);
}

// Whether libtorch's operator, asked on the side, draws these numbers, and leaves its generator
// where this does.
bool agrees_with_libtorch() {
  constexpr int64_t kCount = 1001;
  constexpr double kP = 0.3;
  at::Generator theirs = at::detail::createCPUGenerator(/*seed_val=*/5489);
  at::Generator ours = at::detail::createCPUGenerator(/*seed_val=*/5489);
  // Without the dispatcher's upper half: levels may be open.
  at::Tensor expected = at::detail::empty_cpu({kCount}, at::TensorOptions().dtype(at::kFloat));
  at::_ops::bernoulli__float::redispatch(c10::DispatchKeySet(c10::DispatchKey::CPU), expected, kP,
                                         theirs);
  std::array<float, kCount> got{};
  {
    Words words(impl_of(ours));
    fill(words, got.data(), kCount, kP);
  }
  return std::equal(got.begin(), got.end(), expected.const_data_ptr<float>()) &&
         impl_of(theirs).random() == impl_of(ours).random();
}

bool is_known() {
  static const bool known = agrees_with_libtorch();
  return known;
}

// The dtypes of libtorch's operator.
bool is_drawn(at::ScalarType dtype) {
  return at::isIntegralType(dtype, /*includeBool=*/false)
             ? !c10::isBarebonesUnsignedType(dtype)
             : dtype == at::kBool || dtype == at::kFloat || dtype == at::kDouble ||
                   dtype == at::kHalf || dtype == at::kBFloat16;
}

// Memory of the CPU that no autograd, level or mode follows.
bool is_plain(const at::Tensor& t) {
  constexpr c10::DispatchKeySet kCpu =
      c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                           c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutocastCPU});
  return kCpu.has_all(t.key_set()) && !t.requires_grad() && !t._fw_grad(/*level=*/0).defined() &&
         t.is_non_overlapping_and_dense() && is_drawn(t.scalar_type()) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

}  // namespace

bool draw_bernoulli(const at::Tensor& target, double p,
                    const std::optional<at::Generator>& generator) {
  const bool of_cpu =
      !generator.has_value() || !generator->defined() || generator->device().is_cpu();
  if (!(p >= 0 && p <= 1) || !of_cpu || !is_plain(target) || !is_known()) {
    return false;
  }
  at::Generator drawn_from = generator.has_value() && generator->defined()
                                 ? *generator
                                 : at::detail::getDefaultCPUGenerator();
  {
    const std::lock_guard<std::mutex> lock(drawn_from.mutex());
    Words words(impl_of(drawn_from));
    fill(words, target, p);
  }
  if (!target.is_inference()) target.unsafeGetTensorImpl()->bump_version();
  return true;
}

}  // namespace torchlift
