#include "batching/batch_dims.h"

#include <c10/util/irange.h>

#include "batching/sparse_results.h"
#include "core/error.h"

namespace torchlift {
namespace {

constexpr const char* kVmap = "vmap";

std::string entries(size_t count) {
  return std::to_string(count) + (count == 1 ? " entry" : " entries");
}

std::string join(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

// "argument 1.w", "the result", "the result[0]".
std::string describe(const Path* path) {
  std::string text = path == nullptr ? std::string() : path->str();
  if (text.rfind("argument", 0) == 0) return text;
  return "the result" + text;
}

// What stands around the child at `path`: "the function, which was called with 2 arguments".
std::string describe_node(const Path& path) {
  const size_t count = path.step.count;
  if (path.step.kind == PathStep::Kind::kArgument) {
    return "the function was called with " + std::to_string(count) +
           (count == 1 ? " argument" : " arguments");
  }
  return describe(path.parent) + " has " + std::to_string(count) +
         (path.step.kind == PathStep::Kind::kField ? " fields" : " elements");
}

[[noreturn]] void throw_count(const Dims& dims, const Path& path, const char* what) {
  transform_error(kVmap, what, " has ", entries(dims.children().size()), ", ", dims.str(),
                  ", where ", describe_node(path),
                  ". Give one entry for each, or a single int or kNone for all.");
}

const Dims& named_child(const Dims& dims, const Path& path, const char* what) {
  const bool has_names =
      path.step.kind == PathStep::Kind::kField || path.step.kind == PathStep::Kind::kKey;
  if (!has_names) {
    transform_error(kVmap, what, " gives names, ", dims.str(), ", where ", describe_node(path),
                    ", which have no names. Use in(...) with one entry for each.");
  }
  const std::string label = path.step.label();
  for (const auto i : c10::irange(dims.names().size())) {
    if (dims.names()[i] != label) continue;
    if (dims.names().size() != path.step.count) throw_count(dims, path, what);
    return dims.children()[i];
  }
  transform_error(kVmap, what, " has no entry for '", label, "' of ", describe(path.parent),
                  "; it has: ", join(dims.names()),
                  ". Give an int or kNone for every name, or a single one for all.");
}

const Dims& child(const Dims& dims, const Path& path, const char* what) {
  if (dims.kind() == Dims::Kind::kNamed) return named_child(dims, path, what);
  if (path.step.kind == PathStep::Kind::kKey) {
    transform_error(kVmap, what, " gives a list, ", dims.str(), ", where ", describe(path.parent),
                    " is a map. Use named({{\"key\", 0}, ...}), or a single int or kNone for all.");
  }
  if (dims.children().size() != path.step.count) throw_count(dims, path, what);
  return dims.children()[path.step.index];
}

struct Found {
  const Dims* dims;
  bool exact;
};

Found descend(const Dims& root, const Path& path, const char* what) {
  const Found up = path.parent == nullptr ? Found{&root, true} : descend(root, *path.parent, what);
  if (path.step.kind == PathStep::Kind::kNone) return up;
  if (up.dims->is_prefix()) return {up.dims, false};
  return {&child(*up.dims, path, what), true};
}

// A dim of a tensor of this rank, counted from the front.
int64_t wrapped(int64_t dim, int64_t rank) { return dim < 0 ? dim + rank : dim; }

std::vector<int64_t> moved_dims(int64_t rank, int64_t from, int64_t to) {
  std::vector<int64_t> order;
  order.reserve(rank);
  for (const auto dim : c10::irange(rank)) {
    if (dim != from) order.push_back(dim);
  }
  order.insert(order.begin() + to, from);
  return order;
}

// See NOTE [nested and quantized tensors] in core/lifted_tensor.cc.
void check_ordinary(const Path& path, const at::Tensor& leaf) {
  if (leaf.is_nested()) {
    transform_error(kVmap, describe(&path),
                    " is a nested tensor, over which vmap cannot map: its examples differ in "
                    "shape. Pass at::nested_to_padded_tensor of it, or loop over its unbind().");
  }
  if (leaf.is_quantized()) {
    transform_error(kVmap, describe(&path), " is a quantized tensor (", leaf.scalar_type(),
                    "), over which vmap cannot map: operators on quantized tensors have no "
                    "batching rules. Pass its dequantize(), or give kNone if all examples share "
                    "it.");
  }
}

at::Tensor repeat_for_examples(const at::Tensor& value, int64_t dim, int64_t size) {
  std::vector<int64_t> sizes = value.sizes().vec();
  sizes.insert(sizes.begin() + dim, size);
  return value.unsqueeze(dim).expand(sizes);
}

}  // namespace

Dims Dims::list(std::vector<Dims> children) {
  Dims dims;
  dims.kind_ = Kind::kList;
  dims.children_ = std::move(children);
  return dims;
}

// NOLINTNEXTLINE(performance-unnecessary-value-param): its elements are moved from.
Dims Dims::named(std::vector<std::pair<std::string, Dims>> children) {
  Dims dims;
  dims.kind_ = Kind::kNamed;
  for (auto& [name, child] : children) {
    dims.names_.push_back(std::move(name));
    dims.children_.push_back(std::move(child));
  }
  return dims;
}

Dims named(std::initializer_list<std::pair<std::string, Dims>> entries) {
  return Dims::named(std::vector<std::pair<std::string, Dims>>(entries));
}

std::string Dims::str() const {
  if (kind_ == Kind::kNone) return "None";
  if (kind_ == Kind::kDim) return std::to_string(dim_);
  std::vector<std::string> words;
  for (const auto i : c10::irange(children_.size())) {
    words.push_back((kind_ == Kind::kNamed ? names_[i] + ": " : "") + children_[i].str());
  }
  return kind_ == Kind::kNamed ? "{" + join(words) + "}" : "(" + join(words) + ")";
}

LeafDim find_dim(const Dims& dims, const Path& path, const char* what) {
  if (dims.is_prefix()) {
    return {dims.dim(), path.parent == nullptr && path.step.kind == PathStep::Kind::kNone};
  }
  const Found found = descend(dims, path, what);
  if (!found.dims->is_prefix()) {
    transform_error(kVmap, what, " has ", entries(found.dims->children().size()), ", ",
                    found.dims->str(), ", for ", describe(&path),
                    ", which is a single leaf. Give one int or kNone for it.");
  }
  return {found.dims->dim(), found.exact};
}

void MappedInputs::check_constant(const Path& path) const {
  const LeafDim found = find_dim(in_dims_, path, "in_dims");
  if (found.dim.has_value() && found.exact) {
    transform_error(
        kVmap, "in_dims gives dim ", *found.dim, " for ", describe(&path),
        ", which is not a tensor and has no dims. Give kNone: it is handed to the function "
        "as it is.");
  }
}

void MappedInputs::add(const Path& path, at::Tensor& leaf) {
  const LeafDim found = find_dim(in_dims_, path, "in_dims");
  if (!found.dim.has_value()) return;
  if (!leaf.defined()) return check_constant(path);
  check_ordinary(path, leaf);
  const int64_t rank = leaf.dim();
  const int64_t dim = wrapped(*found.dim, rank);
  if (dim < 0 || dim >= rank) {
    transform_error(kVmap, "in_dims gives dim ", *found.dim, " for ", describe(&path), " of shape ",
                    leaf.sizes(),
                    rank == 0
                        ? std::string(", which has no dims. Give kNone for it.")
                        : c10::str(", which needs ", -rank, " <= dim < ", rank,
                                   ". Name one of its dims, or kNone if all examples share it."));
  }
  const int64_t size = leaf.size(dim);
  if (reporting_) {
    report_ += c10::str("\n  ", describe(&path), ": size ", size, " (dim ", dim, " of shape ",
                        leaf.sizes(), ")");
    return;
  }
  if (size_ < 0) size_ = size;
  inconsistent_ = inconsistent_ || size != size_;
  leaves_.push_back({&leaf, leaf, dim});
}

void MappedInputs::throw_report() const {
  const std::string axis =
      axis_size_.has_value() ? c10::str("\n  axis_size: ", *axis_size_) : std::string();
  transform_error(kVmap, "the batched dims of the arguments must all have the same size, but got:",
                  report_, axis,
                  "\nMake the sizes equal, or say in in_dims which dims are batched (kNone for an "
                  "argument that all examples share).");
}

int64_t MappedInputs::batch_size() const {
  if (size_ >= 0) return size_;
  transform_error(
      kVmap, "nothing is batched: in_dims = ", in_dims_.str(),
      " gives no dim for any tensor among the arguments. Give the dim of at least one, or "
      "the number of examples as axis_size.");
}

c10::Device MappedInputs::device() const {
  return leaves_.empty() ? c10::Device(c10::kCPU) : leaves_.front().value.device();
}

void MappedInputs::lift(const LevelPtr& level) {
  for (Leaf& leaf : leaves_) *leaf.slot = lift_alias(leaf.value, leaf.dim, level);
}

void MappedInputs::lift_slice(int64_t start, const LevelPtr& level) {
  for (Leaf& leaf : leaves_) {
    *leaf.slot = lift_alias(leaf.value.narrow(leaf.dim, start, level->size()), leaf.dim, level);
  }
}

void MappedOutputs::check_constant(const Path& path) const {
  const LeafDim found = find_dim(out_dims_, path, "out_dims");
  if (found.dim.has_value() && found.exact) {
    transform_error(kVmap, "out_dims gives dim ", *found.dim, " for ", describe(&path),
                    ", which is not a tensor. Give kNone: it is returned as it is.");
  }
}

void MappedOutputs::take_out(const Path& path, at::Tensor& leaf) const {
  const LeafDim found = find_dim(out_dims_, path, "out_dims");
  if (!leaf.defined()) return;
  if (leaf.is_nested()) {
    transform_error(kVmap, describe(&path),
                    " is a nested tensor, which has no dim for the examples. Return "
                    "at::nested_to_padded_tensor of it.");
  }
  Lowered lowered = lower(leaf, level_);
  if (!found.dim.has_value()) {
    if (lowered.bdim.has_value()) {
      transform_error(
          kVmap, "out_dims gives kNone for ", describe(&path), " (shape ", leaf.sizes(),
          " for one example), but it differs from example to example. Give the dim that "
          "is to hold the examples, 0 for one, or return something that does not depend "
          "on a batched argument.");
    }
    leaf = std::move(lowered.value);
    return;
  }
  const int64_t rank = leaf.dim() + 1;
  const int64_t dim = wrapped(*found.dim, rank);
  if (dim < 0 || dim >= rank) {
    transform_error(kVmap, "out_dims gives dim ", *found.dim, " for ", describe(&path),
                    ", whose shape is ", leaf.sizes(),
                    " for one example, so that the batched result has ", rank,
                    rank == 1 ? " dim" : " dims", ": it needs ", -rank, " <= dim < ", rank, ".");
  }
  if (!lowered.bdim.has_value()) {
    leaf = repeat_for_examples(lowered.value, dim, level_.size());
  } else if (*lowered.bdim == dim) {
    leaf = as_marked(std::move(lowered.value), leaf, dim);
  } else {
    leaf = as_marked(lowered.value.permute(moved_dims(rank, *lowered.bdim, dim)), leaf, dim);
  }
}

}  // namespace torchlift
