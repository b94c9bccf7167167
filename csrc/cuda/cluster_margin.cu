#include "last_block.cuh"
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
  ClusterMarginState<A> state;
  bool normalize;
  IgnoredLabel ignored;

  __device__ bool is_valid(std::int64_t m) const { return m >= 0 && m < clusters; }
  __device__ bool is_ignored(std::int64_t i) const { return ignored.marks(cluster_index[i]); }
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
__global__ void centroids_kernel(Batch<A> b) {
  FACELT_SHARED(A, inverse, 1);
  const std::int64_t m = blockIdx.x;
  std::int64_t size = 0, taking_part = 0;
  for (std::int64_t i = 0; i < b.batch; ++i) {
    if (b.is_ignored(i)) continue;
    size += b.cluster_index[i] == m;
    ++taking_part;
  }
  if (m == 0 && threadIdx.x == 0) {
    b.state.sizes[b.clusters] = A(0);
    *b.state.taking_part = static_cast<A>(taking_part);
  }
  if (m >= b.clusters) return;
  A* mean = b.state.centroids + m * b.dimensions;
  for (std::int64_t d = threadIdx.x; d < b.dimensions; d += kThreads) {
    A sum = 0;
    for (std::int64_t i = 0; i < b.batch; ++i) {
      if (b.cluster_index[i] == m) sum += b.features[i * b.dimensions + d];
    }
    mean[d] = size > 0 ? sum / static_cast<A>(size) : A(0);
  }
  __syncthreads();
  if (threadIdx.x < kWarp) {
    const A own = b.normalize ? inverse_norm(mean, b.dimensions) : A(1);
    if (lane_of_warp() == 0) {
      *inverse = own;
      b.state.inverse_norms[m] = own;
      b.state.sizes[m] = static_cast<A>(size);
    }
  }
  __syncthreads();
  if (!b.normalize) return;
  for (std::int64_t d = threadIdx.x; d < b.dimensions; d += kThreads) mean[d] *= *inverse;
}

template <class A>
struct HingeTask {
  Batch<A> batch;
  const std::int64_t* cluster_class;
  const A* weights;
  A between_margin, within_margin;
  Reduction reduction;
  bool given;
  A* losses;
  A* loss;

  // The losses may be another block's.
  __device__ A weighted(std::int64_t i) const {
    const A loss = static_cast<const volatile A*>(losses)[i];
    return weights && !batch.is_ignored(i) ? weights[i] * loss : loss;
  }

  __device__ A share() const { return share_of_sample(reduction, *batch.state.taking_part); }
};

enum class Kind { kOwn, kBetween, kWithin, kNone };

