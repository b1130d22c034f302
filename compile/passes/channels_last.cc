#include "compile/passes/channels_last.h"

#include <ATen/core/ivalue.h>
#include <c10/core/MemoryFormat.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>

#include "compile/passes/evaluate.h"
#include "compile/passes/node_facts.h"
#include "core/error.h"

namespace torchlift::compile {
namespace {

using Strides = std::vector<SizeExpr>;

size_t index(ValueId id) { return static_cast<size_t>(id); }

// What a vector of a kernel holds at least, and from how many numbers on a pool is worth a copy.
constexpr int64_t kFewestChannels = 8;
constexpr int64_t kWorthCopies = 8192;
// Of images with fewer channels than these, which leave half of a vector empty, from how many on.
// A pool of contiguous memory takes planes of several images at a time instead
// (batching/rules/plane_pools.h), copies included.
constexpr int64_t kEnoughChannels = 16;
constexpr int64_t kWorthCopiesOfFew = 1 << 18;
// How many numbers may be copied for each that a pool reads. A pool takes three to five times as
// long for a number as a copy.
constexpr int64_t kCopiesWorthAPool = 2;

bool is_cpu_tensor(const TensorType& type) {
  return type.device.is_cpu() && type.layout == c10::kStrided;
}

// Whether strides are the same where there is more than one element to step over. A sparse tensor
// has none.
bool same_strides(const TensorType& type, const Strides& a, const Strides& b) {
  if (type.layout != c10::kStrided) return true;
  for (size_t d = 0; d < type.sizes.size(); ++d) {
    if (type.sizes[d] != 1 && a[d] != b[d]) return false;
  }
  return true;
}

// Of [N, C, H, W] in the order N, H, W, C.
Strides channels_last_strides(const std::vector<SizeExpr>& sizes) {
  const SizeExpr row = sizes[3] * sizes[1];
  return {sizes[2] * row, 1, row, sizes[1]};
}

Strides contiguous_strides(const std::vector<SizeExpr>& sizes) {
  Strides strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  return strides;
}

bool is_channels_last(const TensorType& type) {
  return type.dim() == 4 && type.layout == c10::kStrided &&
         same_strides(type, type.strides, channels_last_strides(type.sizes));
}

// And not contiguous at the same time, as what has one channel is: libtorch takes it for that.
bool says_channels_last(const TensorType& type) {
  return is_channels_last(type) &&
         !same_strides(type, type.strides, contiguous_strides(type.sizes));
}

// --- what nodes are ------------------------------------------------------------------------------

const TensorType* type_of_argument(const Graph& graph, const Node& node, size_t i) {
  const auto* ref = std::get_if<ValueRef>(&node.args[i]);
  return ref == nullptr || ref->id == kNoValue ? nullptr : &graph.type(ref->id);
}

bool is_image(const TensorType* type) {
  return type != nullptr && is_cpu_tensor(*type) && type->dim() == 4;
}

bool is_convolution(const Graph& graph, const Node& node) {
  const TensorType* input =
      node.op == "aten::convolution" ? type_of_argument(graph, node, 0) : nullptr;
  return is_image(input) && input->dtype == at::kFloat;
}

bool is_convolution_backward(const Graph& graph, const Node& node) {
  return node.op == "aten::convolution_backward" && is_image(type_of_argument(graph, node, 0));
}

bool is_max_pool(const Graph& graph, const Node& node) {
  if (node.op != "aten::max_pool2d_with_indices" || !node.overload.empty()) return false;
  const TensorType* input = type_of_argument(graph, node, 0);
  if (!is_image(input) || (input->dtype != at::kFloat && input->dtype != at::kDouble)) return false;
  const auto channels = input->sizes[1].constant();
  return channels.has_value() && *channels >= kFewestChannels;
}

// The image whose layout the images have that the node gives, by its place among the arguments: of
// operators whose kernels take any layout, and copy other images into this one's if need be.
std::optional<size_t> leading_image(const Graph& graph, const Node& node) {
  struct Row {
    std::string_view op;
    size_t image;
  };
  constexpr std::array<Row, 14> kRows = {{{"aten::max_pool2d_with_indices_backward", 1},
                                          {"aten::avg_pool2d", 0},
                                          {"aten::avg_pool2d_backward", 1},
                                          {"aten::_adaptive_avg_pool2d", 0},
                                          {"aten::_adaptive_avg_pool2d_backward", 1},
                                          {"aten::native_batch_norm", 0},
                                          {"aten::native_batch_norm_backward", 1},
                                          {"aten::native_group_norm", 0},
                                          {"aten::native_group_norm_backward", 1},
                                          {"aten::upsample_nearest2d", 0},
                                          {"aten::upsample_nearest2d_backward", 0},
                                          {"aten::upsample_bilinear2d", 0},
                                          {"aten::upsample_bilinear2d_backward", 0},
                                          {"aten::constant_pad_nd", 0}}};
  for (const Row& row : kRows) {
    if (node.op != row.op || !node.overload.empty()) continue;
    return is_image(type_of_argument(graph, node, row.image)) ? std::optional(row.image)
                                                              : std::nullopt;
  }
  return std::nullopt;
}

// Its result has other strides where its argument has; what it holds is the same.
bool is_metadata_view(const Node& node) {
  constexpr std::array<std::string_view, 13> kOps = {
      "aten::view",      "aten::_unsafe_view", "aten::permute", "aten::transpose", "aten::t",
      "aten::unsqueeze", "aten::squeeze",      "aten::expand",  "aten::slice",     "aten::select",
      "aten::narrow",    "aten::unfold",       "aten::detach"};
  return is_one_of(node.op, kOps) && node.overload != "dtype";
}

// Reads the dtype and the device of its argument, no more.
bool reads_no_layout(const Node& node) {
  constexpr std::array<std::string_view, 4> kOps = {"aten::new_empty", "aten::new_zeros",
                                                    "aten::new_ones", "aten::new_full"};
  return is_one_of(node.op, kOps);
}

// Reads its argument in any layout.
bool is_reduction(const Node& node) {
  constexpr std::array<std::string_view, 3> kOps = {"aten::sum", "aten::mean", "aten::amax"};
  return is_one_of(node.op, kOps);
}

// Products take a matrix whose rows, or columns, are in one piece.
bool is_product(const Node& node) {
  constexpr std::array<std::string_view, 2> kOps = {"aten::mm", "aten::bmm"};
  return is_one_of(node.op, kOps) && node.overload.empty();
}

bool is_matrix_for_products(const TensorType& type) {
  if (type.layout != c10::kStrided) return false;
  const SizeExpr &row = type.strides.end()[-2], &column = type.strides.end()[-1];
  const SizeExpr &rows = type.sizes.end()[-2], &columns = type.sizes.end()[-1];
  return (column == 1 && row == columns) || (row == 1 && column == rows);
}

// Its result has strides of its own, whatever those of its argument.
bool asks_for_a_format(const Node& node) {
  const Argument* format = find_argument(node, "memory_format");
  const auto* value = format == nullptr ? nullptr : std::get_if<c10::IValue>(format);
  return value != nullptr && value->isInt() &&
         value->toInt() != static_cast<int64_t>(c10::MemoryFormat::Preserve);
}

// Gives each element of its result from those of its arguments in the same place, in their layout.
bool keeps_layout(const Node& node) {
  constexpr std::array<std::string_view, 6> kLike = {"aten::clone",      "aten::_to_copy",
                                                     "aten::empty_like", "aten::zeros_like",
                                                     "aten::ones_like",  "aten::full_like"};
  if (node.results.size() != 1 || node.results[0].is_list || asks_for_a_format(node)) return false;
  if (effects_of(node).draws) return false;  // numbers are drawn in the order of memory
  return is_pointwise(node) || is_one_of(node.op, kLike);
}

// --- which convolutions are to give it -----------------------------------------------------------

// The results of the convolutions that a pool reads, through pointwise operators and views that
// leave the last two dims in their places. By ValueId.
class Sources {
 public:
  explicit Sources(const Graph& graph) : graph_(graph), uses_(graph) {
    found_.assign(graph.values.size(), false);
    seen_.assign(graph.values.size(), false);
    for (const Node& node : graph.nodes) {
      if (is_max_pool(graph, node)) search(std::get<ValueRef>(node.args[0]).id);
    }
  }

