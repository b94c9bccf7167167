#include "centroids.cuh"
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
        center_tiles(make_center_tiles<A>(centroids, counts, num_classes, batch, dimensions, arena)) {
  }
};

template <class A>
struct Finish {
  RangeLossWorkspace<A> workspace;
  const std::int64_t* offsets;
  std::int64_t batch, dimensions, k;
  A margin, alpha, beta;
  bool squared;
  A* loss;
  std::int64_t* pairs;
  A* pair_scale;
  std::int64_t* center_pair;
  A* center_gradient;
};

// True in the block that comes last; what the others wrote before is then visible to it.
__device__ bool is_last_block(unsigned* ticket) {
  __threadfence();
  __syncthreads();
  unsigned before = 0;
  if (threadIdx.x == 0) before = atomicAdd(ticket, 1u);
  const bool last = __syncthreads_or(threadIdx.x == 0 && before == gridDim.x - 1);
  __threadfence();
  return last;
}

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
  A* pair_scale = f.pair_scale + s * f.k;
  const std::int64_t number =
      merge_class(w.candidates, f.offsets[s], f.offsets[s + 1], w.order, f.batch, f.k, f.squared,
                  ranges, f.pairs + s * f.k * 2);
  if (threadIdx.x % kWarp != 0) return;
  w.class_loss[s] = harmonic_mean(ranges, number, f.squared, f.alpha, pair_scale);
  for (std::int64_t j = number; j < f.k; ++j) pair_scale[j] = A(0);
}

// A warp finishes a class; the last block adds up the loss.
template <class A>
__global__ void finish_kernel(Finish<A> f) {
  FACELT_SHARED(NearestPair<A>, shared_nearest, 1);
  const RangeLossWorkspace<A>& w = f.workspace;
  const std::int64_t s = static_cast<std::int64_t>(blockIdx.x) * (kFinishThreads / kWarp) +
                         threadIdx.x / kWarp;
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
    f.center_gradient[d] = q == kNoPair ? A(0)
                                        : inter.scale * (w.centroids[q * f.dimensions + d] -
                                                         w.centroids[r * f.dimensions + d]);
  }
  if (threadIdx.x == 0) {
    const A loss = f.alpha * intra + inter.value;
    *f.loss = loss;
    f.center_pair[0] = q;
    f.center_pair[1] = r;
    f.center_gradient[f.dimensions] = loss == loss ? A(0) : loss;
  }
}

}  // namespace

void range_loss_forward(const TensorView& features, const TensorView& labels,
                        const RangeLossOptions& options, const TensorView& loss,
                        const TensorView& segment, const TensorView& offsets,
                        const TensorView& pairs, const TensorView& pair_scale,
                        const TensorView& center_pair, const TensorView& center_gradient,
                        const TensorView& workspace, Execution execution) {
  constexpr ScalarType kIndex = ScalarType::kInt64;
  const std::int64_t batch = features.size(0), dimensions = features.size(1);
  const std::int64_t k = pair_scale.size(1);
  const int device = features.device;
  const stream_t stream = stream_of(execution);
  const auto* label = pointer<const std::int64_t>(labels, "labels", kIndex, batch, device);
  auto* starts = pointer<std::int64_t>(offsets, "offsets", kIndex, batch + 1, device);
  dispatch_floating(features.dtype, "features", [&](auto zero) {
    using T = decltype(zero);
    using A = Compute<T>;
    constexpr ScalarType kType = Scalar<A>::kType;
    Arena arena(workspace_pointer(
        workspace, range_loss_workspace(batch, dimensions, k, sizeof(A)), device));
    const RangeLossWorkspace<A> w(arena, batch, dimensions, k);
    const auto* x =
        pointer<const T>(features, "features", Scalar<T>::kType, batch * dimensions, device);
    const Numbering numbering{
        w.order, w.starts, batch, pointer<std::int64_t>(segment, "segment", kIndex, batch, device),
        starts,  w.num_classes};
    const Finish<A> finish{w,
                           starts,
                           batch,
                           dimensions,
                           k,
                           static_cast<A>(options.margin),
                           static_cast<A>(options.alpha),
                           static_cast<A>(options.beta),
                           options.squared,
                           pointer<A>(loss, "loss", kType, 1, device),
                           pointer<std::int64_t>(pairs, "pairs", kIndex, batch * k * 2, device),
                           pointer<A>(pair_scale, "pair_scale", kType, batch * k, device),
                           pointer<std::int64_t>(center_pair, "center_pair", kIndex, 2, device),
                           pointer<A>(center_gradient, "center_gradient", kType, dimensions + 1,
                                      device)};
    launch_rank_labels(label, batch, w.order, w.starts, w.ticket, stream);
    launch_range_tiles(RangeTiles<T>{x, label, w.order, batch, dimensions, k, w.candidates},
                       &numbering, stream);
    launch_centroids(Centroids<T>{x, w.order, starts, w.num_classes, batch, dimensions, batch,
                                  w.centroids, w.counts},
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

void range_loss_backward(const TensorView& grad_loss, const TensorView& features,
                         const TensorView& segment, const TensorView& offsets,
                         const TensorView& pairs, const TensorView& pair_scale,
                         const TensorView& center_pair, const TensorView& center_gradient,
                         const TensorView& grad_features, Execution execution) {
  constexpr ScalarType kIndex = ScalarType::kInt64;
  const std::int64_t batch = features.size(0), dimensions = features.size(1);
  const std::int64_t k = pair_scale.size(1);
  const int device = features.device;
  dispatch_floating(features.dtype, "features", [&](auto zero) {
    using T = decltype(zero);
    using A = Compute<T>;
    constexpr ScalarType kType = Scalar<A>::kType;
    const CenterGradient<A> center{
        pointer<const A>(grad_loss, "grad_loss", kType, 1, device),
        pointer<const std::int64_t>(offsets, "offsets", kIndex, batch + 1, device),
        pointer<const std::int64_t>(center_pair, "center_pair", kIndex, 2, device),
        pointer<const A>(center_gradient, "center_gradient", kType, dimensions + 1, device)};
    const PairGradients<T> gradients{
        pointer<const T>(features, "features", Scalar<T>::kType, batch * dimensions, device),
        pointer<const std::int64_t>(segment, "segment", kIndex, batch, device),
        pointer<const std::int64_t>(pairs, "pairs", kIndex, batch * k * 2, device),
        pointer<const A>(pair_scale, "pair_scale", kType, batch * k, device),
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
