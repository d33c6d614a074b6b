// The runtime calls of the emulator's cuda_runtime.h, as strict as a GPU about launch configurations.
#include <cuda_runtime.h>
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <map>

#include "emulator/log.h"

namespace tokenprune::emulator {

namespace {

std::map<std::pair<const void*, int>, size_t> shared_limits;  // by kernel and device

std::pair<const void*, int> on_this_device(const void* kernel) {
  int device = 0;
  cudaGetDevice(&device);
  return {kernel, device};
}

}  // namespace

std::atomic<int>& query_count() {
  static std::atomic<int> count{0};
  return count;
}

std::vector<LaunchRecord>& launch_log() {
  static std::vector<LaunchRecord> log;
  return log;
}

std::mutex& launch_mutex() {
  static std::mutex mutex;
  return mutex;
}

void allow_shared(const void* kernel, size_t bytes) {
  const std::lock_guard<std::mutex> lock(launch_mutex());
  shared_limits[on_this_device(kernel)] = bytes;
}

// The demangled name without its parameter list. The dynamic symbol table knows it: the module exports its symbols.
std::string kernel_name(const void* kernel) {
  Dl_info found;
  if (dladdr(kernel, &found) == 0 || found.dli_sname == nullptr) return "unknown";
  int status = 0;
  char* plain = abi::__cxa_demangle(found.dli_sname, nullptr, nullptr, &status);
  std::string name = plain != nullptr ? plain : found.dli_sname;
  std::free(plain);
  const size_t begin = name.find("tokenprune::");
  if (begin != std::string::npos) name = name.substr(begin + 12);
  return name.substr(0, name.find('('));
}

cudaError_t check_configuration(const LaunchRecord& launch, const void* kernel) {
  Settings& now = settings();
  if (now.fail_launch > 0 && --now.fail_launch == 0) return static_cast<cudaError_t>(now.fail_status);
  const dim3 &g = launch.grid, &b = launch.block;
  const uint64_t threads = uint64_t(b.x) * b.y * b.z;
  if (g.x == 0 || g.y == 0 || g.z == 0 || threads == 0) return cudaErrorInvalidConfiguration;
  if (g.x > 2147483647u || g.y > 65535 || g.z > 65535) return cudaErrorInvalidConfiguration;
  if (threads > 1024 || b.z > 64) return cudaErrorInvalidConfiguration;
  const bool clusters = now.architecture >= 90;
  if (launch.cluster == 0 || launch.cluster > (clusters ? unsigned(now.largest_cluster) : 1) ||
      g.x % launch.cluster != 0)
    return cudaErrorInvalidConfiguration;
  if (launch.dependent && !clusters) return cudaErrorInvalidConfiguration;
  const auto limit = shared_limits.find(on_this_device(kernel));
  if (launch.shared > std::max<size_t>(48 * 1024, limit == shared_limits.end() ? 0 : limit->second))
    return cudaErrorInvalidValue;
  if (launch.cooperative) {
    if (!now.cooperative || launch.cluster != 1) return cudaErrorNotSupported;
    // 1 KB of every block is the system's. What static memory and registers take shows on a GPU only.
    const size_t by_memory = (now.shared_per_block + 1024) / (launch.shared + 1024), by_threads = 2048 / threads;
    if (uint64_t(g.x) * g.y * g.z > now.sm_count * std::min({by_memory, by_threads, size_t(32)}))
      return cudaErrorCooperativeLaunchTooLarge;
  }
  launch_log().push_back(launch);
  return cudaSuccess;
}

}  // namespace tokenprune::emulator

cudaError_t cudaGetDevice(int* device) {
  using Properties = std::array<int, 5>;
  static std::mutex mutex;
  static std::vector<Properties> known;
  const tokenprune::emulator::Settings& now = tokenprune::emulator::settings();
  const Properties properties{now.sm_count, now.shared_per_block, now.architecture, now.cooperative,
                              now.largest_cluster};
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = std::find(known.begin(), known.end(), properties);
  if (found == known.end()) found = known.insert(known.end(), properties);
  *device = static_cast<int>(found - known.begin());
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorName(cudaError_t status) {
  switch (status) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorNoKernelImageForDevice:
      return "cudaErrorNoKernelImageForDevice";
    case cudaErrorCooperativeLaunchTooLarge:
      return "cudaErrorCooperativeLaunchTooLarge";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    default:
      return "cudaErrorInvalidConfiguration";
  }
}

const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    default:
      return "invalid configuration argument";
  }
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const tokenprune::emulator::Settings& now = tokenprune::emulator::settings();
  ++tokenprune::emulator::query_count();
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = now.sm_count;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = now.shared_per_block;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = now.architecture / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = now.architecture % 10;
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = now.cooperative;
      break;
  }
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  tokenprune::emulator::finish_launches();
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
