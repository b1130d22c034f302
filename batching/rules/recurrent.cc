// Recurrent layers and cells. libtorch makes them of other operators, but by way of sums written in
// place, which fail where the hidden state is not batched and the gates are, and of fused kernels.
// They are made here of operators out of place instead, whatever the level and the gradients:
//
//   gates of all time steps:  W_ih x_t + b_ih      one matmul, [T, N, I] -> [T, N, G]
//   and step by step:         W_hh h + b_hh        [N, H] -> [N, G]
//
// Formulas: torch.nn.LSTM, GRU, RNN.

#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/gru_cell_ops.h>
#include <ATen/ops/gru_ops.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/lstm_cell_ops.h>
#include <ATen/ops/lstm_ops.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/rnn_relu_cell_ops.h>
#include <ATen/ops/rnn_relu_ops.h>
#include <ATen/ops/rnn_tanh_cell_ops.h>
#include <ATen/ops/rnn_tanh_ops.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/tanh.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/registry.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;

// What goes from step to step. cell is undefined but for LSTM.
struct Hidden {
  at::Tensor output;
  at::Tensor cell;
};

// The weights of one layer in one direction. projection: of an LSTM with proj_size, else undefined.
struct Weights {
  at::Tensor input, hidden;
  std::optional<at::Tensor> input_bias, hidden_bias;
  at::Tensor projection;
};

at::Tensor hidden_gates(const Hidden& h, const Weights& w) {
  return at::linear(h.output, w.hidden, w.hidden_bias);
}

// A cell: the next hidden state, from W_ih x + b_ih and the last one.
using Cell = Hidden (*)(const at::Tensor& input_gates, const Hidden& h, const Weights& w);

Hidden lstm_step(const at::Tensor& input_gates, const Hidden& h, const Weights& w) {
  const std::vector<at::Tensor> gates = at::add(input_gates, hidden_gates(h, w)).chunk(4, -1);
  const at::Tensor kept = at::mul(at::sigmoid(gates[1]), h.cell);
  const at::Tensor cell = at::add(kept, at::mul(at::sigmoid(gates[0]), at::tanh(gates[2])));
  at::Tensor output = at::mul(at::sigmoid(gates[3]), at::tanh(cell));
  if (w.projection.defined()) output = at::linear(output, w.projection);
  return {std::move(output), cell};
}

Hidden gru_step(const at::Tensor& input_gates, const Hidden& h, const Weights& w) {
  const std::vector<at::Tensor> in = input_gates.chunk(3, -1);
  const std::vector<at::Tensor> out = hidden_gates(h, w).chunk(3, -1);
  const at::Tensor reset = at::sigmoid(at::add(in[0], out[0]));
  const at::Tensor update = at::sigmoid(at::add(in[1], out[1]));
  const at::Tensor fresh = at::tanh(at::add(in[2], at::mul(reset, out[2])));
  return {at::add(fresh, at::mul(update, at::sub(h.output, fresh))), {}};
}

template <auto Activation>
Hidden rnn_step(const at::Tensor& input_gates, const Hidden& h, const Weights& w) {
  return {Activation(at::add(input_gates, hidden_gates(h, w))), {}};
}

at::Tensor tanh(const at::Tensor& x) { return at::tanh(x); }
at::Tensor relu(const at::Tensor& x) { return at::relu(x); }

// --- layers --------------------------------------------------------------------------------------

struct LayerOptions {
  bool has_biases;
  int64_t num_layers;
  double dropout;
  bool train, bidirectional, batch_first;

  int64_t directions() const { return bidirectional ? 2 : 1; }
};

std::vector<Weights> split_weights(at::TensorList params, const LayerOptions& options,
                                   bool projected) {
  const auto count = static_cast<size_t>(options.num_layers * options.directions());
  const size_t each = 2 + (options.has_biases ? 2 : 0) + (projected ? 1 : 0);
  if (params.size() != count * each) {
    transform_error("vmap", "a recurrent layer expects ", count * each, " weights, got ",
                    params.size(), ".");
  }
  std::vector<Weights> all(count);
  for (size_t i = 0; i < count; ++i) {
    const at::Tensor* next = params.data() + i * each;
    all[i].input = *next++;
    all[i].hidden = *next++;
    if (options.has_biases) {
      all[i].input_bias = *next++;
      all[i].hidden_bias = *next++;
    }
    if (projected) all[i].projection = *next;
  }
  return all;
}

// One layer in one direction: the outputs of all steps, in the order of time, and the last state.
std::pair<std::vector<at::Tensor>, Hidden> run_direction(Cell cell, const at::Tensor& input,
                                                         Hidden h, const Weights& w,
                                                         bool backwards) {
  const std::vector<at::Tensor> gates = at::linear(input, w.input, w.input_bias).unbind(0);
  std::vector<at::Tensor> outputs(gates.size());
  for (size_t step = 0; step < gates.size(); ++step) {
    const size_t t = backwards ? gates.size() - 1 - step : step;
    h = cell(gates[t], h, w);
    outputs[t] = h.output;
  }
  return {std::move(outputs), std::move(h)};
}

