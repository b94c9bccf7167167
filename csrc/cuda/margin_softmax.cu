#include "row_reductions.cuh"

namespace facelt::FACELT_CUDA_NAMESPACE {

namespace {

#if defined(FACELT_EMULATION)
constexpr int kThreads = 64;
#else
constexpr int kThreads = 512;
#endif
constexpr int kThreadWarps = kThreads / kWarp;
constexpr int kItems = 4;  // columns that a thread takes at a time

template <class T, class W>
struct TargetTask {
  using A = Compute<T>;
  const T* features;
  const A* inverse_feature_norms;
  const W* weight;
  const std::int64_t* labels;
  const A* cosine_margin;
  const A* angular_margin;
  MarginSoftmaxOptions options;
  std::int64_t batch, rows, dimensions;
  A* targets;
};

template <class T, class W>
__device__ Products<Compute<T>> products_of(const T* feature, const W* row,
                                            const Factors<Compute<T>>& factors, std::int64_t n) {
  using A = Compute<T>;
  Products<A> p;
  for (std::int64_t d = lane_of_warp(); d < n; d += kWarp) {
    const A u = widen(feature[d]) * factors.feature, v = widen(row[d]) * factors.weight;
    p.plain += u * v;
    p.difference += (u - v) * (u - v);
    p.sum += (u + v) * (u + v);
  }
  p.plain = warp_sum(p.plain);
  p.difference = warp_sum(p.difference);
  p.sum = warp_sum(p.sum);
  return p;
}

// One warp a sample. A label out of range gives NaN and is not followed.
template <class T, class W>
__global__ void targets_kernel(TargetTask<T, W> task) {
  using A = Compute<T>;
  const std::int64_t i = row_of_warp();
  if (i >= task.batch) return;
  const std::int64_t label = task.labels[i];
  const LabelKind kind = label_kind(label, task.rows, task.options);
  Target<A> target{kind == LabelKind::kInvalid ? A(NAN) : A(0), A(1), A(0)};
  if (kind == LabelKind::kOwn) {
    const W* row = task.weight + (label - task.options.class_offset) * task.dimensions;
    const A inverse = inverse_norm(row, task.dimensions);
    const A own = task.inverse_feature_norms[i];
    const Products<A> products =
        products_of(task.features + i * task.dimensions, row,
                    normalized_by(own, inverse, task.options), task.dimensions);
    target = target_logit(products, own, inverse, task.cosine_margin[i], task.angular_margin[i],
                          task.options);
  }
  if (lane_of_warp() != 0) return;
  task.targets[i] = target.logit;
  task.targets[task.batch + i] = target.slope;
  task.targets[2 * task.batch + i] = target.radial;
}

// A chunk of products, and which of its columns each sample's class has.
template <class P>
struct Chunk {
  using A = Compute<P>;
  const P* products;
  const A* column_scales;
  const std::int64_t* labels;
  const A* targets;
  A scale;
  std::int64_t first_class, batch, columns;

  __device__ A column_scale(std::int64_t j) const {
    return column_scales ? column_scales[j] : A(1);
  }

