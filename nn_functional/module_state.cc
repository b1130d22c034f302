#include "nn_functional/module_state.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/copy_ops.h>
#include <c10/util/Type.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <iterator>
#include <numeric>
#include <utility>

#include "core/error.h"

namespace torchlift {
namespace {

// Not module.name(), which writes into the module when it is first called.
std::string name_of(const std::type_info& type) {
  std::string name = c10::demangle(type.name());
  if (name.size() > 4 && name.ends_with("Impl")) name.resize(name.size() - 4);
  const size_t scope = name.find('<') == std::string::npos ? name.rfind("::") : std::string::npos;
  return scope == std::string::npos ? name : name.substr(scope + 2);
}

// "'a', 'b' and 3 more"
template <class Names>
std::string list_names(const Names& names) {
  std::string text;
  size_t count = 0;
  for (const auto& name : names) {
    if (count++ == 8) return text + " and " + std::to_string(names.size() - 8) + " more";
    text += (text.empty() ? "'" : ", '") + name + "'";
  }
  return text.empty() ? "none" : text;
}

std::string describe(const at::Tensor& t) {
  return c10::str("shape ", t.sizes(), ", ", t.scalar_type(), " on ", t.device());
}

// Opens up the parameters that a module holds, without the copies that named_parameters() makes.
struct Opened : torch::nn::Module {
  static const auto& parameters(const torch::nn::Module& module) {
    return module.*(&Opened::parameters_);
  }
};

bool address_less(const at::Tensor& a, const at::Tensor& b) {
  return a.unsafeGetTensorImpl() < b.unsafeGetTensorImpl();
}

}  // namespace

ModuleState extract_state(const torch::nn::Module& module, StateKind kind) {
  const StateSlots slots(module);
  ModuleState state;
  const auto add = [&](const std::vector<std::string>& names, const std::vector<at::Tensor>& own) {
    for (size_t i = 0; i < names.size(); ++i) state.emplace(names[i], own[i]);
  };
  if (kind != StateKind::kBuffers) add(slots.parameter_names(), slots.parameters());
  if (kind != StateKind::kParameters) add(slots.buffer_names(), slots.buffers());
  return state;
}

void load_state(torch::nn::Module& module, const ModuleState& state, bool strict) {
  const StateSlots slots(module, {.strict = strict}, "load_state");
  const c10::AutoGradMode no_grad(false);
  for (Substitution& s : slots.bind({&state})) {
    at::_ops::copy_::call(s.own, s.value, /*non_blocking=*/false);
  }
}

StateSlots::StateSlots(const torch::nn::Module& module, FunctionalOptions options,
                       const char* transform)
    : transform_(transform), type_(&typeid(module)), options_(options) {
  std::vector<Slot> buffers;
  slots_.reserve(16);  // a layer or a few, where the cost of a call is to be seen
  module.apply([&](const std::string& path, const torch::nn::Module& part) {
    const auto add = [&](std::vector<Slot>& slots, const auto& registered) {
      for (const auto& item : registered) {
        if (!item.value().defined()) continue;
        slots.push_back({path.empty() ? item.key() : path + "." + item.key(), item.value()});
      }
    };
    add(slots_, Opened::parameters(part));
    add(buffers, part.named_buffers(/*recurse=*/false));
  });
  const size_t parameter_count = slots_.size();
  std::move(buffers.begin(), buffers.end(), std::back_inserter(slots_));
  distinct_.reserve(slots_.size());
  for (const Slot& slot : slots_) distinct_.push_back(slot.own);
  std::sort(distinct_.begin(), distinct_.end(), address_less);
  const auto same = [](const at::Tensor& a, const at::Tensor& b) { return a.is_same(b); };
  distinct_.erase(std::unique(distinct_.begin(), distinct_.end(), same), distinct_.end());
  std::vector<bool> seen(distinct_.size());
  for (size_t i = 0; i < slots_.size(); ++i) {
    Slot& slot = slots_[i];
    slot.place = static_cast<size_t>(
        std::lower_bound(distinct_.begin(), distinct_.end(), slot.own, address_less) -
        distinct_.begin());
    if (!seen[slot.place]) (i < parameter_count ? parameters_ : buffers_).push_back(i);
    seen[slot.place] = true;
  }
  by_name_.resize(slots_.size());
  std::iota(by_name_.begin(), by_name_.end(), size_t{0});
  std::sort(by_name_.begin(), by_name_.end(),
            [this](size_t a, size_t b) { return slots_[a].name < slots_[b].name; });
}

std::string StateSlots::module_name() const { return name_of(*type_); }

// Collects values for the distinct tensors.
class StateSlots::Binder {
 public:
  explicit Binder(const StateSlots& slots)
      : slots_(slots), values_(slots.distinct_.size()), givers_(slots.distinct_.size()) {}