  bool contains(ValueId id) const { return found_[index(id)]; }

 private:
  void search(ValueId id) {
    std::vector<ValueId> open = {id};
    while (!open.empty()) {
      id = open.back();
      open.pop_back();
      const int32_t producer = uses_.producer[index(id)];
      if (seen_[index(id)] || producer < 0) continue;
      seen_[index(id)] = true;
      const Node& node = graph_.nodes[index(producer)];
      if (is_convolution(graph_, node)) {
        found_[index(id)] = true;
      } else if (passes_on(node)) {
        for (const ValueId argument : arguments_of(node)) {
          if (has_same_planes(argument, id)) open.push_back(argument);
        }
      }
    }
  }

  bool passes_on(const Node& node) const {
    return !node.is_control_flow() && (is_metadata_view(node) || keeps_layout(node) ||
                                       leading_image(graph_, node).has_value());
  }

  bool has_same_planes(ValueId a, ValueId b) const {
    const auto& x = graph_.type(a).sizes;
    const auto& y = graph_.type(b).sizes;
    return x.size() >= 4 && y.size() >= 4 && x.end()[-1] == y.end()[-1] &&
           x.end()[-2] == y.end()[-2];
  }

  const Graph& graph_;
  const Uses uses_;
  std::vector<bool> found_;
  std::vector<bool> seen_;
};

// --- the graph with other strides ----------------------------------------------------------------

class Relayout {
 public:
  explicit Relayout(Graph graph) : graph_(std::move(graph)), sources_(graph_) {
    for (const Value& value : graph_.values) original_.push_back(value.type.strides);
    plain_.assign(graph_.values.size(), kNoValue);
    copies_.assign(graph_.values.size(), kNoValue);
  }

