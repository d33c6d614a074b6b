#include "cuda/binding.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>

#if !defined(TOKENPRUNE_EMULATOR)
#include <dlfcn.h>
#endif

namespace tokenprune {

// device.cu
cudaError_t compiled_architecture(int* architecture);
cudaError_t largest_cluster(int* blocks);

namespace {

#if !defined(TOKENPRUNE_EMULATOR)
// The symbol lives in libtorch_cuda, which a CPU build of torch does not have: linking to it would keep this library
// from loading there. By the time a CUDA tensor exists, libtorch_cuda is in the process.
cudaStream_t current_stream(int32_t device) {
  using Query = int32_t (*)(int32_t, void**);
  static const Query query = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr : reinterpret_cast<Query>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  void* stream = nullptr;
  if (query == nullptr || query(device, &stream) != 0)
    throw std::runtime_error("tokenprune: cannot ask torch for the current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}
#endif

void check_query(cudaError_t status) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  throw std::runtime_error(std::string("tokenprune: cannot query the CUDA device: ") + cudaGetErrorString(status));
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_query(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

DeviceLimits query_limits(int device) {
  DeviceLimits limits;
  limits.overrides = &plan_overrides();
  limits.sm_count = attribute(cudaDevAttrMultiProcessorCount, device);
  limits.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  limits.cooperative = attribute(cudaDevAttrCooperativeLaunch, device) != 0;
  int compiled = 0;
  check_query(compiled_architecture(&compiled));
  limits.architecture = std::min(compiled, 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                                               attribute(cudaDevAttrComputeCapabilityMinor, device));
  // Where it cannot be asked, a launch that has no room says so itself.
  int cluster = 0;
  if (limits.architecture >= 90 && largest_cluster(&cluster) == cudaSuccess)
    limits.clusters = cluster >= static_cast<int>(kMaxCluster);
  (void)cudaGetLastError();
  return limits;
}

// Asked once per device: the queries cost more than a small launch.
DeviceLimits limits_of(int device) {
  static std::mutex mutex;
  static std::vector<std::optional<DeviceLimits> > known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.size() <= static_cast<size_t>(device)) known.resize(device + 1);
  if (!known[device]) known[device] = query_limits(device);
  return *known[device];
}

#if defined(TOKENPRUNE_EMULATOR)
int current_device() {
  int device = 0;
  check_query(cudaGetDevice(&device));
  return device;
}
#endif

}  // namespace

#if defined(TOKENPRUNE_EMULATOR)
CudaScope::CudaScope(const Tensor&) : limits_(limits_of(current_device())), stream_{nullptr, limits_.has_clusters()} {}
#else
CudaScope::CudaScope(const Tensor& t)
    : guard_(t.get_device_index()),
      limits_(limits_of(t.get_device_index())),
      stream_{current_stream(t.get_device_index()), limits_.has_clusters()} {}
#endif

#if !defined(TOKENPRUNE_EMULATOR)
namespace {

void fill_bytes(const Tensor& t, int byte) {
  const CudaScope cuda(t);
  check_launch("new_empty",
               cudaMemsetAsync(t.mutable_data_ptr(), byte, t.numel() * t.element_size(), cuda.stream().handle), {});
}

[[maybe_unused]] const bool told = (fill_cuda_bytes = fill_bytes, cuda_runtime_version = CUDART_VERSION, true);

}  // namespace
#endif

void check_launch(const char* op, cudaError_t status, std::initializer_list<NamedTensor> inputs) {
#if defined(TOKENPRUNE_EMULATOR)
  emulator::finish_launches();  // CPU tensors have no stream that later work would wait in
#endif
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // a refused launch must not be reported again by the next call
  std::ostringstream text;
  text << "tokenprune::" << op << ": CUDA error " << cudaGetErrorName(status) << " (" << cudaGetErrorString(status)
       << ")";
  if (status == cudaErrorNoKernelImageForDevice) text << "; backend triton has kernels for this GPU";
  if (status == cudaErrorInvalidConfiguration) text << "; a launch has at most " << kMaxGridX << " blocks";
  const char* comma = " for ";
  for (const NamedTensor& input : inputs) {
    text << comma << input.name << ' ' << shape_text(input.tensor) << ' ' << dtype_name(input.tensor.scalar_type());
    comma = ", ";
  }
  throw std::runtime_error(text.str());
}

void check_not_float64(const char* op, std::initializer_list<NamedTensor> inputs) {
  for (const NamedTensor& input : inputs)
    if (is_float64(input.tensor))
      fail(op, input.name, "be float16, bfloat16 or float32 on a GPU (backend reference takes float64)", "float64");
}

void check_greedy_tokens(const char* op, const char* name, int64_t tokens) {
  if (tokens > kGreedyMostTokens) fail(op, name, "have at most 2^30 tokens on a GPU", tokens);
}

OptionalTensor contiguous_floats(const char* op, const char* name, const OptionalTensor& given) {
  if (!given) return std::nullopt;
  check_not_float64(op, {{name, *given}});
  return contiguous_as(*given, ScalarType::Float);
}

void check_indices(const char* op, const char* name, const Tensor& indices, int64_t size) {
  static const bool on = [] {
    const char* value = std::getenv("TOKENPRUNE_CHECK_INDICES");
    return value != nullptr && std::strcmp(value, "1") == 0;
  }();
  if (!on || indices.numel() == 0) return;
  const Tensor host = contiguous_as(
      torch::stable::to(indices, torch::stable::Device(torch::headeronly::DeviceType::CPU)), ScalarType::Long);
  check_index_values(op, name, host.const_data_ptr<int64_t>(), host.numel(), size);
}

}  // namespace tokenprune
