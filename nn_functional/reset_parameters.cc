#include "nn_functional/reset_parameters.h"

#include <torch/nn/modules.h>

#include <memory>
#include <string>
#include <vector>

#include "core/error.h"
#include "nn_functional/module_state.h"

namespace torchlift {
namespace {

namespace nn = torch::nn;

using Reset = void (*)(nn::Module& module);

// A row of the table: whether the module is of the class, and what to do then.
struct Row {
  bool (*is)(const nn::Module& module);
  Reset reset;
};

template <class Impl>
bool is(const nn::Module& module) {
  return module.as<Impl>() != nullptr;
}

template <class Impl>
constexpr Row row() {
  return {&is<Impl>, [](nn::Module& module) { module.as<Impl>()->reset_parameters(); }};
}

// Classes whose initial values are constants: a copy is as good.
template <class Impl>
constexpr Row constant() {
  return {&is<Impl>, [](nn::Module&) {}};
}

constexpr Row kRows[] = {
    row<nn::LinearImpl>(),
    row<nn::BilinearImpl>(),
    row<nn::Conv1dImpl>(),
    row<nn::Conv2dImpl>(),
    row<nn::Conv3dImpl>(),
    row<nn::ConvTranspose1dImpl>(),
    row<nn::ConvTranspose2dImpl>(),
    row<nn::ConvTranspose3dImpl>(),
    row<nn::EmbeddingImpl>(),
    row<nn::EmbeddingBagImpl>(),
    row<nn::BatchNorm1dImpl>(),
    row<nn::BatchNorm2dImpl>(),
    row<nn::BatchNorm3dImpl>(),
    row<nn::InstanceNorm1dImpl>(),
    row<nn::InstanceNorm2dImpl>(),
    row<nn::InstanceNorm3dImpl>(),
    row<nn::LayerNormImpl>(),
    row<nn::GroupNormImpl>(),
    constant<nn::PReLUImpl>(),
    row<nn::RNNImpl>(),
    row<nn::LSTMImpl>(),
    row<nn::GRUImpl>(),
    row<nn::RNNCellImpl>(),
    row<nn::LSTMCellImpl>(),
    row<nn::GRUCellImpl>(),
    {&is<nn::MultiheadAttentionImpl>,
     [](nn::Module& module) { module.as<nn::MultiheadAttentionImpl>()->_reset_parameters(); }},
    row<nn::TransformerImpl>(),
};

const Row* row_of(const nn::Module& module) {
  for (const Row& row : kRows) {
    if (row.is(module)) return &row;
  }
  return nullptr;
}

void check_known(const nn::Module& module, const std::string& name) {
  if (row_of(module) != nullptr || module.parameters(/*recurse=*/false).empty()) return;
  transform_error("make_ensemble", "'", name, "' (", StateSlots(module).module_name(),
                  ") has parameters of its own and is no class of torch::nn whose "
                  "reset_parameters() is known, so EnsembleInit::kVmap cannot make them anew. Use "
                  "EnsembleInit::kFactory.");
}

}  // namespace

void reset_all_parameters(nn::Module& root) {
  std::vector<std::shared_ptr<nn::Module>> inside;
  check_known(root, "");
  for (const auto& item : root.named_modules("", /*include_self=*/false)) {
    check_known(*item.value(), item.key());
    inside.push_back(item.value());
  }
  for (auto module = inside.rbegin(); module != inside.rend(); ++module) {
    if (const Row* row = row_of(**module)) row->reset(**module);
  }
  if (const Row* row = row_of(root)) row->reset(root);
}

}  // namespace torchlift
