#ifndef TORCHLIFT_BATCHING_RULES_LINEAR_CROSS_ENTROPY_H_
#define TORCHLIFT_BATCHING_RULES_LINEAR_CROSS_ENTROPY_H_

// File: batching/rules/linear_cross_entropy.h
//
// torch.nn.functional.linear_cross_entropy with `options` runs operators that are written in
// Python: they go through the rows in chunks, so that the logits of all rows are never there at
// once, and write into buffers, which no transform can follow. They are, as torch documents,
//
//   cross_entropy(linear(input, weight, bias), target, class_weight, reduction, ignore_index)
//
// and that is what they are replaced by where their own code cannot run: under vmap and in forward
// mode. Torch defines them when they are first used, so they are known by name.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace torchlift {

// What at::_ops has for an operator of libtorch's own.
template <class Self, class Schema>
struct PythonOperator;
template <class Self, class R, class... A>
struct PythonOperator<Self, R(A...)> {
  using schema = R(A...);
  static constexpr const char* overload_name = "";

  static R redispatch(c10::DispatchKeySet keys, A... args) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow(Self::name, overload_name)
                               .template typed<schema>();
    return op.redispatch(keys, args...);
  }
};

// (input [N, F] , linear_weight [C, F], target [N] or [N, C], linear_bias [C], weight [C],
// reduction, ignore_index, label_smoothing, batch_chunk_size, acc_policy, acc_dtype,
// allow_retain_graph, compute_input_grad, compute_linear_weight_grad, compute_linear_bias_grad) ->
// (loss, gradients). The gradients are for the operator's own backward pass, and are left empty.
struct LinearCrossEntropy
    : PythonOperator<LinearCrossEntropy,
                     std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
                         const at::Tensor&, const at::Tensor&, const at::Tensor&,
                         const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
                         std::string_view, c10::SymInt, double, c10::SymInt, std::string_view,
                         at::ScalarType, bool, bool, bool, bool)> {
  static constexpr const char* name = "torch_nn::_linear_cross_entropy_batch_chunked";
  static std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> decomposed(
      const at::Tensor& input, const at::Tensor& linear_weight, const at::Tensor& target,
      const std::optional<at::Tensor>& linear_bias, const std::optional<at::Tensor>& weight,
      std::string_view reduction, c10::SymInt ignore_index, double label_smoothing,
      c10::SymInt batch_chunk_size, std::string_view acc_policy, at::ScalarType acc_dtype,
      bool allow_retain_graph, bool compute_input_grad, bool compute_linear_weight_grad,
      bool compute_linear_bias_grad);
};

// The same with reduction="none": one loss [N].
struct LinearCrossEntropyRows
    : PythonOperator<LinearCrossEntropyRows,
                     at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
                                c10::SymInt, c10::SymInt, std::string_view, at::ScalarType)> {
  static constexpr const char* name = "torch_nn::_linear_cross_entropy_batch_chunked_no_reduction";
  static at::Tensor decomposed(const at::Tensor& input, const at::Tensor& linear_weight,
                               const at::Tensor& target,
                               const std::optional<at::Tensor>& linear_bias,
                               const std::optional<at::Tensor>& weight, c10::SymInt ignore_index,
                               c10::SymInt batch_chunk_size, std::string_view acc_policy,
                               at::ScalarType acc_dtype);
};

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_RULES_LINEAR_CROSS_ENTROPY_H_
