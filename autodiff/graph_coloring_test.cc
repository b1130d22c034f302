#include "autodiff/graph_coloring.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>
#include <utility>
#include <vector>

namespace torchlift {
namespace {

using Ints = std::vector<int64_t>;

// A pattern that owns its arrays.
struct Matrix {
  int64_t rows = 0, columns = 0;
  Ints starts, places;

  SparsePattern pattern() const { return {rows, columns, starts, places}; }
  bool has(int64_t i, int64_t j) const {
    for (const int64_t column : pattern().row(i)) {
      if (column == j) return true;
    }
    return false;
  }
};

Matrix matrix(int64_t rows, int64_t columns, const std::set<std::pair<int64_t, int64_t>>& places) {
  Matrix result{rows, columns, {0}, {}};
  auto next = places.begin();
  for (int64_t i = 0; i < rows; ++i) {
    for (; next != places.end() && next->first == i; ++next) result.places.push_back(next->second);
    result.starts.push_back(static_cast<int64_t>(result.places.size()));
  }
  return result;
}

Matrix random_matrix(int64_t rows, int64_t columns, double density, bool symmetric, int seed) {
  std::mt19937 random(seed);
  std::bernoulli_distribution draw(density);
  std::set<std::pair<int64_t, int64_t>> places;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      if (!draw(random)) continue;
      places.emplace(i, j);
      if (symmetric) places.emplace(j, i);
    }
  }
  return matrix(rows, columns, places);
}

Matrix band(int64_t size, int64_t width) {
  std::set<std::pair<int64_t, int64_t>> places;
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t j = std::max<int64_t>(0, i - width); j <= std::min(size - 1, i + width); ++j) {
      places.emplace(i, j);
    }
  }
  return matrix(size, size, places);
}

// First row, first column, diagonal.
Matrix arrow(int64_t size) {
  std::set<std::pair<int64_t, int64_t>> places;
  for (int64_t i = 0; i < size; ++i) places.insert({{0, i}, {i, 0}, {i, i}});
  return matrix(size, size, places);
}

// Multiplies numbers in those places by the sums of the columns and rows of each colour, and reads
// them back.
void expect_reads_back(const Matrix& m, const MatrixColoring& coloring, bool symmetric = false) {
  std::map<std::pair<int64_t, int64_t>, double> numbers;
  std::mt19937 random(7);
  for (int64_t i = 0; i < m.rows; ++i) {
    for (const int64_t j : m.pattern().row(i)) {
      const double number = std::uniform_real_distribution(1.0, 2.0)(random);
      numbers[{i, j}] = number;
      if (symmetric && j <= i) numbers[{i, j}] = numbers[{j, i}] = number;
    }
  }
  if (symmetric) {
    for (auto& [place, number] : numbers) number = numbers.at({place.second, place.first});
  }
  std::vector<double> products(coloring.forward * m.rows + coloring.reverse * m.columns, 0);
  for (const auto& [place, number] : numbers) {
    const auto [i, j] = place;
    if (coloring.column_colors[j] != kNoColor) {
      products[coloring.column_colors[j] * m.rows + i] += number;
    }
    if (coloring.row_colors[i] != kNoColor) {
      products[coloring.forward * m.rows + coloring.row_colors[i] * m.columns + j] += number;
    }
  }
  ASSERT_EQ(coloring.sources.size(), m.places.size());
  size_t k = 0;
  for (int64_t i = 0; i < m.rows; ++i) {
    for (const int64_t j : m.pattern().row(i)) {
      EXPECT_DOUBLE_EQ(products.at(coloring.sources[k++]), (numbers[{i, j}])) << i << ", " << j;
    }
  }
}

// The definitions, word by word.
void expect_columns_differ(const Matrix& m, const Ints& colors) {
  for (int64_t i = 0; i < m.rows; ++i) {
    for (int64_t a = 0; a < m.columns; ++a) {
      for (int64_t b = 0; b < a; ++b) {
        if (m.has(i, a) && m.has(i, b)) {
          EXPECT_NE(colors[a], colors[b]);
        }
      }
    }
  }
}

