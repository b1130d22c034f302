#include "core/random_stream.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "core/error.h"
#include "core/philox.h"

namespace torchlift {
namespace {

// 64 bits of a generator, which moves on.
uint64_t take_number(at::Generator generator) {
  if (generator.device().is_cpu()) {
    const std::lock_guard<std::mutex> lock(generator.mutex());
    return at::check_generator<at::CPUGeneratorImpl>(generator)->random64();
  }
  // Another device's generator is asked by its own operator, on behalf of no level.
  const RandomHandledScope outside(*level_stack().front());
  const NoRowDraws none;
  at::Tensor number =
      at::empty({1}, at::TensorOptions().dtype(at::kLong).device(generator.device()));
  number.random_(generator);
  return static_cast<uint64_t>(number.item<int64_t>());
}

RowDraws*& current_rows() {
  static thread_local RowDraws* rows = nullptr;
  return rows;
}

// Rows that leave a branch or a loop have not all made the same calls.
void check_not_narrowed(const Level& level, const char* what) {
  if (level.base() == nullptr || level.randomness() != Randomness::kReproducible) return;
  unsupported_error("vmap", what, " in a branch or loop that only some examples are in (",
                    level.describe(),
                    ") cannot draw reproducible numbers: which ones depends on how many random "
                    "operators an example has met. Draw them before, or use "
                    "randomness=\"different\".");
}

}  // namespace

Level* reproducible_level() {
  const auto& levels = level_stack();
  for (auto level = levels.rbegin(); level != levels.rend(); ++level) {
    if ((*level)->randomness() == Randomness::kReproducible) return level->get();
  }
  return nullptr;
}

std::shared_ptr<RandomStream> RandomStream::open() {
  if (const Level* around = reproducible_level()) {
    check_not_narrowed(*around, "a vmap");
    const auto& stream = around->stream();
    const auto root = stream->root_ == nullptr ? stream : stream->root_;
    return std::shared_ptr<RandomStream>(new RandomStream(root, around->take_call()));
  }
  const uint64_t seed = take_number(at::detail::getDefaultCPUGenerator());
  return std::shared_ptr<RandomStream>(new RandomStream(seed));
}

uint64_t RandomStream::root(const std::optional<at::Generator>& generator) {
  if (root_ != nullptr) return root_->root(generator);
  if (!generator.has_value() || !generator->defined()) return seed_;
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [known, number] : generators_) {
    if (known == *generator) return number;
  }
  generators_.emplace_back(*generator, take_number(*generator));
  return generators_.back().second;
}

uint64_t fold_row(uint64_t key, const Level& level, int64_t row) {
  if (level.stream() != nullptr && level.stream()->opened_as().has_value()) {
    key = fold_in(key, PhiloxUse::kCall, static_cast<uint64_t>(*level.stream()->opened_as()));
  }
  return fold_in(key, PhiloxUse::kRow, static_cast<uint64_t>(level.first_row() + row));
}

bool has_own_numbers(const Level& level, const char* op) {
  check_not_narrowed(level, op);
  if (level.randomness() == Randomness::kError) {
    unsupported_error(
        "vmap", "called random operation ", op,
        " while in randomness error mode: ", level.describe(),
        " has randomness=\"error\", a level inside of it randomness=\"reproducible\". "
        "Give the outer vmap randomness=\"reproducible\", \"different\" or \"same\".");
  }
  return level.randomness() != Randomness::kSame;
}

RowDraws::RowDraws(const Level& level, const std::optional<at::Generator>& generator,
                   const char* op)
    : level_(level), inner_(current_rows()), own_numbers_(has_own_numbers(level, op)) {
  if (inner_ == nullptr) {
    root_ = level.stream()->root(generator);
    call_ = level.take_call();
  }
  current_rows() = this;
}

RowDraws::~RowDraws() { current_rows() = inner_; }

void RowDraws::begin(int64_t row) {
  row_ = row;
  innermost().drawn_ = 0;
}

RowDraws* RowDraws::current() { return current_rows(); }

uint64_t RowDraws::next_key() {
  RowDraws& draw = innermost();
  uint64_t key = draw.root_;
  // Outer loops were opened last.
  for (RowDraws* rows = this; rows != nullptr; rows = rows->inner_) {
    if (rows->own_numbers_) key = fold_row(key, rows->level_, rows->row_);
  }
  key = fold_in(key, PhiloxUse::kCall, static_cast<uint64_t>(draw.call_));
  // An operator that a rule makes of several random ones draws more than once.
  return fold_in(key, PhiloxUse::kState, static_cast<uint64_t>(draw.drawn_++));
}

NoRowDraws::NoRowDraws() : saved_(std::exchange(current_rows(), nullptr)) {}

NoRowDraws::~NoRowDraws() { current_rows() = saved_; }

}  // namespace torchlift
