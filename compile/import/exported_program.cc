#include "compile/import/exported_program.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "compile/artifact/format_error.h"
#include "compile/import/exported_graph.h"
#include "compile/import/pt2_archive.h"
#include "compile/replay.h"
#include "core/error.h"

namespace torchlift {
namespace compile {
namespace {

constexpr const char* kLoad = "load_exported";

// A program and its tensors, as they are in the file.
struct Loaded {
  ExportedGraph exported;
  std::vector<at::Tensor> state;
};

Loaded read(const std::string& path, const std::string& model) {
  Pt2Archive archive(path, model);
  Loaded loaded;
  loaded.exported = read_exported_graph(
      archive.program(), [&](const std::string& name) { return archive.tensor(name); });
  const Graph& graph = loaded.exported.graph;
  for (size_t i = 0; i < loaded.exported.state.size(); ++i) {
    const std::string& name = loaded.exported.state[i].name;
    loaded.state.push_back(archive.tensor(name));
    const TensorType type = type_of(loaded.state.back());
    if (type != graph.type(graph.inputs[i])) {
      format_error("'", name, "' is ", type.str(), ", and the program says ",
                   graph.type(graph.inputs[i]).str(), ", or its strides differ.");
    }
  }
  return loaded;
}

// A tied weight is an input of the program under each of its names, of which it may use any.
struct TiedState {
  std::vector<ImportedTensor> tensors;
  std::vector<size_t> places;  // of the program's inputs, in `tensors`
};

TiedState tie(const Loaded& loaded) {
  TiedState tied;
  for (size_t i = 0; i < loaded.state.size(); ++i) {
    const auto same = std::find_if(
        tied.tensors.begin(), tied.tensors.end(),
        [&](const ImportedTensor& each) { return each.tensor.is_same(loaded.state[i]); });
    tied.places.push_back(static_cast<size_t>(same - tied.tensors.begin()));
    const ExportedState& state = loaded.exported.state[i];
    if (same != tied.tensors.end()) {
      same->names.push_back(state.name);
    } else {
      tied.tensors.push_back({{state.name}, loaded.state[i], state.is_parameter});
    }
  }
  return tied;
}

// Runs the graph, after a look at what it cannot check itself.
class ExportedCode final : public ImportedCode {
 public:
  ExportedCode(ExportedGraph exported, std::vector<size_t> places)
      : places_(std::move(places)),
        input_names_(std::move(exported.input_names)),
        conditions_(std::move(exported.conditions)),
        program_(std::move(exported.graph)) {}

  std::vector<at::Tensor> run(at::ArrayRef<at::Tensor> state,
                              at::ArrayRef<at::Tensor> inputs) const override {
    std::vector<at::Tensor> all;
    all.reserve(places_.size() + inputs.size());
    for (const size_t place : places_) all.push_back(state[place]);
    all.insert(all.end(), inputs.begin(), inputs.end());
    for (const SizeCondition& condition : conditions_) check(condition, all);
    return program_.run(all);
  }

 private:
  void check(const SizeCondition& condition, const std::vector<at::Tensor>& all) const {
    const auto leaf = [&](const SizeTerm& term) {
      return term.kind == SizeTerm::Kind::kSize ? size(all, input(term.name), term.number)
                                                : size_of_symbol(term.name, all);
    };
    if (evaluate(condition.term, leaf) != 0) return;
    transform_error("imported module",
                    "the inputs do not have sizes that the program was exported "
                    "for: ",
                    condition.text, ".");
  }

  size_t input(const std::string& name) const {
    const auto found = std::find(input_names_.begin(), input_names_.end(), name);
    return places_.size() + static_cast<size_t>(found - input_names_.begin());
  }

  int64_t size_of_symbol(const std::string& name, const std::vector<at::Tensor>& all) const {
    for (const Symbol& symbol : program_.graph().symbols) {
      if (symbol.name == name) return size(all, static_cast<size_t>(symbol.input), symbol.dim);
    }
    transform_error("imported module", "there is no dynamic dim ", name, ".");
  }

  static int64_t size(const std::vector<at::Tensor>& all, size_t input, int64_t dim) {
    if (dim >= all[input].dim()) {
      transform_error("imported module", "an input has ", all[input].dim(),
                      " dims, and the program was exported for more.");
    }
    return all[input].size(dim);
  }

  const std::vector<size_t> places_;
  const std::vector<std::string> input_names_;
  const std::vector<SizeCondition> conditions_;
  const Program program_;
};

// Its state as constants.
Graph with_constant_state(Loaded loaded) {
  Graph graph = std::move(loaded.exported.graph);
  const auto count = static_cast<int32_t>(loaded.state.size());
  for (size_t i = 0; i < loaded.state.size(); ++i) {
    graph.constants.push_back({graph.inputs[i], std::move(loaded.state[i])});
  }
  graph.inputs.erase(graph.inputs.begin(), graph.inputs.begin() + count);
  for (Symbol& symbol : graph.symbols) symbol.input -= count;
  verify(graph);
  return graph;
}

}  // namespace

Graph read_exported(const std::string& path, const ExportedOptions& options) {
  return naming_file(kLoad, path, [&] {
    Loaded loaded = read(path, options.model);
    if (!loaded.exported.conditions.empty()) {
      unsupported_error("import", "the program is right where ", loaded.exported.conditions[0].text,
                        ", which a graph cannot say. load_exported checks it in every call.");
    }
    return with_constant_state(std::move(loaded));
  });
}

}  // namespace compile

ImportedModule load_exported(const std::string& path, const ExportedOptions& options) {
  return compile::naming_file(compile::kLoad, path, [&] {
    compile::Loaded loaded = compile::read(path, options.model);
    compile::TiedState state = compile::tie(loaded);
    std::vector<std::string> names = loaded.exported.input_names;
    return ImportedModule(std::move(state.tensors), std::move(names),
                          std::make_shared<const compile::ExportedCode>(std::move(loaded.exported),
                                                                        std::move(state.places)));
  });
}

}  // namespace torchlift
