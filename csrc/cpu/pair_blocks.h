// Squared distances of the pairs among n rows, by blocks that fit the cache.
#pragma once

#include <algorithm>
#include <vector>

#include "../scalar.h"
#include "rows.h"

namespace facelt::cpu {

constexpr std::int64_t kBlockRows = 16;

inline std::int64_t number_of_blocks(std::int64_t rows) {
  return (rows + kBlockRows - 1) / kBlockRows;
}

// Up to kBlockRows rows of x, `order` giving the row at each position; half types are widened into
// a buffer. The last pointer is repeated up to a multiple of the tile, so that a tile always has
// its rows.
template <class T>
class RowBlock {
 public:
  using A = Compute<T>;

  void load(const T* x, std::int64_t dimensions, const std::int64_t* order, std::int64_t begin,
            std::int64_t end) {
    const std::int64_t rows = std::min(kBlockRows, end - begin);
    for (std::int64_t i = 0; i < rows; ++i) {
      rows_[i] = widened(x + order[begin + i] * dimensions, dimensions, i);
    }
    for (std::int64_t i = rows; i % kTile != 0; ++i) rows_[i] = rows_[rows - 1];
  }

  const A* const* rows() const { return rows_; }

 private:
  const A* widened(const T* row, std::int64_t dimensions, std::int64_t slot) {
    if constexpr (std::is_same_v<T, A>) {
      return row;
    } else {
      buffer_.resize(kBlockRows * dimensions);
      A* copy = buffer_.data() + slot * dimensions;
      conversion_kernels<T>().widen(row, copy, dimensions);
      return copy;
    }
  }

  const A* rows_[kBlockRows];
  std::vector<A> buffer_;
};

// Of four rows against four a number for each pair, as RowKernels has them.
template <class A>
using TileKernel = void (*)(const A* const* a, const A* const* b, std::int64_t n, A* out);

// Visits the pairs (i, j), begin <= i < j < end, whose i lies in block `block` of that interval,
// with what `kernel` says of them. What is visited, and in which order, depends on nothing but the
// arguments.
template <class T, class Visit>
void visit_pair_block(const T* x, std::int64_t dimensions, const std::int64_t* order,
                      std::int64_t begin, std::int64_t end, std::int64_t block, Visit&& visit,
                      TileKernel<Compute<T>> kernel = row_kernels<Compute<T>>().squared_distances) {
  using A = Compute<T>;
  RowBlock<T> first, second;
  const std::int64_t i_begin = begin + block * kBlockRows;
  const std::int64_t i_end = std::min(i_begin + kBlockRows, end);
  first.load(x, dimensions, order, i_begin, end);
  for (std::int64_t j_begin = i_begin; j_begin < end; j_begin += kBlockRows) {
    const std::int64_t j_end = std::min(j_begin + kBlockRows, end);
    second.load(x, dimensions, order, j_begin, end);
    for (std::int64_t i = i_begin; i < i_end; i += kTile) {
      for (std::int64_t j = j_begin; j < j_end; j += kTile) {
        if (j + kTile <= i + 1) continue;  // wholly below the diagonal
        A numbers[kTile * kTile];
        kernel(first.rows() + (i - i_begin), second.rows() + (j - j_begin), dimensions, numbers);
        for (std::int64_t a = i; a < std::min(i + kTile, i_end); ++a) {
          for (std::int64_t b = std::max(j, a + 1); b < std::min(j + kTile, j_end); ++b) {
            visit(a, b, numbers[kTile * (a - i) + (b - j)]);
          }
        }
      }
    }
  }
}

}  // namespace facelt::cpu
