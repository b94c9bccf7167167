#pragma once

#include "device.cuh"

namespace facelt::FACELT_CUDA_NAMESPACE {

constexpr int kGroupThreads = 256;

// starts: the class's first sorted position, at each sorted position; ignored samples come last.
// taking_part: how many are not ignored. ticket: set to 0 for a later kernel that counts its
// blocks; may be null.
void launch_rank_labels(const std::int64_t* labels, std::int64_t batch, IgnoredLabel ignored,
                        std::int64_t* order, std::int64_t* starts, std::int64_t* taking_part,
                        unsigned* ticket, stream_t stream);

struct Numbering {
  const std::int64_t* order;
  const std::int64_t* starts;
  std::int64_t batch;
  std::int64_t* segment;
  std::int64_t* offsets;  // whose last entry, at `batch`, says how many samples take part
  std::int64_t* num_classes;
};

// Numbers the classes along the sorted batch; the work of one block of at most kGroupThreads.
__device__ inline void number_segments(const Numbering& n) {
  FACELT_SHARED(std::int64_t, heads, kGroupThreads + 1);
  const int threads = blockDim.x;
  const std::int64_t taking_part = n.offsets[n.batch];
  const std::int64_t per_thread = (taking_part + threads - 1) / threads;
  const std::int64_t begin = lesser(taking_part, threadIdx.x * per_thread);
  const std::int64_t end = lesser(taking_part, begin + per_thread);
  std::int64_t count = 0;
  for (std::int64_t p = begin; p < end; ++p) count += n.starts[p] == p;
  heads[threadIdx.x + 1] = count;
  __syncthreads();
  if (threadIdx.x == 0) {
    heads[0] = 0;
    for (int t = 1; t <= threads; ++t) heads[t] += heads[t - 1];
    *n.num_classes = heads[threads];
  }
  __syncthreads();
  std::int64_t next = heads[threadIdx.x];
  for (std::int64_t p = begin; p < end; ++p) {
    if (n.starts[p] == p) n.offsets[next++] = p;
    n.segment[n.order[p]] = next - 1;
  }
  for (std::int64_t p = taking_part + threadIdx.x; p < n.batch; p += threads) {
    n.segment[n.order[p]] = -1;
  }
  for (std::int64_t s = heads[threads] + threadIdx.x; s < n.batch; s += threads) {
    n.offsets[s] = taking_part;
  }
}

}  // namespace facelt::FACELT_CUDA_NAMESPACE