  // The new graph, and the values of it that have other strides; none where nothing is gained.
  std::optional<std::pair<Graph, std::vector<ValueId>>> run() {
    for (Node& node : std::exchange(graph_.nodes, {})) visit(std::move(node));
    if (chosen_.empty()) return std::nullopt;
    for (ValueId& id : graph_.outputs) {
      if (id != kNoValue) id = plain(id);
    }
    if (copied_ > kCopiesWorthAPool * pooled_) return std::nullopt;
    graph_.nodes = std::move(nodes_);
    return std::pair(std::move(graph_), std::move(chosen_));
  }

 private:
  void visit(Node node) {
    if (node.is_control_flow()) return keep(std::move(node));
    if (is_convolution(graph_, node)) return visit_convolution(std::move(node));
    if (is_max_pool(graph_, node)) return visit_max_pool(std::move(node));
    if (!reads_other_strides(node) || reads_no_layout(node) || asks_for_a_format(node)) {
      nodes_.push_back(std::move(node));
    } else if (is_convolution_backward(graph_, node)) {
      visit_convolution_backward(std::move(node));
    } else if (const auto image = leading_image(graph_, node)) {
      const bool relaid = is_channels_last(*type_of_argument(graph_, node, *image));
      put(std::move(node), relaid);
    } else if (is_metadata_view(node)) {
      visit_view(std::move(node));
    } else if (is_reduction(node)) {
      // Its result is small beside what it reads, and keeps its strides, whatever the kernel gives.
      for (const ValueId id : results_of(node)) chosen_.push_back(id);
      nodes_.push_back(std::move(node));
    } else if (is_product(node)) {
      visit_product(std::move(node));
    } else if (keeps_layout(node)) {
      visit_pointwise(std::move(node));
    } else {
      keep(std::move(node));
    }
  }

  void visit_convolution(Node node) {
    const bool wanted = sources_.contains(node.results[0].ids[0]);
    const bool given = says_channels_last(*type_of_argument(graph_, node, 0));
    if (!wanted && !(given && reads_other_strides(node))) return keep(std::move(node));
    if (!given) relay_weight(&node, 1);
    put(std::move(node), true);
  }

  // One of the image and the weight decides the layout of all.
  void visit_convolution_backward(Node node) {
    if (!says_channels_last(*type_of_argument(graph_, node, 1))) relay_weight(&node, 2);
    put(std::move(node), true);
  }

