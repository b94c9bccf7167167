// What the last block of a grid to come does for all of them.
#pragma once

#include "device.cuh"

namespace facelt::FACELT_CUDA_NAMESPACE {

// True in the block that comes last; what the others wrote before is then visible to it.
__device__ __forceinline__ bool is_last_block(unsigned* ticket) {
  __threadfence();
  __syncthreads();
  unsigned before = 0;
  if (threadIdx.x == 0) before = atomicAdd(ticket, 1u);
  const bool last = __syncthreads_or(threadIdx.x == 0 && before == gridDim.x - 1);
  __threadfence();
  return last;
}

}  // namespace facelt::FACELT_CUDA_NAMESPACE
