#include "../quintuplets.h"

#include "distance_tile.cuh"
#include "last_block.cuh"
#include "row_reductions.cuh"

namespace facelt::FACELT_CUDA_NAMESPACE {

namespace {

constexpr int kRowThreads = kTileThreads / kTile;  // that look through a row of a tile
static_assert(kWarp % kRowThreads == 0);

#if defined(FACELT_EMULATION)
constexpr int kWarps = 2;
#else
constexpr int kWarps = 4;
#endif
constexpr int kThreads = kWarps * kWarp;

template <class A>
struct Workspace {
  Candidate<A>* found;  // [B, columns, 4] by the blocks that share a row of tiles
  int* bad;             // [tiles] whether features of their rows are not finite
  A* losses;            // [B]
  A* any;               // [B] 1 for anchors with a hinge
  unsigned* ticket;
  std::int64_t columns;

  Workspace(Arena& arena, std::int64_t batch)
      : columns(lesser(number_of_tiles(batch), kColumnBlocks)) {
    found = arena.take<Candidate<A>>(batch * columns * kNeighbors);
    bad = arena.take<int>(number_of_tiles(batch));
    losses = arena.take<A>(batch);
    any = arena.take<A>(batch);
    ticket = arena.take<unsigned>(1);
  }
};

template <class A>
struct Mining {
  const A* features;
  const std::int64_t *labels, *clusters;
  IgnoredLabel ignored;
  std::int64_t batch, dimensions;
  Workspace<A> workspace;

  __device__ bool takes_part(std::int64_t i) const {
    return i < batch && !ignored.marks(labels[i]);
  }
};

// Sample i against one tile's columns, each kRowThreads-th of them.
template <class A>
__device__ void look_through(const Mining<A>& m, const A* row, std::int64_t i, std::int64_t begin,
                             Candidate<A>* found) {
  for (int c = threadIdx.x % kRowThreads; c < kTile && begin + c < m.batch; c += kRowThreads) {
    const std::int64_t j = begin + c;
    if (j == i || !m.takes_part(j)) continue;
    const bool same_class = m.labels[i] == m.labels[j];
    offer(same_class, same_class && m.clusters[i] == m.clusters[j], Candidate<A>{row[c], j}, found);
  }
}

// Block (x, y) takes row x of tiles and each gridDim.y-th tile of it.
template <class A>
__global__ void mining_kernel(Mining<A> m) {
  const std::int64_t tile_row = blockIdx.x, first = tile_row * kTile;
  const int r = threadIdx.x / kRowThreads;
  const std::int64_t i = first + r;
  const bool takes_part = m.takes_part(i);
  Candidate<A> found[kNeighbors];
  for (int k = 0; k < kNeighbors; ++k) found[k] = {A(0), kNoPair};
  bool bad = false;
  for (std::int64_t tile = blockIdx.y; tile * kTile < m.batch; tile += gridDim.y) {
    const std::int64_t j = tile * kTile;
    const A* distances =
        distance_tile(m.features, m.dimensions, nullptr, m.batch, first, j) + r * kTile;
    if (takes_part) look_through(m, distances, i, j, found);
    // x - x is 0 for finite x only.
    if (tile == tile_row) bad = takes_part && distances[r] != A(0);
  }
  for (int k = 0; k < kNeighbors; ++k) {
    for (int mask = kRowThreads / 2; mask > 0; mask /= 2) {
      offer(k, shuffle_xor(found[k], mask), found);
    }
  }
  if (i < m.batch && threadIdx.x % kRowThreads == 0) {
    Candidate<A>* out = m.workspace.found + (i * m.workspace.columns + blockIdx.y) * kNeighbors;
    for (int k = 0; k < kNeighbors; ++k) out[k] = found[k];
  }
  bad = __syncthreads_or(bad);
  if (threadIdx.x != 0) return;
  if (blockIdx.y == tile_row % gridDim.y) m.workspace.bad[tile_row] = bad;
  if (tile_row == 0 && blockIdx.y == 0) *m.workspace.ticket = 0;
}

template <class A>
struct Finish {
  Workspace<A> workspace;
  QuintupletState<A> state;
  const std::int64_t* labels;
  IgnoredLabel ignored;
  std::int64_t batch;
  A margins[3];
  Reduction reduction;
  A* loss;
};

// 0, or NaN where a feature is not finite; a warp's work.
template <class A>
__device__ A poison_of(const Finish<A>& f) {
  A bad = 0;
  for (std::int64_t t = lane_of_warp(); t * kTile < f.batch; t += kWarp) {
    bad += static_cast<A>(f.workspace.bad[t]);
  }
  return warp_sum(bad) > A(0) ? A(NAN) : A(0);
}

template <class A>
__device__ void finish_anchor(const Finish<A>& f, std::int64_t i, A poison) {
  Candidate<A> found[kNeighbors];
  for (int k = 0; k < kNeighbors; ++k) {
    found[k] = {A(0), kNoPair};
    for (std::int64_t c = lane_of_warp(); c < f.workspace.columns; c += kWarp) {
      offer(k, f.workspace.found[(i * f.workspace.columns + c) * kNeighbors + k], found);
    }
    found[k] = warp_first(
        found[k], [k](const Candidate<A>& x, const Candidate<A>& y) { return precedes(k, x, y); });
  }
  if (lane_of_warp() != 0) return;
  const Hinges<A> hinges = quintuplet_hinges(found, f.margins, f.state.slopes + i * kNeighbors);
  const bool ignored = f.ignored.marks(f.labels[i]);
  for (int k = 0; k < kNeighbors; ++k) {
    f.state.neighbors[i * kNeighbors + k] = ignored ? kIgnoredSample : found[k].pair;
  }
  f.workspace.losses[i] = hinges.loss;
  f.workspace.any[i] = hinges.any ? A(1) : A(0);
  if (f.reduction == Reduction::kNone) f.loss[i] = ignored ? A(0) : hinges.loss + poison;
}

template <class A>
__device__ A total(const volatile A* values, std::int64_t count) {
  FACELT_SHARED(A, sums, kWarps);
  A sum = 0;
  for (std::int64_t i = threadIdx.x; i < count; i += kThreads) sum += values[i];
  sum = warp_sum(sum);
  __syncthreads();
  if (lane_of_warp() == 0) sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += sums[w];
  return sum;
}

// A warp takes an anchor; the last block adds up.
template <class A>
__global__ void hinges_kernel(Finish<A> f) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const A poison = poison_of(f);
  if (i < f.batch) finish_anchor(f, i, poison);
  if (!is_last_block(f.workspace.ticket)) return;
  const A anchors = total(f.workspace.any, f.batch);
  const A sum = total(f.workspace.losses, f.batch);
  if (threadIdx.x != 0) return;
  *f.state.anchors = anchors;
  *f.state.poison = poison;
  if (f.reduction == Reduction::kNone) return;
  const bool mean = f.reduction == Reduction::kMean && anchors > A(0);
  *f.loss = (mean ? sum / anchors : sum) + poison;
}

template <class A>
struct Gradient {
  const A* features;
  std::int64_t batch, dimensions;
  Reduction reduction;
  const A* grad_loss;
  QuintupletState<A> state;
  A* grad_features;

