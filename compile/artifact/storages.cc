#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/set.h>

#include <algorithm>
#include <map>
#include <utility>

#include "compile/artifact/bytes.h"
#include "compile/artifact/dtypes.h"
#include "compile/artifact/encode.h"
#include "compile/artifact/format_error.h"

// NOTE [storages]
// Constants that are views of one tensor (tied weights, a weight and its transpose) are kept as one
// storage and as views of it, so that a file holds each number once and a write into one is seen by
// the others, as before. Of a storage only the bytes that constants can see are kept: a constant
// that is a row of a large table does not bring the table along. What is kept are intervals;
// constants whose intervals overlap share one.
//
// as_strided counts its offset from the begin of the storage, whatever the tensor it is called on
// sees. In a graph that calls it, storages are kept whole.

namespace torchlift::compile {
namespace {

struct Interval {
  uint64_t begin = 0;
  uint64_t end = 0;
};

struct Kept {
  const Constant* constant;
  at::Tensor tensor;
  uint64_t offset;  // in the storage, bytes
  Interval interval;
};

uint64_t offset_of(const at::Tensor& tensor) {
  return tensor.numel() == 0
             ? 0
             : static_cast<uint64_t>(tensor.storage_offset()) * tensor.element_size();
}

// The bytes of its storage that a strided tensor sees.
Interval interval_of(const at::Tensor& tensor) {
  const auto element = static_cast<int64_t>(tensor.element_size());
  const int64_t begin = tensor.storage_offset();
  if (tensor.numel() == 0) return {};
  int64_t last = begin;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  return {static_cast<uint64_t>(begin * element), static_cast<uint64_t>((last + 1) * element)};
}

bool calls_as_strided(const Graph& graph) {
  const std::vector<const Graph*> graphs = all_graphs(graph);
  return std::any_of(graphs.begin(), graphs.end(), [](const Graph* each) {
    return std::any_of(each->nodes.begin(), each->nodes.end(), [](const Node& node) {
      return node.op.find("as_strided") != std::string::npos;
    });
  });
}

// The constant without lazy bits, which have no place in the format.
at::Tensor plain(const Graph& graph, const Constant& constant) {
  const at::Tensor& tensor = constant.tensor;
  const std::string& name = graph.value(constant.id).name;
  if (tensor.layout() != c10::kStrided || tensor.is_quantized() ||
      find_dtype(tensor.scalar_type()) == nullptr) {
    format_error("constant ", name, " is ", graph.type(constant.id).str(),
                 ", and only strided tensors of numbers can be saved. Make it an input.");
  }
  if (type_of(tensor) != graph.type(constant.id)) {
    format_error("constant ", name, " is ", type_of(tensor).str(), ", and its value is said to be ",
                 graph.type(constant.id).str(), ", or its strides differ.");
  }
  at::Tensor result = tensor.detach();
  if (result.is_conj() || result.is_neg() || result._is_zerotensor()) {
    result = at::empty_strided(result.sizes(), result.strides(), result.options()).copy_(result);
  }
  const bool has_numbers = !result.is_meta() && result.has_storage() &&
                           (result.numel() == 0 || result.storage().data() != nullptr);
  if (!has_numbers) {
    format_error("constant ", name, " has no memory of its own (a meta, fake or batched tensor).");
  }
  return result;
}

at::Tensor bytes_of(const at::Tensor& any_view, const Interval& interval) {
  const auto count = static_cast<int64_t>(interval.end - interval.begin);
  at::Tensor bytes = at::empty({0}, any_view.options().dtype(at::kByte));
  if (count > 0) bytes.set_(any_view.storage(), static_cast<int64_t>(interval.begin), {count}, {1});
  return bytes.cpu();
}

// Offsets must be multiples of the size of an element, also of a view of another dtype.
uint64_t aligned_begin(uint64_t begin) { return begin / 16 * 16; }

// Sorted by begin: the next interval overlaps the last one, or opens another.
void add_storages(std::vector<Kept>& views, const std::string& name, Storages& storages) {
  std::sort(views.begin(), views.end(),
            [](const Kept& a, const Kept& b) { return a.interval.begin < b.interval.begin; });
  for (size_t first = 0; first < views.size();) {
    Interval all = views[first].interval;
    bool mixed = false;
    size_t last = first;
    while (++last < views.size() && views[last].interval.begin < all.end) {
      all.end = std::max(all.end, views[last].interval.end);
      mixed |= views[last].tensor.dtype() != views[first].tensor.dtype();
    }
    if (mixed) all.begin = aligned_begin(all.begin);
    const at::Tensor bytes = bytes_of(views[first].tensor, all);
    const size_t index = storages.records.size();
    storages.records.push_back({.name = name + (first == 0 ? "" : "." + std::to_string(first)),
                                .bytes = static_cast<uint64_t>(bytes.numel()),
                                .crc = crc32(bytes.const_data_ptr(), bytes.nbytes())});
    storages.bytes.push_back(bytes);
    storages.views.push_back(views[first].tensor);
    for (; first < last; ++first) {
      storages.places[views[first].constant] = {index, views[first].offset - all.begin};
    }
  }
}

}  // namespace

Storages collect_storages(const Graph& graph) {
  const bool whole = calls_as_strided(graph);
  // In the order of the graph, which does not depend on addresses: a program gives the same file
  // each time.
  std::vector<std::pair<std::string, std::vector<Kept>>> groups;
  std::map<const void*, size_t> group_of;
  const std::vector<const Graph*> graphs = all_graphs(graph);
  for (size_t g = graphs.size(); g-- > 0;) {
    for (const Constant& constant : graphs[g]->constants) {
      const at::Tensor tensor = plain(*graphs[g], constant);
      const void* storage = tensor.storage().unsafeGetStorageImpl();
      const auto [found, fresh] = group_of.emplace(storage, groups.size());
      if (fresh) {
        const std::string prefix = g + 1 == graphs.size() ? "" : std::to_string(g) + "/";
        groups.push_back({prefix + graphs[g]->value(constant.id).name, {}});
      }
      Interval interval = interval_of(tensor);
      if (whole) interval = {0, tensor.storage().nbytes()};
      groups[found->second].second.push_back({&constant, tensor, offset_of(tensor), interval});
    }
  }
  Storages storages;
  for (auto& [name, views] : groups) add_storages(views, name, storages);
  return storages;
}

}  // namespace torchlift::compile
