// CUDA's language for kernels that are compiled as C++ and run on the CPU: a block's threads are
// fibers of the launching host thread. A broken rule is an Error, thrown from launch.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>

#include "schedule.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

// The names that CUDA has at global scope are brought there at the end of this header; living in
// another namespace they are other symbols than those of the CUDA build in the same module.
namespace facelt::emulation::language {

#define FACELT_EMULATION_VECTORS(name, type)                       \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };         \
  struct alignas(16) name##4 { type x, y, z, w; };                 \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
FACELT_EMULATION_VECTORS(float, float)
FACELT_EMULATION_VECTORS(double, double)
FACELT_EMULATION_VECTORS(int, int)
FACELT_EMULATION_VECTORS(uint, unsigned)
FACELT_EMULATION_VECTORS(longlong, long long)
FACELT_EMULATION_VECTORS(ulonglong, unsigned long long)
#undef FACELT_EMULATION_VECTORS

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

}  // namespace facelt::emulation::language

namespace facelt::emulation {

using language::dim3;
using language::uint3;

struct Site {
  const char* file;
  int line;
  /// As a default argument: the place of the outermost call.
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

struct SharedSite {
  const char* name;
  Site site;
};

/// What the running thread knows of itself.
struct Coordinates {
  uint3 thread, block;
  dim3 block_size, grid_size;
  int warp_size, lane;
};
inline thread_local Coordinates running_thread{};
inline const Coordinates& coordinates() { return running_thread; }

struct Launch {
  dim3 grid, block;
  std::size_t dynamic_bytes;
  Site site;
  std::uintptr_t kernel;
  void (*run_thread)(const void* call);
  const void* call;
};
void run_grid(const Launch& launch);
void raise_dynamic_limit(std::uintptr_t kernel, std::size_t bytes, Site site);

/// Throws an Error that names the place, and the running thread and its launch if there is one.
[[noreturn]] void fail(Site site, const char* what);

/// Waits for all threads of the block; returns how many of them came with `predicate` true.
int join_block(const char* kind, bool predicate, Site site);
/// Waits for all lanes of the warp; returns what each brought, valid until this lane's next join.
const std::uint64_t* join_warp(const char* kind, unsigned mask, std::uint64_t value, Site site);
void* shared_array(const SharedSite& site, std::size_t bytes, std::size_t alignment);
void* dynamic_shared_array(const SharedSite& site);

// `static` gives each instantiation a site of its own; its address is the array's identity.
#define FACELT_SHARED(type, name, count)                                                     \
  static_assert(std::is_trivially_default_constructible_v<type>);                            \
  static constexpr ::facelt::emulation::SharedSite name##_site{#name, {__FILE__, __LINE__}}; \
  type(&name)[count] = *static_cast<type(*)[count]>(                                         \
      ::facelt::emulation::shared_array(name##_site, sizeof(type[count]), alignof(type)))

#define FACELT_DYNAMIC_SHARED(type, name)                                                    \
  static constexpr ::facelt::emulation::SharedSite name##_site{#name, {__FILE__, __LINE__}}; \
  type* name = static_cast<type*>(::facelt::emulation::dynamic_shared_array(name##_site))

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarpSize = 32;

template <class T>
std::uint64_t to_bits(T value) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T from_bits(std::uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

/// `source` outside the warp means the lane itself.
template <class T>
T shuffle(const char* kind, unsigned mask, T value, int source, int width, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "CUDA shuffles numbers of 4 or 8 bytes");
  if (width != kWarpSize) fail(site, "a shuffle within less than the warp is not emulated");
  const std::uint64_t* values = join_warp(kind, mask, to_bits(value), site);
  const bool inside = source >= 0 && source < kWarpSize;
  return from_bits<T>(values[inside ? source : coordinates().lane]);
}

template <class T, class Combine>
T reduce(const char* kind, unsigned mask, T value, Combine combine, Site site) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  const std::uint64_t* values = join_warp(kind, mask, to_bits(value), site);
  T total = from_bits<T>(values[0]);
  for (int lane = 1; lane < kWarpSize; ++lane) total = combine(total, from_bits<T>(values[lane]));
  return total;
}

inline unsigned ballot(const char* kind, unsigned mask, bool predicate, Site site) {
  const std::uint64_t* values = join_warp(kind, mask, predicate, site);
  unsigned bits = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) bits |= unsigned(values[lane]) << lane;
  return bits;
}

template <class T>
struct Identity {
  using type = T;
};
/// Keeps a parameter out of the deduction of T.
template <class T>
using Same = typename Identity<T>::type;

template <class T>
constexpr void check_atomic() {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> ||
                    std::is_same_v<T, unsigned long long>,
                "atomics are for int, unsigned and unsigned long long: those on floats give "
                "results that depend on the order of the threads");
}

/// Atomic because other host threads may run kernels on the same memory.
template <class T, class Combine>
T update(T* address, Combine combine) {
  check_atomic<T>();
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &old, combine(old), false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  return old;
}

template <class V>
void check_vector_access(const void* address, Site site) {
  if (reinterpret_cast<std::uintptr_t>(address) % alignof(V) != 0) {
    fail(site, "misaligned vector access");
  }
}

}  // namespace facelt::emulation

#define threadIdx (::facelt::emulation::coordinates().thread)
#define blockIdx (::facelt::emulation::coordinates().block)
#define blockDim (::facelt::emulation::coordinates().block_size)
#define gridDim (::facelt::emulation::coordinates().grid_size)
#define warpSize (::facelt::emulation::coordinates().warp_size)

namespace facelt::emulation::language {

inline void __syncthreads(Site site = Site::here()) { join_block("__syncthreads", false, site); }
inline int __syncthreads_count(int predicate, Site site = Site::here()) {
  return join_block("__syncthreads_count", predicate != 0, site);
}
inline int __syncthreads_or(int predicate, Site site = Site::here()) {
  return join_block("__syncthreads_or", predicate != 0, site) != 0;
}
inline int __syncthreads_and(int predicate, Site site = Site::here()) {
  return join_block("__syncthreads_and", predicate == 0, site) == 0;
}

inline void __syncwarp(unsigned mask = kFullMask, Site site = Site::here()) {
  join_warp("__syncwarp", mask, 0, site);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = kWarpSize, Site site = Site::here()) {
  const int source = lane & (kWarpSize - 1);
  return shuffle("__shfl_sync", mask, value, source, width, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = kWarpSize,
                  Site site = Site::here()) {
  const int source = coordinates().lane ^ lane_mask;
  return shuffle("__shfl_xor_sync", mask, value, source, width, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = kWarpSize,
                 Site site = Site::here()) {
  const int source = coordinates().lane - static_cast<int>(delta);
  return shuffle("__shfl_up_sync", mask, value, source, width, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = kWarpSize,
                   Site site = Site::here()) {
  const int source = coordinates().lane + static_cast<int>(delta);
  return shuffle("__shfl_down_sync", mask, value, source, width, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, Site site = Site::here()) {
  return ballot("__ballot_sync", mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, Site site = Site::here()) {
  return ballot("__any_sync", mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, Site site = Site::here()) {
  return ballot("__all_sync", mask, predicate == 0, site) == 0;
}

template <class T>
T __reduce_add_sync(unsigned mask, T value, Site site = Site::here()) {
  const auto wrapping_add = [](T a, T b) { return T(unsigned(a) + unsigned(b)); };
  return reduce("__reduce_add_sync", mask, value, wrapping_add, site);
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, Site site = Site::here()) {
  const auto smaller = [](T a, T b) { return b < a ? b : a; };
  return reduce("__reduce_min_sync", mask, value, smaller, site);
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, Site site = Site::here()) {
  const auto larger = [](T a, T b) { return a < b ? b : a; };
  return reduce("__reduce_max_sync", mask, value, larger, site);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, Site site = Site::here()) {
  const auto either = [](unsigned a, unsigned b) { return a | b; };
  return reduce("__reduce_or_sync", mask, value, either, site);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, Site site = Site::here()) {
  const auto both = [](unsigned a, unsigned b) { return a & b; };
  return reduce("__reduce_and_sync", mask, value, both, site);
}

template <class T>
T atomicAdd(T* address, Same<T> value) {
  check_atomic<T>();
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicMax(T* address, Same<T> value) {
  return update(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* address, Same<T> value) {
  return update(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicOr(T* address, Same<T> value) {
  return update(address, [=](T old) { return old | value; });
}
template <class T>
T atomicExch(T* address, Same<T> value) {
  return update(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, Same<T> expected, Same<T> value) {
  return update(address, [=](T old) { return old == expected ? value : old; });
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <class T>
T __ldg(const T* address) {
  return *address;
}

}  // namespace facelt::emulation::language

using namespace facelt::emulation::language;

namespace facelt {

using stream_t = void*;

// Other symbols than those of the CUDA build.
inline namespace emulated_launch {

/// Made from a stream, which means nothing here; tells where the launch stands.
struct LaunchStream {
  emulation::Site site;
  LaunchStream(stream_t, emulation::Site site = emulation::Site::here()) : site(site) {}
};

/// Runs the grid and returns when it has ended.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared_bytes,
            LaunchStream stream, A&&... args) {
  static_assert(sizeof...(P) == sizeof...(A), "the kernel takes another number of arguments");
  const std::tuple<P...> parameters(std::forward<A>(args)...);
  const auto call = [&] { std::apply(kernel, parameters); };
  emulation::run_grid({grid, block, shared_bytes, stream.site,
                       reinterpret_cast<std::uintptr_t>(kernel),
                       [](const void* c) { (*static_cast<decltype(&call)>(c))(); }, &call});
}

/// Allows launches of this kernel `bytes` of dynamic shared memory, above the limit for all.
template <class... P>
void allow_dynamic_shared(void (*kernel)(P...), std::size_t bytes,
                          emulation::Site site = emulation::Site::here()) {
  emulation::raise_dynamic_limit(reinterpret_cast<std::uintptr_t>(kernel), bytes, site);
}

/// Reads sizeof(V) bytes at once; as in CUDA, the address must be aligned to them.
template <class V, class T>
V load_vector(const T* address, emulation::Site site = emulation::Site::here()) {
  static_assert(std::is_trivially_copyable_v<V> && sizeof(V) % sizeof(T) == 0);
  emulation::check_vector_access<V>(address, site);
  V value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

template <class V, class T>
void store_vector(T* address, V value, emulation::Site site = emulation::Site::here()) {
  static_assert(std::is_trivially_copyable_v<V> && sizeof(V) % sizeof(T) == 0);
  emulation::check_vector_access<V>(address, site);
  std::memcpy(address, &value, sizeof value);
}

inline float power_of_2(float x) {
  const float result = std::exp2(x);
  return result < std::numeric_limits<float>::min() ? 0.0f : result;
}
inline double power_of_2(double x) { return std::exp2(x); }

}  // namespace emulated_launch
}  // namespace facelt
