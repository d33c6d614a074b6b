// The part of CUDA that the kernels use, for the host: keywords, vector types, intrinsics, and the runtime calls of the
// launchers. What is missing here is missing on purpose: atomics on floats, __shared__, warp functions without a mask.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <tuple>
#include <typeinfo>
#include <utility>

#include "emulator/grid.h"

#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __restrict__ __restrict
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define __grid_constant__

// Set by the scheduler whenever a thread gets its turn.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// --- vector types ----------------------------------------------------------------------------------------------------

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

// --- scalar functions ------------------------------------------------------------------------------------------------

using std::max;
using std::min;

template <class To, class From>
To tokenprune_bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &x, sizeof x);
  return result;
}
inline unsigned __float_as_uint(float x) { return tokenprune_bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return tokenprune_bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return tokenprune_bits_as<float>(x); }
inline float __int_as_float(int x) { return tokenprune_bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return tokenprune_bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return tokenprune_bits_as<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(unsigned x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __clzll(unsigned long long x) { return x == 0 ? 64 : __builtin_clzll(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __ffsll(unsigned long long x) { return __builtin_ffsll(static_cast<long long>(x)); }
inline float __fmul_rn(float a, float b) { return a * b; }  // compiled with -ffp-contract=off
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
// Of what was there before the first launch of a call: the compiler may move it in front of wait_for_launch_before.
template <class T>
T __ldg(const T* p) {
  return *p;
}

// --- barriers and collectives ----------------------------------------------------------------------------------------

inline void __syncthreads() { ::tokenprune::emulator::block_barrier(0); }
inline int __syncthreads_count(int p) { return ::tokenprune::emulator::block_barrier(p != 0); }
inline int __syncthreads_or(int p) { return ::tokenprune::emulator::block_barrier(p != 0) != 0; }
inline int __syncthreads_and(int p) { return ::tokenprune::emulator::block_barrier(p == 0) == 0; }
inline void __threadfence() {}
inline void __threadfence_block() {}

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
  ::tokenprune::emulator::warp_collective("__syncwarp", mask, nullptr, [](void* const*, uint32_t) {});
}

namespace tokenprune::emulator {

template <class T>
struct ShuffleRequest {
  T value, result;
  int source;  // lane to read from, already inside the group of `width` lanes
};

template <class T>
T shuffle(const char* name, uint32_t mask, T value, int source) {
  ShuffleRequest<T> mine{value, value, source};
  warp_collective(name, mask, &mine, [](void* const* requests, uint32_t lanes) {
    for (int i = 0; i < 32; ++i) {
      if (!(lanes >> i & 1)) continue;
      auto* request = static_cast<ShuffleRequest<T>*>(requests[i]);
      if (!(lanes >> request->source & 1)) throw KernelError("shuffle reads from a lane outside its mask");
      request->result = static_cast<ShuffleRequest<T>*>(requests[request->source])->value;
    }
  });
  return mine.result;
}

struct VoteRequest {
  uint64_t value;
  uint64_t result;
};

template <class Combine>
uint64_t vote(const char* name, uint32_t mask, uint64_t value, Combine) {
  VoteRequest mine{value, 0};
  warp_collective(name, mask, &mine, [](void* const* requests, uint32_t lanes) {
    const uint64_t result = Combine::of(requests, lanes);
    for (int i = 0; i < 32; ++i)
      if (lanes >> i & 1) static_cast<VoteRequest*>(requests[i])->result = result;
  });
  return mine.result;
}

inline uint64_t value_of(void* const* requests, int lane) { return static_cast<VoteRequest*>(requests[lane])->value; }

struct Ballot {
  static uint64_t of(void* const* requests, uint32_t lanes) {
    uint64_t bits = 0;
    for (int i = 0; i < 32; ++i)
      if ((lanes >> i & 1) && value_of(requests, i)) bits |= 1u << i;
    return bits;
  }
};

template <class T, class Op>
struct Fold {
  static uint64_t of(void* const* requests, uint32_t lanes) {
    bool first = true;
    T result{};
    for (int i = 0; i < 32; ++i) {
      if (!(lanes >> i & 1)) continue;
      const T value = static_cast<T>(value_of(requests, i));
      result = first ? value : Op::of(result, value);
      first = false;
    }
    return static_cast<uint64_t>(result);
  }
};

#define TOKENPRUNE_FOLD(name, expression) \
  struct name {                           \
    template <class T>                    \
    static T of(T a, T b) {               \
      return expression;                  \
    }                                     \
  }
TOKENPRUNE_FOLD(FoldAdd, a + b);
TOKENPRUNE_FOLD(FoldMin, std::min(a, b));
TOKENPRUNE_FOLD(FoldMax, std::max(a, b));
TOKENPRUNE_FOLD(FoldOr, a | b);
TOKENPRUNE_FOLD(FoldAnd, a& b);
#undef TOKENPRUNE_FOLD

}  // namespace tokenprune::emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = ::tokenprune::emulator::lane(), group = lane / width * width;
  return ::tokenprune::emulator::shuffle("__shfl_sync", mask, value, group + (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = ::tokenprune::emulator::lane(), source = lane ^ bits;
  return ::tokenprune::emulator::shuffle("__shfl_xor_sync", mask, value,
                                         source / width == lane / width ? source : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32) {
  const int lane = ::tokenprune::emulator::lane(), source = lane - delta;
  return ::tokenprune::emulator::shuffle("__shfl_up_sync", mask, value, source >= lane / width * width ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32) {
  const int lane = ::tokenprune::emulator::lane(), source = lane + delta;
  return ::tokenprune::emulator::shuffle("__shfl_down_sync", mask, value,
                                         source < (lane / width + 1) * width ? source : lane);
}
inline unsigned __ballot_sync(unsigned mask, int p) {
  return static_cast<unsigned>(
      ::tokenprune::emulator::vote("__ballot_sync", mask, p != 0, ::tokenprune::emulator::Ballot()));
}
inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, p) == mask; }
template <class T, class Op>
T tokenprune_fold(unsigned mask, T value, const char* name) {
  return static_cast<T>(
      ::tokenprune::emulator::vote(name, mask, static_cast<uint64_t>(value), ::tokenprune::emulator::Fold<T, Op>()));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned v) {
  return tokenprune_fold<unsigned, ::tokenprune::emulator::FoldAdd>(mask, v, "__reduce_add_sync");
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned v) {
  return tokenprune_fold<unsigned, ::tokenprune::emulator::FoldMin>(mask, v, "__reduce_min_sync");
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned v) {
  return tokenprune_fold<unsigned, ::tokenprune::emulator::FoldMax>(mask, v, "__reduce_max_sync");
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned v) {
  return tokenprune_fold<unsigned, ::tokenprune::emulator::FoldOr>(mask, v, "__reduce_or_sync");
}

// --- atomics on integers; fibers never interrupt each other --------------------------------------------------------

template <class T, class F>
T tokenprune_atomic(T* address, F&& f) {
  static_assert(std::is_integral_v<T>, "atomics on floats make results depend on the order of threads");
  const T before = *address;
  *address = f(before);
  return before;
}
#define TOKENPRUNE_ATOMIC(name, expression)                                    \
  template <class T>                                                           \
  T name(T* address, std::common_type_t<T> v) {                                \
    return tokenprune_atomic(address, [&](T old) -> T { return expression; }); \
  }
TOKENPRUNE_ATOMIC(atomicAdd, old + v)
TOKENPRUNE_ATOMIC(atomicSub, old - v)
TOKENPRUNE_ATOMIC(atomicMin, std::min(old, v))
TOKENPRUNE_ATOMIC(atomicMax, std::max(old, v))
TOKENPRUNE_ATOMIC(atomicOr, old | v)
TOKENPRUNE_ATOMIC(atomicAnd, old& v)
TOKENPRUNE_ATOMIC(atomicExch, (void(old), v))
#undef TOKENPRUNE_ATOMIC
template <class T>
T atomicCAS(T* address, std::common_type_t<T> compare, std::common_type_t<T> v) {
  return tokenprune_atomic(address, [&](T old) { return old == compare ? v : old; });
}

// --- the runtime -----------------------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrCooperativeLaunch,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeCooperative,
  cudaLaunchAttributeProgrammaticStreamSerialization
};
struct CUstream_st;
using cudaStream_t = CUstream_st*;

union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
  int cooperative;
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace tokenprune::emulator {

// How often a property of the device or of a kernel was asked for or set.
std::atomic<int>& query_count();
// Launches of one thread run at a time, whichever threads launch them.
std::mutex& launch_mutex();
cudaError_t check_configuration(const LaunchRecord& launch, const void* kernel);
// The limit of dynamic shared memory, of the kernel on the current device, for every thread.
void allow_shared(const void* kernel, size_t bytes);
std::string kernel_name(const void* kernel);

}  // namespace tokenprune::emulator

cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t status);
const char* cudaGetErrorString(cudaError_t status);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream);

// Tests change the device by changing the settings: every combination is a device with a number of its own. Which one is
// current is known to the thread and no query of the device.
cudaError_t cudaGetDevice(int* device);

struct cudaFuncAttributes {
  size_t sharedSizeBytes;  // 0: static shared memory shows when a kernel runs
  int ptxVersion;
};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  ++::tokenprune::emulator::query_count();
  *attributes = {0, ::tokenprune::emulator::settings().architecture};
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxPotentialClusterSize(int* blocks, Kernel*, const cudaLaunchConfig_t*) {
  ++::tokenprune::emulator::query_count();
  *blocks = ::tokenprune::emulator::settings().largest_cluster;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  ++::tokenprune::emulator::query_count();
  if (value < 0 || value > ::tokenprune::emulator::settings().shared_per_block) return cudaErrorInvalidValue;
  ::tokenprune::emulator::allow_shared(reinterpret_cast<const void*>(kernel), value);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  namespace emulator = ::tokenprune::emulator;
  if (const auto before = std::exchange(emulator::settings().before_launch, nullptr)) before();
  const std::lock_guard<std::mutex> lock(emulator::launch_mutex());
  const auto* address = reinterpret_cast<const void*>(kernel);
  emulator::LaunchRecord launch{
      emulator::kernel_name(address), config->gridDim, config->blockDim, 1, config->dynamicSmemBytes, false, false};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension)
      launch.cluster = attribute.val.clusterDim.x;
    else if (attribute.id == cudaLaunchAttributeCooperative)
      launch.cooperative = attribute.val.cooperative != 0;
    else
      launch.dependent = attribute.val.programmaticStreamSerializationAllowed != 0;
  }
  const cudaError_t status = emulator::check_configuration(launch, address);
  if (status != cudaSuccess) return status;
  const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  emulator::submit(launch, [kernel, values] { std::apply(kernel, values); });
  return cudaSuccess;
}
