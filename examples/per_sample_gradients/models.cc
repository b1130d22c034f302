#include "examples/per_sample_gradients/models.h"

#include <ATen/ops/conv2d.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/relu.h>

namespace digits {
namespace {

at::Tensor linear(const Layer& layer, const at::Tensor& x) {
  return at::linear(x, layer.weight, layer.bias);
}

at::Tensor conv_relu_pool(const Layer& layer, const at::Tensor& x) {
  const at::Tensor y =
      at::conv2d(x, layer.weight, layer.bias, /*stride=*/at::IntArrayRef{1, 1}, /*padding=*/{1, 1});
  return at::max_pool2d(at::relu(y), /*kernel_size=*/{2, 2});
}

}  // namespace

at::Tensor logits(const Mlp& model, const at::Tensor& images) {
  const at::Tensor h1 = at::relu(linear(model.hidden1, images.flatten(1)));
  const at::Tensor h2 = at::relu(linear(model.hidden2, h1));
  return linear(model.output, h2);
}

at::Tensor logits(const Cnn& model, const at::Tensor& images) {
  const at::Tensor h1 = conv_relu_pool(model.conv1, images);
  const at::Tensor h2 = conv_relu_pool(model.conv2, h1);
  return linear(model.output, h2.flatten(1));
}

template <class Model>
at::Tensor loss(const Model& model, const at::Tensor& image, const at::Tensor& label) {
  return at::cross_entropy_loss(logits(model, image.unsqueeze(0)), label.unsqueeze(0));
}

template at::Tensor loss(const Mlp&, const at::Tensor&, const at::Tensor&);
template at::Tensor loss(const Cnn&, const at::Tensor&, const at::Tensor&);

}  // namespace digits
