#include "batching/testing/call_op.h"

#include <ATen/core/dispatch/Dispatcher.h>

namespace torchlift::testing {

std::vector<at::Tensor> call_op(const std::string& name, std::vector<c10::IValue> args) {
  const size_t dot = name.find('.');
  const std::string overload = dot == std::string::npos ? "" : name.substr(dot + 1);
  const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow(name.substr(0, dot).c_str(), overload.c_str());
  const auto& formals = op.schema().arguments();
  for (size_t i = args.size(); i < formals.size(); ++i) {
    args.push_back(formals[i].default_value().value_or(c10::IValue()));
  }
  op.callBoxed(args);
  std::vector<at::Tensor> results;
  for (const c10::IValue& result : args) {
    if (result.isTensor()) results.push_back(result.toTensor());
    if (result.isTensorList()) {
      for (const at::Tensor& each : result.toTensorVector()) results.push_back(each);
    }
  }
  return results;
}

}  // namespace torchlift::testing
