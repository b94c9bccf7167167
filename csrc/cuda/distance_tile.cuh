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
constexpr int kPitch = kDepth + 1;  // a column of a tile touches every bank once
static_assert(kTileThreads % kWarp == 0);

inline std::int64_t number_of_tiles(std::int64_t rows) { return (rows + kTile - 1) / kTile; }

// Copies rows [begin, begin + kTile) of columns [d, d + kDepth) into shared memory, 0 outside x.
template <class T>
__device__ __forceinline__ void load_rows(const T* x, std::int64_t dimensions,
                                          const std::int64_t* order, std::int64_t rows,
                                          std::int64_t begin, std::int64_t d, Compute<T>* tile) {
  for (int e = threadIdx.x; e < kTile * kDepth; e += kTileThreads) {
    const int row = e / kDepth, column = e % kDepth;
    Compute<T> value = 0;
    if (begin + row < rows && d + column < dimensions) {
      const std::int64_t source = order ? order[begin + row] : begin + row;
      value = widen(x[source * dimensions + d + column]);
    }
    tile[row * kPitch + column] = value;
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
  FACELT_SHARED(A, first, kTile * kPitch);
  FACELT_SHARED(A, second, kTile * kPitch);
  FACELT_SHARED(A, distances, kTile * kTile);
  const int a = threadIdx.x / kHalfTile, b = threadIdx.x % kHalfTile;
  A sums[2][2] = {};
  for (std::int64_t d = 0; d < dimensions; d += kDepth) {
    __syncthreads();
    load_rows(x, dimensions, order, rows, i, d, first);
    load_rows(x, dimensions, order, rows, j, d, second);
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kDepth; ++c) {
      const A row[2] = {first[a * kPitch + c], first[(a + kHalfTile) * kPitch + c]};
      const A column[2] = {second[b * kPitch + c], second[(b + kHalfTile) * kPitch + c]};
      for (int u = 0; u < 2; ++u) {
        for (int v = 0; v < 2; ++v) {
          const A difference = row[u] - column[v];
          sums[u][v] += difference * difference;
        }
      }
    }
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
