#include "compile/jit.h"

#include <ATen/core/grad_mode.h>
#include <c10/util/StringUtil.h>

#include <algorithm>

#include "core/dispatch.h"
#include "core/level.h"

namespace torchlift::compile {

std::string TensorSignature::str() const {
  return c10::str(c10::toString(dtype), at::IntArrayRef(sizes), " of strides ",
                  at::IntArrayRef(strides), " on ", device);
}

TensorSignature signature_of(const at::Tensor& tensor) {
  if (!tensor.defined()) return {at::ScalarType::Undefined, c10::kCPU, {}, {}};
  const bool strided = tensor.layout() == c10::kStrided;
  return {tensor.scalar_type(), tensor.device(), tensor.sizes().vec(),
          strided ? tensor.strides().vec() : std::vector<int64_t>()};
}

bool calls_function(const std::vector<at::Tensor>& tensors) {
  return !level_stack().empty() ||
         std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor& t) {
           return t.defined() && (is_lifted(t) || is_tracked(t));
         });
}

std::string describe_change(const std::vector<TensorSignature>& before,
                            const std::vector<TensorSignature>& now, const std::string& structure) {
  if (!structure.empty()) return structure;
  for (size_t i = 0; i < std::min(before.size(), now.size()); ++i) {
    if (before[i] == now[i]) continue;
    return c10::str("tensor ", i, " of the arguments is ", now[i].str(), "; it was ",
                    before[i].str());
  }
  return "the graph had been evicted from the cache";
}

}  // namespace torchlift::compile
