#ifndef TORCHLIFT_AUTODIFF_NAN_SEARCH_H_
#define TORCHLIFT_AUTODIFF_NAN_SEARCH_H_

// File: autodiff/nan_search.h
//
// Where in a tensor of any levels there are NaNs: which example, which element. What check_nan
// (autodiff/check_nan.h) is made of. Not for users.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/level.h"

namespace torchlift::nan_search {

// A plain tensor inside of one that the user sees, or its tangent: every dim of it belongs to the
// tensor the user sees, or holds the examples of a level.
struct Part {
  at::Tensor value;
  std::vector<LevelPtr> levels;  // one for each dim; null for those that the user sees
  bool tangent = false;
};

// The value of t below all levels, and its tangents. Leaves out what cannot be read: integers, and
// tensors without data (meta, fake). Runs in the dispatch state that t was made in, since autograd
// may have to derive the tangent of a view.
std::vector<Part> parts_of(const at::Tensor& t);

// Which numbers are looked for.
struct Wanted {
  bool inf = false;  // infinities too
};

// False if there are none; a pass over the value that is cheap in comparison with rows_of. True if
// there may be.
bool may_contain(const Part& part);

// The examples in which a tensor has such numbers: `hit` is a boolean tensor with one dim for each
// level, outermost first. A tensor of no level has no dim there.
struct Rows {
  std::vector<LevelPtr> levels;
  at::Tensor hit;
};

Rows rows_of(const Part& part, Wanted wanted);
// Rows of nothing: all examples, of no level.
Rows everywhere();
// Whether any example is hit.
bool any(const Rows& rows);

// The examples of `rows` that none of the others has. (A level that only the others know counts for
// all of its examples.)
Rows without(Rows rows, const std::vector<Rows>& others);

// The first of these numbers in the examples that are hit.
struct Place {
  std::vector<int64_t> row;    // of each level of rows
  std::vector<int64_t> index;  // in the tensor that the user sees
  int64_t hits = 0;            // how many there are in that example
  int64_t elements = 0;        // of how many
  // For each level, the other examples that are hit, whatever those of the other levels.
  std::vector<std::vector<int64_t>> all_rows;
};

Place first_place(const Part& part, const Rows& rows, Wanted wanted);

// "row 3 of vmap level 1 (size 8)": for a message, as the user counts: an example of a chunk by its
// place among all, one of a branch by its place among those that did not take it.
std::string describe_rows(const Rows& rows, const Place& place);

}  // namespace torchlift::nan_search

#endif  // TORCHLIFT_AUTODIFF_NAN_SEARCH_H_
