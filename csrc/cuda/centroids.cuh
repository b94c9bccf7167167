#pragma once

#include "distance_tile.cuh"
#include "groups.cuh"

namespace facelt::FACELT_CUDA_NAMESPACE {

constexpr int kReduceThreads = 256;
constexpr std::int64_t kNotFinite = -2;  // in place of a pair: a centroid has an infinity or a NaN

template <class T>
struct Centroids {
  const T* features;
  const std::int64_t* order;
  const std::int64_t* offsets;
  const std::int64_t* num_classes;
  std::int64_t batch, dimensions, rows;
  Compute<T>* centroids;
  std::int64_t* counts;
  bool pad;  // with rows of 0 beyond the classes, which are not written otherwise
};

// NaN everywhere if there are more classes than rows.
template <class T>
void launch_centroids(const Centroids<T>& c, stream_t stream);

// The smallest squared distance of pairs of rows with count > 0, as one candidate a block; the pair
// is a * rows + b. Rows beyond *num_rows, where given, are not read.
template <class A>
struct CenterTiles {
  const A* centroids;
  const std::int64_t* counts;
  const std::int64_t* num_rows;
  std::int64_t rows, dimensions;
  Candidate<A>* candidates;
  std::int64_t num_candidates;
};

template <class A>
CenterTiles<A> make_center_tiles(const A* centroids, const std::int64_t* counts,
                                 const std::int64_t* num_rows, std::int64_t rows,
                                 std::int64_t dimensions, Arena& arena);
template <class A>
void launch_center_tiles(const CenterTiles<A>& tiles, stream_t stream);

// kNotFinite before all, then the smaller distance.
template <class A>
FACELT_HOST_DEVICE bool is_nearer(const Candidate<A>& x, const Candidate<A>& y) {
  if (x.pair == kNotFinite || y.pair == kNotFinite) {
    return x.pair == kNotFinite && y.pair != kNotFinite;
  }
  return is_smaller(x, y);
}

// The nearest of one candidate a thread, in thread 0; the work of a block of at most
// kReduceThreads.
template <class A>
__device__ Candidate<A> block_nearest(Candidate<A> value) {
  FACELT_SHARED(Candidate<A>, nearest, kReduceThreads / kWarp);
  value = warp_first(value, is_nearer<A>);
  if (threadIdx.x % kWarp == 0) nearest[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
      if (is_nearer(nearest[w], value)) value = nearest[w];
    }
  }
  return value;
}

template <class A>
struct NearestPair {
  A squared_distance;  // +inf where there is no pair, NaN where a centroid is not finite
  std::int64_t q, r;   // rows, or kNoPair
};

// The result of all blocks' candidates, in thread 0 of a block of at most kReduceThreads.
template <class A>
__device__ NearestPair<A> nearest_pair(const CenterTiles<A>& tiles) {
  Candidate<A> best{A(0), kNoPair};
  for (std::int64_t e = threadIdx.x; e < tiles.num_candidates; e += blockDim.x) {
    if (is_nearer(tiles.candidates[e], best)) best = tiles.candidates[e];
  }
  best = block_nearest(best);
  if (best.pair == kNotFinite) return {A(NAN), kNoPair, kNoPair};
  if (best.pair == kNoPair) return {A(INFINITY), kNoPair, kNoPair};
  return {best.distance, best.pair / tiles.rows, best.pair % tiles.rows};
}

}  // namespace facelt::FACELT_CUDA_NAMESPACE
