#include "autodiff/nan_search.h"

#include <ATen/ops/isfinite.h>
#include <ATen/ops/isnan.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/view_as_real.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/lifted_tensor.h"
#include "core/narrow.h"

namespace torchlift::nan_search {
namespace {

using at::Tensor;
using Dims = std::vector<LevelPtr>;

constexpr int kDual = 0;  // libtorch's one dual level
constexpr size_t kRowsShown = 8;
// Up to so many numbers are read one by one, which takes less time than an operator.
constexpr int64_t kReadHere = 4096;

// Whether the numbers of a plain tensor can be NaN, and be read.
bool readable(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kHalf:
    case at::kBFloat16:
    case at::kFloat:
    case at::kDouble:
    case at::kComplexFloat:
    case at::kComplexDouble:
      break;
    default:
      return false;
  }
  if (t.is_meta() || t.is_nested() || t._is_zerotensor()) return false;
  return !t.unsafeGetTensorImpl()->key_set().has(c10::DispatchKey::Python);
}

// The numbers of a sparse tensor that are stored; a dense tensor itself.
std::optional<Part> dense(Part part) {
  if (part.value.layout() == at::kStrided) return part;
  // Its dims are not those that the user sees; what is said of them would be wrong.
  const bool known = std::all_of(part.levels.begin(), part.levels.end(),
                                 [](const LevelPtr& level) { return !level; });
  if (!known) return std::nullopt;
  if (part.value.layout() == at::kSparse) {
    part.value = part.value._values();
  } else if (part.value.layout() == at::kSparseCsr || part.value.layout() == at::kSparseCsc) {
    part.value = part.value.values();
  } else {
    return std::nullopt;
  }
  part.levels.assign(part.value.dim(), LevelPtr());
  return part;
}

void collect(const Tensor& t, const Dims& dims, bool tangent, std::vector<Part>& parts) {
  if (!t.defined()) return;
  const Tensor own_tangent = t._fw_grad(kDual);
  if (own_tangent.defined()) collect(own_tangent, dims, /*tangent=*/true, parts);
  const LiftedTensorImpl* impl = as_lifted(t);
  if (impl == nullptr) {
    if (!readable(t)) return;
    if (auto part = dense({t, dims, tangent})) parts.push_back(*std::move(part));
    return;
  }
  Dims inside = dims;
  if (impl->bdim().has_value()) inside.insert(inside.begin() + *impl->bdim(), impl->level_ptr());
  collect(impl->value(), inside, tangent, parts);
}

Tensor hits(const Tensor& value, Wanted wanted) {
  return wanted.inf ? at::isfinite(value).logical_not() : at::isnan(value);
}

template <class T>
bool any_not_finite(const Tensor& value) {
  const T* data = value.const_data_ptr<T>();
  return std::any_of(data, data + value.numel(), [](T number) { return !std::isfinite(number); });
}

// The dims of a part's value: those of levels, outermost first, and the others in their order.
struct DimOrder {
  explicit DimOrder(const Part& part) {
    for (size_t dim = 0; dim < part.levels.size(); ++dim) {
      (part.levels[dim] ? batch : own).push_back(static_cast<int64_t>(dim));
    }
    std::sort(batch.begin(), batch.end(), [&](int64_t a, int64_t b) {
      return part.levels[a]->depth() < part.levels[b]->depth();
    });
    order = batch;
    order.insert(order.end(), own.begin(), own.end());
  }
  std::vector<int64_t> batch, own, order;
};

// `hit` of others in the dims of rows: levels it lacks as dims of size 1.
Tensor in_dims_of(const Rows& rows, const Rows& other) {
  Tensor hit = other.hit;
  for (size_t i = other.levels.size(); i-- > 0;) {
    const bool common =
        std::find(rows.levels.begin(), rows.levels.end(), other.levels[i]) != rows.levels.end();
    if (!common) hit = hit.any(static_cast<int64_t>(i));
  }
  for (size_t i = 0; i < rows.levels.size(); ++i) {
    const bool common =
        std::find(other.levels.begin(), other.levels.end(), rows.levels[i]) != other.levels.end();
    if (!common) hit = hit.unsqueeze(static_cast<int64_t>(i));
  }
  return hit;
}

std::vector<int64_t> as_list(const Tensor& indices) {
  std::vector<int64_t> list(indices.numel());
  for (int64_t i = 0; i < indices.numel(); ++i) list[i] = indices[i].item<int64_t>();
  return list;
}

const char* examples_of(LevelKind kind) {
  if (kind == LevelKind::kTangents) return "direction";
  return kind == LevelKind::kInterpreted ? "part" : "row";
}

// An element of the rows of a narrowed level, in the example `row` of the levels around; none if it
// cannot be told.
std::optional<int64_t> chosen_row(const Tensor& rows, int64_t index, const Rows& all,
                                  const std::vector<int64_t>& row) {
  Dims dims(1);
  Tensor value = rows;
  while (const LiftedTensorImpl* impl = as_lifted(value)) {
    if (impl->bdim().has_value()) dims.insert(dims.begin() + *impl->bdim(), impl->level_ptr());
    value = Tensor(impl->value());
  }
  for (const LevelPtr& level : dims) {
    const auto found = std::find(all.levels.begin(), all.levels.end(), level);
    if (level && found == all.levels.end()) return std::nullopt;
    value = value.select(0, level ? row[found - all.levels.begin()] : index);
  }
  return value.item<int64_t>();
}

// The number of an example as the user counts, and the level that he knows it by.
struct Example {
  const Level* level;
  int64_t row;
};

Example seen_by_user(const Rows& rows, size_t which, int64_t index,
                     const std::vector<int64_t>& row) {
  Example example{rows.levels[which].get(), index};
  while (example.level->base() != nullptr) {
    const auto* narrowed = static_cast<const NarrowedLevel*>(example.level);
    if (narrowed->rows().defined()) {
      const auto chosen = chosen_row(narrowed->rows(), example.row, rows, row);
      if (!chosen.has_value()) return example;
      example.row = *chosen;
    }
    example.level = narrowed->base();
  }
  if (example.level->kind() == LevelKind::kVmap) example.row += example.level->first_row();
  return example;
}

}  // namespace

