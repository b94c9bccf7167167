// Kernels for test_emulation.py: `emulation_cases NAME SCHEDULE SEED` runs one case and prints
// {"result": [...]} or {"error": "..."}. The test finds lines by their `// site: NAME`.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "emulation/runtime.h"

namespace {

using facelt::launch;
using Result = std::vector<double>;

constexpr unsigned kFull = 0xffffffffu;

// Kernels that keep the rules.

__device__ float warp_sum(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kFull, value, offset);
  return value;
}

template <int kThreads>
__device__ float block_sum(float value) {
  FACELT_SHARED(float, partial, kThreads / 32);
  value = warp_sum(value);
  if (threadIdx.x % warpSize == 0) partial[threadIdx.x / warpSize] = value;
  __syncthreads();
  float total = 0;
  for (int i = 0; i < kThreads / 32; ++i) total += partial[i];
  __syncthreads();
  return total;
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    sums(const float* __restrict__ input, float* __restrict__ output, int64_t columns) {
  float value = 0, square = 0;
  for (int64_t i = threadIdx.x; i < columns; i += kThreads) {
    const float x = __ldg(input + blockIdx.x * columns + i);
    value += x;
    square += x * x;
  }
  value = block_sum<kThreads>(value);
  square = block_sum<kThreads>(square);
  if (threadIdx.x == 0) {
    output[2 * blockIdx.x] = value;
    output[2 * blockIdx.x + 1] = square;
  }
}

Result run_sums() {
  const int rows = 5, columns = 300;
  std::vector<float> input(rows * columns), output(2 * rows);
  for (int i = 0; i < rows * columns; ++i) input[i] = 0.1f * i;
  launch(sums<128>, rows, 128, 0, nullptr, input.data(), output.data(), columns);
  return {output.begin(), output.end()};
}

template <class T>
__global__ void shuffles(T* out) {
  const int lane = threadIdx.x;
  const T value = static_cast<T>(100 + lane * 3);
  out[lane] = __shfl_sync(kFull, value, (lane + 5) % 32);
  out[32 + lane] = __shfl_xor_sync(kFull, value, 6);
  out[64 + lane] = __shfl_up_sync(kFull, value, 3);
  out[96 + lane] = __shfl_down_sync(kFull, value, 3, warpSize);
}

template <class T>
void append_shuffles(Result& result) {
  std::vector<T> out(128);
  launch(shuffles<T>, 1, 32, 0, nullptr, out.data());
  result.insert(result.end(), out.begin(), out.end());
}

Result run_shuffles() {
  Result result;
  append_shuffles<int>(result);
  append_shuffles<unsigned>(result);
  append_shuffles<int64_t>(result);
  append_shuffles<float>(result);
  append_shuffles<double>(result);
  return result;
}

__global__ void votes(double* out) {
  const int lane = threadIdx.x % 32;
  const int value = 3 * lane - 40;
  double* mine = out + 12 * threadIdx.x;
  mine[0] = __ballot_sync(kFull, lane % 3 == 0);
  mine[1] = __any_sync(kFull, lane == 7) + 10 * __any_sync(kFull, lane == 40);
  mine[2] = __all_sync(kFull, lane < 32) + 10 * __all_sync(kFull, lane != 7);
  mine[3] = __reduce_add_sync(kFull, value);
  mine[4] = __reduce_min_sync(kFull, value);
  mine[5] = __reduce_max_sync(kFull, value);
  mine[6] = __reduce_max_sync(kFull, static_cast<unsigned>(value));
  mine[7] = __reduce_or_sync(kFull, 1u << (lane / 2));
  mine[8] = __reduce_and_sync(kFull, ~(1u << (lane / 2)));
  mine[9] = 0;
  for (int round = 0; round < 3; ++round) {
    mine[9] = 1000 * mine[9] + __syncthreads_count(int(threadIdx.x) < 10 * round);
  }
  mine[10] = __syncthreads_or(threadIdx.x == 33) + 10 * __syncthreads_or(threadIdx.x == 64);
  mine[11] = __syncthreads_and(threadIdx.x < 64) + 10 * __syncthreads_and(threadIdx.x != 33);
}

Result run_votes() {
  std::vector<double> out(12 * 64);
  launch(votes, 1, 64, 0, nullptr, out.data());
  return out;
}

__global__ void indices(int* order, int* next, int* ids) {
  const dim3 place(threadIdx);
  const int thread = (place.z * blockDim.y + place.y) * blockDim.x + place.x;
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int id = block * blockDim.x * blockDim.y * blockDim.z + thread;
  ids[id] = id;
  order[atomicAdd(next, 1)] = id;
}

Result run_indices() {
  const int count = 3 * 2 * 2 * 4 * 4 * 2;
  std::vector<int> order(count), ids(count, -1);
  int next = 0;
  launch(indices, dim3(3, 2, 2), dim3(4, 4, 2), 0, nullptr, order.data(), &next, ids.data());
  for (int i = 0; i < count; ++i) {
    if (ids[i] != i) throw std::runtime_error("wrong indices");
  }
  return {order.begin(), order.end()};
}

__global__ void atomics(int* i, unsigned* u, unsigned long long* l, int* bins) {
  const int id = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&i[0], id - 1);
  atomicMax(&i[1], id * 37 % 101 - 50);
  atomicMin(&i[2], id * 37 % 101 - 50);
  atomicOr(&i[3], 1 << (id % 20));
  atomicAdd(&u[0], 0x80000000u);
  atomicMax(&u[1], 0u - id);
  atomicMin(&u[2], id + 7u);
  atomicOr(&u[3], 1u << 31);
  atomicAdd(&l[0], 1ull << 33);
  atomicMax(&l[1], static_cast<unsigned long long>(id) << 32);
  atomicMin(&l[2], (1ull << 40) + id);
  atomicOr(&l[3], 1ull << 45);
  atomicCAS(&u[4], 1u << 31, 0u);  // never swaps
  // Here one does in the end; and each value that atomicExch takes out goes to the next thread.
  for (unsigned seen = u[4], old = ~seen; old != seen;) {
    old = seen;
    seen = atomicCAS(&u[4], old, old + id);
  }
  bins[atomicExch(&i[4], id + 1)] += 1;
  __threadfence();
}

