// Barriers that are missing, and threads that wait at the wrong one.
#pragma once

#include "broken/kernels.h"
#include "tokenprune/ptx.cuh"
#include "tokenprune/warp.cuh"

namespace broken {

using namespace tokenprune;

// The sum and then the maximum over the block, as block_reduce does it, in every thread; variant 1 leaves out the
// barrier before the partial results are read, 2 the one before they are overwritten.
template <class Op>
__device__ float reduce_in(float (&partial)[kWarp], float value, Op op, float identity, int variant) {
  value = warp_reduce(value, op);
  if (variant != 2) __syncthreads();
  if (lane_id() == 0) partial[warp_id()] = value;
  if (variant != 1) __syncthreads();
  const int warps = blockDim.x / kWarp;
  return warp_reduce(lane_id() < warps ? partial[lane_id()] : identity, op);
}

__global__ void reduce_twice(const Arguments p) {
  TOKENPRUNE_SHARED(float[kWarp], partial);
  const float value = static_cast<const float*>(p.in)[threadIdx.x];
  float* out = static_cast<float*>(p.out) + 2 * threadIdx.x;
  out[0] = reduce_in(partial, value, Sum(), 0.0f, p.variant);
  out[1] = reduce_in(partial, value, Max(), -1.0f, p.variant);
}

__global__ void library_reductions(const Arguments p) {
  const float value = static_cast<const float*>(p.in)[threadIdx.x];
  float* out = static_cast<float*>(p.out) + 4 * threadIdx.x;
  out[0] = block_reduce(value, Sum(), 0.0f);
  out[1] = block_reduce(value, Max(), -1.0f);
  out[2] = block_exclusive_sum(value, out[3]);
}

__global__ void half_at_a_barrier(const Arguments p) {
  if (static_cast<int>(threadIdx.x) < p.variant) __syncthreads();
}

__global__ void half_at_a_cluster_barrier(const Arguments) {
  if (cluster_rank() == 0) cluster_sync();
}

// Every thread adds up what the threads of all blocks wrote: [counter][a number of every block][a sum of every thread].
// Variant 1 leaves out the barrier between; in variant 2 the last block does not come to it.
__global__ void sum_over_grid(const Arguments p) {
  uint32_t *counter = static_cast<uint32_t*>(p.out), *numbers = counter + 1, *sums = numbers + gridDim.x;
  if (threadIdx.x == blockDim.x - 1) numbers[blockIdx.x] = 1u << blockIdx.x;
  if (p.variant == 2 && blockIdx.x == gridDim.x - 1) return;
  TOKENPRUNE_SHARED(uint32_t, target);
  if (threadIdx.x == 0) target = *static_cast<const uint32_t*>(p.in);
  if (p.variant != 1) group_sync(counter, target, gridDim.x);
  uint32_t sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += numbers[b];
  sums[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

__global__ void lanes_in_different_collectives(const Arguments) {
  if (lane_id() < 16)
    __syncwarp();
  else
    (void)__ballot_sync(kAllLanes, 1);
}

__global__ void lanes_with_different_masks(const Arguments) { __syncwarp(lane_id() < 16 ? kAllLanes : 0xFFFFFF00u); }

__global__ void mask_without_its_lane(const Arguments) { __syncwarp(0xFFFFu); }

__global__ void shuffle_from_outside(const Arguments) {
  if (lane_id() < 16) (void)__shfl_sync(0xFFFFu, 1, 20);
}

__global__ void ends_in_a_collective(const Arguments) {
  if (lane_id() < 31) __syncwarp();
}

__global__ void one_thread_throws(const Arguments p) {
  volatile unsigned char stack[4096];
  for (volatile unsigned char& byte : stack) byte = static_cast<unsigned char>(threadIdx.x);
  __syncthreads();
  if (static_cast<int>(threadIdx.x) == p.variant) throw emulator::KernelError("thrown on purpose");
  __syncthreads();
  if (stack[17] != static_cast<unsigned char>(threadIdx.x)) throw emulator::KernelError("a stack is not what it was");
  static_cast<int*>(p.out)[threadIdx.x] = static_cast<int>(threadIdx.x);
}

}  // namespace broken
