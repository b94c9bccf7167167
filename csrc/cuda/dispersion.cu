#include "../dispersion.h"

#include "row_reductions.cuh"

namespace facelt::FACELT_CUDA_NAMESPACE {

namespace {

#if defined(FACELT_EMULATION)
constexpr int kWarps = 2;
constexpr int kColumns = 1;
#else
constexpr int kWarps = 8;
constexpr int kColumns = 16;  // that a lane adds up at a time
#endif
constexpr int kThreads = kWarps * kWarp;

// A batch against the members of its super classes.
template <class W>
struct Tails {
  using A = Compute<W>;
  std::int64_t batch, dimensions, heads, rows;
  const A* features;
  const W* weight;
  const std::int64_t* labels;
  const std::int64_t* order;
  const std::int64_t* offsets;

  // Of one warp, known to every lane.
  template <class T>
  __device__ A dot(std::int64_t i, const T* row) const {
    A sum = 0;
    for (std::int64_t d = lane_of_warp(); d < dimensions; d += kWarp) {
      sum += features[i * dimensions + d] * widen(row[d]);
    }
    return warp_sum(sum);
  }

  __device__ const W* row(std::int64_t tail) const { return weight + tail * dimensions; }

  // The probability of member `tail` for sample i, less 1 if it is the sample's own class.
  __device__ A residual(std::int64_t i, std::int64_t tail, A lse) const {
    const A probability = exp(dot(i, row(tail)) - lse);
    return labels[i] == heads + tail ? probability - A(1) : probability;
  }
};

// log of a sum of exponentials that come one by one.
template <class A>
struct LogSum {
  A largest = -A(INFINITY);
  A sum = 0;