  __device__ A logit(std::int64_t i, std::int64_t j) const {
    if (labels[i] - first_class == j) return targets[i];
    return scale * (widen(products[i * columns + j]) * column_scale(j));
  }
};

// sum of exp(logit - largest); of nothing, largest is -infinity.
template <class A>
struct Normalizer {
  A largest;
  A sum;
};

template <class A>
__device__ A rescaled(const Normalizer<A>& n, A largest) {
  return n.largest == largest ? n.sum : n.sum * exp(n.largest - largest);
}

template <class A>
__device__ Normalizer<A> joined(const Normalizer<A>& x, const Normalizer<A>& y) {
  const A largest = x.largest > y.largest ? x.largest : y.largest;
  return {largest, rescaled(x, largest) + rescaled(y, largest)};
}

template <class A>
__device__ Normalizer<A> warp_joined(Normalizer<A> value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const Normalizer<A> other{__shfl_xor_sync(kFullMask, value.largest, mask),
                              __shfl_xor_sync(kFullMask, value.sum, mask)};
    value = joined(value, other);
  }
  return value;
}

// Items of a thread lie kThreads apart, so that a warp reads neighbours.
template <class P>
__device__ Normalizer<Compute<P>> normalizer_of_thread(const Chunk<P>& chunk, std::int64_t i) {
  using A = Compute<P>;
  const A nothing = -A(INFINITY);
  Normalizer<A> total{nothing, A(0)};
  for (std::int64_t begin = 0; begin < chunk.columns; begin += kItems * kThreads) {
    A logits[kItems], largest = total.largest;
    for (int item = 0; item < kItems; ++item) {
      const std::int64_t j = begin + item * kThreads + threadIdx.x;
      logits[item] = j < chunk.columns ? chunk.logit(i, j) : nothing;
      if (logits[item] > largest) largest = logits[item];
    }
    total = {largest, rescaled(total, largest)};
    const A shift = largest == nothing ? A(0) : largest;
    for (int item = 0; item < kItems; ++item) total.sum += exp(logits[item] - shift);
  }
  return total;
}

// Block i takes sample i.
template <class P>
__global__ void normalizer_kernel(Chunk<P> chunk, bool start, Compute<P>* normalizer) {
  using A = Compute<P>;
  FACELT_SHARED(A, largest, kThreadWarps);
  FACELT_SHARED(A, sums, kThreadWarps);
  const std::int64_t i = blockIdx.x;
  const Normalizer<A> own = warp_joined(normalizer_of_thread(chunk, i));
  if (lane_of_warp() == 0) {
    largest[threadIdx.x / kWarp] = own.largest;
    sums[threadIdx.x / kWarp] = own.sum;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  Normalizer<A> total{largest[0], sums[0]};
  for (int w = 1; w < kThreadWarps; ++w) total = joined(total, Normalizer<A>{largest[w], sums[w]});
  if (!start) total = joined(Normalizer<A>{normalizer[i], normalizer[chunk.batch + i]}, total);
  normalizer[i] = total.largest;
  normalizer[chunk.batch + i] = total.sum;
}

// Block (i, y) takes sample i and kItems * kThreads columns.
template <class P>
__global__ void gradient_kernel(Chunk<P> chunk, const Compute<P>* lse,
                                const Compute<P>* coefficients, P* gradient) {
  using A = Compute<P>;
  const std::int64_t i = blockIdx.x;
  const A shift = lse[i], coefficient = coefficients[i];
  const std::int64_t target = chunk.labels[i] - chunk.first_class;
  for (int item = 0; item < kItems; ++item) {
    const std::int64_t j =
        (static_cast<std::int64_t>(blockIdx.y) * kItems + item) * kThreads + threadIdx.x;
    if (j >= chunk.columns) continue;
    A value = exp(chunk.logit(i, j) - shift);
    if (j == target) value = (value - A(1)) * chunk.targets[chunk.batch + i];
    value *= coefficient * chunk.column_scale(j);
    // A row that is nearly zero has a large scale.
    if (j == target) value = within_range<P>(value);
    gradient[i * chunk.columns + j] = narrow<P>(coefficient == A(0) ? A(0) : value);
  }
}

template <class A>
struct CoefficientsTask {
  const A* grads;
  const std::int64_t* labels;
  const A* slopes;
  const A* inverse_feature_norms;
  MarginSoftmaxOptions options;
  std::int64_t batch;
  A* coefficients;
  A* weight_gain;
  A* feature_gain;
};

// The largest of a block's numbers, in every thread.
template <class A>
__device__ A block_max(A* shared, A value) {
  value = warp_max(value);
  if (lane_of_warp() == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (int w = 0; w < kThreadWarps; ++w) value = shared[w] > value ? shared[w] : value;
  __syncthreads();
  return value;
}

template <class A>
__global__ void coefficients_kernel(CoefficientsTask<A> task) {
  FACELT_SHARED(A, shared, kThreadWarps);
  A largest = 0, largest_norm = 0;
  for (std::int64_t i = threadIdx.x; i < task.batch; i += kThreads) {
    if (!takes_part(task.labels[i], task.options)) continue;
    const A size = gradient_size(task.grads[i], task.slopes[i]);
    const A inverse = task.inverse_feature_norms[i];
    if (size > largest) largest = size;
    if (inverse > A(0) && 1 / inverse > largest_norm) largest_norm = 1 / inverse;
  }
  largest = block_max(shared, largest);
  largest_norm = block_max(shared, largest_norm);
  const A unit = power_of_two_above(largest * crowding(largest_norm, task.batch, task.options));
  const A gain = static_cast<A>(task.options.scale) * unit;
  if (threadIdx.x == 0) *task.weight_gain = gain;
  for (std::int64_t i = threadIdx.x; i < task.batch; i += kThreads) {
    const LabelKind kind = label_kind(task.labels[i], 0, task.options);
    task.coefficients[i] = takes_part(task.labels[i], task.options) ? task.grads[i] / unit : A(0);
    task.feature_gain[i] = feature_gain_of(kind, gain);
  }
}

template <class P>
Chunk<P> make_chunk(const TensorView& products, const TensorView& column_scales,
                    const TensorView& labels, const TensorView& targets, std::int64_t first_class,
                    double scale) {
  using A = Compute<P>;
  const std::int64_t batch = products.size(0), columns = products.size(1);
  const int device = products.device;
  const bool scaled = column_scales.numel() > 0;
  const A* scales = pointer<const A>(column_scales, "column_scales", Scalar<A>::kType,
                                     scaled ? columns : 0, device);
  return {pointer<const P>(products, "products", Scalar<P>::kType, batch * columns, device),
          scaled ? scales : nullptr,
          pointer<const std::int64_t>(labels, "labels", ScalarType::kInt64, batch, device),
          pointer<const A>(targets, "targets", Scalar<A>::kType, 3 * batch, device),
          static_cast<A>(scale),
          first_class,
          batch,
          columns};
}

}  // namespace

void margin_softmax_targets(const TensorView& features, const TensorView& inverse_feature_norms,
                            const TensorView& weight, const TensorView& labels,
                            const TensorView& cosine_margin, const TensorView& angular_margin,
                            const MarginSoftmaxOptions& options, const TensorView& targets,
                            Execution execution) {
  const std::int64_t batch = features.size(0), dimensions = features.size(1);
  const std::int64_t rows = weight.size(0);
  const int device = features.device;
  dispatch_pair(features.dtype, weight.dtype, "features", "weight", [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    using A = Compute<T>;
    constexpr ScalarType kCompute = Scalar<A>::kType;
    const TargetTask<T, W> task{
        pointer<const T>(features, "features", Scalar<T>::kType, batch * dimensions, device),
        pointer<const A>(inverse_feature_norms, "inverse_feature_norms", kCompute, batch, device),
        pointer<const W>(weight, "weight", Scalar<W>::kType, rows * dimensions, device),
        pointer<const std::int64_t>(labels, "labels", ScalarType::kInt64, batch, device),
        pointer<const A>(cosine_margin, "cosine_margin", kCompute, batch, device),
        pointer<const A>(angular_margin, "angular_margin", kCompute, batch, device),
        options,
        batch,
        rows,
        dimensions,
        pointer<A>(targets, "targets", kCompute, 3 * batch, device)};
    launch(targets_kernel<T, W>, blocks_for(batch, kRowWarps), kRowWarps * kWarp, 0,
           stream_of(execution), task);
  });
}

void margin_softmax_normalizer(const TensorView& products, const TensorView& column_scales,
                               const TensorView& labels, const TensorView& targets,
                               std::int64_t first_class, double scale, bool start,
                               const TensorView& normalizer, Execution execution) {
  const std::int64_t batch = products.size(0);
  if (batch == 0) return;
  dispatch_floating(products.dtype, "products", [&](auto zero) {
    using P = decltype(zero);
    using A = Compute<P>;
    const Chunk<P> chunk =
        make_chunk<P>(products, column_scales, labels, targets, first_class, scale);
    launch(normalizer_kernel<P>, blocks_for(batch, 1), kThreads, 0, stream_of(execution), chunk,
           start,
           pointer<A>(normalizer, "normalizer", Scalar<A>::kType, 2 * batch, products.device));
  });
}

void margin_softmax_coefficients(const TensorView& grad_losses, const TensorView& labels,
                                 const TensorView& targets, const TensorView& inverse_feature_norms,
                                 const MarginSoftmaxOptions& options,
                                 const TensorView& coefficients, const TensorView& weight_gain,
                                 const TensorView& feature_gain, Execution execution) {
  const std::int64_t batch = grad_losses.numel();
  const int device = grad_losses.device;
  dispatch_floating(grad_losses.dtype, "grad_losses", [&](auto zero) {
    using A = Compute<decltype(zero)>;
    constexpr ScalarType kType = Scalar<A>::kType;
    const CoefficientsTask<A> task{
        pointer<const A>(grad_losses, "grad_losses", kType, batch, device),
        pointer<const std::int64_t>(labels, "labels", ScalarType::kInt64, batch, device),
        pointer<const A>(targets, "targets", kType, 3 * batch, device) + batch,
        pointer<const A>(inverse_feature_norms, "inverse_feature_norms", kType, batch, device),
        options,
        batch,
        pointer<A>(coefficients, "coefficients", kType, batch, device),
        pointer<A>(weight_gain, "weight_gain", kType, 1, device),
        pointer<A>(feature_gain, "feature_gain", kType, batch, device)};
    launch(coefficients_kernel<A>, 1, kThreads, 0, stream_of(execution), task);
  });
}

void margin_softmax_gradient(const TensorView& products, const TensorView& column_scales,
                             const TensorView& labels, const TensorView& targets,
                             const TensorView& lse, const TensorView& coefficients,
                             std::int64_t first_class, double scale, const TensorView& gradient,
                             Execution execution) {
  const std::int64_t batch = products.size(0), columns = products.size(1);
  const int device = products.device;
  if (batch == 0) return;
  dispatch_floating(products.dtype, "products", [&](auto zero) {
    using P = decltype(zero);
    using A = Compute<P>;
    const Chunk<P> chunk =
        make_chunk<P>(products, column_scales, labels, targets, first_class, scale);
    const dim3 grid(blocks_for(batch, 1), blocks_for(columns, kItems * kThreads));
    launch(gradient_kernel<P>, grid, kThreads, 0, stream_of(execution), chunk,
           pointer<const A>(lse, "lse", Scalar<A>::kType, batch, device),
           pointer<const A>(coefficients, "coefficients", Scalar<A>::kType, batch, device),
           pointer<P>(gradient, "gradient", Scalar<P>::kType, batch * columns, device));
  });
}

}  // namespace facelt::FACELT_CUDA_NAMESPACE
