// The host twins of PTX and of warp functions, as functions from registers to registers: the tests know the layouts.
#pragma once

#include "broken/kernels.h"
#include "tokenprune/ptx.cuh"
#include "tokenprune/warp.cuh"

namespace broken {

using namespace tokenprune;

// Lane i reads its registers a[4], b[2], d[4] from row i of `in` and writes d[4].
template <class T>
__global__ void multiply(const Arguments p) {
  const auto* in = static_cast<const uint32_t*>(p.in) + 10 * threadIdx.x;
  const uint32_t a[4] = {in[0], in[1], in[2], in[3]}, b[2] = {in[4], in[5]};
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(in[6 + i]);
  mma_m16n8k16<T>(d, a, b);
  for (int i = 0; i < 4; ++i) static_cast<float*>(p.out)[4 * threadIdx.x + i] = d[i];
}

// 32 rows of 16 bytes are put into shared memory, row i at 48 * i bytes; variant 1 names rows off by 2 bytes.
__global__ void load_matrices(const Arguments p) {
  unsigned char* shared = dynamic_shared();
  for (int i = 0; i < 16; ++i)
    shared[48 * threadIdx.x + i] = static_cast<const unsigned char*>(p.in)[16 * threadIdx.x + i];
  __syncthreads();
  uint32_t r[4];
  ldmatrix_x4(r, shared + 48 * threadIdx.x + 2 * p.variant);
  for (int i = 0; i < 4; ++i) static_cast<uint32_t*>(p.out)[4 * threadIdx.x + i] = r[i];
}

__global__ void shuffles(const Arguments p) {
  const int lane = lane_id(), width = p.variant;
  const int value = static_cast<const int*>(p.in)[lane];
  int* out = static_cast<int*>(p.out) + 5 * lane;
  out[0] = __shfl_sync(kAllLanes, value, lane * 7 + 3, width);
  out[1] = __shfl_xor_sync(kAllLanes, value, 5, width);
  out[2] = __shfl_up_sync(kAllLanes, value, 3, width);
  out[3] = __shfl_down_sync(kAllLanes, value, 3, width);
  // Halves of a warp on their way at the same time.
  out[4] = __shfl_sync(lane < 16 ? 0xFFFFu : 0xFFFF0000u, value, lane < 16 ? 2 : 30);
}

__global__ void votes(const Arguments p) {
  const int lane = lane_id();
  const auto value = static_cast<const uint32_t*>(p.in)[lane];
  auto* out = static_cast<uint32_t*>(p.out) + 13 * lane;
  out[0] = __ballot_sync(kAllLanes, value & 1);
  out[1] = __any_sync(kAllLanes, value & 2) != 0;
  out[2] = __all_sync(kAllLanes, value & 4) != 0;
  out[3] = __reduce_add_sync(kAllLanes, value);
  out[4] = __reduce_min_sync(kAllLanes, value);
  out[5] = __reduce_max_sync(kAllLanes, value);
  out[6] = __reduce_or_sync(kAllLanes, value);
  out[7] = warp_reduce(value, Sum(), 8);
  out[8] = warp_inclusive_sum(value);
  out[9] = __syncthreads_count(value & 1);
  out[10] = __syncthreads_or(value & 2) != 0;
  out[11] = __syncthreads_and(value & 4) != 0;
  out[12] = threadIdx.y * 100 + blockIdx.y * 10 + blockIdx.z;
}

}  // namespace broken
