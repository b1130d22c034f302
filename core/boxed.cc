#include "core/boxed.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include "core/dispatch.h"
#include "core/promotion.h"

namespace torchlift {

void for_each_tensor(const c10::IValue& value, const std::function<void(const at::Tensor&)>& f) {
  if (value.isTensor()) {
    const at::Tensor& t = value.toTensor();
    if (t.defined()) f(t);
  } else if (value.isTensorList()) {
    for (const at::Tensor& t : value.toTensorVector()) {
      if (t.defined()) f(t);
    }
  } else if (value.isOptionalTensorList()) {
    for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector()) {
      if (t.has_value() && t->defined()) f(*t);
    }
  }
}

c10::IValue map_tensors(const c10::IValue& value,
                        const std::function<at::Tensor(const at::Tensor&)>& f) {
  if (value.isTensor()) {
    const at::Tensor& t = value.toTensor();
    return t.defined() ? c10::IValue(f(t)) : value;
  }
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& t : value.toTensorVector()) list.push_back(t.defined() ? f(t) : t);
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector()) {
      list.push_back(t.has_value() && t->defined() ? std::optional<at::Tensor>(f(*t)) : t);
    }
    return list;
  }
  return value;
}

bool writes_argument(const c10::OperatorHandle& op, size_t index) {
  const auto* alias = op.schema().arguments()[index].alias_info();
  return alias != nullptr && alias->isWrite();
}

namespace {

// An operator that is functional but for arguments that it also writes (rrelu_with_noise, running
// statistics) leaves the versions of these as they are: autograd saves what it has written.
bool leaves_versions(const c10::OperatorHandle& op) {
  for (const auto& result : op.schema().returns()) {
    if (result.alias_info() != nullptr && result.alias_info()->isWrite()) return false;
  }
  return !op.schema().returns().empty();
}

}  // namespace

WriteScopes::WriteScopes(const c10::OperatorHandle& op, const std::vector<c10::IValue>& args) {
  if (leaves_versions(op)) return;
  for (size_t i = 0; i < args.size(); ++i) {
    if (!writes_argument(op, i)) continue;
    for_each_tensor(args[i], [this](const at::Tensor& t) {
      if (is_lifted(t)) scopes_.emplace_back(as_lifted(t));
    });
  }
}

namespace {

// A target from outside takes what all examples share, as it is.
bool belongs(const at::Tensor& t, const Level& level) {
  const LiftedTensorImpl* impl = as_lifted(t);
  return impl != nullptr && &impl->level() == &level;
}

}  // namespace

void apply_unbatched(const c10::OperatorHandle& op, const LevelPtr& level,
                     torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t count = schema.arguments().size();
  const std::vector<c10::IValue> args(stack->end() - static_cast<int64_t>(count), stack->end());
  torch::jit::drop(*stack, count);
  const auto unlift = [&](const at::Tensor& t) { return lower(t, *level).value; };
  for (const c10::IValue& arg : args) stack->push_back(map_tensors(arg, unlift));
  {
    const WriteScopes writing(op, args);
    op.callBoxed(*stack);
  }
  const size_t results = schema.returns().size();
  // Results that are arguments written in place keep their identity.
  std::vector<c10::IValue> written;
  for (size_t i = 0; i < count; ++i) {
    if (!writes_argument(op, i)) continue;
    for_each_tensor(args[i], [&](const at::Tensor& t) {
      if (belongs(t, *level)) as_lifted(t)->refresh_metadata();
    });
    written.push_back(args[i]);
  }
  size_t next = 0;
  for (size_t r = 0; r < results; ++r) {
    c10::IValue& result = (*stack)[stack->size() - results + r];
    const auto* alias = schema.returns()[r].alias_info();
    if (alias != nullptr && alias->isWrite() && next < written.size()) {
      result = written[next++];
    } else {
      result = map_tensors(result, [&](const at::Tensor& t) {
        at::Tensor lifted = lift_shared(t, level);
        if (alias != nullptr && args[0].isTensor()) note_views({lifted}, args[0].toTensor());
        return lifted;
      });
    }
  }
}

}  // namespace torchlift
