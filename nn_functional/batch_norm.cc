#include "nn_functional/batch_norm.h"

#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/modules/container/moduledict.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/container/sequential.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/error.h"

namespace torchlift {
namespace {

using torch::nn::AnyModule;
using torch::nn::Module;

constexpr const char* kPatch = "patch_batch_norm_with";

// f(the module as its class), if it is a BatchNorm; whether it is.
template <class M, class F>
bool if_batch_norm(M& module, const F& f) {
  if (auto* one = module.template as<torch::nn::BatchNorm1dImpl>()) return f(*one), true;
  if (auto* two = module.template as<torch::nn::BatchNorm2dImpl>()) return f(*two), true;
  if (auto* three = module.template as<torch::nn::BatchNorm3dImpl>()) return f(*three), true;
  return false;
}

bool is_batch_norm(const Module& module) {
  return if_batch_norm(module, [](const auto&) {});
}

// libtorch has no way to change a registered buffer, so this names the private member where C++
// lets one: in an explicit instantiation.
using BuffersMember = torch::OrderedDict<std::string, at::Tensor> Module::*;
BuffersMember registered_buffers();
template <BuffersMember kMember>
struct AccessToBuffers {
  friend BuffersMember registered_buffers() { return kMember; }
};
template struct AccessToBuffers<&Module::buffers_>;

template <class Norm>
void drop_running_stats(Norm& norm) {
  if (!norm.options.track_running_stats()) return;
  norm.options.track_running_stats(false);
  for (const char* name : {"running_mean", "running_var", "num_batches_tracked"}) {
    // As libtorch's own code registers them where there are none.
    (norm.*registered_buffers())[name] = at::Tensor();
  }
  norm.running_mean.reset();
  norm.running_var.reset();
  norm.num_batches_tracked.reset();
}

bool is_container(const Module& module) {
  return module.as<torch::nn::SequentialImpl>() != nullptr ||
         module.as<torch::nn::ModuleListImpl>() != nullptr ||
         module.as<torch::nn::ModuleDictImpl>() != nullptr;
}

// Throws where a child of the module is a BatchNorm that cannot be replaced.
void check_children(const Module& holder, const std::string& prefix) {
  if (is_container(holder)) return;
  for (const auto& child : holder.named_children()) {
    if (!is_batch_norm(*child.value())) continue;
    transform_error(
        kPatch, "'", prefix, child.key(),
        "' is a member of a module that is no Sequential, ModuleList or ModuleDict, and "
        "only that module's own code can set it. Set it there, or use "
        "replace_all_batch_norm_modules_.");
  }
}

void check_holders(Module& root) {
  if (is_batch_norm(root)) {
    transform_error(kPatch,
                    "root itself is a BatchNorm. Give a module that holds it, or make the "
                    "other norm yourself.");
  }
  check_children(root, "");
  for (const auto& item : root.named_modules("", /*include_self=*/false)) {
    check_children(*item.value(), item.key() + ".");
  }
}

class Patch {
 public:
  explicit Patch(const MakeNorm& make) : make_(make) {}

  void apply(Module& holder) {
    if (auto* sequential = holder.as<torch::nn::SequentialImpl>()) {
      patch_sequential(*sequential);
    } else if (auto* list = holder.as<torch::nn::ModuleListImpl>()) {
      patch_list(*list);
    } else if (auto* dict = holder.as<torch::nn::ModuleDictImpl>()) {
      patch_dict(*dict);
    }
  }

 private:
  const AnyModule& replacement(Module& norm) {
    auto found = made_.find(&norm);
    if (found == made_.end()) {
      AnyModule made = make_(norm);
      if (made.is_empty()) transform_error(kPatch, "make returned no module.");
      made.ptr()->train(norm.is_training());
      found = made_.emplace(&norm, std::move(made)).first;
    }
    return found->second;
  }

  void patch_sequential(torch::nn::SequentialImpl& sequential) {
    const std::vector<std::string> names = sequential.named_children().keys();
    size_t index = 0;
    for (AnyModule& held : sequential) {
      const std::string& name = names[index++];
      const std::shared_ptr<Module> old = held.ptr();
      if (!is_batch_norm(*old)) continue;
      held = replacement(*old);
      sequential.replace_module(name, held.ptr());
      replaced_.push_back(old);
    }
  }

  void patch_list(torch::nn::ModuleListImpl& list) {
    size_t index = 0;
    for (std::shared_ptr<Module>& held : list) {
      const std::string name = std::to_string(index++);
      if (!is_batch_norm(*held)) continue;
      replaced_.push_back(held);
      held = replacement(*held).ptr();
      list.replace_module(name, held);
    }
  }

  void patch_dict(torch::nn::ModuleDictImpl& dict) {
    for (auto& item : dict) {
      if (!is_batch_norm(*item.value())) continue;
      replaced_.push_back(item.value());
      item.value() = replacement(*item.value()).ptr();
      dict.replace_module(item.key(), item.value());
    }
  }

  const MakeNorm& make_;
  std::map<Module*, AnyModule> made_;
  std::vector<std::shared_ptr<Module>> replaced_;  // alive, so that addresses stay theirs
};

}  // namespace

void replace_all_batch_norm_modules_(Module& root) {
  if_batch_norm(root, [](auto& norm) { drop_running_stats(norm); });
  for (const auto& module : root.modules(/*include_self=*/false)) {
    if_batch_norm(*module, [](auto& norm) { drop_running_stats(norm); });
  }
}

int64_t num_features(const Module& norm) {
  int64_t features = 0;
  if (!if_batch_norm(norm, [&](const auto& n) { features = n.options.num_features(); })) {
    transform_error("num_features", "expected a BatchNorm1d, 2d or 3d, got another module.");
  }
  return features;
}

void patch_batch_norm_with(Module& root, const MakeNorm& make) {
  check_holders(root);
  Patch patch(make);
  std::vector<std::shared_ptr<Module>> inside = root.modules(/*include_self=*/false);
  patch.apply(root);
  for (const auto& module : inside) patch.apply(*module);
}

}  // namespace torchlift