Result run_atomics() {
  int i[5] = {0, -99, 99, 0, 0};
  unsigned u[5] = {0, 0, 99, 0, 0};
  unsigned long long l[4] = {0, 0, ~0ull, 0};
  std::vector<int> bins(65);
  launch(atomics, 2, 32, 0, nullptr, i, u, l, bins.data());
  bins[i[4]] += 1;
  Result result(i, i + 4);
  result.insert(result.end(), u, u + 5);
  result.insert(result.end(), l, l + 4);
  result.push_back(std::count(bins.begin(), bins.end(), 1));
  return result;
}

template <int kCount>
__global__ void reversed(int* out) {
  FACELT_SHARED(int, values, kCount);
  values[threadIdx.x] = kCount + threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = values[kCount - 1 - threadIdx.x] + 1000 * (sizeof values / sizeof values[0]);
}

Result run_template_shared() {
  std::vector<int> out(96);
  launch(reversed<32>, 1, 32, 0, nullptr, out.data());
  launch(reversed<64>, 1, 64, 0, nullptr, out.data() + 32);
  return {out.begin(), out.end()};
}

template <int kSite>
__device__ int* own_shared() {
  FACELT_SHARED(int, values, 4);
  return values;
}

__global__ void two_instances(int* out) {
  int* first = own_shared<1>();
  int* second = own_shared<2>();
  if (threadIdx.x == 0) {
    first[0] = 1;
    second[0] = 2;
  }
  __syncthreads();
  out[threadIdx.x] = 10 * own_shared<1>()[0] + own_shared<2>()[0];
}

Result run_two_instances() {
  std::vector<int> out(32);
  launch(two_instances, 1, 32, 0, nullptr, out.data());
  return {out.begin(), out.end()};
}