  void visit_max_pool(Node node) {
    auto& image = std::get<ValueRef>(node.args[0]);
    if (!is_channels_last(graph_.type(image.id))) {
      if (!is_worth_a_copy(graph_.type(image.id))) return keep(std::move(node));
      image.id = copy(image.id);
      copied_ += some_numel(graph_.type(image.id));
    }
    pooled_ += some_numel(graph_.type(image.id));
    put(std::move(node), true);
  }

  static SizeExpr numel(const TensorType& type) {
    SizeExpr product = 1;
    for (const SizeExpr& size : type.sizes) product = product * size;
    return product;
  }

  static bool is_worth_a_copy(const TensorType& type) {
    const std::optional<int64_t> count = numel(type).constant();
    const bool few = *type.sizes[1].constant() < kEnoughChannels;
    return !count.has_value() || *count >= (few ? kWorthCopiesOfFew : kWorthCopies);
  }

  // With some size for dims that are dynamic.
  static int64_t some_numel(const TensorType& type) {
    return numel(type).evaluate(std::vector<int64_t>(kMostSymbols, kSomeSize));
  }

  void visit_view(Node node) {
    const ValueId id = node.results[0].ids[0];
    try {
      set_strides(id, infer(graph_, node).at(0).at(0).type.value().strides, /*view=*/true);
    } catch (const UnsupportedError&) {  // There is no such view of this memory.
      return keep(std::move(node));
    }
    nodes_.push_back(std::move(node));
  }

  void visit_product(Node node) {
    for (const ValueId id : arguments_of(node)) {
      if (!is_matrix_for_products(graph_.type(id))) return keep(std::move(node));
    }
    nodes_.push_back(std::move(node));
  }

  // All that have the result's sizes must have the same strides; what is broadcast has those that
  // it had.
  void visit_pointwise(Node node) {
    const ValueId result = node.results[0].ids[0];
    const TensorType& type = graph_.type(result);
    std::optional<Strides> strides;
    for (const ValueId id : arguments_of(node)) {
      const TensorType& own = graph_.type(id);
      if (own.layout != c10::kStrided) return keep(std::move(node));
      if (own.sizes != type.sizes) {
        if (is_other(id)) return keep(std::move(node));
        continue;
      }
      if (strides.has_value() && !same_strides(type, *strides, own.strides)) {
        return keep(std::move(node));
      }
      strides = own.strides;
    }
    if (!strides.has_value() || !is_dense(type, *strides)) return keep(std::move(node));
    set_strides(result, *strides, /*view=*/false);
    nodes_.push_back(std::move(node));
  }

  // --- tools ---

  bool is_other(ValueId id) const {
    return index(id) < original_.size() &&
           !same_strides(graph_.type(id), graph_.type(id).strides, original_[index(id)]);
  }

  bool reads_other_strides(const Node& node) const {
    const std::vector<ValueId> arguments = arguments_of(node);
    return std::any_of(arguments.begin(), arguments.end(),
                       [&](ValueId id) { return is_other(id); });
  }

  void set_strides(ValueId id, Strides strides, bool view) {
    graph_.value(id).type.strides = std::move(strides);
    if (is_other(id) && !view) chosen_.push_back(id);
  }

  // As it is, or with all images that it gives channels-last.
  void put(Node node, bool relaid) {
    for (const ValueId id : results_of(node)) {
      const TensorType& type = graph_.type(id);
      if (relaid && type.dim() == 4) set_strides(id, channels_last_strides(type.sizes), false);
    }
    nodes_.push_back(std::move(node));
  }

  // With the arguments that it had.
  void keep(Node node) {
    if (reads_other_strides(node)) {
      std::vector<ValueId> map(graph_.values.size(), kNoValue);
      for (const ValueId id : arguments_of(node)) {
        if (const ValueId other = plain(id); other != id) map[index(id)] = other;
      }
      replace_arguments(node, map);
    }
    nodes_.push_back(std::move(node));
  }

  void relay_weight(Node* node, size_t i) {
    auto& weight = std::get<ValueRef>(node->args[i]);
    weight.id = copy(weight.id);
  }

