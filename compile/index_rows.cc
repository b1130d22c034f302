#include "compile/index_rows.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/index.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/nonzero_static.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/onlookers.h"

namespace torchlift::compile {
namespace {

// A tensor whose numbers may be looked at, and of which nobody else knows.
bool is_plain(const at::Tensor& t) { return t.defined() && t.is_cpu() && is_unfollowed(t); }

// The lists, and the dim of the first of them.
struct Lists {
  int64_t dim = 0;
  std::vector<at::Tensor> places;
};

std::optional<Lists> lists_of(const at::Tensor& x, const Indices& indices) {
  if (!is_plain(x) || !x.is_contiguous() || static_cast<int64_t>(indices.size()) > x.dim()) {
    return std::nullopt;
  }
  Lists lists;
  bool over = false;
  for (size_t d = 0; d < indices.size(); ++d) {
    const std::optional<at::Tensor> index = indices.get(d);
    if (!index.has_value() || !index->defined()) {
      over = !lists.places.empty();
      continue;
    }
    if (over || !is_plain(*index) || index->scalar_type() != at::kLong || index->dim() != 1) {
      return std::nullopt;
    }
    if (lists.places.empty()) lists.dim = static_cast<int64_t>(d);
    if (!lists.places.empty() && index->size(0) != lists.places[0].size(0)) return std::nullopt;
    lists.places.push_back(*index);
  }
  return lists.places.empty() ? std::nullopt : std::optional(std::move(lists));
}

// The places in what the dims are together; undefined if one is out of range, or counts from the
// end of its dim.
at::Tensor merged(const at::Tensor& x, const Lists& lists) {
  const int64_t count = lists.places[0].size(0);
  at::Tensor all = at::empty({count}, lists.places[0].options());
  auto* const into = all.mutable_data_ptr<int64_t>();
  for (size_t k = 0; k < lists.places.size(); ++k) {
    const int64_t size = x.size(lists.dim + static_cast<int64_t>(k));
    const int64_t step = lists.places[k].stride(0);
    const auto* const from = lists.places[k].const_data_ptr<int64_t>();
    bool out_of_range = false;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t place = from[i * step];
      out_of_range |= static_cast<uint64_t>(place) >= static_cast<uint64_t>(size);
      into[i] = k == 0 ? place : into[i] * size + place;
    }
    if (out_of_range) return {};
  }
  return all;
}

}  // namespace

at::Tensor index_rows(const at::Tensor& x, const Indices& indices) {
  const std::optional<Lists> lists = lists_of(x, indices);
  const at::Tensor places = lists.has_value() ? merged(x, *lists) : at::Tensor();
  if (!places.defined()) return at::index(x, indices);
  const auto dims = static_cast<int64_t>(lists->places.size());
  return at::index_select(x.flatten(lists->dim, lists->dim + dims - 1), lists->dim, places);
}

at::Tensor nonzero_places(const at::Tensor& x, int64_t size, int64_t fill) {
  if (is_plain(x)) {
    const at::Tensor found = at::nonzero(x);
    if (found.size(0) == size) return found.contiguous();
  }
  return at::nonzero_static(x, size, fill);
}

}  // namespace torchlift::compile
