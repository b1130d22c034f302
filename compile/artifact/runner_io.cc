#include "compile/artifact/runner_io.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <set>
#include <utility>

#include "compile/artifact/npy.h"
#include "compile/artifact/safetensors.h"
#include "core/error.h"

namespace torchlift::compile {
namespace {

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

std::string joined(const std::vector<std::string>& words) {
  std::string result;
  for (const std::string& word : words) result += (result.empty() ? "" : ", ") + word;
  return result;
}

std::vector<at::Tensor> by_name(const std::vector<std::string>& names, const std::string& file) {
  std::map<std::string, at::Tensor> found;
  for (auto& [name, tensor] : load_safetensors(file)) found.emplace(name, std::move(tensor));
  std::vector<at::Tensor> inputs;
  for (const std::string& name : names) {
    const auto each = found.find(name);
    if (each == found.end()) {
      transform_error("run", file, " has no tensor '", name, "'; the artifact takes ",
                      joined(names), ".");
    }
    inputs.push_back(std::move(each->second));
    found.erase(each);
  }
  if (!found.empty()) {
    transform_error("run", file, " has a tensor '", found.begin()->first,
                    "', which the artifact does not take. It takes ", joined(names), ".");
  }
  return inputs;
}

std::vector<at::Tensor> by_place(const std::vector<std::string>& names,
                                 const std::vector<std::string>& files) {
  if (files.size() != names.size()) {
    transform_error("run", "the artifact takes ", names.size(), " tensors (", joined(names),
                    "), and got ", files.size(), " files. Give a .npy file for each, in this order",
                    ", or one .safetensors.");
  }
  std::vector<at::Tensor> inputs;
  for (const std::string& file : files) {
    if (!ends_with(file, ".npy")) {
      transform_error("run", "the input ", file, " is no .npy file. Inputs are .npy files, or one ",
                      ".safetensors.");
    }
    inputs.push_back(load_npy(file));
  }
  return inputs;
}

at::Tensor random_tensor(const TensorType& type, const std::vector<int64_t>& dims,
                         const at::Generator& generator) {
  const std::vector<int64_t> sizes = type.concrete_sizes(dims);
  const at::TensorOptions options = at::TensorOptions().dtype(type.dtype).device(type.device);
  if (at::isFloatingType(type.dtype) || at::isComplexType(type.dtype)) {
    const bool complex = at::isComplexType(type.dtype);
    return at::randn(sizes, generator, complex ? at::kComplexFloat : at::kFloat).to(options);
  }
  return at::randint(0, 2, sizes, generator, at::TensorOptions().dtype(at::kLong)).to(options);
}

// A program may want the strides that it was traced with.
at::Tensor with_strides(const at::Tensor& tensor, const TensorType& type,
                        const std::vector<int64_t>& dims) {
  const std::vector<int64_t> strides = type.concrete_strides(dims);
  if (type.layout != c10::kStrided || tensor.strides() == at::IntArrayRef(strides)) return tensor;
  return at::empty_strided(tensor.sizes(), strides, tensor.options()).copy_(tensor);
}

// Files have strides of their own: a copy where the program was traced with others. What does not
// fit is left as it is, for the program to say so.
void give_traced_strides(const Graph& graph, std::vector<at::Tensor>& inputs) {
  const auto type = [&](size_t i) -> const TensorType& { return graph.type(graph.inputs[i]); };
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i].dim() != type(i).dim()) return;
  }
  std::vector<int64_t> dims;
  for (const Symbol& symbol : graph.symbols) {
    dims.push_back(inputs[static_cast<size_t>(symbol.input)].size(symbol.dim));
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i].sizes() == at::IntArrayRef(type(i).concrete_sizes(dims))) {
      inputs[i] = with_strides(inputs[i], type(i), dims);
    }
  }
}

// A file's name of nothing but harmless characters: names come from the artifact.
std::string file_name(const std::string& name) {
  std::string result = name;
  for (char& c : result) {
    const bool harmless = std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' ||
                          c == '-' || c == '.' || c == '[' || c == ']';
    if (!harmless) c = '_';
  }
  if (result.empty() || result.front() == '.') result.insert(0, "_");
  return result + ".npy";
}

}  // namespace

std::vector<at::Tensor> read_inputs(const Artifact& artifact,
                                    const std::vector<std::string>& files) {
  const std::vector<std::string> names = artifact.signature.inputs.tensor_paths();
  std::vector<at::Tensor> inputs = files.size() == 1 && ends_with(files[0], ".safetensors")
                                       ? by_name(names, files[0])
                                       : by_place(names, files);
  for (size_t i = 0; i < inputs.size(); ++i) {
    inputs[i] = inputs[i].to(artifact.graph.type(artifact.graph.inputs[i]).device);
  }
  give_traced_strides(artifact.graph, inputs);
  return inputs;
}

std::vector<at::Tensor> random_inputs(const Artifact& artifact,
                                      const std::map<std::string, int64_t>& dims, uint64_t seed) {
  const Graph& graph = artifact.graph;
  const std::vector<std::string> names = graph.symbol_names();
  for (const auto& [name, size] : dims) {
    if (std::find(names.begin(), names.end(), name) == names.end()) {
      transform_error("bench", "the artifact has no dynamic dim '", name, "'",
                      names.empty() ? "." : "; it has " + joined(names) + ".");
    }
  }
  std::vector<int64_t> sizes;
  for (const Symbol& symbol : graph.symbols) {
    const auto given = dims.find(symbol.name);
    sizes.push_back(given != dims.end() ? given->second : std::max(kDefaultDim, symbol.least));
  }
  const at::Generator generator = at::detail::createCPUGenerator(seed);
  std::vector<at::Tensor> inputs;
  for (const ValueId id : graph.inputs) {
    const TensorType& type = graph.type(id);
    inputs.push_back(with_strides(random_tensor(type, sizes, generator), type, sizes));
  }
  return inputs;
}

std::vector<std::string> output_names(const Artifact& artifact) {
  std::vector<std::string> names = artifact.signature.outputs.tensor_paths();
  std::set<std::string> taken;
  for (std::string& name : names) {
    if (name.empty() || name.front() == '[') name.insert(0, "output");
    // Names of tuples may repeat; a number makes them differ.
    const std::string first = name;
    for (int i = 1; !taken.insert(name).second; ++i) name = first + "_" + std::to_string(i);
  }
  return names;
}

std::vector<std::string> write_outputs(const Artifact& artifact,
                                       const std::vector<at::Tensor>& outputs,
                                       const std::string& to) {
  const std::vector<std::string> names = output_names(artifact);
  NamedTensors tensors;
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (outputs[i].defined()) tensors.emplace_back(names[i], outputs[i]);
  }
  if (ends_with(to, ".safetensors")) {
    save_safetensors(tensors, to);
    return {to};
  }
  std::error_code error;
  std::filesystem::create_directories(to, error);
  if (error) {
    transform_error("run", "the folder ", to, " cannot be made: ", error.message(),
                    ". Outputs go to a folder, or to a file that ends in .safetensors.");
  }
  std::vector<std::string> files;
  for (const auto& [name, tensor] : tensors) {
    files.push_back((std::filesystem::path(to) / file_name(name)).string());
    save_npy(tensor, files.back());
  }
  return files;
}

}  // namespace torchlift::compile
