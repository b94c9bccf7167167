#include "ranges.cuh"

namespace facelt::FACELT_CUDA_NAMESPACE {

namespace {

constexpr int kMergeThreads = 128;
constexpr int kGradientThreads = 128;
static_assert(kTileThreads <= kGroupThreads, "number_segments runs in a block of tiles");

// Rows [a_begin, a_end) of a tile against columns [b_begin, b_end); `diagonal` leaves a < b.
struct TileRegion {
  int a_begin, a_end, b_begin, b_end;
  bool diagonal;
};

// Writes the region's k largest candidates, largest first, filled up with kNoPair; a warp's work.
template <class A>
__device__ void select_largest(const A* distances, const TileRegion& region, std::int64_t i,
                               std::int64_t j, std::int64_t batch, std::int64_t k,
                               Candidate<A>* out) {
  const int lane = threadIdx.x % kWarp;
  const int width = region.b_end - region.b_begin;
  const int size = (region.a_end - region.a_begin) * width;
  Candidate<A> previous{A(0), kNoPair};
  for (std::int64_t round = 0; round < k; ++round) {
    Candidate<A> best{A(0), kNoPair};
    for (int e = lane; e < size; e += kWarp) {
      const int a = region.a_begin + e / width, b = region.b_begin + e % width;
      if (region.diagonal && b <= a) continue;
      const Candidate<A> candidate{distances[a * kTile + b], (i + a) * batch + j + b};
      const bool taken = round > 0 && !is_larger(previous, candidate);
      if (!taken && is_larger(candidate, best)) best = candidate;
    }
    best = warp_first(best, is_larger<A>);
    if (lane == 0) out[round] = best;
    previous = best;
    if (best.pair == kNoPair) {
      for (std::int64_t rest = round + 1 + lane; rest < k; rest += kWarp) out[rest] = best;
      return;
    }
  }
}

// The classes within a diagonal tile, a warp for each in turn.
template <class T>
__device__ void select_diagonal(const RangeTiles<T>& t, const Compute<T>* distances,
                                const std::int64_t* labels, std::int64_t i, int rows) {
  const int warp = threadIdx.x / kWarp;
  int classes = 0;
  for (int begin = 0, end = 0; begin < rows; begin = end) {
    while (end < rows && labels[end] == labels[begin]) ++end;
    if (classes++ % (kTileThreads / kWarp) != warp) continue;
    select_largest(distances, {begin, end, begin, end, true}, i, i, t.batch, t.k,
                   t.candidates.diagonal + (i + begin) * t.k);
  }
}

// The one class that the end of tile i and the beginning of tile j have in common.
template <class T>
__device__ void select_cross(const RangeTiles<T>& t, const Compute<T>* distances,
                             const std::int64_t* labels, std::int64_t i, std::int64_t j,
                             int columns) {
  if (threadIdx.x >= kWarp) return;
  const std::int64_t label = labels[kTile - 1];
  int begin = kTile - 1;
  while (begin > 0 && labels[begin - 1] == label) --begin;
  int end = 1;
  while (end < columns && t.labels[t.order[j + end]] == label) ++end;
  select_largest(distances, {begin, kTile, 0, end, false}, i, j, t.batch, t.k,
                 t.candidates.cross + (i / kTile * t.candidates.tiles + j / kTile) * t.k);
}

// Block (x, y) takes row x of tiles and, from the diagonal on, each kColumnBlocks-th tile as long
// as the class at the row's end goes on.
template <class T>
__device__ void range_tiles(const RangeTiles<T>& t, std::int64_t tile_row, std::int64_t offset) {
  FACELT_SHARED(std::int64_t, labels, kTile);
  const std::int64_t i = tile_row * kTile, samples = *t.taking_part;
  for (int r = threadIdx.x; r < kTile && i + r < samples; r += kTileThreads) {
    labels[r] = t.labels[t.order[i + r]];
  }
  __syncthreads();
  for (std::int64_t tile = tile_row + offset; tile * kTile < samples; tile += kColumnBlocks) {
    const std::int64_t j = tile * kTile;
    if (tile != tile_row && t.labels[t.order[j]] != labels[kTile - 1]) break;
    const Compute<T>* distances = distance_tile(t.features, t.dimensions, t.order, samples, i, j);
    const int columns = static_cast<int>(lesser(kTile, samples - j));
    if (tile == tile_row) {
      select_diagonal(t, distances, labels, i, columns);
    } else {
      select_cross(t, distances, labels, i, j, columns);
    }
  }
}

template <class T>
__global__ void range_tiles_kernel(RangeTiles<T> tiles) {
  range_tiles(tiles, blockIdx.x, blockIdx.y);
}

// The tiles need the sorted order only, so the numbering goes on beside them: one launch less.
template <class T>
__global__ void number_and_range_tiles_kernel(RangeTiles<T> tiles, Numbering numbering) {
  if (blockIdx.x == 0) {
    if (blockIdx.y == 0) number_segments(numbering);
  } else {
    range_tiles(tiles, blockIdx.x - 1, blockIdx.y);
  }
}

template <class A>
__global__ void merge_classes_kernel(TileCandidates<A> candidates, const std::int64_t* order,
                                     const std::int64_t* offsets, const std::int64_t* num_classes,
                                     std::int64_t batch, std::int64_t rows, std::int64_t k,
                                     bool squared, A* ranges, std::int64_t* pairs) {
  const std::int64_t s =
      static_cast<std::int64_t>(blockIdx.x) * (kMergeThreads / kWarp) + threadIdx.x / kWarp;
  if (s >= rows) return;
  const std::int64_t begin = offsets[lesser(s, batch)], end = offsets[lesser(s + 1, batch)];
  merge_class(candidates, begin, end, order, batch, k, squared, ranges + s * k, pairs + s * k * 2);
  if (*num_classes > rows) {
    __syncwarp();  // after what other lanes have written
    for (std::int64_t j = threadIdx.x % kWarp; j < k; j += kWarp) ranges[s * k + j] = A(NAN);
  }
}

template <class T>
__global__ void pair_gradients_kernel(PairGradients<T> g) {
  using A = Compute<T>;
  const std::int64_t i = blockIdx.x;
  const std::int64_t s = g.segment[i];
  if (s < 0) {
    for (std::int64_t d = threadIdx.x; d < g.dimensions; d += kGradientThreads) {
      g.grad_features[i * g.dimensions + d] = narrow<T>(A(0));
    }
    return;
  }
  const CenterGradient<A>& center = g.center;
  const A grad_loss = center.gradient ? *center.grad_loss : A(1);
  A center_share = 0, start = s < g.rows ? A(0) : A(NAN);
  if (center.gradient) {
    start = *center.poison;
    if (s == center.pair[0] || s == center.pair[1]) {
      center_share = grad_loss / static_cast<A>(center.offsets[s + 1] - center.offsets[s]);
      if (s == center.pair[1]) center_share = -center_share;
    }
  }
  for (std::int64_t d = threadIdx.x; d < g.dimensions; d += kGradientThreads) {
    A sum = start;
    if (center_share != A(0)) sum += center_share * center.gradient[d];
    const A own = widen(g.features[i * g.dimensions + d]);
    for (std::int64_t p = s * g.k; s < g.rows && p < (s + 1) * g.k; ++p) {
      const std::int64_t a = g.pairs[2 * p], b = g.pairs[2 * p + 1];
      if (a != i && b != i) continue;
      const A other = widen(g.features[(a == i ? b : a) * g.dimensions + d]);
      sum += grad_loss * g.pair_scale[p] * (own - other);
    }
    g.grad_features[i * g.dimensions + d] = narrow<T>(sum);
  }
}

}  // namespace

template <class T>
void launch_range_tiles(const RangeTiles<T>& tiles, const Numbering* numbering, stream_t stream) {
  const unsigned rows = blocks_for(tiles.batch, kTile);
  const unsigned columns = rows < kColumnBlocks ? rows : kColumnBlocks;
  if (numbering) {
    launch(number_and_range_tiles_kernel<T>, dim3(rows + 1, columns), kTileThreads, 0, stream,
           tiles, *numbering);
  } else {
    launch(range_tiles_kernel<T>, dim3(rows, columns), kTileThreads, 0, stream, tiles);
  }
}

template <class T>
void launch_pair_gradients(const PairGradients<T>& gradients, stream_t stream) {
  if (gradients.batch == 0) return;
  launch(pair_gradients_kernel<T>, blocks_for(gradients.batch, 1), kGradientThreads, 0, stream,
         gradients);
}

#define FACELT_INSTANTIATE(T)                                                         \
  template void launch_range_tiles(const RangeTiles<T>&, const Numbering*, stream_t); \
  template void launch_pair_gradients(const PairGradients<T>&, stream_t);
FACELT_INSTANTIATE(double)
FACELT_INSTANTIATE(float)
FACELT_INSTANTIATE(BFloat16)
FACELT_INSTANTIATE(Float16)
#undef FACELT_INSTANTIATE

void class_ranges_forward(const TensorView& features, const TensorView& labels,
                          const TensorView& order, const TensorView& offsets,
                          const TensorView& num_classes, bool squared, const TensorView& ranges,
                          const TensorView& pairs, const TensorView& workspace,
                          Execution execution) {
  constexpr ScalarType kIndex = ScalarType::kInt64;
  const std::int64_t batch = features.size(0), dimensions = features.size(1);
  const std::int64_t rows = ranges.size(0), k = ranges.size(1);
  require_ranges(k);
  const int device = features.device;
  const auto* position = pointer<const std::int64_t>(order, "order", kIndex, batch, device);
  const auto* starts = pointer<const std::int64_t>(offsets, "offsets", kIndex, batch + 1, device);
  dispatch_floating(features.dtype, "features", [&](auto zero) {
    using T = decltype(zero);
    using A = Compute<T>;
    Arena arena(workspace_pointer(workspace, class_ranges_workspace(batch, k), device));
    const RangeTiles<T> tiles{
        pointer<const T>(features, "features", Scalar<T>::kType, batch * dimensions, device),
        pointer<const std::int64_t>(labels, "labels", kIndex, batch, device),
        position,
        starts + batch,
        batch,
        dimensions,
        k,
        TileCandidates<A>(arena, batch, k)};
    launch_range_tiles(tiles, nullptr, stream_of(execution));
    launch(merge_classes_kernel<A>, blocks_for(rows, kMergeThreads / kWarp), kMergeThreads, 0,
           stream_of(execution), tiles.candidates, position, starts,
           pointer<const std::int64_t>(num_classes, "num_classes", kIndex, 1, device), batch, rows,
           k, squared, pointer<A>(ranges, "ranges", Scalar<A>::kType, rows * k, device),
           pointer<std::int64_t>(pairs, "pairs", kIndex, rows * k * 2, device));
  });
}

std::int64_t class_ranges_workspace(std::int64_t batch, std::int64_t k) {
  Arena arena;
  TileCandidates<double>(arena, batch, k);
  return arena.used();
}

void class_ranges_backward(const TensorView& features, const TensorView& segment,
                           const TensorView& pairs, const TensorView& pair_scale,
                           const TensorView& grad_features, Execution execution) {
  constexpr ScalarType kIndex = ScalarType::kInt64;
  const std::int64_t batch = features.size(0), dimensions = features.size(1);
  const std::int64_t rows = pair_scale.size(0), k = pair_scale.size(1);
  const int device = features.device;
  dispatch_floating(features.dtype, "features", [&](auto zero) {
    using T = decltype(zero);
    using A = Compute<T>;
    const PairGradients<T> gradients{
        pointer<const T>(features, "features", Scalar<T>::kType, batch * dimensions, device),
        pointer<const std::int64_t>(segment, "segment", kIndex, batch, device),
        pointer<const std::int64_t>(pairs, "pairs", kIndex, rows * k * 2, device),
        pointer<const A>(pair_scale, "pair_scale", Scalar<A>::kType, rows * k, device),
        batch,
        dimensions,
        rows,
        k,
        pointer<T>(grad_features, "grad_features", Scalar<T>::kType, batch * dimensions, device),
        {}};
    launch_pair_gradients(gradients, stream_of(execution));
  });
}

}  // namespace facelt::FACELT_CUDA_NAMESPACE
