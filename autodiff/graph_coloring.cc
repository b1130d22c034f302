#include "autodiff/graph_coloring.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <queue>
#include <utility>

namespace torchlift {
namespace {

using Ints = std::vector<int64_t>;

// A pattern with arrays of its own.
class OwnPattern {
 public:
  OwnPattern(int64_t rows, int64_t columns, Ints starts, Ints places)
      : rows_(rows), columns_(columns), starts_(std::move(starts)), places_(std::move(places)) {}
  SparsePattern view() const { return {rows_, columns_, starts_, places_}; }

 private:
  int64_t rows_, columns_;
  Ints starts_, places_;
};

OwnPattern transpose(const SparsePattern& pattern) {
  Ints starts(pattern.columns + 1, 0);
  for (const int64_t column : pattern.places) ++starts[column + 1];
  std::partial_sum(starts.begin(), starts.end(), starts.begin());
  Ints next(starts.begin(), starts.end() - 1);
  Ints places(pattern.places.size());
  for (int64_t i = 0; i < pattern.rows; ++i) {
    for (const int64_t column : pattern.row(i)) places[next[column]++] = i;
  }
  return {pattern.columns, pattern.rows, std::move(starts), std::move(places)};
}

// The same without some rows, which become empty.
OwnPattern without_rows(const SparsePattern& pattern, const std::vector<bool>& removed) {
  Ints starts{0}, places;
  for (int64_t i = 0; i < pattern.rows; ++i) {
    if (!removed[i]) {
      const auto row = pattern.row(i);
      places.insert(places.end(), row.begin(), row.end());
    }
    starts.push_back(static_cast<int64_t>(places.size()));
  }
  return {pattern.rows, pattern.columns, std::move(starts), std::move(places)};
}

int64_t densest_row(const SparsePattern& pattern) {
  int64_t most = 0;
  for (int64_t i = 0; i < pattern.rows; ++i) {
    most = std::max(most, static_cast<int64_t>(pattern.row(i).size()));
  }
  return most;
}

int64_t count_colors(const Ints& colors) {
  const auto most = std::max_element(colors.begin(), colors.end());
  return most == colors.end() ? 0 : *most + 1;
}

// Colours that are forbidden to the vertex at work: stamped with it.
class Forbidden {
 public:
  void forbid(int64_t color, int64_t vertex) {
    if (color == kNoColor) return;
    if (color >= static_cast<int64_t>(stamps_.size())) stamps_.resize(color + 1, -1);
    stamps_[color] = vertex;
  }
  int64_t smallest_allowed(int64_t vertex) const {
    int64_t color = 0;
    while (color < static_cast<int64_t>(stamps_.size()) && stamps_[color] == vertex) ++color;
    return color;
  }

 private:
  Ints stamps_;
};

// --- orders --------------------------------------------------------------------------------------

// How hard it is to find the neighbours of all vertices; too hard for an order that needs them
// again and again.
constexpr int64_t kTooMany = 20'000'000;

Ints natural_order(int64_t count) {
  Ints order(count);
  std::iota(order.begin(), order.end(), 0);
  return order;
}

Ints largest_first(const Ints& degrees) {
  Ints order = natural_order(static_cast<int64_t>(degrees.size()));
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return degrees[a] > degrees[b]; });
  return order;
}

// Takes away a vertex with the fewest neighbours left, again and again, and colours them the other
// way around. `neighbors(v, f)` calls f on each neighbour of v.
template <class Neighbors>
Ints smallest_last(Ints degrees, const Neighbors& neighbors) {
  using Entry = std::pair<int64_t, int64_t>;  // degree, vertex
  std::priority_queue<Entry, std::vector<Entry>, std::greater<>> queue;
  const auto count = static_cast<int64_t>(degrees.size());
  for (int64_t v = 0; v < count; ++v) queue.emplace(degrees[v], v);
  std::vector<bool> taken(count, false);
  Ints order;
  while (!queue.empty()) {
    const auto [degree, v] = queue.top();
    queue.pop();
    if (taken[v] || degree != degrees[v]) continue;
    taken[v] = true;
    order.push_back(v);
    neighbors(v, [&](int64_t w) {
      if (!taken[w]) queue.emplace(--degrees[w], w);
    });
  }
  std::reverse(order.begin(), order.end());
  return order;
}

// The best of several orders; `fewest` colours are needed in any case.
template <class Color, class SmallestLast>
Ints best_of(const Ints& degrees, int64_t fewest, const Color& color,
             const SmallestLast& smallest_last_order) {
  Ints best = color(natural_order(static_cast<int64_t>(degrees.size())));
  const auto try_order = [&](const Ints& order) {
    Ints colors = color(order);
    if (count_colors(colors) < count_colors(best)) best = std::move(colors);
  };
  if (count_colors(best) > fewest) try_order(largest_first(degrees));
  const int64_t work = std::accumulate(degrees.begin(), degrees.end(), int64_t{0});
  if (count_colors(best) > fewest && work < kTooMany) try_order(smallest_last_order());
  return best;
}

// --- columns -------------------------------------------------------------------------------------