__global__ void dynamic_shared(int* out, int count) {
  FACELT_DYNAMIC_SHARED(int, values);
  FACELT_DYNAMIC_SHARED(unsigned char, bytes);
  for (int i = threadIdx.x; i < count; i += blockDim.x) values[i] = i;
  __syncthreads();
  if (threadIdx.x != 0) return;
  out[0] = values[count - 1];
  out[1] = static_cast<void*>(bytes) == static_cast<void*>(values);
  out[2] = reinterpret_cast<uintptr_t>(values) % 16;
}

Result run_dynamic(int bytes, bool allow) {
  int out[3];
  if (allow) facelt::allow_dynamic_shared(dynamic_shared, bytes);
  launch(dynamic_shared, 1, 64, bytes, nullptr, out, bytes / 4);
  return {out, out + 3};
}

__global__ void vectors(const float* in, float* out) {
  const float4 v = facelt::load_vector<float4>(in + 4 * threadIdx.x);
  facelt::store_vector(out + 4 * threadIdx.x, make_float4(v.w, v.z, v.y, v.x));
}

Result run_vectors() {
  std::vector<float> in(128), out(128);
  std::iota(in.begin(), in.end(), 0.f);
  launch(vectors, 1, 32, 0, nullptr, in.data(), out.data());
  return {out.begin(), out.end()};
}

Result run_two_host_threads() {
  const Result expected[2] = {run_sums(), run_votes()};
  bool right[2] = {true, true};
  std::atomic<int> waiting{2};
  const auto work = [&](int which) {
    for (--waiting; waiting > 0;) std::this_thread::yield();
    try {
      for (int i = 0; i < 300; ++i) {
        right[which] &= (which == 0 ? run_sums() : run_votes()) == expected[which];
      }
    } catch (...) {
      right[which] = false;
    }
  };
  std::thread first(work, 0), second(work, 1);
  first.join();
  second.join();
  return {double(right[0]), double(right[1])};
}

// Kernels that break one rule each.

