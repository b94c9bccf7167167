#include "centroids.cuh"

namespace facelt::FACELT_CUDA_NAMESPACE {

namespace {

constexpr int kColumns = kWarp;  // of a block of centroids_kernel
constexpr int kLanes = 8;        // samples added up side by side
constexpr int kGradientThreads = 128;
static_assert(kTileThreads <= kReduceThreads);

// A block takes kColumns columns of one class; its lanes each add every kLanes-th sample.
template <class T>
__global__ void centroids_kernel(Centroids<T> c) {
  using A = Compute<T>;
  FACELT_SHARED(A, sums, kLanes * kColumns);
  const std::int64_t s = blockIdx.x;
  if (!c.pad && s >= *c.num_classes) return;
  const int column = threadIdx.x % kColumns, lane = threadIdx.x / kColumns;
  const std::int64_t d = static_cast<std::int64_t>(blockIdx.y) * kColumns + column;
  const std::int64_t begin = c.offsets[lesser(s, c.batch)];
  const std::int64_t end = c.offsets[lesser(s + 1, c.batch)];
  A sum = 0;
  for (std::int64_t p = begin + lane; p < end && d < c.dimensions; p += kLanes) {
    sum += widen(c.features[c.order[p] * c.dimensions + d]);
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (lane == 0 && d < c.dimensions && s < c.rows) {
    for (int other = 1; other < kLanes; ++other) sum += sums[other * kColumns + column];
    const A mean = end > begin ? sum / static_cast<A>(end - begin) : A(0);
    c.centroids[s * c.dimensions + d] = *c.num_classes > c.rows ? A(NAN) : mean;
  }
  if (threadIdx.x == 0 && blockIdx.y == 0 && s < c.rows) c.counts[s] = end - begin;
}

// Block (x, y) takes row x of tiles and, from the diagonal on, each kColumnBlocks-th tile.
template <class A>
__global__ void center_tiles_kernel(CenterTiles<A> t) {
  const std::int64_t rows = t.num_rows ? lesser(*t.num_rows, t.rows) : t.rows;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kTile;
  Candidate<A> best{A(0), kNoPair};
  for (std::int64_t j = i + blockIdx.y * kTile; j < rows; j += kColumnBlocks * kTile) {
    const A* distances = distance_tile(t.centroids, t.dimensions,
                                       static_cast<const std::int64_t*>(nullptr), rows, i, j);
    for (int e = threadIdx.x; e < kTile * kTile; e += kTileThreads) {
      const std::int64_t a = i + e / kTile, b = j + e % kTile;
      if (a > b || b >= rows || t.counts[a] <= 0 || t.counts[b] <= 0) continue;
      if (a == b) {
        // The distance of a row to itself is 0, or NaN if it is not finite.
        if (distances[e] != A(0)) best.pair = kNotFinite;
        continue;
      }
      const Candidate<A> candidate{distances[e], a * t.rows + b};
      if (is_nearer(candidate, best)) best = candidate;
    }
  }
  best = block_nearest(best);
  if (threadIdx.x == 0) t.candidates[blockIdx.y * gridDim.x + blockIdx.x] = best;
}

template <class A>
__global__ void min_distance_kernel(CenterTiles<A> tiles, bool squared, A* distance,
                                    std::int64_t* pair) {
  const NearestPair<A> nearest = nearest_pair(tiles);
  if (threadIdx.x != 0) return;
  *distance = squared ? nearest.squared_distance : square_root(nearest.squared_distance);
  pair[0] = nearest.q;
  pair[1] = nearest.r;
}

template <class A>
__global__ void min_distance_gradient_kernel(const A* grad_distance, const A* centroids,
                                             const A* distance, const std::int64_t* pair,
                                             std::int64_t dimensions, bool squared,
                                             A* grad_centroids) {
  const std::int64_t s = blockIdx.x;
  const bool chosen = s == pair[0] || s == pair[1];
  const std::int64_t other = s == pair[0] ? pair[1] : pair[0];
  const A value = *distance;
  const A start = value == value ? A(0) : value;
  const A scale = squared ? 2 * *grad_distance : value > A(0) ? *grad_distance / value : A(0);
  for (std::int64_t d = threadIdx.x; d < dimensions; d += kGradientThreads) {
    const A difference =
        chosen ? centroids[s * dimensions + d] - centroids[other * dimensions + d] : A(0);
    grad_centroids[s * dimensions + d] = start + (chosen ? scale * difference : A(0));
  }
}

// The gradient of a sample whose class did not get a row is NaN, as its centroid is; that of an
// ignored sample is 0.
template <class T>
__global__ void centroid_gradients_kernel(const Compute<T>* grad_centroids,
                                          const std::int64_t* segment, const std::int64_t* counts,
                                          std::int64_t rows, std::int64_t dimensions,
                                          T* grad_features) {
  using A = Compute<T>;
  const std::int64_t i = blockIdx.x;
  const std::int64_t s = segment[i];
  const bool in_rows = s >= 0 && s < rows;
  const A share = in_rows ? A(1) / static_cast<A>(counts[s]) : s < 0 ? A(0) : A(NAN);
  for (std::int64_t d = threadIdx.x; d < dimensions; d += kGradientThreads) {
    grad_features[i * dimensions + d] =
        narrow<T>(in_rows ? share * grad_centroids[s * dimensions + d] : share);
  }
}

unsigned column_blocks(std::int64_t rows) {
  return static_cast<unsigned>(lesser(kColumnBlocks, blocks_for(rows, kTile)));
}

}  // namespace

template <class T>
void launch_centroids(const Centroids<T>& c, stream_t stream) {
  const dim3 grid(blocks_for(c.rows, 1), blocks_for(c.dimensions, kColumns));
  launch(centroids_kernel<T>, grid, kColumns * kLanes, 0, stream, c);
}

template <class A>
CenterTiles<A> make_center_tiles(const A* centroids, const std::int64_t* counts,
                                 const std::int64_t* num_rows, std::int64_t rows,
                                 std::int64_t dimensions, Arena& arena) {
  const std::int64_t blocks =
      static_cast<std::int64_t>(blocks_for(rows, kTile)) * column_blocks(rows);
  return {centroids, counts, num_rows, rows, dimensions, arena.take<Candidate<A>>(blocks), blocks};
}

template <class A>
void launch_center_tiles(const CenterTiles<A>& tiles, stream_t stream) {
  launch(center_tiles_kernel<A>, dim3(blocks_for(tiles.rows, kTile), column_blocks(tiles.rows)),
         kTileThreads, 0, stream, tiles);
}

template void launch_centroids(const Centroids<double>&, stream_t);
template void launch_centroids(const Centroids<float>&, stream_t);
template void launch_centroids(const Centroids<BFloat16>&, stream_t);
template void launch_centroids(const Centroids<Float16>&, stream_t);
#define FACELT_INSTANTIATE(A)                                                                   \
  template CenterTiles<A> make_center_tiles(const A*, const std::int64_t*, const std::int64_t*, \
                                            std::int64_t, std::int64_t, Arena&);                \
  template void launch_center_tiles(const CenterTiles<A>&, stream_t);
FACELT_INSTANTIATE(double)
FACELT_INSTANTIATE(float)
#undef FACELT_INSTANTIATE

void class_centroids_forward(const TensorView& features, const TensorView& order,
                             const TensorView& offsets, const TensorView& num_classes,
                             const TensorView& centroids, const TensorView& counts,
                             Execution execution) {
  constexpr ScalarType kIndex = ScalarType::kInt64;
  const std::int64_t batch = features.size(0), dimensions = features.size(1);
  const std::int64_t rows = centroids.size(0);
  const int device = features.device;
  dispatch_floating(features.dtype, "features", [&](auto zero) {
    using T = decltype(zero);
    using A = Compute<T>;
    launch_centroids(
        Centroids<T>{
            pointer<const T>(features, "features", Scalar<T>::kType, batch * dimensions, device),
            pointer<const std::int64_t>(order, "order", kIndex, batch, device),
            pointer<const std::int64_t>(offsets, "offsets", kIndex, batch + 1, device),
            pointer<const std::int64_t>(num_classes, "num_classes", kIndex, 1, device), batch,
            dimensions, rows,
            pointer<A>(centroids, "centroids", Scalar<A>::kType, rows * dimensions, device),
            pointer<std::int64_t>(counts, "counts", kIndex, rows, device), true},
        stream_of(execution));
  });
}

void class_centroids_backward(const TensorView& grad_centroids, const TensorView& segment,
                              const TensorView& counts, const TensorView& grad_features,
                              Execution execution) {
  constexpr ScalarType kIndex = ScalarType::kInt64;
  const std::int64_t rows = grad_centroids.size(0), dimensions = grad_centroids.size(1);
  const std::int64_t batch = grad_features.size(0);
  const int device = grad_features.device;
  if (batch == 0) return;
  dispatch_floating(grad_features.dtype, "grad_features", [&](auto zero) {
    using T = decltype(zero);
    using A = Compute<T>;
    launch(
        centroid_gradients_kernel<T>, blocks_for(batch, 1), kGradientThreads, 0,
        stream_of(execution),
        pointer<const A>(grad_centroids, "grad_centroids", Scalar<A>::kType, rows * dimensions,
                         device),
        pointer<const std::int64_t>(segment, "segment", kIndex, batch, device),
        pointer<const std::int64_t>(counts, "counts", kIndex, rows, device), rows, dimensions,
        pointer<T>(grad_features, "grad_features", Scalar<T>::kType, batch * dimensions, device));
  });
}

void min_centroid_distance_forward(const TensorView& centroids, const TensorView& counts,
                                   bool squared, const TensorView& distance, const TensorView& pair,
                                   const TensorView& workspace, Execution execution) {
  constexpr ScalarType kIndex = ScalarType::kInt64;
  const std::int64_t rows = centroids.size(0), dimensions = centroids.size(1);
  const int device = centroids.device;
  dispatch_floating(centroids.dtype, "centroids", [&](auto zero) {
    using A = Compute<decltype(zero)>;
    Arena arena(workspace_pointer(workspace, min_centroid_distance_workspace(rows), device));
    const CenterTiles<A> tiles = make_center_tiles(
        pointer<const A>(centroids, "centroids", Scalar<A>::kType, rows * dimensions, device),
        pointer<const std::int64_t>(counts, "counts", kIndex, rows, device),
        static_cast<const std::int64_t*>(nullptr), rows, dimensions, arena);
    launch_center_tiles(tiles, stream_of(execution));
    launch(min_distance_kernel<A>, 1, kReduceThreads, 0, stream_of(execution), tiles, squared,
           pointer<A>(distance, "distance", Scalar<A>::kType, 1, device),
           pointer<std::int64_t>(pair, "pair", kIndex, 2, device));
  });
}

std::int64_t min_centroid_distance_workspace(std::int64_t rows) {
  Arena arena;
  make_center_tiles<double>(nullptr, nullptr, nullptr, rows, 0, arena);
  return arena.used();
}

void min_centroid_distance_backward(const TensorView& grad_distance, const TensorView& centroids,
                                    const TensorView& distance, const TensorView& pair,
                                    bool squared, const TensorView& grad_centroids,
                                    Execution execution) {
  constexpr ScalarType kIndex = ScalarType::kInt64;
  const std::int64_t rows = centroids.size(0), dimensions = centroids.size(1);
  const int device = centroids.device;
  if (rows == 0) return;
  dispatch_floating(centroids.dtype, "centroids", [&](auto zero) {
    using A = Compute<decltype(zero)>;
    constexpr ScalarType kType = Scalar<A>::kType;
    launch(min_distance_gradient_kernel<A>, blocks_for(rows, 1), kGradientThreads, 0,
           stream_of(execution), pointer<const A>(grad_distance, "grad_distance", kType, 1, device),
           pointer<const A>(centroids, "centroids", kType, rows * dimensions, device),
           pointer<const A>(distance, "distance", kType, 1, device),
           pointer<const std::int64_t>(pair, "pair", kIndex, 2, device), dimensions, squared,
           pointer<A>(grad_centroids, "grad_centroids", kType, rows * dimensions, device));
  });
}

}  // namespace facelt::FACELT_CUDA_NAMESPACE