// Colours the columns that have a nonzero, so that those that meet in a row differ.
Ints color_meeting_columns(const SparsePattern& pattern) {
  const OwnPattern owned = transpose(pattern);
  const SparsePattern columns = owned.view();
  Ints degrees(pattern.columns, 0);  // counts neighbours once for each row they meet in
  for (int64_t j = 0; j < pattern.columns; ++j) {
    for (const int64_t i : columns.row(j)) {
      degrees[j] += static_cast<int64_t>(pattern.row(i).size()) - 1;
    }
  }
  const auto neighbors = [&](int64_t j, const auto& f) {
    for (const int64_t i : columns.row(j)) {
      for (const int64_t other : pattern.row(i)) {
        if (other != j) f(other);
      }
    }
  };
  const auto color = [&](const Ints& order) {
    Ints colors(pattern.columns, kNoColor);
    Forbidden forbidden;
    for (const int64_t j : order) {
      if (columns.row(j).empty()) continue;
      neighbors(j, [&](int64_t other) { forbidden.forbid(colors[other], j); });
      colors[j] = forbidden.smallest_allowed(j);
    }
    return colors;
  };
  return best_of(degrees, densest_row(pattern), color,
                 [&] { return smallest_last(degrees, neighbors); });
}

// --- where nonzeros are found --------------------------------------------------------------------

// How often each colour comes up in the row at work.
class ColorCounts {
 public:
  explicit ColorCounts(int64_t colors) : counts_(colors, 0) {}
  void start(std::span<const int64_t> row, const Ints& colors) {
    for (const int64_t color : used_) counts_[color] = 0;
    used_.clear();
    for (const int64_t column : row) {
      const int64_t color = colors[column];
      if (color == kNoColor) continue;
      if (counts_[color]++ == 0) used_.push_back(color);
    }
  }
  bool alone(int64_t color) const { return color != kNoColor && counts_[color] == 1; }

 private:
  Ints counts_, used_;
};

// For each nonzero, whether its column is the only one of its colour in the row.
std::vector<bool> alone_in_row(const SparsePattern& pattern, const Ints& colors) {
  ColorCounts counts(count_colors(colors));
  std::vector<bool> alone;
  for (int64_t i = 0; i < pattern.rows; ++i) {
    counts.start(pattern.row(i), colors);
    for (const int64_t j : pattern.row(i)) alone.push_back(counts.alone(colors[j]));
  }
  return alone;
}

// For each nonzero in the order of the pattern, its position in the transpose.
Ints transposed_positions(const SparsePattern& pattern) {
  const OwnPattern owned = transpose(pattern);
  const SparsePattern columns = owned.view();
  Ints next(columns.starts.begin(), columns.starts.end() - 1);
  Ints positions;
  for (const int64_t j : pattern.places) positions.push_back(next[j]++);
  return positions;
}

// Finds every nonzero in the products, which proves the colouring right.
MatrixColoring with_sources(const SparsePattern& pattern, Ints column_colors, Ints row_colors) {
  MatrixColoring result{std::move(column_colors), std::move(row_colors), 0, 0, {}};
  result.forward = count_colors(result.column_colors);
  result.reverse = count_colors(result.row_colors);
  const std::vector<bool> by_column = alone_in_row(pattern, result.column_colors);
  const OwnPattern owned = transpose(pattern);
  const std::vector<bool> by_row = alone_in_row(owned.view(), result.row_colors);
  const Ints mirrored = transposed_positions(pattern);
  size_t k = 0;
  for (int64_t i = 0; i < pattern.rows; ++i) {
    for (const int64_t j : pattern.row(i)) {
      const bool forward = by_column[k];
      TORCH_INTERNAL_ASSERT(forward || by_row[mirrored[k]], "nonzero (", i, ", ", j,
                            ") cannot be read off any product");
      result.sources.push_back(forward ? result.column_colors[j] * pattern.rows + i
                                       : result.forward * pattern.rows +
                                             result.row_colors[i] * pattern.columns + j);
      ++k;
    }
  }
  return result;
}

// --- both directions -----------------------------------------------------------------------------

// How many of the densest rows to try to take away.
Ints candidates(const Ints& order, const SparsePattern& pattern) {
  constexpr size_t kTries = 12;
  Ints cuts;
  for (size_t k = 1; k < order.size(); ++k) {
    if (pattern.row(order[k]).size() < pattern.row(order[k - 1]).size()) {
      cuts.push_back(static_cast<int64_t>(k));
    }
  }
  if (cuts.size() <= kTries) return cuts;
  Ints chosen;
  for (size_t t = 0; t < kTries; ++t) {
    // More of the small ones: dense rows are few.
    const size_t place = t < kTries / 2 ? t : t * cuts.size() / kTries;
    chosen.push_back(cuts[place]);
  }
  return chosen;
}

