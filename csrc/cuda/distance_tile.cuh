#pragma once

#include "device.cuh"

namespace facelt::FACELT_CUDA_NAMESPACE {

#if defined(FACELT_EMULATION)
// Small, so that small batches need many tiles and more than one tile a block.
constexpr int kTile = 16;
constexpr int kColumnBlocks = 2;
#else
constexpr int kTile = 32;
constexpr int kColumnBlocks = 32;  // blocks that share a row of tiles, each taking every 32nd
#endif
constexpr int kHalfTile = kTile / 2;
constexpr int kTileThreads = kHalfTile * kHalfTile;  // each thread keeps 2 x 2 sums
constexpr int kDepth = 32;
constexpr int kCopyStep = kTileThreads / kDepth;
constexpr int kCopies = kTile / kCopyStep;
static_assert(kTileThreads % kDepth == 0 && kTile % kCopyStep == 0);

inline std::int64_t number_of_tiles(std::int64_t rows) { return (rows + kTile - 1) / kTile; }

// Part of a row, and the packs from one row of a tile to the next: one pack more than there is, so
// that the rows' packs lie in different banks.
template <class A>
using TilePack = Pack<A, kWide<A>>;
template <class A>
constexpr int kPitch = kDepth / kWide<A> + 1;

// What a thread copies into a tile: one column of every kCopyStep-th of the rows [begin, begin +
// kTile), kDepth columns further each time; 0 outside x.
template <class T>
class TileCopy {
  using A = Compute<T>;

 public:
  __device__ TileCopy(const T* x, std::int64_t dimensions, const std::int64_t* order,
                      std::int64_t rows, std::int64_t begin)
      : left_(dimensions - threadIdx.x % kDepth) {
    for (int copy = 0; copy < kCopies; ++copy) {
      const std::int64_t row = begin + threadIdx.x / kDepth + copy * kCopyStep;
      rows_[copy] = nullptr;
      if (row < rows) {
        rows_[copy] = x + (order ? order[row] : row) * dimensions + threadIdx.x % kDepth;
      }
    }
  }

  // Reads from column d on.
  __device__ void load(std::int64_t d) {
    for (int copy = 0; copy < kCopies; ++copy) {
      values_[copy] = rows_[copy] && d < left_ ? widen(rows_[copy][d]) : A(0);
    }
  }

  __device__ void store(TilePack<A>* tile) const {
    const int column = threadIdx.x % kDepth;
    for (int copy = 0; copy < kCopies; ++copy) {
      const int row = threadIdx.x / kDepth + copy * kCopyStep;
      tile[row * kPitch<A> + column / kWide<A>].items[column % kWide<A>] = values_[copy];
    }
  }

 private:
  const T* rows_[kCopies];
  std::int64_t left_;
  A values_[kCopies];
};

// Adds the squared differences of rows a and a + kHalfTile of one tile to b and b + kHalfTile of
// another.
template <class A>
__device__ __forceinline__ void add_squares(const TilePack<A>* first, const TilePack<A>* second,
                                            int a, int b, A (&sums)[2][2]) {
#pragma unroll
  for (int c = 0; c < kDepth / kWide<A>; ++c) {
    TilePack<A> row[2], column[2];
    for (int half = 0; half < 2; ++half) {
      row[half] = first[(a + half * kHalfTile) * kPitch<A> + c];
      column[half] = second[(b + half * kHalfTile) * kPitch<A> + c];
    }
    for (int item = 0; item < kWide<A>; ++item) {
      for (int u = 0; u < 2; ++u) {
        for (int v = 0; v < 2; ++v) {
          const A difference = row[u].items[item] - column[v].items[item];
          sums[u][v] += difference * difference;
        }
      }
    }
  }
}

// The squared distances of rows [i, i + kTile) against [j, j + kTile), in shared memory
// [kTile][kTile], by a block of kTileThreads. `order` gives the row at each position; null for the
// rows as they lie. The next call's first barrier lets every thread finish with the result;
// dimensions >= 1.
template <class T>
__device__ Compute<T>* distance_tile(const T* x, std::int64_t dimensions, const std::int64_t* order,
                                     std::int64_t rows, std::int64_t i, std::int64_t j) {
  using A = Compute<T>;
  constexpr int kPacks = kTile * kPitch<A>;
  FACELT_SHARED(TilePack<A>, first, 2 * kPacks);
  FACELT_SHARED(TilePack<A>, second, 2 * kPacks);
  FACELT_SHARED(A, distances, kTile * kTile);
  const int a = threadIdx.x / kHalfTile, b = threadIdx.x % kHalfTile;
  TileCopy<T> rows_of_first(x, dimensions, order, rows, i);
  TileCopy<T> rows_of_second(x, dimensions, order, rows, j);
  A sums[2][2] = {};
  rows_of_first.load(0);
  rows_of_second.load(0);
  // Of two buffers one is filled while other threads still read the other.
  int buffer = 0;
  for (std::int64_t d = 0; d < dimensions; d += kDepth) {
    rows_of_first.store(first + buffer);
    rows_of_second.store(second + buffer);
    __syncthreads();
    rows_of_first.load(d + kDepth);
    rows_of_second.load(d + kDepth);
    add_squares(first + buffer, second + buffer, a, b, sums);
    buffer = kPacks - buffer;
  }
  for (int u = 0; u < 2; ++u) {
    for (int v = 0; v < 2; ++v) {
      distances[(a + u * kHalfTile) * kTile + b + v * kHalfTile] = sums[u][v];
    }
  }
  __syncthreads();
  return distances;
}

}  // namespace facelt::FACELT_CUDA_NAMESPACE