  __device__ void add(A other_largest, A other_sum) {
    if (other_largest > largest) {
      sum = sum * exp(largest - other_largest) + other_sum;
      largest = other_largest;
    } else {
      sum += other_largest == largest ? other_sum : other_sum * exp(other_largest - largest);
    }
  }
};

template <class W>
struct TargetTask {
  using A = Compute<W>;
  Tails<W> tails;
  const W* head_weight;
  const std::int64_t* super_class;
  std::int64_t ignore_index;
  std::int64_t* classes;
  A* targets;
};

// Block i takes sample i; its warps take the members in turn, of which one meets the own class.
template <class W>
__global__ void targets_kernel(TargetTask<W> task) {
  using A = Compute<W>;
  FACELT_SHARED(A, largest, kWarps);
  FACELT_SHARED(A, sums, kWarps);
  FACELT_SHARED(A, own_logit, 1);
  const Tails<W>& tails = task.tails;
  const std::int64_t i = blockIdx.x;
  const int warp = threadIdx.x / kWarp;
  const std::int64_t label = tails.labels[i];
  const std::int64_t coarse =
      coarse_class(label, tails.heads, tails.rows, task.super_class, task.ignore_index);
  const bool is_tail = coarse >= tails.heads;
  LogSum<A> total;
  if (threadIdx.x == 0) *own_logit = coarse == kInvalidClass ? A(NAN) : A(0);
  __syncthreads();
  if (is_tail) {
    const std::int64_t s = coarse - tails.heads;
    for (std::int64_t p = tails.offsets[s] + warp; p < tails.offsets[s + 1]; p += kWarps) {
      const std::int64_t tail = tails.order[p];
      const A logit = tails.dot(i, tails.row(tail));
      total.add(logit, A(1));
      if (label == tails.heads + tail && lane_of_warp() == 0) *own_logit = logit;
    }
  } else if (coarse >= 0 && warp == 0) {
    const A logit = tails.dot(i, task.head_weight + coarse * tails.dimensions);
    if (lane_of_warp() == 0) *own_logit = logit;
  }
  if (lane_of_warp() == 0) {
    largest[warp] = total.largest;
    sums[warp] = total.sum;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w) total.add(largest[w], sums[w]);
  task.classes[i] = coarse;
  task.targets[i] = is_tail ? total.largest + log(total.sum) : *own_logit;
  task.targets[tails.batch + i] = is_tail ? A(0) : A(1);
  task.targets[2 * tails.batch + i] = *own_logit;
}

// Block i takes sample i: its warps reckon a member's residual each, then all add up columns.
template <class W>
__global__ void feature_gradient_kernel(Tails<W> tails, const std::int64_t* classes,
                                        const Compute<W>* lse, const Compute<W>* coefficients,
                                        Compute<W>* raw_features) {
  using A = Compute<W>;
  FACELT_SHARED(A, residuals, kWarps);
  const std::int64_t i = blockIdx.x;
  const int warp = threadIdx.x / kWarp;
  const std::int64_t s = classes[i] - tails.heads;
  const A coefficient = coefficients[i];
  const bool active = s >= 0 && coefficient != A(0);
  const std::int64_t begin = active ? tails.offsets[s] : 0;
  const std::int64_t end = active ? tails.offsets[s + 1] : 0;
  for (std::int64_t tile = begin; tile < end; tile += kWarps) {
    const std::int64_t p = tile + warp;
    const A residual = p < end ? tails.residual(i, tails.order[p], lse[i]) : A(0);
    if (lane_of_warp() == 0) residuals[warp] = coefficient * residual;
    __syncthreads();
    const int members = static_cast<int>(lesser(kWarps, end - tile));
    for (std::int64_t d = threadIdx.x; d < tails.dimensions; d += kThreads) {
      A sum = 0;
      for (int m = 0; m < members; ++m) {
        sum += residuals[m] * widen(tails.row(tails.order[tile + m])[d]);
      }
      raw_features[i * tails.dimensions + d] += sum;
    }
    __syncthreads();
  }
}

template <class P, class W>
struct TailGradientTask {
  using A = Compute<W>;
  Tails<W> tails;
  const P* raw;
  const A* gain;
  const std::int64_t* sample_order;
  const std::int64_t* sample_offsets;
  const A* lse;
  const A* coefficients;
  std::int64_t first;
  W* grad_tail;
};

// kWarp * kColumns columns of one member's gradient, by one warp.
template <class P, class W>
__device__ void write_member(const TailGradientTask<P, W>& task, std::int64_t s, std::int64_t tail,
                             std::int64_t begin) {
  using A = Compute<W>;
  const Tails<W>& tails = task.tails;
  const std::int64_t dimensions = tails.dimensions;
  const A gain = *task.gain;
  const A members = static_cast<A>(tails.offsets[s + 1] - tails.offsets[s]);
  const P* raw = task.raw + (s - task.first) * dimensions;
  A sums[kColumns];
  for (int c = 0; c < kColumns; ++c) {
    const std::int64_t d = begin + c * kWarp + lane_of_warp();
    sums[c] = d < dimensions ? gain * widen(raw[d]) / members : A(0);
  }
  for (std::int64_t b = task.sample_offsets[s]; b < task.sample_offsets[s + 1]; ++b) {
    const std::int64_t i = task.sample_order[b];
    const A coefficient = task.coefficients[i];
    if (coefficient == A(0)) continue;
    const A factor = gain * coefficient * tails.residual(i, tail, task.lse[i]);
    for (int c = 0; c < kColumns; ++c) {
      const std::int64_t d = begin + c * kWarp + lane_of_warp();
      if (d < dimensions) sums[c] += factor * tails.features[i * dimensions + d];
    }
  }
  for (int c = 0; c < kColumns; ++c) {
    const std::int64_t d = begin + c * kWarp + lane_of_warp();
    if (d < dimensions) task.grad_tail[tail * dimensions + d] = narrow<W>(sums[c]);
  }
}

// Block (c, y) takes each gridDim.y-th kWarps members of super class first + c, one warp a member.
template <class P, class W>
__global__ void tail_gradient_kernel(TailGradientTask<P, W> task) {
  const Tails<W>& tails = task.tails;
  const std::int64_t s = task.first + blockIdx.x;
  const std::int64_t own = static_cast<std::int64_t>(blockIdx.y) * kWarps + threadIdx.x / kWarp;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.y) * kWarps;
  for (std::int64_t p = tails.offsets[s] + own; p < tails.offsets[s + 1]; p += stride) {
    for (std::int64_t begin = 0; begin < tails.dimensions; begin += kWarp * kColumns) {
      write_member(task, s, tails.order[p], begin);
    }
  }
}

template <class W>
Tails<W> make_tails(const TensorView& features, const TensorView& tail_weight,
                    const TensorView& labels, const TensorView& order, const TensorView& offsets,
                    std::int64_t num_head) {
  using A = Compute<W>;
  constexpr ScalarType kIndex = ScalarType::kInt64;
  const std::int64_t batch = features.size(0), dimensions = features.size(1);
  const std::int64_t rows = tail_weight.size(0);
  const int device = features.device;
  return {batch,
          dimensions,
          num_head,
          rows,
          pointer<const A>(features, "features", Scalar<A>::kType, batch * dimensions, device),
          pointer<const W>(tail_weight, "tail_weight", Scalar<W>::kType, rows * dimensions, device),
          pointer<const std::int64_t>(labels, "labels", kIndex, batch, device),
          pointer<const std::int64_t>(order, "order", kIndex, rows, device),
          pointer<const std::int64_t>(offsets, "offsets", kIndex, offsets.numel(), device)};
}

}  // namespace

