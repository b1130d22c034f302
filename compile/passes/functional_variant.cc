#include "compile/passes/functional_variant.h"

#include <ATen/core/enum_tag.h>
#include <ATen/core/function_schema.h>
#include <ATen/core/jit_type.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>

#include "core/boxed.h"

namespace torchlift::compile {
namespace {

using Overloads = std::vector<c10::OperatorHandle>;

// All operators of a name. To ask the dispatcher for all names takes a millisecond, so that is done
// anew only where nothing was found: libraries may register more at any time.
Overloads overloads_of(const std::string& name, bool anew) {
  static std::mutex mutex;
  static std::unordered_map<std::string, std::vector<std::string>> index;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& dispatcher = c10::Dispatcher::singleton();
  if (index.empty() || anew) {
    index.clear();
    for (const auto& each : dispatcher.getAllOpNames()) {
      index[each.name].push_back(each.overload_name);
    }
  }
  Overloads found;
  const auto overloads = index.find(name);
  if (overloads == index.end()) return found;
  for (const std::string& overload : overloads->second) {
    // A kernel may be registered before, or without, its schema.
    if (const auto op = dispatcher.findSchema({name, overload})) found.push_back(*op);
  }
  return found;
}

bool writes(const c10::OperatorHandle& op) {
  for (size_t i = 0; i < op.schema().arguments().size(); ++i) {
    if (writes_argument(op, i)) return true;
  }
  return false;
}

bool is_option(const c10::Argument& argument) {
  constexpr std::array<std::string_view, 5> kOptions = {"dtype", "layout", "device", "pin_memory",
                                                        "memory_format"};
  return std::find(kOptions.begin(), kOptions.end(), argument.name()) != kOptions.end();
}

bool same_argument(const c10::Argument& a, const c10::Argument& b) {
  return a.name() == b.name() && *a.type() == *b.type();
}

bool has_arguments(const c10::OperatorHandle& op, const std::vector<const c10::Argument*>& wanted,
                   bool options_too) {
  size_t next = 0;
  for (const c10::Argument& argument : op.schema().arguments()) {
    if (next < wanted.size() && same_argument(argument, *wanted[next])) {
      ++next;
    } else if (!options_too || !is_option(argument)) {
      return false;
    }
  }
  return next == wanted.size();
}

std::string without_underscore(const std::string& name) {
  const bool in_place = name.size() > 2 && name.back() == '_' && name[name.size() - 2] != '_';
  return in_place ? name.substr(0, name.size() - 1) : name;
}

}  // namespace

namespace {

std::optional<FunctionalVariant> functional_variant(const c10::OperatorHandle& op, bool anew) {
  const auto& schema = op.schema();
  std::vector<size_t> written;
  std::vector<const c10::Argument*> all, read_only;
  bool out_form = true;
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const c10::Argument& argument = schema.arguments()[i];
    all.push_back(&argument);
    if (!writes_argument(op, i)) {
      read_only.push_back(&argument);
      continue;
    }
    written.push_back(i);
    out_form = out_form && argument.is_out();
  }
  if (written.empty()) return std::nullopt;
  size_t own = 0;
  for (const c10::Argument& result : schema.returns()) {
    if (result.alias_info() == nullptr) ++own;
  }
  const std::string base = without_underscore(schema.name());
  for (const std::string& name : {base, base + "_functional"}) {
    for (const c10::OperatorHandle& candidate : overloads_of(name, anew)) {
      if (writes(candidate)) continue;
      if (candidate.schema().returns().size() != own + written.size()) continue;
      if (!has_arguments(candidate, out_form ? read_only : all, out_form)) continue;
      return FunctionalVariant{candidate, written, own, out_form};
    }
  }
  return std::nullopt;
}

std::optional<c10::OperatorHandle> view_variant(const c10::OperatorHandle& op, bool anew) {
  std::vector<const c10::Argument*> arguments;
  for (const c10::Argument& argument : op.schema().arguments()) arguments.push_back(&argument);
  for (const c10::OperatorHandle& candidate :
       overloads_of(without_underscore(op.schema().name()), anew)) {
    const auto& returns = candidate.schema().returns();
    const bool view = returns.size() == 1 && returns[0].alias_info() != nullptr &&
                      !returns[0].alias_info()->isWrite();
    if (view && has_arguments(candidate, arguments, false)) return candidate;
  }
  return std::nullopt;
}

}  // namespace

std::optional<FunctionalVariant> find_functional_variant(const c10::OperatorHandle& op) {
  const auto known = functional_variant(op, /*anew=*/false);
  return known.has_value() ? known : functional_variant(op, /*anew=*/true);
}

std::optional<c10::OperatorHandle> find_view_variant(const c10::OperatorHandle& op) {
  if (!op.hasTag(at::Tag::inplace_view)) return std::nullopt;
  const auto known = view_variant(op, /*anew=*/false);
  return known.has_value() ? known : view_variant(op, /*anew=*/true);
}

}  // namespace torchlift::compile
