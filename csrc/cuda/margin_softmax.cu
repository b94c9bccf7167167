#include "row_reductions.cuh"

namespace facelt::FACELT_CUDA_NAMESPACE {

namespace {

#if defined(FACELT_EMULATION)
constexpr int kThreads = 64;
#else
constexpr int kThreads = 512;
#endif
constexpr int kThreadWarps = kThreads / kWarp;
// Packs of neighbouring columns that a thread takes at a time.
template <int kItems>
constexpr int kPacks = kItems == 1 ? 4 : 2;
template <int kItems>
constexpr int kBlockColumns = kThreads * kPacks<kItems> * kItems;

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
  const A* column_scales;  // null for 1
  const std::int64_t* labels;
  const A* targets;
  A scale;
  std::int64_t first_class, batch, columns;

  // Of `items` columns from j on, the one that sample i's class has, or -1.
  __device__ int target_item(std::int64_t i, std::int64_t j, int items) const {
    const std::int64_t label = labels[i], first = first_class + j;
    return label >= first && label < first + items ? static_cast<int>(label - first) : -1;
  }
};

// Some neighbouring columns of a sample, whose logits are read as if none were its target.
template <class A, int kItems>
struct Columns {
  A logits[kItems];
  A scales[kItems];

  template <class P>
  __device__ Columns(const Chunk<P>& chunk, std::int64_t i, std::int64_t j) {
    const auto products = load_vector<Pack<P, kItems>>(chunk.products + i * chunk.columns + j);
    constexpr int kPart = kItems < kWide<A> ? kItems : kWide<A>;
    for (int first = 0; first < kItems; first += kPart) {
      Pack<A, kPart> part;
      if (chunk.column_scales) {
        part = load_vector<Pack<A, kPart>>(chunk.column_scales + j + first);
      }
      for (int item = 0; item < kPart; ++item) {
        scales[first + item] = chunk.column_scales ? part.items[item] : A(1);
      }
    }
    for (int item = 0; item < kItems; ++item) {
      logits[item] = chunk.scale * (widen(products.items[item]) * scales[item]);
    }
  }
};

// exp, by the instruction that there is. Its argument is rounded to a part of its size, which is
// small where the result is not.
template <class A>
__device__ __forceinline__ A exp_by_2(A value) {
  return power_of_2(value * static_cast<A>(1.4426950408889634074));
}

// sum of exp(logit - largest); of nothing, largest is -infinity.
template <class A>
struct Normalizer {
  A largest;
  A sum;
};

template <class A>
__device__ A rescaled(const Normalizer<A>& n, A largest) {
  return n.largest == largest ? n.sum : n.sum * exp_by_2(n.largest - largest);
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

// Packs of a thread lie kThreads apart, so that a warp reads neighbours.
template <int kItems, class P>
__device__ Normalizer<Compute<P>> normalizer_of_thread(const Chunk<P>& chunk, std::int64_t i) {
  using A = Compute<P>;
  const A nothing = -A(INFINITY);
  const A target_logit = chunk.targets[i];
  Normalizer<A> total{nothing, A(0)};
  for (std::int64_t begin = 0; begin < chunk.columns; begin += kBlockColumns<kItems>) {
    A logits[kPacks<kItems>][kItems], largest = total.largest;
    for (int pack = 0; pack < kPacks<kItems>; ++pack) {
      const std::int64_t j = begin + (pack * kThreads + static_cast<int>(threadIdx.x)) * kItems;
      for (int item = 0; item < kItems; ++item) logits[pack][item] = nothing;
      if (j < chunk.columns) {
        const Columns<A, kItems> columns(chunk, i, j);
        const int own = chunk.target_item(i, j, kItems);
        for (int item = 0; item < kItems; ++item) {
          logits[pack][item] = item == own ? target_logit : columns.logits[item];
        }
      }
      for (int item = 0; item < kItems; ++item) {
        if (logits[pack][item] > largest) largest = logits[pack][item];
      }
    }
    total = {largest, rescaled(total, largest)};
    const A shift = largest == nothing ? A(0) : largest;
    for (int pack = 0; pack < kPacks<kItems>; ++pack) {
      for (int item = 0; item < kItems; ++item) total.sum += exp_by_2(logits[pack][item] - shift);
    }
  }
  return total;
}

// Block i takes sample i.
template <int kItems, class P>
__global__ void normalizer_kernel(Chunk<P> chunk, bool start, Compute<P>* normalizer) {
  using A = Compute<P>;
  FACELT_SHARED(A, largest, kThreadWarps);
  FACELT_SHARED(A, sums, kThreadWarps);
  const std::int64_t i = blockIdx.x;
  const Normalizer<A> own = warp_joined(normalizer_of_thread<kItems>(chunk, i));
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

// The gradient by the product with the target, which has column j, within the range of P: a row
// that is nearly zero has a large scale.
template <class P>
__device__ Compute<P> target_gradient(const Chunk<P>& chunk, std::int64_t i, std::int64_t j,
                                      Compute<P> shift, Compute<P> coefficient) {
  using A = Compute<P>;
  const A scale = chunk.column_scales ? chunk.column_scales[j] : A(1);
  const A less = exp_by_2(chunk.targets[i] - shift) - A(1);
  return within_range<P>(less * chunk.targets[chunk.batch + i] * (coefficient * scale));
}

// Block (i, y) takes sample i and kBlockColumns columns. The gradient may lie where the products
// do.
template <int kItems, class P>
__global__ void gradient_kernel(Chunk<P> chunk, const Compute<P>* lse,
                                const Compute<P>* coefficients, P* gradient) {
  using A = Compute<P>;
  const std::int64_t i = blockIdx.x;
  const A shift = lse[i], coefficient = coefficients[i];
  for (int pack = 0; pack < kPacks<kItems>; ++pack) {
    const std::int64_t j = static_cast<std::int64_t>(blockIdx.y) * kBlockColumns<kItems> +
                           (pack * kThreads + static_cast<int>(threadIdx.x)) * kItems;
    if (j >= chunk.columns) return;
    const Columns<A, kItems> columns(chunk, i, j);
    const int own = chunk.target_item(i, j, kItems);
    const A own_value = own < 0 ? A(0) : target_gradient(chunk, i, j + own, shift, coefficient);
    Pack<P, kItems> result;
    for (int item = 0; item < kItems; ++item) {
      const A value = exp_by_2(columns.logits[item] - shift) * (coefficient * columns.scales[item]);
      result.items[item] = narrow<P>(coefficient == A(0) ? A(0) : item == own ? own_value : value);
    }
    store_vector(gradient + i * chunk.columns + j, result);
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

// Whether products and results can be read and written in packs.
template <class P>
bool in_packs(const Chunk<P>& chunk, const P* result) {
  using A = Compute<P>;
  return aligned<kWide<P>>(chunk.products, chunk.columns) &&
         aligned<kWide<P>>(result, chunk.columns) &&
         (!chunk.column_scales || aligned<kWide<A>>(chunk.column_scales, chunk.columns));
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
    A* result = pointer<A>(normalizer, "normalizer", Scalar<A>::kType, 2 * batch, products.device);
    const auto kernel =
        in_packs(chunk, chunk.products) ? normalizer_kernel<kWide<P>, P> : normalizer_kernel<1, P>;
    launch(kernel, blocks_for(batch, 1), kThreads, 0, stream_of(execution), chunk, start, result);
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
  if (batch == 0) return;
  dispatch_floating(products.dtype, "products", [&](auto zero) {
    using P = decltype(zero);
    using A = Compute<P>;
    const Chunk<P> chunk =
        make_chunk<P>(products, column_scales, labels, targets, first_class, scale);
    P* result =
        pointer<P>(gradient, "gradient", Scalar<P>::kType, batch * columns, products.device);
    const bool packs = in_packs(chunk, result);
    const dim3 grid(blocks_for(batch, 1),
                    blocks_for(columns, packs ? kBlockColumns<kWide<P>> : kBlockColumns<1>));
    launch(packs ? gradient_kernel<kWide<P>, P> : gradient_kernel<1, P>, grid, kThreads, 0,
           stream_of(execution), chunk,
           pointer<const A>(lse, "lse", Scalar<A>::kType, batch, products.device),
           pointer<const A>(coefficients, "coefficients", Scalar<A>::kType, batch, products.device),
           result);
  });
}

}  // namespace facelt::FACELT_CUDA_NAMESPACE