// h: one for each layer and direction. Returns the output, and replaces h by the last states.
at::Tensor run_layers(Cell cell, at::Tensor input, std::vector<Hidden>& h,
                      const std::vector<Weights>& weights, const LayerOptions& options) {
  if (h.size() != weights.size()) {
    transform_error("vmap", "a recurrent layer expects ", weights.size(),
                    " hidden states, one for each layer and direction, got ", h.size(), ".");
  }
  if (options.batch_first) input = input.transpose(0, 1);
  if (input.size(0) == 0) transform_error("vmap", "a recurrent layer got a sequence of length 0.");
  for (int64_t layer = 0; layer < options.num_layers; ++layer) {
    std::vector<at::Tensor> directions;
    for (int64_t direction = 0; direction < options.directions(); ++direction) {
      const auto i = static_cast<size_t>(layer * options.directions() + direction);
      auto [outputs, last] = run_direction(cell, input, h[i], weights[i], direction == 1);
      h[i] = std::move(last);
      directions.push_back(at::stack(outputs, 0));
    }
    input = directions.size() == 1 ? directions[0] : at::cat(directions, -1);
    if (options.dropout > 0 && options.train && layer + 1 < options.num_layers) {
      input = at::dropout(input, options.dropout, /*train=*/true);
    }
  }
  return options.batch_first ? input.transpose(0, 1) : input;
}

at::Tensor stack_outputs(const std::vector<Hidden>& h) {
  std::vector<at::Tensor> outputs;
  for (const Hidden& each : h) outputs.push_back(each.output);
  return at::stack(outputs, 0);
}

template <Cell kCell>
std::tuple<at::Tensor, at::Tensor> run_rnn(const at::Tensor& input, const at::Tensor& hx,
                                           at::TensorList params, bool has_biases,
                                           int64_t num_layers, double dropout, bool train,
                                           bool bidirectional, bool batch_first) {
  const LayerOptions options{has_biases, num_layers, dropout, train, bidirectional, batch_first};
  const std::vector<Weights> weights = split_weights(params, options, /*projected=*/false);
  std::vector<Hidden> h;
  for (at::Tensor& each : hx.unbind(0)) h.push_back({std::move(each), {}});
  at::Tensor output = run_layers(kCell, input, h, weights, options);
  return {std::move(output), stack_outputs(h)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> run_lstm(const at::Tensor& input, at::TensorList hx,
                                                        at::TensorList params, bool has_biases,
                                                        int64_t num_layers, double dropout,
                                                        bool train, bool bidirectional,
                                                        bool batch_first) {
  if (hx.size() != 2)
    transform_error("vmap", "lstm expects two hidden states, got ", hx.size(), ".");
  const LayerOptions options{has_biases, num_layers, dropout, train, bidirectional, batch_first};
  const bool projected = hx[0].size(2) != hx[1].size(2);
  const std::vector<Weights> weights = split_weights(params, options, projected);
  std::vector<Hidden> h;
  for (at::Tensor& each : hx[0].unbind(0)) h.push_back({std::move(each), {}});
  const std::vector<at::Tensor> cells = hx[1].unbind(0);
  for (size_t i = 0; i < h.size(); ++i) h[i].cell = cells[i];
  at::Tensor output = run_layers(&lstm_step, input, h, weights, options);
  std::vector<at::Tensor> last;
  for (const Hidden& each : h) last.push_back(each.cell);
  return {std::move(output), stack_outputs(h), at::stack(last, 0)};
}

// --- cells ---------------------------------------------------------------------------------------

template <Cell kCell>
at::Tensor run_cell(const at::Tensor& input, const at::Tensor& hx, const at::Tensor& w_ih,
                    const at::Tensor& w_hh, const std::optional<at::Tensor>& b_ih,
                    const std::optional<at::Tensor>& b_hh) {
  const Weights weights{w_ih, w_hh, b_ih, b_hh, {}};
  return kCell(at::linear(input, w_ih, b_ih), {hx, {}}, weights).output;
}

std::tuple<at::Tensor, at::Tensor> run_lstm_cell(const at::Tensor& input, at::TensorList hx,
                                                 const at::Tensor& w_ih, const at::Tensor& w_hh,
                                                 const std::optional<at::Tensor>& b_ih,
                                                 const std::optional<at::Tensor>& b_hh) {
  if (hx.size() != 2) {
    transform_error("vmap", "lstm_cell expects two hidden states, got ", hx.size(), ".");
  }
  const Weights weights{w_ih, w_hh, b_ih, b_hh, {}};
  Hidden h = lstm_step(at::linear(input, w_ih, b_ih), {hx[0], hx[1]}, weights);
  return {std::move(h.output), std::move(h.cell)};
}

[[maybe_unused]] const RuleSet kRules{
    composite<ops::lstm_input, &run_lstm>(),
    composite<ops::gru_input, &run_rnn<&gru_step>>(),
    composite<ops::rnn_tanh_input, &run_rnn<&rnn_step<&tanh>>>(),
    composite<ops::rnn_relu_input, &run_rnn<&rnn_step<&relu>>>(),
    composite<ops::lstm_cell, &run_lstm_cell>(),
    composite<ops::gru_cell, &run_cell<&gru_step>>(),
    composite<ops::rnn_tanh_cell, &run_cell<&rnn_step<&tanh>>>(),
    composite<ops::rnn_relu_cell, &run_cell<&rnn_step<&relu>>>(),
};

}  // namespace
}  // namespace torchlift