__global__ void missing_barrier(int* out) {
  FACELT_SHARED(int, values, 64);
  values[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = values[(threadIdx.x + 1) % 64];
}

Result run_missing_barrier() {
  std::vector<int> out(64);
  launch(missing_barrier, 1, 64, 0, nullptr, out.data());
  return {out.begin(), out.end()};
}

__global__ void unwritten_shared(float* out) {
  FACELT_SHARED(float, numbers, 32);
  FACELT_SHARED(int, counts, 32);
  FACELT_DYNAMIC_SHARED(double, doubles);
  const int i = threadIdx.x;
  out[3 * i] = numbers[i];
  out[3 * i + 1] = counts[i];
  out[3 * i + 2] = static_cast<float>(doubles[i]);
  numbers[i] = counts[i] = 5;
  doubles[i] = 5;
}

Result run_unwritten_shared() {
  std::vector<float> out(96);
  launch(unwritten_shared, 3, 32, 256, nullptr, out.data());
  return {out.begin(), out.end()};
}

__global__ void divergent_barrier() {
  if (threadIdx.x < 32) {
    __syncthreads();  // site: divergent_barrier_a
  } else {
    __syncthreads();  // site: divergent_barrier_b
  }
}

__global__ void return_before_barrier(int count) {
  if (static_cast<int>(threadIdx.x) >= count) return;
  __syncthreads();  // site: return_before_barrier
}

__global__ void divergent_kinds() {
  if (threadIdx.x % 32 < 16) {
    __shfl_sync(kFull, 1, 0);  // site: divergent_kinds_shuffle
  }
  __syncthreads();  // site: divergent_kinds_barrier
}

__global__ void different_shuffles() {
  // clang-format off
  if (threadIdx.x % 2) __shfl_up_sync(kFull, 1, 1); else __shfl_down_sync(kFull, 1, 1);  // site: different_shuffles
  // clang-format on
}

__global__ void partial_mask() {
  if (threadIdx.x < 16) __shfl_down_sync(0x0000ffffu, 1.0f, 8);  // site: partial_mask
}

__global__ void partial_width(int* out) {
  out[threadIdx.x] = __shfl_xor_sync(kFull, 1, 8, 16);  // site: partial_width
}

__global__ void shared_overrun(int offset) {
  FACELT_SHARED(int, before, 8);
  FACELT_SHARED(int, tile, 32);  // site: shared_overrun
  before[threadIdx.x % 8] = 0;
  tile[static_cast<int>(threadIdx.x) + offset] = -1;
}

__global__ void dynamic_overrun() {
  FACELT_DYNAMIC_SHARED(float, rows);  // site: dynamic_overrun
  rows[threadIdx.x] = 0;
}

__global__ void static_limit() {
  FACELT_SHARED(double, large, 4096);
  FACELT_SHARED(double, small, 2049);  // site: static_limit
  large[threadIdx.x] = small[threadIdx.x] = 0;
}

__global__ void static_full() {
  FACELT_SHARED(double, large, 6144);
  large[threadIdx.x] = 0;
}

__global__ void static_and_dynamic() {
  FACELT_SHARED(double, large, 4096);  // site: static_and_dynamic
  large[threadIdx.x] = 0;
}

__global__ void global_overrun(float* out) { out[threadIdx.x] = 1; }

__global__ void misaligned_load(const float* in, float2* out) {
  out[threadIdx.x] = facelt::load_vector<float2>(in + 1 + threadIdx.x);  // site: misaligned_load
}

__global__ void misaligned_store(int* out) {
  facelt::store_vector(out + 2, make_int4(1, 2, 3, 4));  // site: misaligned_store
}

__global__ void misaligned_shared() {
  FACELT_SHARED(float, row, 32);
  row[threadIdx.x] = 0;
  __syncthreads();
  facelt::load_vector<float4>(row);  // site: misaligned_shared
}

__global__ void throwing() {
  __syncthreads();
  if (threadIdx.x == 40) throw std::out_of_range("thrown in device code");
  __syncthreads();
}

__global__ void nothing() {}

__global__ void launching() {
  launch(nothing, 1, 32, 0, nullptr);  // site: launching
}

Result run_shared_overrun(int offset) {
  launch(shared_overrun, 1, 32, 0, nullptr, offset);
  return {};
}

Result run_global_overrun() {
  std::vector<float> out(31);
  launch(global_overrun, 1, 32, 0, nullptr, out.data());
  return {};
}

Result run_misaligned(bool is_store) {
  alignas(16) static float numbers[64];
  alignas(16) static int integers[8];
  float2 out[32];
  if (is_store) {
    launch(misaligned_store, 1, 32, 0, nullptr, integers);
  } else {
    launch(misaligned_load, 1, 32, 0, nullptr, numbers, out);
  }
  return {};
}

Result run_empty(dim3 grid, dim3 block, size_t shared_bytes) {
  launch(nothing, grid, block, shared_bytes, nullptr);  // site: launch_limit
  return {};
}

int count_mappings() {
  std::FILE* maps = std::fopen("/proc/self/maps", "r");
  int lines = 0;
  for (int c = std::fgetc(maps); c != EOF; c = std::fgetc(maps)) lines += c == '\n';
  std::fclose(maps);
  return lines;
}

// Returns how many of the launches failed, how many mappings they added, and whether sums still
// works on the stacks that they left.
Result run_recovery() {
  const Result expected = run_sums();
  int failed = 0, mappings = 0;
  for (int i = 0; i < 200; ++i) {
    try {
      if (i % 4 == 0) launch(divergent_barrier, 1, 128, 0, nullptr);
      if (i % 4 == 1) launch(divergent_kinds, 1, 128, 0, nullptr);
      if (i % 4 == 2) launch(throwing, 1, 128, 0, nullptr);
      if (i % 4 == 3) launch(return_before_barrier, 1, 128, 0, nullptr, 70);
    } catch (const std::exception&) {
      ++failed;
    }
    if (i == 20) mappings = count_mappings();
  }
  return {double(failed), double(count_mappings() - mappings), double(run_sums() == expected)};
}

template <class... P>
std::function<Result()> once(void (*kernel)(P...), dim3 block, size_t shared_bytes, P... args) {
  return [=] {
    launch(kernel, 2, block, shared_bytes, nullptr, args...);  // site: once
    return Result();
  };
}

const std::map<std::string, std::function<Result()>> cases = {
    {"sums", run_sums},
    {"shuffles", run_shuffles},
    {"votes", run_votes},
    {"indices", run_indices},
    {"atomics", run_atomics},
    {"template_shared", run_template_shared},
    {"two_instances", run_two_instances},
    {"dynamic", [] { return run_dynamic(48 * 1024, false); }},
    {"dynamic_allowed", [] { return run_dynamic(227 * 1024, true); }},
    {"dynamic_not_allowed", [] { return run_dynamic(48 * 1024 + 4, false); }},
    {"dynamic_too_large", [] { return run_dynamic(227 * 1024 + 4, true); }},
    {"vectors", run_vectors},
    {"two_host_threads", run_two_host_threads},
    {"missing_barrier", run_missing_barrier},
    {"unwritten_shared", run_unwritten_shared},
    {"divergent_barrier", once(divergent_barrier, 64, 0)},
    {"return_before_barrier", once(return_before_barrier, 64, 0, 40)},
    {"divergent_kinds", once(divergent_kinds, 64, 0)},
    {"different_shuffles", once(different_shuffles, 32, 0)},
    {"partial_mask", once(partial_mask, 32, 0)},
    {"partial_width",
     [] {
       int out[32];
       launch(partial_width, 1, 32, 0, nullptr, out);
       return Result();
     }},
    {"shared_overrun", [] { return run_shared_overrun(1); }},
    {"shared_underrun", [] { return run_shared_overrun(-1); }},
    {"dynamic_overrun", once(dynamic_overrun, 32, 31 * 4)},
    {"static_limit", once(static_limit, 32, 0)},
    {"static_full", once(static_full, 32, 0)},
    {"static_and_dynamic", once(static_and_dynamic, 32, 16 * 1024 + 1)},
    {"global_overrun", run_global_overrun},
    {"misaligned_load", [] { return run_misaligned(false); }},
    {"misaligned_store", [] { return run_misaligned(true); }},
    {"misaligned_shared", once(misaligned_shared, 32, 0)},
    {"throwing", once(throwing, 64, 0)},
    {"launching", once(launching, 32, 0)},
    {"outside",
     [] {
       __syncthreads();  // site: outside
       return Result();
     }},
    {"recovery", run_recovery},
    {"block_33", [] { return run_empty(1, 33, 0); }},
    {"block_0", [] { return run_empty(1, dim3(32, 0), 0); }},
    {"block_1056", [] { return run_empty(1, dim3(33, 32), 0); }},
    {"block_z", [] { return run_empty(1, dim3(1, 1, 96), 0); }},
    {"grid_0", [] { return run_empty(0, 32, 0); }},
    {"grid_x", [] { return run_empty(0x80000000u, 32, 0); }},
    {"grid_y", [] { return run_empty(dim3(1, 65536), 32, 0); }},
    {"grid_z", [] { return run_empty(dim3(1, 1, 65536), 32, 0); }},
    {"largest_block", [] { return run_empty(2, dim3(8, 2, 64), 0); }},
    {"largest_grid", [] { return run_empty(dim3(1, 65535), 32, 0); }},
};

std::string json_string(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') quoted += '\\';
    quoted += c;
  }
  return quoted + "\"";
}

std::string json_list(const Result& numbers) {
  std::string list;
  for (const double number : numbers) {
    char digits[40];
    std::snprintf(digits, sizeof digits, "%s%.17g", list.empty() ? "" : ", ", number);
    list += std::isnan(number) ? (list.empty() ? "NaN" : ", NaN") : digits;
  }
  return "[" + list + "]";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  std::string answer;
  try {
    facelt::emulation::set_schedule(argv[2], std::strtoull(argv[3], nullptr, 10));
    answer = "{\"result\": " + json_list(cases.at(argv[1])()) + "}";
  } catch (const facelt::emulation::Error& error) {
    answer = "{\"error\": " + json_string(error.what()) + "}";
  } catch (const std::exception& error) {
    answer = "{\"other_error\": " + json_string(error.what()) + "}";
  }
  std::puts(answer.c_str());
}