  // The gradient by x_i[d] of the distance at a place in [B, 4], between i and another sample.
  __device__ A of_place(std::int64_t place, std::int64_t i, std::int64_t other,
                        std::int64_t d) const {
    if (state.slopes[place] == A(0)) return A(0);
    const A factor = anchor_gradient(reduction, grad_loss, *state.anchors, place / kNeighbors);
    return 2 * factor * state.slopes[place] *
           (features[i * dimensions + d] - features[other * dimensions + d]);
  }
};

// The places from `begin` on, kThreads of them, where sample i is an anchor's neighbor, ascending.
// Returns their number.
template <class A>
__device__ int places_of(const Gradient<A>& g, std::int64_t i, std::int64_t begin,
                         std::int64_t* places) {
  FACELT_SHARED(int, counts, kWarps);
  const std::int64_t place = begin + threadIdx.x;
  const bool here = place < g.batch * kNeighbors && g.state.neighbors[place] == i;
  const unsigned votes = __ballot_sync(kFullMask, here);
  __syncthreads();
  if (lane_of_warp() == 0) counts[threadIdx.x / kWarp] = __popc(votes);
  __syncthreads();
  int before = __popc(votes & ((1u << lane_of_warp()) - 1)), sum = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < static_cast<int>(threadIdx.x) / kWarp) before += counts[w];
    sum += counts[w];
  }
  if (here) places[before] = place;
  __syncthreads();
  return sum;
}

