#include "row_reductions.cuh"

namespace facelt::FACELT_CUDA_NAMESPACE {

namespace {

#if defined(FACELT_EMULATION)
constexpr int kWarps = 2;
#else
constexpr int kWarps = 8;
#endif
constexpr int kThreads = kWarps * kWarp;

// A batch of samples in clusters. What a cluster_index out of range leads to is NaN, and it is not
// followed.
template <class A>
struct Batch {
  std::int64_t batch, clusters, dimensions;
  const A* features;
  const std::int64_t* cluster_index;

  __device__ bool is_valid(std::int64_t m) const { return m >= 0 && m < clusters; }
};

template <class A>
__device__ A block_sum(A* shared, A value) {
  value = warp_sum(value);
  if (lane_of_warp() == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = 0;
  for (int w = 0; w < kWarps; ++w) value += shared[w];
  __syncthreads();
  return value;
}

template <class A>
__device__ A block_largest(A* shared, A value) {
  value = warp_max(value);
  if (lane_of_warp() == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) value = shared[w] > value ? shared[w] : value;
  __syncthreads();
  return value;
}

// Block m takes cluster m: its threads take columns, and look through the batch for its samples.
template <class A>
__global__ void centroids_kernel(Batch<A> b, bool normalize, A* centroids, A* inverse_norms,
                                 std::int64_t* counts) {
  FACELT_SHARED(A, inverse, 1);
  const std::int64_t m = blockIdx.x;
  A* mean = centroids + m * b.dimensions;
  std::int64_t size = 0;
  for (std::int64_t i = 0; i < b.batch; ++i) size += b.cluster_index[i] == m;
  for (std::int64_t d = threadIdx.x; d < b.dimensions; d += kThreads) {
    A sum = 0;
    for (std::int64_t i = 0; i < b.batch; ++i) {
      if (b.cluster_index[i] == m) sum += b.features[i * b.dimensions + d];
    }
    mean[d] = size > 0 ? sum / static_cast<A>(size) : A(0);
  }
  __syncthreads();
  if (threadIdx.x < kWarp) {
    const A own = normalize ? inverse_norm(mean, b.dimensions) : A(1);
    if (lane_of_warp() == 0) {
      *inverse = own;
      inverse_norms[m] = own;
      counts[m] = size;
    }
  }
  __syncthreads();
  if (!normalize) return;
  for (std::int64_t d = threadIdx.x; d < b.dimensions; d += kThreads) mean[d] *= *inverse;
}

template <class A>
struct HingeTask {
  Batch<A> batch;
  const std::int64_t* cluster_class;
  const A* centroids;
  const std::int64_t* counts;
  A between_margin, within_margin;
  bool given;
  A* losses;
  A* gradient;
};

enum class Kind { kOwn, kBetween, kWithin, kNone };

template <class A>
__device__ Kind kind_of(const HingeTask<A>& task, std::int64_t own, std::int64_t m) {
  if (m == own) return Kind::kOwn;
  if (task.counts[m] == 0) return Kind::kNone;
  return task.cluster_class[m] == task.cluster_class[own] ? Kind::kWithin : Kind::kBetween;
}

// A hinge over a row of similarities, those of one kind.
template <class A>
struct Hinge {
  A largest = 0, sum = 0, active = 0, loss = 0;
};

template <class A>
__device__ Hinge<A> hinge(const HingeTask<A>& task, A* shared, const A* row, std::int64_t own,
                          A own_similarity, Kind kind, A margin) {
  A count = 0, largest = -A(INFINITY);
  for (std::int64_t m = threadIdx.x; m < task.batch.clusters; m += kThreads) {
    if (kind_of(task, own, m) != kind) continue;
    count += 1;
    if (row[m] > largest) largest = row[m];
  }
  Hinge<A> result;
  if (block_sum(shared, count) == A(0)) return result;
  result.largest = block_largest(shared, largest);
  A sum = 0;
  for (std::int64_t m = threadIdx.x; m < task.batch.clusters; m += kThreads) {
    if (kind_of(task, own, m) == kind) sum += exp(row[m] - result.largest);
  }
  result.sum = block_sum(shared, sum);
  const A exceeding = margin - own_similarity + result.largest + log(result.sum);
  const bool nan = exceeding != exceeding;
  result.active = exceeding > A(0) ? A(1) : nan ? exceeding : A(0);
  result.loss = exceeding > A(0) || nan ? exceeding : A(0);
  return result;
}

// Block i takes sample i: its warps take clusters in turn, then all of it the hinges.
template <class A>
__global__ void hinges_kernel(HingeTask<A> task) {
  FACELT_SHARED(A, shared, kWarps);
  const Batch<A>& b = task.batch;
  const std::int64_t i = blockIdx.x;
  const std::int64_t own = b.cluster_index[i];
  A* row = task.gradient + i * b.clusters;
  if (!task.given) {
    for (std::int64_t m = threadIdx.x / kWarp; m < b.clusters; m += kWarps) {
      A sum = 0;
      for (std::int64_t d = lane_of_warp(); d < b.dimensions; d += kWarp) {
        sum += b.features[i * b.dimensions + d] * task.centroids[m * b.dimensions + d];
      }
      sum = warp_sum(sum);
      if (lane_of_warp() == 0) row[m] = sum;
    }
  }
  __syncthreads();
  const bool valid = b.is_valid(own);
  const A own_similarity = valid ? row[own] : A(NAN);
  // NaN for a feature that is not finite, also where it meets no other cluster.
  const A poison = own_similarity - own_similarity;
  Hinge<A> between, within;
  if (valid) {
    between = hinge(task, shared, row, own, own_similarity, Kind::kBetween, task.between_margin);
    within = hinge(task, shared, row, own, own_similarity, Kind::kWithin, task.within_margin);
  }
  __syncthreads();
  for (std::int64_t m = threadIdx.x; m < b.clusters; m += kThreads) {
    A value = 0;
    const Kind kind = valid ? kind_of(task, own, m) : Kind::kNone;
    if (kind == Kind::kOwn) value = poison - between.active - within.active;
    if (kind == Kind::kBetween && between.active != A(0)) {
      value = between.active * (exp(row[m] - between.largest) / between.sum);
    }
    if (kind == Kind::kWithin && within.active != A(0)) {
      value = within.active * (exp(row[m] - within.largest) / within.sum);
    }
    row[m] = value;
  }
  if (threadIdx.x == 0) task.losses[i] = poison + between.loss + within.loss;
}

template <class A>
struct CentroidGradientTask {
  Batch<A> batch;
  const A* factors;
  const A* gradient;
  const A* centroids;
  const A* inverse_norms;
  const std::int64_t* counts;
  bool normalize, given;
  A* shares;
};

// Block m takes cluster m.
template <class A>
__global__ void centroid_gradient_kernel(CentroidGradientTask<A> task) {
  FACELT_SHARED(A, shared, kWarps);
  const Batch<A>& b = task.batch;
  const std::int64_t m = blockIdx.x;
  A* share = task.shares + m * b.dimensions;
  const A* centroid = task.centroids + m * b.dimensions;
  A along = 0;
  for (std::int64_t d = threadIdx.x; d < b.dimensions; d += kThreads) {
    A sum = task.given ? share[d] : A(0);
    for (std::int64_t i = 0; i < b.batch && !task.given; ++i) {
      sum += task.factors[i] * task.gradient[i * b.clusters + m] * b.features[i * b.dimensions + d];
    }
    share[d] = sum;
    along += sum * centroid[d];
  }
  along = task.normalize ? block_sum(shared, along) : A(0);
  const A size = static_cast<A>(task.counts[m]);
  const A scale = size > A(0) ? task.inverse_norms[m] / size : A(0);
  for (std::int64_t d = threadIdx.x; d < b.dimensions; d += kThreads) {
    share[d] = scale * (share[d] - along * centroid[d]);
  }
}

// Block i takes sample i.
template <class A>
__global__ void feature_gradient_kernel(Batch<A> b, const A* factors, const A* gradient,
                                        const A* centroids, const A* shares, bool given,
                                        A* grad_features) {
  const std::int64_t i = blockIdx.x;
  const std::int64_t own = b.cluster_index[i];
  for (std::int64_t d = threadIdx.x; d < b.dimensions; d += kThreads) {
    A sum = given ? grad_features[i * b.dimensions + d] : A(0);
    for (std::int64_t m = 0; m < b.clusters && !given; ++m) {
      sum += gradient[i * b.clusters + m] * centroids[m * b.dimensions + d];
    }
    const A share = b.is_valid(own) ? shares[own * b.dimensions + d] : A(NAN);
    grad_features[i * b.dimensions + d] = factors[i] * sum + share;
  }
}

template <class A>
Batch<A> make_batch(const A* features, const TensorView& cluster_index, std::int64_t clusters,
                    std::int64_t dimensions) {
  const std::int64_t batch = cluster_index.numel();
  return {batch, clusters, dimensions, features,
          pointer<const std::int64_t>(cluster_index, "cluster_index", ScalarType::kInt64, batch,
                                      cluster_index.device)};
}

template <class A>
const A* rows_of(const TensorView& view, const char* name, std::int64_t rows,
                 std::int64_t columns) {
  return pointer<const A>(view, name, Scalar<A>::kType, rows * columns, view.device);
}

}  // namespace

void cluster_centroids(const TensorView& features, const TensorView& cluster_index, bool normalize,
                       const TensorView& centroids, const TensorView& inverse_norms,
                       const TensorView& counts, Execution execution) {
  const std::int64_t batch = features.size(0), dimensions = features.size(1);
  const std::int64_t clusters = centroids.size(0);
  const int device = features.device;
  if (clusters == 0) return;
  dispatch_floating(features.dtype, "features", [&](auto zero) {
    using A = Compute<decltype(zero)>;
    launch(centroids_kernel<A>, blocks_for(clusters, 1), kThreads, 0, stream_of(execution),
           make_batch(rows_of<A>(features, "features", batch, dimensions), cluster_index, clusters,
                      dimensions),
           normalize,
           pointer<A>(centroids, "centroids", Scalar<A>::kType, clusters * dimensions, device),
           pointer<A>(inverse_norms, "inverse_norms", Scalar<A>::kType, clusters, device),
           pointer<std::int64_t>(counts, "counts", ScalarType::kInt64, clusters, device));
  });
}

void cluster_hinges(const TensorView& features, const TensorView& cluster_index,
                    const TensorView& cluster_class, const TensorView& centroids,
                    const TensorView& counts, double between_margin, double within_margin,
                    bool given, const TensorView& losses, const TensorView& gradient,
                    Execution execution) {
  const std::int64_t batch = features.size(0), dimensions = features.size(1);
  const std::int64_t clusters = centroids.size(0);
  const int device = features.device;
  if (batch == 0) return;
  dispatch_floating(features.dtype, "features", [&](auto zero) {
    using A = Compute<decltype(zero)>;
    constexpr ScalarType kType = Scalar<A>::kType, kIndex = ScalarType::kInt64;
    const HingeTask<A> task{
        make_batch(rows_of<A>(features, "features", batch, dimensions), cluster_index, clusters,
                   dimensions),
        pointer<const std::int64_t>(cluster_class, "cluster_class", kIndex, clusters, device),
        rows_of<A>(centroids, "centroids", clusters, dimensions),
        pointer<const std::int64_t>(counts, "counts", kIndex, clusters, device),
        static_cast<A>(between_margin),
        static_cast<A>(within_margin),
        given,
        pointer<A>(losses, "losses", kType, batch, device),
        pointer<A>(gradient, "gradient", kType, batch * clusters, device)};
    launch(hinges_kernel<A>, blocks_for(batch, 1), kThreads, 0, stream_of(execution), task);
  });
}

void cluster_centroid_gradient(const TensorView& features, const TensorView& factors,
                               const TensorView& gradient, const TensorView& centroids,
                               const TensorView& inverse_norms, const TensorView& counts,
                               bool normalize, bool given, const TensorView& grad_shares,
                               Execution execution) {
  const std::int64_t batch = features.size(0), dimensions = features.size(1);
  const std::int64_t clusters = centroids.size(0);
  const int device = features.device;
  if (clusters == 0) return;
  dispatch_floating(features.dtype, "features", [&](auto zero) {
    using A = Compute<decltype(zero)>;
    constexpr ScalarType kType = Scalar<A>::kType;
    const CentroidGradientTask<A> task{
        {batch, clusters, dimensions, rows_of<A>(features, "features", batch, dimensions), nullptr},
        rows_of<A>(factors, "factors", batch, 1),
        rows_of<A>(gradient, "gradient", batch, clusters),
        rows_of<A>(centroids, "centroids", clusters, dimensions),
        rows_of<A>(inverse_norms, "inverse_norms", clusters, 1),
        pointer<const std::int64_t>(counts, "counts", ScalarType::kInt64, clusters, device),
        normalize,
        given,
        pointer<A>(grad_shares, "grad_shares", kType, clusters * dimensions, device)};
    launch(centroid_gradient_kernel<A>, blocks_for(clusters, 1), kThreads, 0, stream_of(execution),
           task);
  });
}

void cluster_feature_gradient(const TensorView& factors, const TensorView& cluster_index,
                              const TensorView& gradient, const TensorView& centroids,
                              const TensorView& grad_shares, bool given,
                              const TensorView& grad_features, Execution execution) {
  const std::int64_t batch = factors.numel(), clusters = centroids.size(0);
  const std::int64_t dimensions = centroids.size(1);
  const int device = factors.device;
  if (batch == 0) return;
  dispatch_floating(centroids.dtype, "centroids", [&](auto zero) {
    using A = Compute<decltype(zero)>;
    launch(
        feature_gradient_kernel<A>, blocks_for(batch, 1), kThreads, 0, stream_of(execution),
        make_batch<A>(nullptr, cluster_index, clusters, dimensions),
        rows_of<A>(factors, "factors", batch, 1), rows_of<A>(gradient, "gradient", batch, clusters),
        rows_of<A>(centroids, "centroids", clusters, dimensions),
        rows_of<A>(grad_shares, "grad_shares", clusters, dimensions), given,
        pointer<A>(grad_features, "grad_features", Scalar<A>::kType, batch * dimensions, device));
  });
}

}  // namespace facelt::FACELT_CUDA_NAMESPACE
