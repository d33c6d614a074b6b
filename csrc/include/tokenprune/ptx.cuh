// The seams: every function that is PTX on the GPU and has a host twin in the emulator. Nothing else in the kernels
// contains inline assembly or depends on __CUDA_ARCH__.
#pragma once

#include "tokenprune/device.cuh"

#if defined(TOKENPRUNE_EMULATOR)
#include "emulator/ptx.h"  // the same functions for the host
#else

namespace tokenprune {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// x, in a register from here on: what is cheap to work out is otherwise worked out again by every iteration of a loop.
__device__ __forceinline__ int in_register(int x) {
  asm("" : "+r"(x));
  return x;
}

// --- tensor cores ----------------------------------------------------------------------------------------------------

// d += a * b for one m16n8k16 tile; T is __half or __nv_bfloat16, two of them per register. With group = lane / 4 and
// t = lane % 4: a[0] is A[group][2t, 2t+1], a[1] the same of row group + 8, a[2] and a[3] those 8 columns further;
// b[0] is B[2t, 2t+1][group], b[1] 8 rows further down; d[0..1] is D[group][2t, 2t+1], d[2..3] row group + 8.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Four 8x8 matrices of 16-bit elements from shared memory: lane i names the 16-byte row i % 8 of matrix i / 8. Register
// m then holds elements [lane / 4][2 (lane % 4), +1] of matrix m.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// --- arithmetic -----------------------------------------------------------------------------------------------------

// 2^x within a relative error of 2^-22; below 2^-126 it is 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// --- asynchronous copies into shared memory --------------------------------------------------------------------------

// 16 bytes, both addresses 16-byte aligned; with `valid` false the destination gets zeros and `source` is not read.
// The data is there after cp_async_wait and a barrier.
__device__ __forceinline__ void cp_async_16(void* shared, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's committed groups are still in flight.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// --- blocks of a cooperative launch ----------------------------------------------------------------------------------

// Barrier of a group of `blocks` blocks; what their threads wrote to device memory before is visible after it. `counter`
// belongs to the group; `target` is the block's, is equal to it before the first call, and nobody else's business.
__device__ __forceinline__ void group_sync(uint32_t* counter, uint32_t& target, uint32_t blocks) {
  __syncthreads();
  if (threadIdx.x == 0) {
    target += blocks;
    uint32_t seen;
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    while (static_cast<int32_t>(seen - target) < 0);
  }
  __syncthreads();
}

// --- dependent launches (Launch; compute capability 9.0) -------------------------------------------------------------

// Lets a dependent launch behind this one start, once all blocks of this one have called it or ended. It may be called
// at once: the other launch still waits.
__device__ __forceinline__ void let_next_launch_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the launches in front have ended and what they wrote can be read. Every thread of a dependent launch calls it:
// otherwise the launch could end before the one in front of it, and what comes next would not wait for that.
__device__ __forceinline__ void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// --- thread-block clusters (compute capability 9.0; elsewhere a block is its own cluster) ---------------------------

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size = 1;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
#endif
  return size;
}

// Barrier of all threads of the cluster; what they wrote to shared memory before is visible after it. The last access
// to another block's shared memory must be followed by one, before that block may end.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The address in block `rank` of what `pointer` is in this block's shared memory.
template <class T>
__device__ __forceinline__ T* cluster_shared(T* pointer, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t address;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(pointer), "r"(rank));
  return reinterpret_cast<T*>(address);
#else
  return pointer;
#endif
}

}  // namespace tokenprune

#endif
