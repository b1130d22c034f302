#include "batching/rules/numbers.h"

#include <ATen/ops/_assert_async.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/Exception.h>

#include <utility>

#include "batching/rules/assumptions.h"
#include "core/error.h"
#include "core/lifted_tensor.h"
#include "core/recorder.h"

namespace torchlift {
namespace {

AssumedAnswers*& open_answers() {
  static thread_local AssumedAnswers* innermost_one = nullptr;
  return innermost_one;
}

// The level of the trace that t's numbers are inputs of, or are computed from inputs of.
const Level* recording_level(const at::Tensor& t) {
  at::Tensor value = t;
  while (const LiftedTensorImpl* impl = as_lifted(value)) {
    if (impl->bdim() && recorder_of(impl->level()) != nullptr) return &impl->level();
    value = at::Tensor(impl->value());
  }
  return nullptr;
}

}  // namespace

at::Tensor innermost(const at::Tensor& t) {
  at::Tensor value = t;
  while (const LiftedTensorImpl* impl = as_lifted(value)) value = at::Tensor(impl->value());
  return value;
}

bool has_numbers(const at::Tensor& plain) {
  return plain.numel() == 0 || !plain.has_storage() ||
         plain.storage().unsafeGetStorageImpl()->_mutable_data_ptr_no_checks().get() != nullptr;
}

const char* recorded_by(const at::Tensor& t) {
  const Level* level = recording_level(t);
  return level == nullptr ? nullptr : level->transform();
}

void refuse_recorded(const at::Tensor& t, const char* op, const char* fix) {
  const char* transform = recorded_by(t);
  if (transform == nullptr) return;
  unsupported_error(transform, op,
                    ": its result depends on numbers that are computed from the inputs, and would "
                    "stay what it is in this run. ",
                    fix);
}

void check_all(const at::Tensor& condition, const char* message) {
  const at::Tensor plain = innermost(condition);
  if (plain.numel() == 0) return;
  if (has_numbers(plain)) TORCH_CHECK(plain.all().item<bool>(), message);
  if (recorded_by(condition) != nullptr) {
    at::_assert_async(condition.dim() == 0 ? condition : condition.all(), message);
  }
}

std::string assumption_message(const NumberOfRun& number) {
  return c10::str("[trace] ", number.op, ": ", number.what,
                  " was {was} when the function was traced, and is {is} in this run. ", number.fix,
                  " (torchlift.jit traces the function anew for another number.)");
}

std::optional<int64_t> assumed_number(const at::Tensor& each, const NumberOfRun& number) {
  const at::Tensor all = innermost(each);
  if (!has_numbers(all)) refuse_recorded(each, number.op.c_str(), number.fix);
  if (all.numel() == 0) return std::nullopt;
  const auto result = all.reshape(-1)[0].item<int64_t>();
  if (!all.eq(result).all().item<bool>()) return std::nullopt;
  if (recorded_by(each) == nullptr) return result;
  const std::vector<at::Tensor> ends = each.dim() == 0
                                           ? std::vector<at::Tensor>{each}
                                           : std::vector<at::Tensor>{each.amin(), each.amax()};
  for (const at::Tensor& end : ends) assume(end, {result}, assumption_message(number));
  return result;
}

void note_copy_for_view(const char* op, const at::Tensor& base, const at::Tensor& copy,
                        const at::Tensor& place) {
  if (const Level* level = recording_level(place)) {
    recorder_of(*level)->note_copy_for_view(op, base, copy);
  }
}

AssumedAnswers::AssumedAnswers(const char* message, std::vector<bool> expected, Others others)
    : message_(message),
      expected_(std::move(expected)),
      others_(others),
      outer_(std::exchange(open_answers(), this)) {}

AssumedAnswers::~AssumedAnswers() { open_answers() = outer_; }

bool AssumedAnswers::open() { return open_answers() != nullptr; }

std::optional<bool> AssumedAnswers::answer(const at::Tensor& each) {
  AssumedAnswers& scope = *open_answers();
  const size_t number = scope.next_++;
  const at::Tensor plain = innermost(each);
  const bool expected = number < scope.expected_.size() && scope.expected_[number];
  bool all = expected;
  if (has_numbers(plain)) {
    all = plain.all().item<bool>();
    const bool differ = !all && plain.any().item<bool>();
    TORCH_CHECK((all == expected && !differ) || scope.others_ == Others::kAllowed, scope.message_);
    if (differ) return std::nullopt;
  }
  const at::Tensor one = each.dim() == 0 ? each : all ? each.all() : each.any();
  assume(one, {all ? 1 : 0}, scope.message_);
  return all;
}

}  // namespace torchlift
