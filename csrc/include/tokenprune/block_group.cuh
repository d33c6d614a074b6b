// Groups of blocks of a cooperative launch.
#pragma once

#include "tokenprune/ptx.cuh"

namespace tokenprune {

// The blocks that work on the same samples: blockIdx.x, blockIdx.x + groups, ... The samples are the same numbers. In
// shared memory, where it takes no registers meanwhile.
struct BlockGroup {
  uint32_t index, rank, size, target;
  uint32_t* counter;

  // All threads call it. `counters` are zeros, one for each of the groups, and of this launch alone.
  __device__ __forceinline__ void form(uint32_t* counters, uint32_t groups) {
    if (threadIdx.x == 0) {
      index = blockIdx.x % groups;
      rank = blockIdx.x / groups;
      size = gridDim.x / groups;
      target = 0;
      counter = counters + index;
    }
    __syncthreads();
  }
  __device__ __forceinline__ void sync() { group_sync(counter, target, size); }
};

}  // namespace tokenprune
