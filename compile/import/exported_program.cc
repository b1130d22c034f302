#include "compile/import/exported_program.h"

#include <algorithm>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
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
constexpr const char* kCall = "imported module";

// The tensors of the state, as they are in the file.
std::vector<at::Tensor> state_of(Pt2Archive& archive, const ExportedGraph& exported) {
  std::vector<at::Tensor> state;
  for (size_t i = 0; i < exported.state.size(); ++i) {
    const std::string& name = exported.state[i].name;
    state.push_back(archive.tensor(name));
    const TensorType& type = exported.graph.type(exported.graph.inputs[i]);
    if (type_of(state.back()) != type) {
      format_error("'", name, "' is ", type_of(state.back()).str(), ", and the program says ",
                   type.str(), ", or its strides differ.");
    }
  }
  return state;
}

// A tied weight is an input of the program under each of its names, of which it may use any.
struct TiedState {
  std::vector<ImportedTensor> tensors;
  std::vector<size_t> places;  // of the program's inputs, in `tensors`
};

TiedState tie(const std::vector<ExportedState>& state, const std::vector<at::Tensor>& tensors) {
  TiedState tied;
  for (size_t i = 0; i < state.size(); ++i) {
    const auto same =
        std::find_if(tied.tensors.begin(), tied.tensors.end(),
                     [&](const ImportedTensor& each) { return each.tensor.is_same(tensors[i]); });
    tied.places.push_back(static_cast<size_t>(same - tied.tensors.begin()));
    if (same != tied.tensors.end()) {
      same->names.push_back(state[i].name);
    } else {
      tied.tensors.push_back({{state[i].name}, tensors[i], state[i].is_parameter});
    }
  }
  return tied;
}

// --- graphs --------------------------------------------------------------------------------------

// The graph for the sizes of a call: one for all, or one for each that was met.
//
// NOTE [graphs of sizes]
// A graph of ours knows polynomials of its dynamic dims. Programs compute others (the height of an
// image after a strided convolution), and have branches and loops beside dynamic dims. Of given
// sizes all that is numbers: such programs are read anew, without their file, for each that comes.
class GraphsOfSizes {
 public:
  virtual ~GraphsOfSizes() = default;
  virtual Program of(const DynamicSizes& sizes) const = 0;
};

class OneGraph final : public GraphsOfSizes {
 public:
  explicit OneGraph(Graph graph) : program_(std::move(graph)) {}
  Program of(const DynamicSizes&) const override { return program_; }

 private:
  const Program program_;
};

class GraphForEach final : public GraphsOfSizes {
 public:
  GraphForEach(Json program, std::map<std::string, at::Tensor> constants)
      : json_(std::move(program)), constants_(std::move(constants)) {}

  Program of(const DynamicSizes& sizes) const override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = std::find_if(programs_.begin(), programs_.end(),
                                    [&](const auto& each) { return each.first == sizes; });
    if (found != programs_.end()) {
      programs_.splice(programs_.begin(), programs_, found);
    } else {
      programs_.emplace_front(sizes, Program(graph(sizes)));
      if (programs_.size() > kMaxPrograms) programs_.pop_back();
    }
    return programs_.front().second;
  }

 private:
  static constexpr size_t kMaxPrograms = 64;

  Graph graph(const DynamicSizes& sizes) const {
    return naming_file(kCall, "the program for these sizes", [&] {
      return read_exported_graph(
                 json_, [&](const std::string& name) { return constants_.at(name); }, sizes)
          .graph;
    });
  }

  const Json json_;
  const std::map<std::string, at::Tensor> constants_;
  mutable std::mutex mutex_;
  mutable std::list<std::pair<DynamicSizes, Program>> programs_;  // the last one that ran first
};

// --- calls ---------------------------------------------------------------------------------------

// Runs the graph for the sizes of the inputs, after a look at what it cannot check itself.
class ExportedCode final : public ImportedCode {
 public:
  ExportedCode(ExportedGraph exported, std::vector<size_t> places,
               std::unique_ptr<const GraphsOfSizes> graphs)
      : places_(std::move(places)),
        input_names_(std::move(exported.input_names)),
        symbols_(std::move(exported.symbols)),
        conditions_(std::move(exported.conditions)),
        graphs_(std::move(graphs)) {}

  std::vector<at::Tensor> run(at::ArrayRef<at::Tensor> state,
                              at::ArrayRef<at::Tensor> inputs) const override {
    std::vector<at::Tensor> all;
    all.reserve(places_.size() + inputs.size());
    for (const size_t place : places_) all.push_back(state[place]);
    all.insert(all.end(), inputs.begin(), inputs.end());
    DynamicSizes sizes;
    for (const Symbol& symbol : symbols_) sizes[symbol.name] = size_of(symbol, all);
    for (const SizeCondition& condition : conditions_) check(condition, sizes, all);
    return graphs_->of(sizes).run(all);
  }

