#include "compile/passes/constant_folding.h"

#include <algorithm>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "compile/passes/evaluate.h"
#include "compile/passes/node_facts.h"

namespace torchlift::compile {
namespace {

bool depends_on_sizes(const Node& node) {
  return std::any_of(node.args.begin(), node.args.end(), [](const Argument& argument) {
    return std::holds_alternative<SizeExpr>(argument) ||
           std::holds_alternative<std::vector<SizeExpr>>(argument) ||
           std::holds_alternative<SizeRatio>(argument);
  });
}

// Of what is stored: the rows of an expanded tensor are one.
int64_t bytes_of(const TensorType& type) {
  auto bytes = static_cast<int64_t>(c10::elementSize(type.dtype));
  for (size_t d = 0; d < type.sizes.size(); ++d) {
    if (type.strides[d] != SizeExpr(0)) bytes *= *type.sizes[d].constant();
  }
  return bytes;
}

class Folder {
 public:
  Folder(Graph& graph, const FoldingOptions& options)
      : graph_(graph), options_(options), classes_(graph) {}

  int64_t run() {
    for (const Constant& constant : graph_.constants) known_[constant.id] = constant.tensor;
    std::vector<Node> kept;
    for (Node& node : graph_.nodes) {
      if (!foldable(node)) {
        kept.push_back(std::move(node));
        continue;
      }
      const auto results = evaluate(node, [&](ValueId id) { return known_.at(id); });
      const bool view = may_view(node);
      for (size_t i = 0; i < results.size(); ++i) {
        for (size_t k = 0; k < results[i].size(); ++k) {
          const ValueId id = node.results[i].ids[k];
          if (id == kNoValue) continue;
          known_[id] = results[i][k];
          if (!view) graph_.constants.push_back({id, results[i][k]});
        }
      }
      if (view) {
        kept.push_back(std::move(node));
      } else {
        ++folded_;
      }
    }
    graph_.nodes = std::move(kept);
    return folded_;
  }

 private:
  bool foldable(const Node& node) const {
    if (node.is_control_flow() || !is_pure(node) || depends_on_sizes(node)) return false;
    int64_t read = 0;
    for (const ValueId id : arguments_of(node)) {
      const auto found = known_.find(id);
      if (found == known_.end()) return false;
      // Tracked by autograd: what is made of it is as well.
      if (found->second.requires_grad()) return false;
      if (graph_.type(id).layout != c10::kStrided) return false;
      read += bytes_of(graph_.type(id));
    }
    if (may_view(node)) return true;
    int64_t made = 0;
    for (const ValueId id : results_of(node)) {
      const TensorType& type = graph_.type(id);
      if (classes_.escapes(id) || !type.is_static() || type.layout != c10::kStrided) return false;
      made += bytes_of(type);
    }
    return made <= std::max(options_.max_bytes, read);
  }

  Graph& graph_;
  const FoldingOptions options_;
  const AliasClasses classes_;
  // Constants, and views of them.
  std::unordered_map<ValueId, at::Tensor> known_;
  int64_t folded_ = 0;
};

}  // namespace

int64_t constant_folding(Graph& graph, const FoldingOptions& options) {
  require_functional(graph, "constant_folding");
  return Folder(graph, options).run();
}

}  // namespace torchlift::compile
