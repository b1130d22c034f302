#include "nn_functional/ensemble.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <torch/nn/modules/container/any.h>

#include <algorithm>
#include <map>
#include <ostream>
#include <sstream>
#include <typeinfo>

#include "core/error.h"
#include "nn_functional/reset_parameters.h"

namespace torchlift {

using ensemble_internal::Group;
using ensemble_internal::Inputs;
using ensemble_internal::Member;
using torch::nn::AnyModule;
using torch::nn::Module;

namespace {

constexpr const char* kEnsemble = "Ensemble";

// The modules by name, root first.
std::vector<std::pair<std::string, std::shared_ptr<Module>>> all_modules(
    const std::shared_ptr<Module>& root) {
  std::vector<std::pair<std::string, std::shared_ptr<Module>>> found{{"", root}};
  for (const auto& item : root->named_modules("", /*include_self=*/false)) {
    found.emplace_back(item.key(), item.value());
  }
  return found;
}

void describe_tensors(std::ostream& out, const torch::OrderedDict<std::string, at::Tensor>& named,
                      std::map<const c10::TensorImpl*, std::string>& first_names) {
  for (const auto& item : named) {
    const at::Tensor& t = item.value();
    const std::string& first =
        first_names.emplace(t.unsafeGetTensorImpl(), item.key()).first->second;
    out << item.key() << ' ' << t.sizes() << ' ' << t.scalar_type() << ' ' << t.device() << ' '
        << t.requires_grad() << ' ' << first << '\n';
  }
}

// All that can be seen of a model but the values of its tensors.
std::string signature_of(const std::shared_ptr<Module>& model, const EnsembleOptions& options) {
  std::ostringstream out;
  for (const auto& [name, module] : all_modules(model)) {
    const Module& ref = *module;
    out << name << ' ' << typeid(ref).name() << ' ';
    ref.pretty_print(out);
    out << ' ' << ref.is_training() << '\n';
  }
  std::map<const c10::TensorImpl*, std::string> first_names;
  describe_tensors(out, model->named_parameters(), first_names);
  describe_tensors(out, model->named_buffers(), first_names);
  if (options.signature) out << options.signature(*model);
  return out.str();
}

// A module that holds tensors under dotted names.
class StateHolder {
 public:
  StateHolder() : root_(std::make_shared<Module>()) {}

  void add_parameter(const std::string& name, const at::Tensor& t, bool requires_grad) {
    const auto [owner, leaf] = owner_of(name);
    owner->register_parameter(leaf, t, requires_grad);
  }

  void add_buffer(const std::string& name, const at::Tensor& t) {
    const auto [owner, leaf] = owner_of(name);
    owner->register_buffer(leaf, t);
  }

  const std::shared_ptr<Module>& root() const { return root_; }

 private:
  std::pair<std::shared_ptr<Module>, std::string> owner_of(const std::string& name) {
    std::shared_ptr<Module> owner = root_;
    size_t start = 0;
    for (size_t dot = name.find('.'); dot != std::string::npos; dot = name.find('.', start)) {
      const std::string part = name.substr(start, dot - start);
      const auto children = owner->named_children();
      const auto* child = children.find(part);
      owner = child != nullptr ? *child : owner->register_module(part, std::make_shared<Module>());
      start = dot + 1;
    }
    return {owner, name.substr(start)};
  }