void dispersion_targets(const TensorView& features, const TensorView& head_weight,
                        const TensorView& tail_weight, const TensorView& labels,
                        const TensorView& super_class, const TensorView& order,
                        const TensorView& offsets, std::int64_t ignore_index,
                        const TensorView& classes, const TensorView& targets, Execution execution) {
  constexpr ScalarType kIndex = ScalarType::kInt64;
  const std::int64_t batch = features.size(0), heads = head_weight.size(0);
  const int device = features.device;
  if (batch == 0) return;
  dispatch_floating(tail_weight.dtype, "tail_weight", [&](auto zero) {
    using W = decltype(zero);
    using A = Compute<W>;
    const Tails<W> tails = make_tails<W>(features, tail_weight, labels, order, offsets, heads);
    const TargetTask<W> task{
        tails,
        pointer<const W>(head_weight, "head_weight", Scalar<W>::kType, heads * tails.dimensions,
                         device),
        pointer<const std::int64_t>(super_class, "super_class", kIndex, tails.rows, device),
        ignore_index,
        pointer<std::int64_t>(classes, "classes", kIndex, batch, device),
        pointer<A>(targets, "targets", Scalar<A>::kType, 3 * batch, device)};
    launch(targets_kernel<W>, blocks_for(batch, 1), kThreads, 0, stream_of(execution), task);
  });
}

void dispersion_feature_gradient(const TensorView& features, const TensorView& tail_weight,
                                 const TensorView& labels, const TensorView& classes,
                                 const TensorView& order, const TensorView& offsets,
                                 const TensorView& lse, const TensorView& coefficients,
                                 std::int64_t num_head, const TensorView& raw_features,
                                 Execution execution) {
  const std::int64_t batch = features.size(0);
  const int device = features.device;
  if (batch == 0) return;
  dispatch_floating(tail_weight.dtype, "tail_weight", [&](auto zero) {
    using W = decltype(zero);
    using A = Compute<W>;
    constexpr ScalarType kType = Scalar<A>::kType;
    const Tails<W> tails = make_tails<W>(features, tail_weight, labels, order, offsets, num_head);
    launch(feature_gradient_kernel<W>, blocks_for(batch, 1), kThreads, 0, stream_of(execution),
           tails,
           pointer<const std::int64_t>(classes, "classes", ScalarType::kInt64, batch, device),
           pointer<const A>(lse, "lse", kType, batch, device),
           pointer<const A>(coefficients, "coefficients", kType, batch, device),
           pointer<A>(raw_features, "raw_features", kType, batch * tails.dimensions, device));
  });
}

void dispersion_tail_gradient(const TensorView& raw, const TensorView& gain,
                              const TensorView& features, const TensorView& tail_weight,
                              const TensorView& labels, const TensorView& order,
                              const TensorView& offsets, const TensorView& sample_order,
                              const TensorView& sample_offsets, const TensorView& lse,
                              const TensorView& coefficients, std::int64_t num_head,
                              std::int64_t first, const TensorView& grad_tail,
                              Execution execution) {
  constexpr ScalarType kIndex = ScalarType::kInt64;
  const std::int64_t count = raw.size(0), batch = features.size(0);
  const int device = raw.device;
  check_super_classes(first, count, offsets.numel() - 1);
  if (count == 0) return;
  dispatch_pair(raw.dtype, tail_weight.dtype, "raw", "tail_weight", [&](auto p, auto w) {
    using P = decltype(p);
    using W = decltype(w);
    using A = Compute<W>;
    constexpr ScalarType kType = Scalar<A>::kType;
    const Tails<W> tails = make_tails<W>(features, tail_weight, labels, order, offsets, num_head);
    const TailGradientTask<P, W> task{
        tails,
        pointer<const P>(raw, "raw", Scalar<P>::kType, count * tails.dimensions, device),
        pointer<const A>(gain, "gain", kType, 1, device),
        pointer<const std::int64_t>(sample_order, "sample_order", kIndex, batch, device),
        pointer<const std::int64_t>(sample_offsets, "sample_offsets", kIndex, offsets.numel(),
                                    device),
        pointer<const A>(lse, "lse", kType, batch, device),
        pointer<const A>(coefficients, "coefficients", kType, batch, device),
        first,
        pointer<W>(grad_tail, "grad_tail", Scalar<W>::kType, tails.rows * tails.dimensions,
                   device)};
    // A few super classes with many members shall fill a GPU too.
    constexpr std::int64_t kMostBlocks = 64;
    const std::int64_t mean_members = tails.rows / (offsets.numel() - 1);
    const dim3 grid(blocks_for(count, 1),
                    static_cast<unsigned>(lesser(mean_members / (2 * kWarps) + 1, kMostBlocks)));
    launch(tail_gradient_kernel<P, W>, grid, kThreads, 0, stream_of(execution), task);
  });
}

}  // namespace facelt::FACELT_CUDA_NAMESPACE