// Dense rows by rows, the rest by columns: {column colours, row colours}.
std::pair<Ints, Ints> split_by_rows(const SparsePattern& pattern) {
  Ints order = natural_order(pattern.rows);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return pattern.row(a).size() > pattern.row(b).size();
  });
  std::pair<Ints, Ints> best{color_meeting_columns(pattern), Ints(pattern.rows, kNoColor)};
  const auto total = [](const auto& pair) {
    return count_colors(pair.first) + count_colors(pair.second);
  };
  for (const int64_t count : candidates(order, pattern)) {
    std::vector<bool> dense(pattern.rows, false), others(pattern.rows, true);
    for (int64_t k = 0; k < count; ++k) {
      dense[order[k]] = true;
      others[order[k]] = false;
    }
    const OwnPattern sparse_rows = without_rows(pattern, dense);
    if (densest_row(sparse_rows.view()) >= total(best)) continue;
    const OwnPattern dense_rows = without_rows(pattern, others);
    const OwnPattern turned = transpose(dense_rows.view());
    std::pair<Ints, Ints> found{color_meeting_columns(sparse_rows.view()),
                                color_meeting_columns(turned.view())};
    if (total(found) < total(best)) best = std::move(found);
  }
  return best;
}

// --- symmetric -----------------------------------------------------------------------------------

// Algorithm 4.1 of the paper. The diagonal is no edge.
Ints star_coloring(const SparsePattern& graph, const Ints& order) {
  Ints colors(graph.rows, kNoColor);
  Forbidden forbidden;
  for (const int64_t v : order) {
    for (const int64_t w : graph.row(v)) {
      if (w == v) continue;
      forbidden.forbid(colors[w], v);
      for (const int64_t x : graph.row(w)) {
        if (x == v || x == w || colors[x] == kNoColor) continue;
        if (colors[w] == kNoColor) {
          forbidden.forbid(colors[x], v);
          continue;
        }
        // A path v, w, x, y with two colours must not be.
        const auto path = graph.row(x);
        const bool closes = std::any_of(path.begin(), path.end(), [&](int64_t y) {
          return y != w && y != x && colors[y] == colors[w];
        });
        if (closes) forbidden.forbid(colors[x], v);
      }
    }
    colors[v] = graph.row(v).empty() ? kNoColor : forbidden.smallest_allowed(v);
  }
  return colors;
}

Ints star_colors(const SparsePattern& graph) {
  Ints degrees(graph.rows);
  for (int64_t v = 0; v < graph.rows; ++v) {
    degrees[v] = static_cast<int64_t>(graph.row(v).size());
  }
  const auto neighbors = [&](int64_t v, const auto& f) {
    for (const int64_t w : graph.row(v)) {
      if (w != v) f(w);
    }
  };
  return best_of(
      degrees, /*fewest=*/1, [&](const Ints& order) { return star_coloring(graph, order); },
      [&] { return smallest_last(degrees, neighbors); });
}

}  // namespace

MatrixColoring color_columns(const SparsePattern& pattern) {
  return with_sources(pattern, color_meeting_columns(pattern), Ints(pattern.rows, kNoColor));
}

MatrixColoring color_rows(const SparsePattern& pattern) {
  const OwnPattern turned = transpose(pattern);
  return with_sources(pattern, Ints(pattern.columns, kNoColor),
                      color_meeting_columns(turned.view()));
}

MatrixColoring color_both(const SparsePattern& pattern) {
  auto [columns, rows] = split_by_rows(pattern);
  const OwnPattern turned = transpose(pattern);
  auto [other_rows, other_columns] = split_by_rows(turned.view());
  if (count_colors(other_columns) + count_colors(other_rows) <
      count_colors(columns) + count_colors(rows)) {
    columns = std::move(other_columns);
    rows = std::move(other_rows);
  }
  return with_sources(pattern, std::move(columns), std::move(rows));
}

MatrixColoring color_symmetric(const SparsePattern& pattern) {
  MatrixColoring result{star_colors(pattern), Ints(pattern.rows, kNoColor), 0, 0, {}};
  const Ints& colors = result.column_colors;
  result.forward = count_colors(colors);
  const std::vector<bool> alone = alone_in_row(pattern, colors);
  const Ints mirrored = transposed_positions(pattern);
  size_t k = 0;
  for (int64_t i = 0; i < pattern.rows; ++i) {
    for (const int64_t j : pattern.row(i)) {
      // Columns of a row come in the order of rows of a column: the transpose is the same pattern.
      const bool own = alone[k];
      TORCH_INTERNAL_ASSERT(own || alone[mirrored[k]], "nonzero (", i, ", ", j,
                            ") cannot be read off any product");
      result.sources.push_back(own ? colors[j] * pattern.rows + i : colors[i] * pattern.rows + j);
      ++k;
    }
  }
  return result;
}

bool is_symmetric(const SparsePattern& pattern) {
  if (pattern.rows != pattern.columns) return false;
  const OwnPattern owned = transpose(pattern);
  const SparsePattern turned = owned.view();
  if (!std::equal(pattern.starts.begin(), pattern.starts.end(), turned.starts.begin())) {
    return false;
  }
  for (int64_t i = 0; i < pattern.rows; ++i) {
    Ints row(pattern.row(i).begin(), pattern.row(i).end());
    std::sort(row.begin(), row.end());
    if (!std::equal(row.begin(), row.end(), turned.row(i).begin())) return false;
  }
  return true;
}

}  // namespace torchlift
