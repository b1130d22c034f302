#include "autodiff/dependence_rules.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_sparse_coo_tensor_unsafe.h>
#include <ATen/ops/any.h>
#include <ATen/ops/complex.h>
#include <ATen/ops/logical_or.h>

#include <numeric>
#include <unordered_map>
#include <utility>

#include "core/boxed.h"
#include "core/lifted_tensor.h"

namespace torchlift {

DependenceCall::DependenceCall(const c10::OperatorHandle& op, LevelPtr level,
                               std::vector<c10::IValue> args)
    : op_(op), level_(std::move(level)), args_(std::move(args)) {}

const c10::IValue* DependenceCall::find(const char* name) const {
  const auto index = op_.schema().argumentIndexWithName(name);
  if (!index.has_value() || args_[*index].isNone()) return nullptr;
  return &args_[*index];
}

at::Tensor DependenceCall::tensor(const char* name) const {
  const c10::IValue* found = find(name);
  return found != nullptr && found->isTensor() ? found->toTensor() : at::Tensor();
}

int64_t DependenceCall::integer(const char* name, int64_t otherwise) const {
  const c10::IValue* found = find(name);
  return found != nullptr && found->isInt() ? found->toInt() : otherwise;
}

bool DependenceCall::unknown(const at::Tensor& t) const {
  return t.defined() && lower(t, *level_).bdim.has_value();
}

at::Tensor DependenceCall::mask(const at::Tensor& t) const {
  if (!t.defined() || !(t.is_floating_point() || t.is_complex())) return {};
  const Lowered lowered = lower(t, *level_);
  if (!lowered.bdim.has_value()) return {};
  return lowered.value.movedim(*lowered.bdim, 0).ne(0);
}

std::vector<at::Tensor> DependenceCall::tensors() const {
  std::vector<at::Tensor> found;
  for (const c10::IValue& arg : args_) {
    for_each_tensor(arg, [&](const at::Tensor& t) { found.push_back(t); });
  }
  return found;
}

namespace {

using Table = std::unordered_map<std::string, const DependenceRow*>;

const Table& table() {
  static const auto* rows = [] {
    auto* all = new Table();
    for (const DependenceRows* family :
         {&pointwise_dependence(), &reduction_dependence(), &move_dependence(),
          &product_dependence(), &layer_dependence()}) {
      for (const DependenceRow& row : *family) {
        const bool added = all->emplace(row.name, &row).second;
        TORCH_INTERNAL_ASSERT(added, "two rows of dependence for ", row.name);
      }
    }
    return all;
  }();
  return *rows;
}

}  // namespace

const DependenceRow* find_dependence_row(const std::string& name, const std::string& overload) {
  auto found = table().find(name + "." + overload);
  if (found == table().end()) found = table().find(name);
  return found == table().end() ? nullptr : found->second;
}

at::Tensor either(const at::Tensor& a, const at::Tensor& b) {
  if (!a.defined()) return b;
  if (!b.defined()) return a;
  return at::logical_or(a, b);
}

at::Tensor align(const at::Tensor& mask, int64_t rank) {
  if (!mask.defined() || mask.dim() > rank) return mask;
  std::vector<int64_t> sizes{mask.size(0)};
  sizes.resize(rank + 2 - mask.dim(), 1);
  const auto rest = mask.sizes().slice(1);
  sizes.insert(sizes.end(), rest.begin(), rest.end());
  return mask.reshape(sizes);
}

at::Tensor any_along(const at::Tensor& mask, at::IntArrayRef dims) {
  if (!mask.defined() || mask.dim() == 1) return mask;
  std::vector<int64_t> places;
  for (const int64_t dim : dims) {
    places.push_back((dim < 0 ? dim + mask.dim() - 1 : dim) + 1);
  }
  if (places.empty()) return mask;
  return at::any(mask, places, /*keepdim=*/true);
}

at::Tensor any_element(const at::Tensor& mask, int64_t rank) {
  if (!mask.defined()) return {};
  const at::Tensor any = mask.dim() == 1 ? mask : mask.flatten(1).any(1);
  return align(any, rank);
}

at::Tensor nonzeros(const at::Tensor& constant) {
  if (constant.layout() == at::kStrided) return constant.ne(0);
  const bool is_coo = constant.layout() == at::kSparse;
  const at::Tensor coo = (is_coo ? constant : constant.to_sparse()).coalesce();
  const at::Tensor ones = coo.values().ne(0).to(at::kFloat);
  return at::_sparse_coo_tensor_unsafe(coo.indices(), ones, coo.sizes(),
                                       coo.options().dtype(at::kFloat), /*is_coalesced=*/true);
}

at::Tensor as_dtype(const at::Tensor& mask, at::ScalarType dtype) {
  if (mask.scalar_type() == dtype) return mask;
  if (!at::isComplexType(dtype)) return mask.to(dtype);
  const at::Tensor part = mask.to(c10::toRealValueType(dtype));
  return at::complex(part, part);
}

at::Tensor any_of_all(const DependenceCall& call, const at::Tensor& like, size_t /*result*/) {
  at::Tensor all;
  for (const at::Tensor& t : call.tensors()) all = either(all, align(call.mask(t), like.dim()));
  return all;
}

at::Tensor dense(const DependenceCall& call, const at::Tensor& like, size_t /*result*/) {
  at::Tensor all;
  for (const at::Tensor& t : call.tensors()) {
    all = either(all, any_element(call.mask(t), like.dim()));
  }
  return all;
}

}  // namespace torchlift
