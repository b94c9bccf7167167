#include "../range_loss_state.h"
#include "centroids.cuh"
#include "last_block.cuh"
#include "ranges.cuh"

namespace facelt::FACELT_CUDA_NAMESPACE {

namespace {

constexpr int kFinishThreads = 256;
static_assert(kFinishThreads <= kReduceThreads);

template <class A>
struct RangeLossWorkspace {
  std::int64_t* order;
  std::int64_t* starts;
  std::int64_t* num_classes;
  std::int64_t* counts;
  unsigned* ticket;
  A* centroids;
  A* ranges;
  A* class_loss;
  TileCandidates<A> candidates;
  CenterTiles<A> center_tiles;

  RangeLossWorkspace(Arena& arena, std::int64_t batch, std::int64_t dimensions, std::int64_t k)
      : order(arena.take<std::int64_t>(batch)),
        starts(arena.take<std::int64_t>(batch)),
        num_classes(arena.take<std::int64_t>(1)),
        counts(arena.take<std::int64_t>(batch)),
        ticket(arena.take<unsigned>(1)),
        centroids(arena.take<A>(batch * dimensions)),
        ranges(arena.take<A>(batch * k)),
        class_loss(arena.take<A>(batch)),
        candidates(arena, batch, k),
        center_tiles(
            make_center_tiles<A>(centroids, counts, num_classes, batch, dimensions, arena)) {}
};

template <class A>
struct Finish {
  RangeLossWorkspace<A> workspace;
  RangeLossState<A> state;
  std::int64_t batch, dimensions, k;
  A margin, alpha, beta;
  bool squared;
  A* loss;
};

// A fixed order of addition, whichever block does it.
template <class A>
__device__ A block_sum(const volatile A* values, std::int64_t number) {
  FACELT_SHARED(A, sums, kFinishThreads / kWarp);
  A sum = 0;
  for (std::int64_t s = threadIdx.x; s < number; s += kFinishThreads) sum += values[s];
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  A total = 0;
  for (int w = 0; w < kFinishThreads / kWarp; ++w) total += sums[w];
  return total;
}

// A class's ranges, its harmonic mean and what its pairs pass back; a warp's work. Rows beyond the
// classes become empty ones.
template <class A>
__device__ void finish_class(const Finish<A>& f, std::int64_t s) {
  const RangeLossWorkspace<A>& w = f.workspace;
  A* ranges = w.ranges + s * f.k;
  A* pair_scale = f.state.pair_scale + s * f.k;
  const std::int64_t number =
      merge_class(w.candidates, f.state.offsets[s], f.state.offsets[s + 1], w.order, f.batch, f.k,
                  f.squared, ranges, f.state.pairs + s * f.k * 2);
  if (threadIdx.x % kWarp != 0) return;
  w.class_loss[s] = harmonic_mean(ranges, number, f.squared, f.alpha, pair_scale);
  for (std::int64_t j = number; j < f.k; ++j) pair_scale[j] = A(0);
}

// A warp finishes a class; the last block adds up the loss.
template <class A>
__global__ void finish_kernel(Finish<A> f) {
  FACELT_SHARED(NearestPair<A>, shared_nearest, 1);
  const RangeLossWorkspace<A>& w = f.workspace;
  const std::int64_t s =
      static_cast<std::int64_t>(blockIdx.x) * (kFinishThreads / kWarp) + threadIdx.x / kWarp;
  if (s < f.batch) finish_class(f, s);
  if (!is_last_block(w.ticket)) return;

  const A intra = block_sum(w.class_loss, f.batch);
  const NearestPair<A> nearest = nearest_pair(w.center_tiles);
  if (threadIdx.x == 0) shared_nearest[0] = nearest;
  __syncthreads();
  const std::int64_t q = shared_nearest[0].q, r = shared_nearest[0].r;
  const A squared_distance = shared_nearest[0].squared_distance;
  const A distance = f.squared ? squared_distance : square_root(squared_distance);
  const InterTerm<A> inter = inter_term(distance, f.margin, f.beta, f.squared);
  for (std::int64_t d = threadIdx.x; d < f.dimensions; d += kFinishThreads) {
    f.state.center_gradient[d] =
        q == kNoPair
            ? A(0)
            : inter.scale * (w.centroids[q * f.dimensions + d] - w.centroids[r * f.dimensions + d]);
  }
  if (threadIdx.x == 0) {
    const A loss = f.alpha * intra + inter.value;
    *f.loss = loss;
    f.state.center_pair[0] = q;
    f.state.center_pair[1] = r;
    *f.state.poison = loss == loss ? A(0) : loss;
  }
}

}  // namespace

void range_loss_forward(const TensorView& features, const TensorView& labels,
                        const RangeLossOptions& options, const TensorView& loss,
                        const TensorView& state_index, const TensorView& state_value,
                        const TensorView& workspace, Execution execution) {
  const std::int64_t batch = features.size(0), dimensions = features.size(1), k = options.k;
  require_ranges(k);
  const int device = features.device;
  const stream_t stream = stream_of(execution);
  const auto* label =
      pointer<const std::int64_t>(labels, "labels", ScalarType::kInt64, batch, device);
  dispatch_floating(features.dtype, "features", [&](auto zero) {
    using T = decltype(zero);
    using A = Compute<T>;
    Arena arena(workspace_pointer(workspace, range_loss_workspace(batch, dimensions, k, sizeof(A)),
                                  device));
    const RangeLossWorkspace<A> w(arena, batch, dimensions, k);
    const RangeLossState<A> state =
        range_loss_state<A>(state_index, state_value, batch, dimensions, k, device);
    const auto* x =
        pointer<const T>(features, "features", Scalar<T>::kType, batch * dimensions, device);
    const Numbering numbering{w.order,       w.starts,      batch,
                              state.segment, state.offsets, w.num_classes};
    const Finish<A> finish{w,
                           state,
                           batch,
                           dimensions,
                           k,
                           static_cast<A>(options.margin),
                           static_cast<A>(options.alpha),
                           static_cast<A>(options.beta),
                           options.squared,
                           pointer<A>(loss, "loss", Scalar<A>::kType, 1, device)};
    std::int64_t* taking_part = state.offsets + batch;
    launch_rank_labels(label, batch, options.ignored, w.order, w.starts, taking_part, w.ticket,
                       stream);
    launch_range_tiles(
        RangeTiles<T>{x, label, w.order, taking_part, batch, dimensions, k, w.candidates},
        &numbering, stream);
    launch_centroids(Centroids<T>{x, w.order, state.offsets, w.num_classes, batch, dimensions,
                                  batch, w.centroids, w.counts, false},
                     stream);
    launch_center_tiles(w.center_tiles, stream);
    launch(finish_kernel<A>, blocks_for(batch, kFinishThreads / kWarp), kFinishThreads, 0, stream,
           finish);
  });
}

std::int64_t range_loss_workspace(std::int64_t batch, std::int64_t dimensions, std::int64_t k,
                                  std::int64_t compute_size) {
  Arena arena;
  if (compute_size == sizeof(float)) {
    RangeLossWorkspace<float>(arena, batch, dimensions, k);
  } else {
    RangeLossWorkspace<double>(arena, batch, dimensions, k);
  }
  return arena.used();
}

void range_loss_backward(const TensorView& grad_loss, const TensorView& features, std::int64_t k,
                         const TensorView& state_index, const TensorView& state_value,
                         const TensorView& grad_features, Execution execution) {
  const std::int64_t batch = features.size(0), dimensions = features.size(1);
  const int device = features.device;
  dispatch_floating(features.dtype, "features", [&](auto zero) {
    using T = decltype(zero);
    using A = Compute<T>;
    const RangeLossState<A> state =
        range_loss_state<A>(state_index, state_value, batch, dimensions, k, device);
    const CenterGradient<A> center{
        pointer<const A>(grad_loss, "grad_loss", Scalar<A>::kType, 1, device), state.offsets,
        state.center_pair, state.center_gradient, state.poison};
    const PairGradients<T> gradients{
        pointer<const T>(features, "features", Scalar<T>::kType, batch * dimensions, device),
        state.segment,
        state.pairs,
        state.pair_scale,
        batch,
        dimensions,
        batch,
        k,
        pointer<T>(grad_features, "grad_features", Scalar<T>::kType, batch * dimensions, device),
        center};
    launch_pair_gradients(gradients, stream_of(execution));
  });
}

}  // namespace facelt::FACELT_CUDA_NAMESPACE