template <class A>
__device__ Kind kind_of(const HingeTask<A>& task, std::int64_t own, std::int64_t m) {
  if (m == own) return Kind::kOwn;
  if (task.batch.state.sizes[m] == A(0)) return Kind::kNone;
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

// What an ignored sample leaves.
template <class A>
__device__ void leave_nothing(const HingeTask<A>& task, std::int64_t i) {
  const std::int64_t clusters = task.batch.clusters;
  for (std::int64_t m = threadIdx.x; m < clusters; m += kThreads) {
    task.batch.state.gradient[i * clusters + m] = A(0);
  }
  if (threadIdx.x == 0) task.losses[i] = A(0);
}

// Sample i: the block's warps take clusters in turn, then all of it the hinges.
template <class A>
__device__ void sample_hinges(const HingeTask<A>& task, A* shared, std::int64_t i) {
  const Batch<A>& b = task.batch;
  const std::int64_t own = b.cluster_index[i];
  A* row = b.state.gradient + i * b.clusters;
  if (!task.given) {
    for (std::int64_t m = threadIdx.x / kWarp; m < b.clusters; m += kWarps) {
      A sum = 0;
      for (std::int64_t d = lane_of_warp(); d < b.dimensions; d += kWarp) {
        sum += b.features[i * b.dimensions + d] * b.state.centroids[m * b.dimensions + d];
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
  const A factor = task.weights ? task.share() * task.weights[i] : task.share();
  for (std::int64_t m = threadIdx.x; m < b.clusters; m += kThreads) {
    A value = 0;
    const Kind kind = valid ? kind_of(task, own, m) : Kind::kNone;
    if (kind == Kind::kOwn) value = factor * (poison - between.active - within.active);
    if (kind == Kind::kBetween && between.active != A(0)) {
      value = factor * between.active * (exp(row[m] - between.largest) / between.sum);
    }
    if (kind == Kind::kWithin && within.active != A(0)) {
      value = factor * within.active * (exp(row[m] - within.largest) / within.sum);
    }
    row[m] = value;
  }
  if (threadIdx.x == 0) task.losses[i] = poison + between.loss + within.loss;
}

// Block i takes sample i; the last block adds up the losses.
template <class A>
__global__ void hinges_kernel(HingeTask<A> task) {
  FACELT_SHARED(A, shared, kWarps);
  const std::int64_t batch = task.batch.batch, i = blockIdx.x;
  if (i < batch) {
    if (task.batch.is_ignored(i)) {
      leave_nothing(task, i);
    } else {
      sample_hinges(task, shared, i);
    }
  }
  if (task.reduction == Reduction::kNone) {
    if (i < batch && threadIdx.x == 0) task.loss[i] = task.weighted(i);
    return;
  }
  if (!is_last_block(task.batch.state.ticket)) return;
  A sum = 0;
  for (std::int64_t j = threadIdx.x; j < batch; j += kThreads) sum += task.weighted(j);
  sum = block_sum(shared, sum);
  if (threadIdx.x == 0) *task.loss = sum * task.share();
}

template <class A>
struct GradientTask {
  Batch<A> batch;
  const A* grad_loss;
  bool reduced, given;
  A* grad_centroids;
  A* grad_features;

  __device__ A gradient(std::int64_t i, std::int64_t m) const {
    return grad_loss[reduced ? 0 : i] * batch.state.gradient[i * batch.clusters + m];
  }
};

// Block m takes cluster m: the gradient by its centroid, through its norm to each of its samples.
template <class A>
__global__ void centroid_gradient_kernel(GradientTask<A> task) {
  FACELT_SHARED(A, shared, kWarps);
  const Batch<A>& b = task.batch;
  const std::int64_t m = blockIdx.x;
  A* grad = task.grad_centroids + m * b.dimensions;
  const A* centroid = b.state.centroids + m * b.dimensions;
  A along = 0;
  for (std::int64_t d = threadIdx.x; d < b.dimensions; d += kThreads) {
    A sum = task.given ? grad[d] : A(0);
    for (std::int64_t i = 0; i < b.batch && !task.given; ++i) {
      if (!b.is_ignored(i)) sum += task.gradient(i, m) * b.features[i * b.dimensions + d];
    }
    grad[d] = sum;
    along += sum * centroid[d];
  }
  along = b.normalize ? block_sum(shared, along) : A(0);
  const A size = b.state.sizes[m];
  const A scale = size > A(0) ? b.state.inverse_norms[m] / size : A(0);
  for (std::int64_t d = threadIdx.x; d < b.dimensions; d += kThreads) {
    grad[d] = scale * (grad[d] - along * centroid[d]);
  }
}

// Block i takes sample i.
template <class A>
__global__ void feature_gradient_kernel(GradientTask<A> task) {
  const Batch<A>& b = task.batch;
  const std::int64_t i = blockIdx.x;
  const std::int64_t own = b.cluster_index[i];
  A* grad = task.grad_features + i * b.dimensions;
  for (std::int64_t d = threadIdx.x; d < b.dimensions; d += kThreads) {
    A sum = task.given ? grad[d] : A(0);
    for (std::int64_t m = 0; m < b.clusters && !task.given; ++m) {
      sum += task.gradient(i, m) * b.state.centroids[m * b.dimensions + d];
    }
    sum += b.is_valid(own) ? task.grad_centroids[own * b.dimensions + d] : A(NAN);
    grad[d] = b.is_ignored(i) ? A(0) : sum;
  }
}

template <class A>
Batch<A> make_batch(const TensorView& features, const TensorView& cluster_index,
                    const ClusterMarginOptions& options, const TensorView& state) {
  const std::int64_t batch = features.size(0), dimensions = features.size(1);
  const std::int64_t clusters = cluster_margin_clusters(state, batch, dimensions);
  const int device = features.device;
  return {batch,
          clusters,
          dimensions,
          pointer<const A>(features, "features", Scalar<A>::kType, batch * dimensions, device),
          pointer<const std::int64_t>(cluster_index, "cluster_index", ScalarType::kInt64, batch,
                                      device),
          cluster_margin_state<A>(state, batch, clusters, dimensions, device),
          options.normalize,
          options.ignored};
}

}  // namespace

void cluster_margin_forward(const TensorView& features, const TensorView& cluster_index,
                            const TensorView& cluster_class,
                            const std::optional<TensorView>& sample_weight,
                            const ClusterMarginOptions& options, int part, const TensorView& loss,
                            const TensorView& losses, const TensorView& state,
                            Execution execution) {
  const Part step = checked_part(part);
  const int device = features.device;
  const stream_t stream = stream_of(execution);
  dispatch_floating(features.dtype, "features", [&](auto zero) {
    using A = Compute<decltype(zero)>;
    constexpr ScalarType kType = Scalar<A>::kType;
    const Batch<A> b = make_batch<A>(features, cluster_index, options, state);
    const HingeTask<A> task{
        b,
        pointer<const std::int64_t>(cluster_class, "cluster_class", ScalarType::kInt64, b.clusters,
                                    device),
        sample_weight ? pointer<const A>(*sample_weight, "sample_weight", kType, b.batch, device)
                      : nullptr,
        static_cast<A>(options.between_margin),
        static_cast<A>(options.within_margin),
        options.reduction,
        step == Part::kAfterProducts,
        pointer<A>(losses, "losses", kType, b.batch, device),
        pointer<A>(loss, "loss", kType, number_of_losses(options.reduction, b.batch), device)};
    if (step != Part::kAfterProducts) {
      launch(centroids_kernel<A>, blocks_for(b.clusters, 1), kThreads, 0, stream, b);
    }
    if (step != Part::kBeforeProducts) {
      launch(hinges_kernel<A>, blocks_for(b.batch, 1), kThreads, 0, stream, task);
    }
  });
}

void cluster_margin_backward(const TensorView& grad_loss, const TensorView& features,
                             const TensorView& cluster_index, const ClusterMarginOptions& options,
                             int part, const TensorView& state, const TensorView& grad_centroids,
                             const TensorView& grad_features, Execution execution) {
  const Part step = checked_part(part);
  const int device = features.device;
  const stream_t stream = stream_of(execution);
  dispatch_floating(features.dtype, "features", [&](auto zero) {
    using A = Compute<decltype(zero)>;
    constexpr ScalarType kType = Scalar<A>::kType;
    const Batch<A> b = make_batch<A>(features, cluster_index, options, state);
    const GradientTask<A> task{
        b,
        pointer<const A>(grad_loss, "grad_loss", kType,
                         number_of_losses(options.reduction, b.batch), device),
        options.reduction != Reduction::kNone,
        step == Part::kAfterProducts,
        pointer<A>(grad_centroids, "grad_centroids", kType, b.clusters * b.dimensions, device),
        pointer<A>(grad_features, "grad_features", kType, b.batch * b.dimensions, device)};
    if (b.batch == 0 || b.clusters == 0) return;
    launch(centroid_gradient_kernel<A>, blocks_for(b.clusters, 1), kThreads, 0, stream, task);
    launch(feature_gradient_kernel<A>, blocks_for(b.batch, 1), kThreads, 0, stream, task);
  });
}

}  // namespace facelt::FACELT_CUDA_NAMESPACE