void expect_star_coloring(const Matrix& m, const Ints& colors) {
  const auto edge = [&](int64_t a, int64_t b) { return a != b && m.has(a, b); };
  for (int64_t a = 0; a < m.rows; ++a) {
    for (int64_t b = 0; b < m.rows; ++b) {
      if (!edge(a, b)) continue;
      EXPECT_NE(colors[a], colors[b]);
      for (int64_t c = 0; c < m.rows; ++c) {
        for (int64_t d = 0; d < m.rows; ++d) {
          if (c == a || d == b || d == a || !edge(b, c) || !edge(c, d)) continue;
          const std::set<int64_t> used{colors[a], colors[b], colors[c], colors[d]};
          EXPECT_GE(used.size(), 3U) << a << b << c << d;
        }
      }
    }
  }
}

TEST(GraphColoringTest, RandomPatternsAreReadBack) {
  for (int seed = 0; seed < 30; ++seed) {
    const double density = seed % 3 == 0 ? 0.05 : seed % 3 == 1 ? 0.2 : 0.6;
    const Matrix m = random_matrix(7 + seed % 5, 11 - seed % 4, density, false, seed);
    const MatrixColoring columns = color_columns(m.pattern());
    expect_columns_differ(m, columns.column_colors);
    expect_reads_back(m, columns);
    expect_reads_back(m, color_rows(m.pattern()));
    expect_reads_back(m, color_both(m.pattern()));
    const Matrix s = random_matrix(9, 9, density / 2, true, seed);
    EXPECT_TRUE(is_symmetric(s.pattern()));
    const MatrixColoring star = color_symmetric(s.pattern());
    expect_star_coloring(s, star.column_colors);
    expect_reads_back(s, star, /*symmetric=*/true);
  }
}

TEST(GraphColoringTest, KnownNumbersOfColors) {
  EXPECT_EQ(color_columns(band(50, 0).pattern()).forward, 1);
  EXPECT_EQ(color_columns(band(50, 1).pattern()).forward, 3);
  EXPECT_EQ(color_rows(band(50, 2).pattern()).reverse, 5);
  // Two would do for the columns of a tridiagonal symmetric matrix if it were acyclic; a star
  // colouring of a path takes three.
  EXPECT_EQ(color_symmetric(band(50, 1).pattern()).forward, 3);
  const Matrix a = arrow(40);
  EXPECT_EQ(color_columns(a.pattern()).forward, 40);
  EXPECT_EQ(color_rows(a.pattern()).reverse, 40);
  const MatrixColoring both = color_both(a.pattern());
  EXPECT_EQ(both.forward + both.reverse, 3);
  EXPECT_EQ(color_symmetric(a.pattern()).forward, 2);
}

TEST(GraphColoringTest, EmptyRowsAndColumnsTakeNoProduct) {
  const Matrix m = matrix(3, 4, {{1, 2}});
  const MatrixColoring columns = color_columns(m.pattern());
  EXPECT_EQ(columns.column_colors, (Ints{-1, -1, 0, -1}));
  EXPECT_EQ(columns.forward, 1);
  EXPECT_EQ(color_columns(matrix(3, 0, {}).pattern()).forward, 0);
  EXPECT_EQ(color_rows(matrix(0, 3, {}).pattern()).reverse, 0);
  EXPECT_EQ(color_both(matrix(2, 2, {}).pattern()).forward, 0);
  EXPECT_EQ(color_symmetric(matrix(2, 2, {}).pattern()).forward, 0);
}

TEST(GraphColoringTest, Symmetry) {
  EXPECT_FALSE(is_symmetric(matrix(2, 2, {{0, 1}}).pattern()));
  EXPECT_FALSE(is_symmetric(matrix(2, 3, {}).pattern()));
  EXPECT_FALSE(is_symmetric(matrix(3, 3, {{0, 1}, {1, 2}, {2, 0}}).pattern()));
  EXPECT_TRUE(is_symmetric(band(4, 1).pattern()));
}

}  // namespace
}  // namespace torchlift
