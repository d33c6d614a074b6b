// What every kernel file starts from: storage types, shared memory and launching. Compiled by nvcc, and by g++ against
// the emulator's cuda_runtime.h (emulator/), so nothing here or in a kernel is specific to either.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>
#include <set>
#include <type_traits>
#include <utility>

#include "tokenprune/call_stream.h"
#include "tokenprune/limits.h"
#include "tokenprune/macros.h"

// Static shared memory: TOKENPRUNE_SHARED(float[32], partial). The emulator gives every block its own, poisoned.
#if defined(TOKENPRUNE_EMULATOR)
#define TOKENPRUNE_SHARED(type, name) \
  using name##_storage = type;        \
  name##_storage& name = ::tokenprune::emulator::static_shared<name##_storage>([] {})
#else
#define TOKENPRUNE_SHARED(type, name) \
  using name##_storage = type;        \
  __shared__ name##_storage name
#endif

namespace tokenprune {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

// The block's dynamic shared memory, 16-byte aligned; kernels carve their arrays out of it.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#if defined(TOKENPRUNE_EMULATOR)
  return emulator::dynamic_shared();
#else
  extern __shared__ __align__(16) unsigned char tokenprune_dynamic_shared[];
  return tokenprune_dynamic_shared;
#endif
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// Where and how large a launch is. `cluster` blocks of the row work together (1: no cluster). The blocks of a cooperative
// launch are all there at the same time, or it is refused: they may wait for each other (group_sync).
//
// A dependent launch may start before the one in front of it, of the same call, has ended: its threads call
// wait_for_launch_before (ptx.cuh) before they read what earlier launches write, or write what those read or write.
// Dependent is every launch but the first of its call (CallStream) and cooperative ones: no documentation says whether a
// launch may be both, and these take far longer than a launch does to start.
struct Launch {
  int64_t blocks;  // as many as the work asks for, more than a grid has too: launch() refuses those
  dim3 block;
  size_t shared;
  CallStream& stream;
  unsigned cluster = 1;
  bool cooperative = false;
};

// Blocks of `kernel` may have all the dynamic shared memory of the current device from now on. The limit is one per
// kernel and device, for all threads: were it what each launch needs, the smaller launch of one thread would lower it
// under the larger one of another.
inline cudaError_t raise_shared_limit(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> raised;
  int device = 0, most = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const std::lock_guard<std::mutex> lock(mutex);
  if (raised.count({kernel, device}) != 0) return cudaSuccess;
  cudaFuncAttributes of_kernel{};
  status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&of_kernel, kernel);
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  most - static_cast<int>(of_kernel.sharedSizeBytes));
  if (status == cudaSuccess) raised.insert({kernel, device});
  return status;
}

// One kernel launch that reports its error; an empty grid is no launch, and one too large is refused here, where the number
// of blocks still has all its bits. Arguments convert to the kernel's types.
template <class... Parameters, class... Arguments>
cudaError_t launch(const Launch& where, void (*kernel)(Parameters...), Arguments... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one argument per kernel parameter");
  if (where.blocks == 0) return cudaSuccess;
  if (where.blocks < 0 || where.blocks > kMaxGridX) return cudaErrorInvalidConfiguration;
  if (where.shared > 32 * 1024) {  // a block has 48 KB unasked, for its static shared memory too
    const cudaError_t status = raise_shared_limit(reinterpret_cast<const void*>(kernel));
    if (status != cudaSuccess) return status;
  }
  cudaLaunchAttribute attributes[3] = {};
  unsigned count = 0;
  if (where.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = where.cluster;
    attributes[count].val.clusterDim.y = 1;
    attributes[count++].val.clusterDim.z = 1;
  }
  if (where.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  if (where.stream.overlap && where.stream.begun && !where.cooperative) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(where.blocks));
  config.blockDim = where.block;
  config.dynamicSmemBytes = where.shared;
  config.stream = where.stream.handle;
  config.attrs = attributes;
  config.numAttrs = count;
  where.stream.begun = true;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace tokenprune