  void add(const Slot& slot, const at::Tensor& value) {
    check_fits(slot, value);
    if (givers_[slot.place] != nullptr && !values_[slot.place].is_same(value)) {
      fail_conflict(*givers_[slot.place], slot);
    }
    values_[slot.place] = value;
    givers_[slot.place] = &slot;
  }

  std::vector<Substitution> finish() {
    if (slots_.options_.strict) check_complete();
    std::vector<Substitution> found;
    found.reserve(values_.size());
    for (size_t i = 0; i < values_.size(); ++i) {
      if (givers_[i] != nullptr) found.push_back({slots_.distinct_[i], std::move(values_[i])});
    }
    return found;
  }

 private:
  void check_fits(const Slot& slot, const at::Tensor& value) const {
    const at::Tensor& own = slot.own;
    if (value.defined() && value.sizes() == own.sizes() &&
        value.scalar_type() == own.scalar_type() &&
        (value.device() == own.device() || own.is_meta())) {
      return;
    }
    transform_error(
        slots_.transform_, "'", slot.name, "' of ", slots_.module_name(), " is a tensor of ",
        describe(own), "; got ", value.defined() ? "one of " + describe(value) : "an undefined one",
        ". Give a tensor like the module's (for a stacked one, map over it with vmap), or "
        "convert the module with to().");
  }

  [[noreturn]] void fail_conflict(const Slot& a, const Slot& b) const {
    transform_error(slots_.transform_, "'", a.name, "' and '", b.name, "' are one tensor in ",
                    slots_.module_name(),
                    ", but got different values. Give one of them, or the same tensor for both.");
  }

  void check_complete() const {
    std::vector<std::string> missing;
    for (const Slot& slot : slots_.slots_) {
      if (givers_[slot.place] == nullptr) missing.push_back(slot.name);
    }
    if (missing.empty()) return;
    transform_error(slots_.transform_,
                    "with strict=true the state must name every parameter and buffer of ",
                    slots_.module_name(), "; it lacks ", list_names(missing), ".");
  }

  const StateSlots& slots_;
  std::vector<at::Tensor> values_;
  std::vector<const Slot*> givers_;
};

const StateSlots::Slot* StateSlots::find(const std::string& name) const {
  const auto found =
      std::lower_bound(by_name_.begin(), by_name_.end(), name,
                       [this](size_t i, const std::string& n) { return slots_[i].name < n; });
  return found != by_name_.end() && slots_[*found].name == name ? &slots_[*found] : nullptr;
}

void StateSlots::throw_unknown(const std::string& name) const {
  transform_error(transform_, module_name(), " has no parameter or buffer '", name, "'. It has ",
                  list_names(names(by_name_)), ".");
}

std::vector<Substitution> StateSlots::bind(const std::vector<const ModuleState*>& states) const {
  Binder binder(*this);
  for (size_t i = 0; i < states.size(); ++i) {
    for (const auto& [name, value] : *states[i]) {
      const Slot* slot = find(name);
      if (slot == nullptr) throw_unknown(name);
      for (size_t j = 0; j < i; ++j) {
        if (states[j]->count(name) == 0) continue;
        transform_error(transform_, "'", name,
                        "' is in more than one of the states. Give it once.");
      }
      binder.add(*slot, value);
    }
  }
  return binder.finish();
}

std::vector<Substitution> StateSlots::bind(const std::vector<at::Tensor>& parameters,
                                           const std::vector<at::Tensor>& buffers) const {
  if (parameters.size() != parameters_.size() || buffers.size() != buffers_.size()) {
    transform_error(transform_, module_name(), " has ", parameters_.size(), " parameters and ",
                    buffers_.size(), " buffers; got ", parameters.size(), " and ", buffers.size(),
                    ".");
  }
  Binder binder(*this);
  for (size_t i = 0; i < parameters.size(); ++i) binder.add(slots_[parameters_[i]], parameters[i]);
  for (size_t i = 0; i < buffers.size(); ++i) binder.add(slots_[buffers_[i]], buffers[i]);
  return binder.finish();
}

std::vector<std::string> StateSlots::names(const std::vector<size_t>& indices) const {
  std::vector<std::string> found;
  for (const size_t i : indices) found.push_back(slots_[i].name);
  return found;
}

std::vector<at::Tensor> StateSlots::tensors(const std::vector<size_t>& indices) const {
  std::vector<at::Tensor> found;
  for (const size_t i : indices) found.push_back(slots_[i].own);
  return found;
}

std::vector<std::string> StateSlots::parameter_names() const { return names(parameters_); }

std::vector<std::string> StateSlots::buffer_names() const { return names(buffers_); }

std::vector<at::Tensor> StateSlots::parameters() const { return tensors(parameters_); }

std::vector<at::Tensor> StateSlots::buffers() const { return tensors(buffers_); }

}  // namespace torchlift