 private:
  int64_t size_of(const Symbol& symbol, const std::vector<at::Tensor>& all) const {
    const int64_t found = size(all, static_cast<size_t>(symbol.input), symbol.dim);
    if (found >= symbol.least) return found;
    transform_error(kCall, "input '",
                    input_names_[static_cast<size_t>(symbol.input) - places_.size()], "' has size ",
                    found, " along its dim ", symbol.dim,
                    "; the program was exported for sizes from ", symbol.least, " on.");
  }

  void check(const SizeCondition& condition, const DynamicSizes& sizes,
             const std::vector<at::Tensor>& all) const {
    const auto leaf = [&](const SizeTerm& term) {
      return term.kind == SizeTerm::Kind::kSize ? size(all, input(term.name), term.number)
                                                : sizes.at(term.name);
    };
    if (evaluate(condition.term, leaf) != 0) return;
    std::string found;
    for (const auto& [name, value] : sizes) {
      found += (found.empty() ? "" : ", ") + name + " = " + std::to_string(value);
    }
    transform_error(kCall, "the inputs do not have sizes that the program was exported for: ",
                    condition.text, " does not hold of ", found, ".");
  }

  size_t input(const std::string& name) const {
    const auto found = std::find(input_names_.begin(), input_names_.end(), name);
    return places_.size() + static_cast<size_t>(found - input_names_.begin());
  }

  static int64_t size(const std::vector<at::Tensor>& all, size_t input, int64_t dim) {
    if (dim < all[input].dim()) return all[input].size(dim);
    transform_error(kCall, "an input has ", all[input].dim(),
                    " dims, and the program was exported for more.");
  }

  const std::vector<size_t> places_;  // of the program's state, in the module's
  const std::vector<std::string> input_names_;
  const std::vector<Symbol> symbols_;
  const std::vector<SizeCondition> conditions_;
  const std::unique_ptr<const GraphsOfSizes> graphs_;
};

// The program, and what is needed for graphs of it.
struct Loaded {
  ExportedGraph exported;
  std::unique_ptr<const GraphsOfSizes> graphs;
};

Loaded read_program(Pt2Archive& archive) {
  std::map<std::string, at::Tensor> constants;
  const FindTensor tensor = [&](const std::string& name) {
    return constants[name] = archive.tensor(name);
  };
  const Json& program = archive.program();
  Loaded loaded;
  try {
    loaded.exported = read_exported_graph(program, tensor);
    loaded.graphs = std::make_unique<OneGraph>(loaded.exported.graph);
  } catch (const UnsupportedError&) {
    // For the sizes that it was exported for, to see whether that is possible.
    const DynamicSizes sizes = exported_sizes(program);
    if (sizes.empty()) throw;
    loaded.exported = read_exported_graph(program, tensor, sizes);
    verify(loaded.exported.graph);
    loaded.graphs = std::make_unique<GraphForEach>(program, std::move(constants));
  }
  return loaded;
}

ImportedModule load(const std::string& path, const ExportedOptions& options) {
  Pt2Archive archive(path, options.model);
  Loaded loaded = read_program(archive);
  TiedState state = tie(loaded.exported.state, state_of(archive, loaded.exported));
  std::vector<std::string> names = loaded.exported.input_names;
  return ImportedModule(
      std::move(state.tensors), std::move(names),
      std::make_shared<const ExportedCode>(std::move(loaded.exported), std::move(state.places),
                                           std::move(loaded.graphs)));
}

// --- one graph -----------------------------------------------------------------------------------

// Its state as constants.
Graph with_constant_state(Graph graph, std::vector<at::Tensor> state) {
  const auto count = static_cast<int32_t>(state.size());
  for (size_t i = 0; i < state.size(); ++i) {
    graph.constants.push_back({graph.inputs[i], std::move(state[i])});
  }
  graph.inputs.erase(graph.inputs.begin(), graph.inputs.begin() + count);
  for (Symbol& symbol : graph.symbols) symbol.input -= count;
  verify(graph);
  return graph;
}

}  // namespace

Graph read_exported(const std::string& path, const ExportedOptions& options) {
  return naming_file("read_exported", path, [&] {
    Pt2Archive archive(path, options.model);
    ExportedGraph exported = read_exported_graph(
        archive.program(), [&](const std::string& name) { return archive.tensor(name); });
    if (!exported.conditions.empty()) {
      unsupported_error("import", "the program is right where ", exported.conditions[0].text,
                        ", which a graph cannot say. load_exported checks it in every call.");
    }
    std::vector<at::Tensor> state = state_of(archive, exported);
    return with_constant_state(std::move(exported.graph), std::move(state));
  });
}

}  // namespace compile

ImportedModule load_exported(const std::string& path, const ExportedOptions& options) {
  return compile::naming_file(compile::kLoad, path, [&] { return compile::load(path, options); });
}

}  // namespace torchlift