  ValueId clone(ValueId id, c10::MemoryFormat format) {
    return append(graph_, &nodes_,
                  make_node("aten::clone", "",
                            {{"self", ValueRef{id}},
                             {"memory_format", c10::IValue(static_cast<int64_t>(format))}}),
                  graph_.value(id).name);
  }

  // In channels-last memory.
  ValueId copy(ValueId id) {
    if (index(id) >= copies_.size()) return clone(id, c10::MemoryFormat::ChannelsLast);
    ValueId& known = copies_[index(id)];
    if (known == kNoValue) known = clone(id, c10::MemoryFormat::ChannelsLast);
    return known;
  }

  // With the strides that it had; contiguous, where these left gaps.
  ValueId plain(ValueId id) {
    if (!is_other(id)) return id;
    if (plain_[index(id)] == kNoValue) {
      plain_[index(id)] = laid_out(id, original_[index(id)]);
      copied_ += some_numel(graph_.type(id));
    }
    return plain_[index(id)];
  }

  ValueId laid_out(ValueId id, const Strides& strides) {
    const TensorType& type = graph_.type(id);
    const std::vector<int64_t> order =
        is_dense(type, strides) ? memory_order(type, strides) : std::vector<int64_t>();
    if (std::is_sorted(order.begin(), order.end())) {
      return clone(id, c10::MemoryFormat::Contiguous);
    }
    std::vector<int64_t> back(order.size());
    for (size_t i = 0; i < order.size(); ++i) back[index(order[i])] = static_cast<int64_t>(i);
    return permuted(clone(permuted(id, order), c10::MemoryFormat::Contiguous), back);
  }

  ValueId permuted(ValueId id, const std::vector<int64_t>& order) {
    return append(
        graph_, &nodes_,
        make_node("aten::permute", "", {{"self", ValueRef{id}}, {"dims", c10::IValue(order)}}),
        graph_.value(id).name);
  }

  // The dims, the outermost in memory first; nothing known of sizes that are dynamic but that they
  // are what strides are products of.
  static std::vector<int64_t> memory_order(const TensorType& type, const Strides& strides) {
    std::vector<int64_t> order(type.sizes.size());
    std::iota(order.begin(), order.end(), 0);
    const std::vector<int64_t> some(kMostSymbols, kSomeSize);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return strides[index(a)].evaluate(some) > strides[index(b)].evaluate(some);
    });
    return order;
  }

  // Whether the elements fill their memory.
  static bool is_dense(const TensorType& type, const Strides& strides) {
    const std::vector<int64_t> order = memory_order(type, strides);
    SizeExpr step = 1;
    for (size_t i = order.size(); i-- > 0;) {
      if (type.sizes[index(order[i])] == 1) continue;
      if (strides[index(order[i])] != step) return false;
      step = step * type.sizes[index(order[i])];
    }
    return true;
  }

  static constexpr size_t kMostSymbols = 64;
  static constexpr int64_t kSomeSize = 3;

  Graph graph_;
  const Sources sources_;
  std::vector<Node> nodes_;
  std::vector<Strides> original_;  // by ValueId, as the others
  std::vector<ValueId> plain_;     // the same, with the original strides; kNoValue: not made yet
  std::vector<ValueId> copies_;    // the same, channels-last
  std::vector<ValueId> chosen_;
  int64_t copied_ = 0;  // numbers that are copied from one layout into the other
  int64_t pooled_ = 0;  // and that max pools read
};

// Whether there is something to gain, and nobody looks at memory past the strides of a tensor.
bool is_worth_it(const Graph& graph) {
  constexpr std::array<std::string_view, 3> kPastStrides = {
      "aten::as_strided", "aten::as_strided_scatter", "aten::_reshape_alias"};
  bool pools = false;
  for (const Node& node : graph.nodes) {
    if (node.is_control_flow()) continue;
    if (is_one_of(node.op, kPastStrides)) return false;
    pools = pools || is_max_pool(graph, node);
  }
  return pools;
}

}  // namespace

std::vector<ValueId> channels_last(Graph& graph) {
  require_functional(graph, "channels_last");
  if (!is_worth_it(graph)) return {};
  auto result = Relayout(graph).run();
  if (!result.has_value()) return {};
  graph = std::move(result->first);
  return std::move(result->second);
}

}  // namespace torchlift::compile
