#include "../compactness.h"

#include "row_reductions.cuh"

namespace facelt::FACELT_CUDA_NAMESPACE {

namespace {

#if defined(FACELT_EMULATION)
constexpr int kThreads = 64, kSelectionStep = 64;
#else
constexpr int kThreads = 256, kSelectionStep = 512;
#endif
constexpr int kThreadWarps = kThreads / kWarp;
constexpr int kItems = 4;  // columns that a thread looks at between two barriers
static_assert(kThreads <= kSelectionStep);

// Unsigned integers in the order of the numbers, NaN last.
__device__ unsigned long long key_of(double value) {
  if (value != value) return ~0ull;
  unsigned long long bits;
  memcpy(&bits, &value, sizeof bits);
  return bits >> 63 ? ~bits : bits | 1ull << 63;
}
__device__ unsigned key_of(float value) {
  if (value != value) return ~0u;
  const unsigned bits = detail::bits_of_float(value);
  return bits >> 31 ? ~bits : bits | 1u << 31;
}
__device__ double value_of(unsigned long long key) {
  if (key == ~0ull) return NAN;
  const unsigned long long bits = key >> 63 ? key & ~(1ull << 63) : ~key;
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
__device__ float value_of(unsigned key) {
  if (key == ~0u) return NAN;
  return detail::float_of_bits(key >> 31 ? key & ~(1u << 31) : ~key);
}

// What the block's threads hold together while it works on a row.
struct BlockCounts {
  int* warps;  // [kThreadWarps], shared
};

// How many threads before this one say yes, and how many of the block.
struct Rank {
  int before;
  int all;
};

__device__ Rank block_rank(BlockCounts counts, bool yes) {
  const unsigned votes = __ballot_sync(kFullMask, yes);
  const int lane = lane_of_warp(), warp = threadIdx.x / kWarp;
  if (lane == 0) counts.warps[warp] = __popc(votes);
  __syncthreads();
  Rank rank{__popc(votes & ((1u << lane) - 1)), 0};
  for (int w = 0; w < kThreadWarps; ++w) {
    if (w < warp) rank.before += counts.warps[w];
    rank.all += counts.warps[w];
  }
  __syncthreads();
  return rank;
}

__device__ int block_sum(BlockCounts counts, int value) {
  value = warp_sum(value);
  if (lane_of_warp() == 0) counts.warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  int sum = 0;
  for (int w = 0; w < kThreadWarps; ++w) sum += counts.warps[w];
  __syncthreads();
  return sum;
}

// The key of the k-th largest of the kept numbers, bit after bit.
template <class A>
__device__ auto kth_key(BlockCounts counts, const A* kept, std::int64_t count, std::int64_t k) {
  using Key = decltype(key_of(A(0)));
  Key prefix = 0;
  for (int bit = static_cast<int>(8 * sizeof(Key)) - 1; bit >= 0; --bit) {
    const Key candidate = prefix | static_cast<Key>(1) << bit;
    int reached = 0;
    for (std::int64_t e = threadIdx.x; e < count; e += kThreads) {
      reached += key_of(kept[e]) >= candidate;
    }
    if (block_sum(counts, reached) >= k) prefix = candidate;
  }
  return prefix;
}

// Leaves the k largest in front, in their order but for those equal to the last; returns that one.
template <class A>
__device__ A keep_largest(BlockCounts counts, A* kept, std::int64_t count, std::int64_t k) {
  __syncthreads();  // other threads may have written to `kept` just now
  const auto last = kth_key(counts, kept, count, k);
  std::int64_t left = 0;
  for (std::int64_t begin = 0; begin < count; begin += kThreads) {
    const std::int64_t e = begin + threadIdx.x;
    const A value = e < count ? kept[e] : A(0);
    const bool larger = e < count && key_of(value) > last;
    const Rank rank = block_rank(counts, larger);
    if (larger) kept[left + rank.before] = value;
    left += rank.all;
  }
  const A value = value_of(last);
  for (std::int64_t e = left + threadIdx.x; e < k; e += kThreads) kept[e] = value;
  __syncthreads();
  return value;
}

template <class P>
struct SelectTask {
  using A = Compute<P>;
  const P* products;
  const A* column_scales;
  const std::int64_t* classes;
  std::int64_t first_class, columns, k, capacity;
  bool start;
  A* kept;
  std::int64_t* counts;
  A* thresholds;
};

// Block i takes row i.
template <class P>
__global__ void select_kernel(SelectTask<P> task) {
  using A = Compute<P>;
  FACELT_SHARED(int, warps, kThreadWarps);
  const BlockCounts counts{warps};
  const std::int64_t i = blockIdx.x;
  const std::int64_t self = task.classes[i] - task.first_class;
  A* kept = task.kept + i * task.capacity;
  std::int64_t count = task.start ? 0 : task.counts[i];
  A threshold = task.start ? -A(INFINITY) : task.thresholds[i];
  for (std::int64_t begin = 0; begin < task.columns; begin += kItems * kThreads) {
    A values[kItems];
    bool wanted[kItems], any = false;
    for (int item = 0; item < kItems; ++item) {
      const std::int64_t j = begin + item * kThreads + threadIdx.x;
      const bool inside = j < task.columns && j != self;
      values[item] = inside ? widen(task.products[i * task.columns + j]) *
                                  (task.column_scales ? task.column_scales[j] : A(1))
                            : A(0);
      wanted[item] = inside && !(values[item] <= threshold);
      any |= wanted[item];
    }
    if (!__syncthreads_or(any)) continue;
    // Numbers that are indexed at run time would leave the registers.
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      if (count + kThreads > task.capacity) {
        threshold = keep_largest(counts, kept, count, task.k);
        count = task.k;
      }
      const Rank rank = block_rank(counts, wanted[item]);
      if (wanted[item]) kept[count + rank.before] = values[item];
      count += rank.all;
    }
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  task.counts[i] = count;
  task.thresholds[i] = threshold;
}

// Block i takes row i: first its k largest, then their sum in an order that is always the same.
template <class A>
__global__ void reduce_kernel(A* all_kept, const std::int64_t* all_counts, std::int64_t k,
                              std::int64_t capacity, A scale, A* compactness) {
  FACELT_SHARED(int, warps, kThreadWarps);
  FACELT_SHARED(A, partial, kThreadWarps);
  const BlockCounts counts{warps};
  const std::int64_t i = blockIdx.x;
  A* kept = all_kept + i * capacity;
  std::int64_t count = all_counts[i];
  if (count > k) {
    keep_largest(counts, kept, count, k);
    count = k;
  }
  A largest = -A(INFINITY);
  for (std::int64_t e = threadIdx.x; e < count; e += kThreads) {
    if (scale * kept[e] > largest) largest = scale * kept[e];
  }
  largest = warp_max(largest);
  if (lane_of_warp() == 0) partial[threadIdx.x / kWarp] = largest;
  __syncthreads();
  for (int w = 0; w < kThreadWarps; ++w) largest = partial[w] > largest ? partial[w] : largest;
  __syncthreads();
  A sum = 0;
  for (std::int64_t e = threadIdx.x; e < count; e += kThreads)
    sum += exp(scale * kept[e] - largest);
  sum = warp_sum(sum);
  if (lane_of_warp() == 0) partial[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kThreadWarps; ++w) sum += partial[w];
  compactness[i] = count > 0 ? largest + log(sum) : largest;
}

}  // namespace

void compactness_select(const TensorView& products, const TensorView& column_scales,
                        const TensorView& classes, std::int64_t first_class, std::int64_t k,
                        bool start, const TensorView& kept, const TensorView& counts,
                        const TensorView& thresholds, Execution execution) {
  require_ranges(k);
  const std::int64_t rows = products.size(0), columns = products.size(1);
  const std::int64_t capacity = compactness_capacity(k);
  const int device = products.device;
  const bool scaled = column_scales.numel() > 0;
  if (rows == 0) return;
  dispatch_floating(products.dtype, "products", [&](auto zero) {
    using P = decltype(zero);
    using A = Compute<P>;
    constexpr ScalarType kType = Scalar<A>::kType;
    const A* scales =
        pointer<const A>(column_scales, "column_scales", kType, scaled ? columns : 0, device);
    const SelectTask<P> task{
        pointer<const P>(products, "products", Scalar<P>::kType, rows * columns, device),
        scaled ? scales : nullptr,
        pointer<const std::int64_t>(classes, "classes", ScalarType::kInt64, rows, device),
        first_class,
        columns,
        k,
        capacity,
        start,
        pointer<A>(kept, "kept", kType, rows * capacity, device),
        pointer<std::int64_t>(counts, "counts", ScalarType::kInt64, rows, device),
        pointer<A>(thresholds, "thresholds", kType, rows, device)};
    launch(select_kernel<P>, blocks_for(rows, 1), kThreads, 0, stream_of(execution), task);
  });
}

std::int64_t compactness_capacity(std::int64_t k) { return selection_capacity(k, kSelectionStep); }

void compactness_reduce(const TensorView& kept, const TensorView& counts, std::int64_t k,
                        double scale, const TensorView& compactness, Execution execution) {
  require_ranges(k);
  const std::int64_t rows = counts.numel(), capacity = compactness_capacity(k);
  const int device = kept.device;
  if (rows == 0) return;
  dispatch_floating(kept.dtype, "kept", [&](auto zero) {
    using A = Compute<decltype(zero)>;
    constexpr ScalarType kType = Scalar<A>::kType;
    launch(reduce_kernel<A>, blocks_for(rows, 1), kThreads, 0, stream_of(execution),
           pointer<A>(kept, "kept", kType, rows * capacity, device),
           pointer<const std::int64_t>(counts, "counts", ScalarType::kInt64, rows, device), k,
           capacity, static_cast<A>(scale),
           pointer<A>(compactness, "compactness", kType, rows, device));
  });
}

}  // namespace facelt::FACELT_CUDA_NAMESPACE
