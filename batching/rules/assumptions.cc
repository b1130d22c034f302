#include "batching/rules/assumptions.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/StringUtil.h>
#include <torch/library.h>

#include <algorithm>
#include <string_view>

namespace torchlift {
namespace {

// "5", "[1, 3]"
std::string text_of(at::IntArrayRef numbers) {
  return numbers.size() == 1 ? std::to_string(numbers[0]) : c10::str(numbers);
}

std::string filled(std::string_view message, at::IntArrayRef was, at::IntArrayRef is) {
  std::string text(message);
  const auto fill = [&](const std::string& place, const std::string& with) {
    const size_t found = text.find(place);
    if (found != std::string::npos) text.replace(found, place.size(), with);
  };
  fill("{was}", text_of(was));
  fill("{is}", text_of(is));
  return text;
}

void assume_kernel(const at::Tensor& numbers, at::IntArrayRef expected, std::string_view message,
                   int64_t number) {
  std::vector<int64_t> found = integers_in(numbers);
  if (expected == found) return;
  const std::string text = filled(message, expected, found);
  throw AssumptionError(text, number, std::move(found));
}

constexpr const char* kSchema =
    "assume(Tensor numbers, int[] expected, str message, int number=0) -> ()";

bool is_defined() { return c10::Dispatcher::singleton().findSchema({kAssumeOp, ""}).has_value(); }

// Another copy of this library in the process (a program's own, beside that of the Python package)
// may have defined it.
TORCH_LIBRARY_FRAGMENT(torchlift, library) {
  if (is_defined()) return;
  library.def(kSchema);
  library.impl("assume", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(assume_kernel));
}

}  // namespace

std::vector<int64_t> integers_in(const at::Tensor& numbers) {
  if (numbers.dim() == 0) return {numbers.item<int64_t>()};
  std::vector<int64_t> all;
  for (int64_t i = 0; i < numbers.size(0); ++i) {
    for (const int64_t number : integers_in(numbers.select(0, i))) all.push_back(number);
  }
  return all;
}

void assume(const at::Tensor& numbers, at::IntArrayRef expected, const std::string& message) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow(kAssumeOp, "")
          .typed<void(const at::Tensor&, at::IntArrayRef, std::string_view, int64_t)>();
  op.call(numbers, expected, message, 0);
}

}  // namespace torchlift
