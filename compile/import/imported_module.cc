#include "compile/import/imported_module.h"

#include <c10/util/StringUtil.h>

#include <map>
#include <optional>

#include "core/error.h"

namespace torchlift {
namespace {

using compile::ImportedCode;
using compile::ImportedTensor;

constexpr const char* kCall = "imported module";

// "'a', 'b' and 3 more"
template <class Names>
std::string list_names(const Names& names) {
  constexpr size_t kShown = 8;
  std::string text;
  size_t count = 0;
  for (const auto& name : names) {
    if (count++ == kShown) return text + " and " + std::to_string(names.size() - kShown) + " more";
    text += (text.empty() ? "'" : ", '") + name + "'";
  }
  return text.empty() ? "none" : text;
}

std::string describe(const at::Tensor& t) {
  if (!t.defined()) return "an undefined tensor";
  return c10::str("shape ", t.sizes(), ", ", t.scalar_type(), " on ", t.device());
}

}  // namespace

struct ImportedModule::Contents {
  std::vector<ImportedTensor> state;
  std::vector<std::string> input_names;
  std::shared_ptr<const ImportedCode> code;
  std::map<std::string, size_t> by_name;

  std::vector<at::Tensor> own() const {
    std::vector<at::Tensor> tensors;
    tensors.reserve(state.size());
    for (const ImportedTensor& each : state) tensors.push_back(each.tensor);
    return tensors;
  }

  std::vector<at::Tensor> bind(const ModuleState& given) const {
    std::vector<at::Tensor> tensors = own();
    std::vector<const std::string*> givers(state.size(), nullptr);
    for (const auto& [name, value] : given) {
      const auto found = by_name.find(name);
      if (found == by_name.end()) throw_unknown(name);
      const size_t place = found->second;
      check_fits(name, state[place].tensor, value);
      if (givers[place] != nullptr && !tensors[place].is_same(value)) {
        transform_error(kCall, "'", *givers[place], "' and '", name, "' are one tensor in the ",
                        "module, but got different values. Give one of them, or the same tensor ",
                        "for both.");
      }
      tensors[place] = value;
      givers[place] = &name;
    }
    return tensors;
  }

  [[noreturn]] void throw_unknown(const std::string& name) const {
    std::vector<std::string> names;
    for (const auto& each : by_name) names.push_back(each.first);
    transform_error(kCall, "the module has no parameter or buffer '", name, "'; it has ",
                    list_names(names), ".");
  }

  static void check_fits(const std::string& name, const at::Tensor& own, const at::Tensor& value) {
    if (value.defined() && value.sizes() == own.sizes() &&
        value.scalar_type() == own.scalar_type() && value.device() == own.device()) {
      return;
    }
    transform_error(kCall, "'", name, "' is a tensor of ", describe(own), "; got one of ",
                    describe(value),
                    ". Give a tensor like the module's; for a stacked one, map over it with vmap.");
  }

  void check_inputs(at::ArrayRef<at::Tensor> inputs) const {
    if (inputs.size() != input_names.size()) {
      transform_error(kCall, "the module takes ", input_names.size(), " tensors (",
                      list_names(input_names), "), and got ", inputs.size(), ".");
    }
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (!inputs[i].defined()) {
        transform_error(kCall, "input '", input_names[i], "' is an undefined tensor.");
      }
    }
  }

  std::vector<at::Tensor> run(at::ArrayRef<at::Tensor> tensors,
                              at::ArrayRef<at::Tensor> inputs) const {
    check_inputs(inputs);
    return code->run(tensors, inputs);
  }

  ModuleState tensors_of(std::optional<bool> parameters) const {
    ModuleState found;
    for (const ImportedTensor& each : state) {
      if (parameters.value_or(each.is_parameter) == each.is_parameter) {
        found.emplace(each.names[0], each.tensor);
      }
    }
    return found;
  }

  void check_names(const ReturnBuffers& wanted) const {
    for (const auto& each : wanted.modes) {
      const ReturnBuffers only{.modes = {{each.first, BufferMode::kFrozen}}};
      bool fits = false;
      for (const ImportedTensor& tensor : state) {
        fits =
            fits || (!tensor.is_parameter && only.mode_of(tensor.names[0]) == BufferMode::kFrozen);
      }
      if (fits) continue;
      transform_error(kCall, "ReturnBuffers names '", each.first,
                      "', but there is no buffer of that name and no module of that name with "
                      "buffers.");
    }
  }
};

ImportedModule::ImportedModule(std::vector<ImportedTensor> state,
                               std::vector<std::string> input_names,
                               std::shared_ptr<const ImportedCode> code) {
  Contents contents{
      .state = std::move(state), .input_names = std::move(input_names), .code = std::move(code)};
  for (size_t i = 0; i < contents.state.size(); ++i) {
    for (const std::string& name : contents.state[i].names) contents.by_name.emplace(name, i);
  }
  contents_ = std::make_shared<const Contents>(std::move(contents));
}

std::vector<at::Tensor> ImportedModule::operator()(at::ArrayRef<at::Tensor> inputs) const {
  return contents_->run(contents_->own(), inputs);
}

std::vector<at::Tensor> ImportedModule::operator()(const ModuleState& state,
                                                   at::ArrayRef<at::Tensor> inputs) const {
  return contents_->run(contents_->bind(state), inputs);
}

std::pair<std::vector<at::Tensor>, ModuleState> ImportedModule::operator()(
    const ModuleState& state, const ReturnBuffers& wanted, at::ArrayRef<at::Tensor> inputs) const {
  contents_->check_names(wanted);
  const std::vector<at::Tensor> given = contents_->bind(state);
  std::vector<at::Tensor> used = given;
  const std::vector<ImportedTensor>& all = contents_->state;
  for (size_t i = 0; i < all.size(); ++i) {
    if (!all[i].is_parameter) used[i] = copy_per_row(given[i]);
  }
  std::vector<at::Tensor> outputs = contents_->run(used, inputs);
  ModuleState buffers;
  for (size_t i = 0; i < all.size(); ++i) {
    if (all[i].is_parameter) continue;
    const BufferMode mode = wanted.mode_of(all[i].names[0]);
    buffers.emplace(all[i].names[0], mode == BufferMode::kFrozen   ? given[i]
                                     : mode == BufferMode::kShared ? share_over_rows(used[i])
                                                                   : used[i]);
  }
  return {std::move(outputs), std::move(buffers)};
}

ModuleState ImportedModule::parameters() const { return contents_->tensors_of(true); }
ModuleState ImportedModule::buffers() const { return contents_->tensors_of(false); }
ModuleState ImportedModule::state() const { return contents_->tensors_of(std::nullopt); }

const std::vector<std::string>& ImportedModule::input_names() const {
  return contents_->input_names;
}

}  // namespace torchlift
