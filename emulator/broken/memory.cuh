// Accesses past the end of memory, asynchronous copies, clusters.
#pragma once

#include "broken/kernels.h"
#include "tokenprune/ptx.cuh"
#include "tokenprune/warp.cuh"

namespace broken {

using namespace tokenprune;

// --- one element past the end, found by AddressSanitizer ------------------------------------------------------------

__global__ void read_dynamic(const Arguments p) {
  const float* shared = reinterpret_cast<const float*>(dynamic_shared());
  static_cast<float*>(p.out)[threadIdx.x] = shared[threadIdx.x + p.variant];
}

__global__ void write_dynamic(const Arguments p) {
  reinterpret_cast<float*>(dynamic_shared())[threadIdx.x + p.variant] = 1.0f;
}

__global__ void read_static(const Arguments p) {
  TOKENPRUNE_SHARED(float[kWarp], values);
  values[threadIdx.x] = 1.0f;
  __syncthreads();
  static_cast<float*>(p.out)[threadIdx.x] = (&values[0])[threadIdx.x + p.variant];
}

__global__ void write_static(const Arguments p) {
  TOKENPRUNE_SHARED(float[kWarp], values);
  (&values[0])[threadIdx.x + p.variant] = 1.0f;
}

__global__ void read_global(const Arguments p) {
  static_cast<float*>(p.out)[threadIdx.x] = static_cast<const float*>(p.in)[threadIdx.x + p.variant];
}

__global__ void write_global(const Arguments p) { static_cast<float*>(p.out)[threadIdx.x + p.variant] = 1.0f; }

// --- 16 bytes from an address that is no multiple of 16, found by UndefinedBehaviorSanitizer ---------------------------

__global__ void read_vector(const Arguments p) {
  if (threadIdx.x > 0) return;
  *static_cast<float*>(p.out) = reinterpret_cast<const float4*>(static_cast<const float*>(p.in) + p.variant)->x;
}

// --- asynchronous copies --------------------------------------------------------------------------------------------

// What a thread sees of two groups of copies, and of one of zeros, in memory that held something before: before any wait,
// after the first, and after both.
__global__ void copies(const Arguments p) {
  auto* shared = reinterpret_cast<uint32_t*>(dynamic_shared()) + 12 * threadIdx.x;
  const auto* in = static_cast<const uint32_t*>(p.in) + 8 * threadIdx.x;
  auto* out = static_cast<uint32_t*>(p.out) + 9 * threadIdx.x;
  for (int i = 0; i < 12; ++i) shared[i] = 5;
  cp_async_16(shared, in, true);
  cp_async_commit();
  cp_async_16(shared + 4, in + 4, true);
  cp_async_16(shared + 8, in, false);
  cp_async_commit();
  const auto look = [&](int row) {
    for (int i = 0; i < 3; ++i) out[3 * row + i] = shared[4 * i + 3];
  };
  look(0);
  cp_async_wait<1>();
  look(1);
  cp_async_wait<0>();
  look(2);
}

__global__ void copy_misaligned(const Arguments p) {
  const auto* in = static_cast<const unsigned char*>(p.in);
  if (p.variant == 0)
    cp_async_16(dynamic_shared() + 8, in, true);
  else
    cp_async_16(dynamic_shared(), in + 8, true);
}

// Of zeros, but an offset from null is no address; variant: the offset.
__global__ void copy_from_null(const Arguments p) {
  cp_async_16(dynamic_shared(), static_cast<const unsigned char*>(nullptr) + p.variant, false);
  cp_async_commit();
  cp_async_wait<0>();
}

__global__ void copy_without_wait(const Arguments p) {
  cp_async_16(dynamic_shared(), p.in, true);
  cp_async_commit();
  cp_async_wait<1>();
}

// --- clusters -------------------------------------------------------------------------------------------------------

// Every block reads what the next one of its cluster put into its dynamic and its static shared memory.
__global__ void cluster_neighbours(const Arguments p) {
  TOKENPRUNE_SHARED(uint32_t[kWarp], values);
  auto* dynamic = reinterpret_cast<uint32_t*>(dynamic_shared());
  values[threadIdx.x] = 1000 * blockIdx.x + threadIdx.x;
  dynamic[threadIdx.x] = 1000 * cluster_rank() + 100 * cluster_size() + threadIdx.x;
  cluster_sync();
  const uint32_t next = (cluster_rank() + 1) % cluster_size();
  auto* out = static_cast<uint32_t*>(p.out) + 2 * (blockIdx.x * blockDim.x + threadIdx.x);
  out[0] = *cluster_shared(&values[threadIdx.x], next);
  out[1] = cluster_shared(dynamic, next)[threadIdx.x];
  cluster_sync();
}

// 0: the rank does not exist; 1: the block has ended; 2: not shared memory; 3: not reached by the other block yet; 4: no
// barrier before; 5: none after.
__global__ void cluster_misuse(const Arguments p) {
  TOKENPRUNE_SHARED(uint32_t[kWarp], before);
  before[threadIdx.x] = 0;
  if (p.variant == 4) (void)cluster_shared(&before[0], 1 - cluster_rank());
  cluster_sync();
  if (p.variant == 5) {
    if (cluster_rank() == 0) (void)cluster_shared(&before[0], 1);
    return;
  }
  if (p.variant == 1 && cluster_rank() == 1) return;
  if (p.variant == 1) {
    __syncthreads();  // the threads of the other block end meanwhile
    __syncthreads();
    (void)cluster_shared(&before[0], 1);
  } else if (p.variant == 3) {
    if (cluster_rank() == 0) {
      TOKENPRUNE_SHARED(float[4], own);
      (void)cluster_shared(&own[0], 1);
    }
  } else {
    (void)cluster_shared(p.variant == 0 ? &before[0] : static_cast<uint32_t*>(p.out), p.variant == 0 ? 2 : 1);
  }
  cluster_sync();
}

// The first block reads the other one's memory at an address from before, when that has ended; variant 1: writes.
__global__ void cluster_access_too_late(const Arguments p) {
  TOKENPRUNE_SHARED(uint32_t[kWarp], values);
  values[threadIdx.x] = threadIdx.x;
  cluster_sync();
  uint32_t* other = cluster_shared(&values[threadIdx.x], cluster_size() - 1);
  cluster_sync();
  if (cluster_rank() != 0) return;
  if (p.variant == 1)
    *other = 7;
  else
    static_cast<uint32_t*>(p.out)[threadIdx.x] = *other;
}

}  // namespace broken