std::vector<Part> parts_of(const Tensor& t) {
  std::vector<Part> parts;
  if (t.defined()) collect(t, Dims(t.dim()), /*tangent=*/false, parts);
  return parts;
}

bool may_contain(const Part& part) {
  const Tensor& value = part.value;
  if (value.numel() <= kReadHere && value.device().is_cpu() && value.is_contiguous()) {
    if (value.scalar_type() == at::kFloat) return any_not_finite<float>(value);
    if (value.scalar_type() == at::kDouble) return any_not_finite<double>(value);
  }
  // A sum over NaNs or infinities is none of the finite numbers.
  const Tensor real = value.is_complex() ? at::view_as_real(value.resolve_conj()) : value;
  return !std::isfinite(at::sum(real).item<double>());
}

Rows rows_of(const Part& part, Wanted wanted) {
  const DimOrder dims(part);
  Rows rows;
  for (const int64_t dim : dims.batch) rows.levels.push_back(part.levels[dim]);
  Tensor hit = hits(part.value, wanted).permute(dims.order);
  for (size_t i = 0; i < dims.own.size(); ++i) hit = hit.any(-1);
  rows.hit = hit;
  return rows;
}

Rows everywhere() { return {{}, at::ones({}, at::kBool)}; }

bool any(const Rows& rows) { return rows.hit.any().item<bool>(); }

Rows without(Rows rows, const std::vector<Rows>& others) {
  for (const Rows& other : others) {
    rows.hit = rows.hit.logical_and(in_dims_of(rows, other).to(rows.hit.device()).logical_not());
  }
  return rows;
}

Place first_place(const Part& part, const Rows& rows, Wanted wanted) {
  const DimOrder dims(part);
  Place place;
  place.row = as_list(rows.hit.nonzero()[0]);
  Tensor hit = hits(part.value, wanted).permute(dims.order);
  for (const int64_t row : place.row) hit = hit.select(0, row);
  const Tensor found = hit.nonzero();
  place.index = as_list(found[0]);
  place.hits = found.size(0);
  place.elements = hit.numel();
  for (size_t i = 0; i < rows.levels.size(); ++i) {
    const auto level = static_cast<int64_t>(i);
    Tensor of_level = rows.hit;
    for (int64_t dim = of_level.dim(); dim-- > 0;) {
      if (dim != level) of_level = of_level.any(dim);
    }
    place.all_rows.push_back(as_list(of_level.nonzero().squeeze(1)));
  }
  return place;
}

std::string describe_rows(const Rows& rows, const Place& place) {
  std::string text;
  for (size_t i = 0; i < rows.levels.size(); ++i) {
    const Example first = seen_by_user(rows, i, place.row[i], place.row);
    if (i > 0) text += ", ";
    text +=
        c10::str(examples_of(first.level->kind()), " ", first.row, " of ", first.level->describe());
    if (first.level->kind() == LevelKind::kVmap && first.level->first_row() > 0) {
      text += c10::str(", whose chunk starts at row ", first.level->first_row());
    }
    std::vector<int64_t> others;
    for (const int64_t other : place.all_rows[i]) {
      if (other != place.row[i]) others.push_back(other);
    }
    if (others.empty()) continue;
    text += " (also in ";
    const size_t shown = std::min(others.size(), kRowsShown);
    for (size_t k = 0; k < shown; ++k) {
      text += c10::str(k > 0 ? ", " : "", seen_by_user(rows, i, others[k], place.row).row);
    }
    text += others.size() > shown ? c10::str(" and ", others.size() - shown, " more)") : ")";
  }
  return text;
}

}  // namespace torchlift::nan_search
