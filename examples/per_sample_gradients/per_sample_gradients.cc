// Per-sample gradients in C++: the loss of one digit, differentiated and mapped over all digits.
//
//   per_sample_gradients WEIGHTS_AND_DIGITS GRADIENTS TIMES CHUNK ROUNDS
//
// Reads images, labels and the weights of both models from a file made by torch.save, writes the
// gradients to one for torch.load, and the seconds of each round as JSON. demo.py runs it.

#include <ATen/Parallel.h>
#include <malloc.h>

#include <chrono>
#include <cstdio>
#include <exception>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

#include "autodiff/grad.h"
#include "batching/vmap.h"
#include "core/tree.h"
#include "examples/per_sample_gradients/models.h"
#include "examples/per_sample_gradients/tensor_file.h"

namespace tl = torchlift;

namespace digits {
namespace {

// "mlp.hidden1.weight": the model's name, and the path of the tensor in its struct.
template <class Model>
Model read_model(const std::string& name, const NamedTensors& tensors) {
  Model model;
  tl::for_each_leaf(
      model, [&](at::Tensor& leaf, const tl::Path& path) { leaf = tensors.at(name + path.str()); });
  return model;
}

// The gradient of every digit's loss: a Model whose tensors have the shape [count, ...].
template <class Model>
Model gradients_of(const Model& model, const at::Tensor& images, const at::Tensor& labels,
                   int64_t chunk) {
  const auto per_sample =
      tl::vmap(tl::grad(loss<Model>), {.in_dims = tl::in(tl::kNone, 0, 0), .chunk_size = chunk});
  return per_sample(model, images, labels);
}

struct Job {
  NamedTensors inputs, gradients;
  int64_t chunk = 0;
  int rounds = 0;

  // Adds the model's gradients to `gradients`. Returns the seconds of each round.
  template <class Model>
  std::vector<double> run(const std::string& name) {
    const auto model = read_model<Model>(name, inputs);
    std::vector<double> seconds;
    for (int round = 0; round < rounds; ++round) {
      const auto start = std::chrono::steady_clock::now();
      const Model gradient = gradients_of(model, inputs.at("images"), inputs.at("labels"), chunk);
      seconds.push_back(
          std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
      tl::for_each_leaf(gradient, [&](const at::Tensor& leaf, const tl::Path& path) {
        gradients[name + path.str()] = leaf;
      });
    }
    return seconds;
  }
};

std::string json_list(const std::vector<double>& numbers) {
  std::string text;
  for (const double number : numbers) text += (text.empty() ? "" : ", ") + std::to_string(number);
  return "[" + text + "]";
}

// Stops glibc from giving freed memory back to the kernel, which would have to clear it for every
// round. A long-running program gets there by itself; demo.py does the same.
void keep_freed_memory() {
#ifdef __GLIBC__
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, std::numeric_limits<int>::max());
#endif
}

void run(const std::vector<std::string>& arguments) {
  at::set_num_threads(1);
  keep_freed_memory();
  Job job;
  job.inputs = load_tensors(arguments[0]);
  job.chunk = std::stoll(arguments[3]);
  job.rounds = std::stoi(arguments[4]);
  const std::string mlp = json_list(job.run<Mlp>("mlp"));
  const std::string cnn = json_list(job.run<Cnn>("cnn"));
  save_tensors(arguments[1], job.gradients);
  std::ofstream(arguments[2]) << "{\"mlp\": " << mlp << ", \"cnn\": " << cnn << "}\n";
}

}  // namespace
}  // namespace digits

int main(int argc, char** argv) {
  if (argc != 6) {
    std::fprintf(stderr, "usage: %s WEIGHTS_AND_DIGITS GRADIENTS TIMES CHUNK ROUNDS\n", argv[0]);
    return 2;
  }
  try {
    digits::run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", argv[0], error.what());
    return 1;
  }
  return 0;
}
