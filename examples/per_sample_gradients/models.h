#ifndef TORCHLIFT_EXAMPLES_PER_SAMPLE_GRADIENTS_MODELS_H_
#define TORCHLIFT_EXAMPLES_PER_SAMPLE_GRADIENTS_MODELS_H_

// The two models of the example: plain structs of tensors, and functions of a batch of images.

#include <ATen/core/Tensor.h>

#include "core/tree.h"

namespace digits {

// The weights of a fully connected or of a convolutional layer.
struct Layer {
  at::Tensor weight, bias;
};
TORCHLIFT_PYTREE(Layer, weight, bias);

struct Mlp {
  Layer hidden1, hidden2, output;
};
TORCHLIFT_PYTREE(Mlp, hidden1, hidden2, output);

struct Cnn {
  Layer conv1, conv2, output;
};
TORCHLIFT_PYTREE(Cnn, conv1, conv2, output);

// images: [count, 1, 8, 8]. Returns [count, 10].
at::Tensor logits(const Mlp& model, const at::Tensor& images);
at::Tensor logits(const Cnn& model, const at::Tensor& images);

// The cross entropy of one digit. image: [1, 8, 8], label: []. Returns [].
template <class Model>
at::Tensor loss(const Model& model, const at::Tensor& image, const at::Tensor& label);

extern template at::Tensor loss(const Mlp&, const at::Tensor&, const at::Tensor&);
extern template at::Tensor loss(const Cnn&, const at::Tensor&, const at::Tensor&);

}  // namespace digits

#endif  // TORCHLIFT_EXAMPLES_PER_SAMPLE_GRADIENTS_MODELS_H_
