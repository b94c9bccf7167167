// Sums over a row of numbers by one warp, and over a block.
#pragma once

#include "device.cuh"

namespace facelt::FACELT_CUDA_NAMESPACE {

constexpr int kRowWarps = 4;  // rows of a block, one warp each

template <class V>
__device__ __forceinline__ V warp_max(V value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const V other = __shfl_xor_sync(kFullMask, value, mask);
    if (other > value) value = other;
  }
  return value;
}

// The row that this warp takes; the same for its lanes.
__device__ __forceinline__ std::int64_t row_of_warp() {
  return static_cast<std::int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarp;
}

__device__ __forceinline__ int lane_of_warp() { return threadIdx.x % kWarp; }

// 1 / |x|; 0 for zeros, NaN for what is not finite. The squares of very large and very small
// numbers leave the range of the compute type: those rows are divided by their largest number
// first.
template <class T>
__device__ Compute<T> inverse_norm(const T* x, std::int64_t n) {
  using A = Compute<T>;
  const A low = sizeof(A) == 4 ? A(1e-30) : A(1e-290);
  const A smallest = sizeof(A) == 4 ? A(1.17549435e-38) : A(2.2250738585072014e-308);
  A squares = 0;
  for (std::int64_t d = lane_of_warp(); d < n; d += kWarp) squares += widen(x[d]) * widen(x[d]);
  squares = warp_sum(squares);
  if (squares >= low && squares <= 1 / low) return 1 / square_root(squares);
  A largest = 0, poison = 0;
  for (std::int64_t d = lane_of_warp(); d < n; d += kWarp) {
    const A size = fabs(widen(x[d]));
    if (size > largest) largest = size;
    poison += size - size;
  }
  largest = warp_max(largest);
  poison = warp_sum(poison);
  if (poison != A(0)) return A(NAN);
  if (largest < smallest) return 0;
  A sum = 0;
  for (std::int64_t d = lane_of_warp(); d < n; d += kWarp) {
    const A ratio = widen(x[d]) / largest;
    sum += ratio * ratio;
  }
  return 1 / square_root(warp_sum(sum)) / largest;
}

}  // namespace facelt::FACELT_CUDA_NAMESPACE