  std::shared_ptr<Module> root_;
};

ModuleState stack_states(const std::vector<Member>& members) {
  std::vector<ModuleState> states;
  for (const Member& member : members) states.push_back(extract_state(*member.module));
  const c10::AutoGradMode no_grad(false);
  ModuleState stacked;
  for (const auto& [name, first] : states[0]) {
    std::vector<at::Tensor> tensors;
    for (const ModuleState& state : states) tensors.push_back(state.at(name).detach());
    stacked.emplace(name, at::stack(tensors));
  }
  return stacked;
}

// The state of `members` copies, made anew by the modules' reset_parameters().
ModuleState initialised_states(Module& first, int64_t members) {
  const c10::AutoGradMode no_grad(false);
  ModuleState copies;
  for (const auto& [name, t] : extract_state(first)) {
    std::vector<int64_t> sizes = t.sizes().vec();
    sizes.insert(sizes.begin(), members);
    copies.emplace(name, t.detach().unsqueeze(0).expand(sizes).clone());
  }
  const StateSlots slots(first, {}, "make_ensemble");
  const auto reset = [&](const ModuleState& state) {
    const SubstitutionScope scope(slots.bind({&state}));
    reset_all_parameters(first);
    return state;  // written in place
  };
  return vmap(reset, {.randomness = Randomness::kDifferent, .axis_size = members})(copies);
}

at::Tensor stacked(const std::vector<at::Tensor>& outputs) {
  for (size_t i = 1; i < outputs.size(); ++i) {
    if (outputs[i].sizes() == outputs[0].sizes() &&
        outputs[i].scalar_type() == outputs[0].scalar_type()) {
      continue;
    }
    transform_error(kEnsemble, "the output of member 0 has shape ", outputs[0].sizes(), ", ",
                    outputs[0].scalar_type(), ", and that of member ", i, " has shape ",
                    outputs[i].sizes(), ", ", outputs[i].scalar_type(),
                    ", so they cannot be stacked. Call outputs(), which returns a list.");
  }
  return at::stack(outputs);
}

void check_first_dim(const at::Tensor& t, int64_t members) {
  if (t.dim() > 0 && t.size(0) == members) return;
  transform_error(kEnsemble, "map_members expects inputs with a first dim of ", members,
                  " members, got shape ", t.sizes(), ".");
}

// The rows of the group's members.
Inputs rows_of(const Inputs& inputs, const Group& group) {
  Inputs rows;
  for (const at::Tensor& t : inputs) {
    rows.push_back(at::index_select(t, 0, at::tensor(group.places).to(t.device())));
  }
  return rows;
}

}  // namespace

namespace ensemble_internal {

void throw_arguments(const Module& module, size_t given) {
  transform_error(kEnsemble, "forward of ", StateSlots(module).module_name(), " does not take ",
                  given, " tensors and return one.");
}

Member member_of(const AnyModule& model) {
  const auto code = std::make_shared<AnyModule>(model);
  return {model.ptr(), [code](const Inputs& inputs) -> at::Tensor {
            switch (inputs.size()) {
              case 1:
                return code->forward(inputs[0]);
              case 2:
                return code->forward(inputs[0], inputs[1]);
              case 3:
                return code->forward(inputs[0], inputs[1], inputs[2]);
              default:
                throw_arguments(*code->ptr(), inputs.size());
            }
          }};
}

at::Tensor stack_losses(const std::vector<at::Tensor>& losses) {
  for (const at::Tensor& loss : losses) {
    if (loss.numel() == 1) continue;
    transform_error(kEnsemble, "the loss of a member must be one number, got shape ", loss.sizes(),
                    ".");
  }
  std::vector<at::Tensor> numbers;
  for (const at::Tensor& loss : losses) numbers.push_back(loss.reshape({}));
  return at::stack(numbers);
}

void check_size(int64_t members) {
  if (members >= 1) return;
  transform_error("make_ensemble", "the number of members must be at least 1, got ", members, ".");
}

}  // namespace ensemble_internal

EnsembleImpl::EnsembleImpl(std::vector<Member> members, EnsembleOptions options)
    : size_(static_cast<int64_t>(members.size())), randomness_(options.randomness) {
  if (members.empty()) transform_error(kEnsemble, "expected at least one member, got none.");
  const bool training = members[0].module->is_training();
  std::vector<std::pair<std::string, std::vector<int64_t>>> found;  // signatures, places
  for (int64_t i = 0; i < size_; ++i) {
    const std::shared_ptr<Module>& member = members[static_cast<size_t>(i)].module;
    if (member->is_training() != training) {
      transform_error(kEnsemble,
                      "expected all members in training mode or all in eval mode. Call train() or "
                      "eval() on each.");
    }
    const std::string signature = signature_of(member, options);
    auto group = std::find_if(found.begin(), found.end(),
                              [&](const auto& g) { return g.first == signature; });
    if (group == found.end()) group = found.insert(found.end(), {signature, {}});
    group->second.push_back(i);
  }
  for (auto& [signature, places] : found) {
    std::vector<Member> alike;
    for (const int64_t place : places) alike.push_back(members[static_cast<size_t>(place)]);
    add_group(alike[0], places, stack_states(alike));
  }
  train(training);
}

std::shared_ptr<EnsembleImpl> EnsembleImpl::initialised(Member first, int64_t members,
                                                        EnsembleOptions options) {
  std::shared_ptr<EnsembleImpl> ensemble(new EnsembleImpl(options.randomness));
  std::vector<int64_t> places;
  for (int64_t i = 0; i < members; ++i) places.push_back(i);
  const bool training = first.module->is_training();
  const ModuleState state = initialised_states(*first.module, members);
  ensemble->size_ = members;
  ensemble->add_group(std::move(first), std::move(places), state);
  ensemble->train(training);
  return ensemble;
}

void EnsembleImpl::add_group(Member code, std::vector<int64_t> places,
                             const ModuleState& stacked_state) {
  StateSlots slots(*code.module, {}, kEnsemble);
  StateHolder holder;
  const std::vector<std::string> names = slots.parameter_names();
  const std::vector<at::Tensor> own = slots.parameters();
  for (size_t i = 0; i < own.size(); ++i) {
    holder.add_parameter(names[i], stacked_state.at(names[i]), own[i].requires_grad());
  }
  for (const std::string& name : slots.buffer_names()) {
    holder.add_buffer(name, stacked_state.at(name));
  }
  register_module(std::to_string(groups_.size()), holder.root());
  groups_.push_back({std::move(code), std::move(slots), std::move(places), holder.root()});
}

at::Tensor EnsembleImpl::run_group(const Group& group, const Dims& in_dim,
                                   const Inputs& inputs) const {
  const auto one = [&](const ModuleState& state, const Inputs& own) {
    const SubstitutionScope scope(group.slots.bind({&state}));
    return group.code.forward(own);
  };
  return vmap(one, {.in_dims = in(0, in_dim),
                    .randomness = randomness_,
                    .axis_size = static_cast<int64_t>(group.places.size())})(
      extract_state(*group.state), inputs);
}

at::Tensor EnsembleImpl::forward(const EnsembleInputs& inputs) {
  if (groups_.size() == 1) return run_group(groups_[0], Dims(kNone), inputs.tensors);
  return stacked(outputs(inputs));
}

std::vector<at::Tensor> EnsembleImpl::outputs(const EnsembleInputs& inputs) {
  return in_order(
      [&](const Group& group) { return run_group(group, Dims(kNone), inputs.tensors); });
}

at::Tensor EnsembleImpl::map_members(const EnsembleInputs& inputs) {
  for (const at::Tensor& t : inputs.tensors) check_first_dim(t, size_);
  if (groups_.size() == 1) return run_group(groups_[0], Dims(0), inputs.tensors);
  return stacked(in_order([&](const Group& group) {
    return run_group(group, Dims(0), rows_of(inputs.tensors, group));
  }));
}

std::vector<at::Tensor> EnsembleImpl::in_order(
    const std::function<at::Tensor(const Group&)>& run) const {
  std::vector<at::Tensor> outputs(static_cast<size_t>(size_));
  for (const Group& group : groups_) {
    const std::vector<at::Tensor> rows = run(group).unbind(0);
    for (size_t i = 0; i < rows.size(); ++i) {
      outputs[static_cast<size_t>(group.places[i])] = rows[i];
    }
  }
  return outputs;
}

ModuleState EnsembleImpl::member_state(int64_t member) const {
  for (const Group& group : groups_) {
    const auto place = std::find(group.places.begin(), group.places.end(), member);
    if (place == group.places.end()) continue;
    ModuleState state;
    for (const auto& [name, t] : extract_state(*group.state)) {
      state.emplace(name, t.detach().select(0, place - group.places.begin()).clone());
    }
    return state;
  }
  transform_error(kEnsemble, "there is no member ", member, "; there are ", size_, ".");
}

void EnsembleImpl::train(bool on) {
  Module::train(on);
  for (const Group& group : groups_) group.code.module->train(on);
}

void EnsembleImpl::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  Module::to(device, dtype, non_blocking);
  for (const Group& group : groups_) group.code.module->to(device, dtype, non_blocking);
}

void EnsembleImpl::to(torch::Dtype dtype, bool non_blocking) {
  Module::to(dtype, non_blocking);
  for (const Group& group : groups_) group.code.module->to(dtype, non_blocking);
}

void EnsembleImpl::to(torch::Device device, bool non_blocking) {
  Module::to(device, non_blocking);
  for (const Group& group : groups_) group.code.module->to(device, non_blocking);
}

void EnsembleImpl::pretty_print(std::ostream& stream) const {
  stream << "torchlift::Ensemble(members=" << size_ << ")";
}

}  // namespace torchlift