// Block i takes sample i: as an anchor, then as the neighbor of others.
template <class A>
__global__ void gradient_kernel(Gradient<A> g) {
  FACELT_SHARED(std::int64_t, places, kThreads);
  const std::int64_t i = blockIdx.x;
  A* grad = g.grad_features + i * g.dimensions;
  for (std::int64_t d = threadIdx.x; d < g.dimensions; d += kThreads) {
    A sum = g.state.poison_of(i);
    for (std::int64_t p = i * kNeighbors; p < (i + 1) * kNeighbors; ++p) {
      const std::int64_t other = g.state.neighbors[p];
      if (other >= 0 && other < g.batch) sum += g.of_place(p, i, other, d);
    }
    grad[d] = sum;
  }
  for (std::int64_t begin = 0; begin < g.batch * kNeighbors; begin += kThreads) {
    const int count = places_of(g, i, begin, places);
    for (std::int64_t d = threadIdx.x; d < g.dimensions; d += kThreads) {
      A sum = grad[d];
      for (int p = 0; p < count; ++p) sum += g.of_place(places[p], i, places[p] / kNeighbors, d);
      grad[d] = sum;
    }
  }
}

}  // namespace

void quintuplet_forward(const TensorView& features, const TensorView& labels,
                        const TensorView& cluster_index, const QuintupletOptions& options,
                        const TensorView& loss, const TensorView& neighbors,
                        const TensorView& state, const TensorView& workspace, Execution execution) {
  constexpr ScalarType kIndex = ScalarType::kInt64;
  const std::int64_t batch = features.size(0), dimensions = features.size(1);
  const int device = features.device;
  const stream_t stream = stream_of(execution);
  dispatch_floating(features.dtype, "features", [&](auto zero) {
    using A = Compute<decltype(zero)>;
    constexpr ScalarType kType = Scalar<A>::kType;
    Arena arena(workspace_pointer(workspace, quintuplet_workspace(batch, sizeof(A)), device));
    const Workspace<A> w(arena, batch);
    const Mining<A> mining{
        pointer<const A>(features, "features", kType, batch * dimensions, device),
        pointer<const std::int64_t>(labels, "labels", kIndex, batch, device),
        pointer<const std::int64_t>(cluster_index, "cluster_index", kIndex, batch, device),
        options.ignored,
        batch,
        dimensions,
        w};
    const Finish<A> finish{
        w,
        quintuplet_state<A>(neighbors, state, batch, device),
        mining.labels,
        options.ignored,
        batch,
        {static_cast<A>(options.margins[0]), static_cast<A>(options.margins[1]),
         static_cast<A>(options.margins[2])},
        options.reduction,
        pointer<A>(loss, "loss", kType, number_of_losses(options.reduction, batch), device)};
    launch(mining_kernel<A>,
           dim3(blocks_for(batch, kTile), static_cast<unsigned>(w.columns > 0 ? w.columns : 1)),
           kTileThreads, 0, stream, mining);
    launch(hinges_kernel<A>, blocks_for(batch, kWarps), kThreads, 0, stream, finish);
  });
}

std::int64_t quintuplet_workspace(std::int64_t batch, std::int64_t compute_size) {
  Arena arena;
  if (compute_size == sizeof(double)) {
    Workspace<double>(arena, batch);
  } else {
    Workspace<float>(arena, batch);
  }
  return arena.used();
}

void quintuplet_backward(const TensorView& grad_loss, const TensorView& features,
                         const QuintupletOptions& options, const TensorView& neighbors,
                         const TensorView& state, const TensorView& grad_features,
                         Execution execution) {
  const std::int64_t batch = features.size(0), dimensions = features.size(1);
  const int device = features.device;
  if (batch == 0) return;
  dispatch_floating(features.dtype, "features", [&](auto zero) {
    using A = Compute<decltype(zero)>;
    constexpr ScalarType kType = Scalar<A>::kType;
    const Gradient<A> gradient{
        pointer<const A>(features, "features", kType, batch * dimensions, device),
        batch,
        dimensions,
        options.reduction,
        pointer<const A>(grad_loss, "grad_loss", kType, number_of_losses(options.reduction, batch),
                         device),
        quintuplet_state<A>(neighbors, state, batch, device),
        pointer<A>(grad_features, "grad_features", kType, batch * dimensions, device)};
    launch(gradient_kernel<A>, blocks_for(batch, 1), kThreads, 0, stream_of(execution), gradient);
  });
}

}  // namespace facelt::FACELT_CUDA_NAMESPACE
