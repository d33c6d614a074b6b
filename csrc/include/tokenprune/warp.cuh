// Reductions and scans of a warp and of a block, in a fixed order: the same inputs give the same bits.
#pragma once

#include "tokenprune/device.cuh"
#include "tokenprune/math.h"

namespace tokenprune {

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};
struct NanMax {
  __device__ __forceinline__ float operator()(float a, float b) const { return nan_max(a, b); }
};
struct Min {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};

__device__ __forceinline__ int lane_id() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / kWarp; }

// The reduction over `width` neighbouring lanes (a power of two), in every one of them.
template <class T, class Op>
__device__ __forceinline__ T warp_reduce(T value, Op op, int width = kWarp) {
  for (int offset = width / 2; offset > 0; offset /= 2) value = op(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}

// Lane i gets the sum of the lanes 0..i.
template <class T>
__device__ __forceinline__ T warp_inclusive_sum(T value) {
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const T below = __shfl_up_sync(kAllLanes, value, offset);
    if (lane_id() >= offset) value += below;
  }
  return value;
}

// The reduction over the whole block, in every thread. All threads call it; blockDim.x is a multiple of 32. Contains
// barriers, the first one before anything is written: it may be called repeatedly.
template <class T, class Op>
__device__ T block_reduce(T value, Op op, T identity) {
  TOKENPRUNE_SHARED(T[kWarp], partial);
  value = warp_reduce(value, op);
  __syncthreads();
  if (lane_id() == 0) partial[warp_id()] = value;
  __syncthreads();
  const int warps = blockDim.x / kWarp;
  return warp_reduce(lane_id() < warps ? partial[lane_id()] : identity, op);
}

// Sum of the values of all threads before this one; `total` receives the sum over the block. Same rules as
// block_reduce.
template <class T>
__device__ T block_exclusive_sum(T value, T& total) {
  TOKENPRUNE_SHARED(T[kWarp], partial);
  const T inclusive = warp_inclusive_sum(value);
  __syncthreads();
  if (lane_id() == kWarp - 1) partial[warp_id()] = inclusive;
  __syncthreads();
  const int warps = blockDim.x / kWarp;
  const T sums = warp_inclusive_sum(lane_id() < warps ? partial[lane_id()] : T(0));
  total = __shfl_sync(kAllLanes, sums, kWarp - 1);
  const T before = __shfl_sync(kAllLanes, sums, warp_id() == 0 ? 0 : warp_id() - 1);
  return (warp_id() == 0 ? T(0) : before) + inclusive - value;
}

}  // namespace tokenprune
