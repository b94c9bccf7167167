// What the kernels stand on: CUDA, or its emulation on the CPU. Kernels use nothing beyond this.
#pragma once

#if defined(FACELT_EMULATION)
#include "../emulation/runtime.h"
#define FACELT_CUDA_NAMESPACE emulated
#else
#include <cuda_runtime.h>
#define FACELT_CUDA_NAMESPACE cuda
#endif

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "../launchers.h"
#include "../scalar.h"
#include "../selection.h"

#if !defined(FACELT_EMULATION)

#define FACELT_SHARED(type, name, count) __shared__ type name[count]

namespace facelt {

using stream_t = cudaStream_t;

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, stream_t stream,
            A&&... args) {
  std::tuple<P...> parameters(std::forward<A>(args)...);
  std::apply(
      [&](auto&... parameter) {
        void* addresses[] = {static_cast<void*>(&parameter)...};
        check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, addresses,
                               shared_bytes, stream),
              "kernel launch");
      },
      parameters);
}

// Reads, or writes, sizeof(V) bytes at once; the address must be aligned to them.
template <class V, class T>
__device__ __forceinline__ V load_vector(const T* address) {
  return *reinterpret_cast<const V*>(address);
}

template <class V, class T>
__device__ __forceinline__ void store_vector(T* address, const V& value) {
  if constexpr (sizeof(V) == sizeof(int4)) {
    // The compiler makes several stores of an assignment.
    int4 words;
    memcpy(&words, &value, sizeof words);
    asm volatile(
        "st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)),
        "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
        : "memory");
  } else {
    *reinterpret_cast<V*>(address) = value;
  }
}

// 2^x; 0 where a float would be subnormal.
__device__ __forceinline__ float power_of_2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ double power_of_2(double x) { return exp2(x); }

}  // namespace facelt

#endif

namespace facelt::FACELT_CUDA_NAMESPACE {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarp = 32;

// Neighbouring numbers that are read or written at once.
template <class T, int kItems>
struct alignas(kItems * sizeof(T)) Pack {
  T items[kItems];
};

// As many as 16 bytes have.
template <class T>
constexpr int kWide = 16 / sizeof(T);

// Whether rows of so many numbers can be read in packs.
template <int kItems, class T>
bool aligned(const T* address, std::int64_t columns) {
  return columns % kItems == 0 &&
         reinterpret_cast<std::uintptr_t>(address) % (kItems * sizeof(T)) == 0;
}

inline stream_t stream_of(Execution execution) {
  return reinterpret_cast<stream_t>(execution.stream_or_threads);
}

// Grids may not be empty; kernels check their bounds, so one block too many does nothing.
inline unsigned blocks_for(std::int64_t items, std::int64_t per_block) {
  const std::int64_t blocks = (items + per_block - 1) / per_block;
  if (blocks > 0x7fffffff) throw std::invalid_argument("the batch is too large for a CUDA grid");
  return blocks > 0 ? static_cast<unsigned>(blocks) : 1u;
}

// Hands out aligned parts of a workspace. Without a base it only adds up what is needed.
class Arena {
 public:
  explicit Arena(void* base = nullptr) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(std::int64_t count) {
    const std::int64_t offset = (used_ + 15) / 16 * 16;
    used_ = offset + count * static_cast<std::int64_t>(sizeof(T));
    return base_ ? reinterpret_cast<T*>(base_ + offset) : nullptr;
  }

  std::int64_t used() const { return used_; }

 private:
  char* base_;
  std::int64_t used_ = 0;
};

inline void* workspace_pointer(const TensorView& workspace, std::int64_t needed, int device) {
  return pointer<void>(workspace, "workspace", ScalarType::kUInt8, needed, device);
}

__host__ __device__ __forceinline__ std::int64_t lesser(std::int64_t a, std::int64_t b) {
  return a < b ? a : b;
}

template <class A>
__device__ __forceinline__ Candidate<A> shuffle_xor(const Candidate<A>& value, int lane_mask) {
  return {__shfl_xor_sync(kFullMask, value.distance, lane_mask),
          static_cast<std::int64_t>(
              __shfl_xor_sync(kFullMask, static_cast<long long>(value.pair), lane_mask))};
}

// The first candidate of a warp in the order `precedes`, known to every lane.
template <class A, class Order>
__device__ __forceinline__ Candidate<A> warp_first(Candidate<A> value, Order precedes) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const Candidate<A> other = shuffle_xor(value, mask);
    if (precedes(other, value)) value = other;
  }
  return value;
}

template <class V>
__device__ __forceinline__ V warp_sum(V value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(kFullMask, value, mask);
  return value;
}

}  // namespace facelt::FACELT_CUDA_NAMESPACE
