// What the CUDA bindings of all ops share: registration, device guard and stream, dtype dispatch, launch errors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <initializer_list>
#include <optional>

#include "checks.h"
#include "op.h"
#include "tokenprune/call_stream.h"
#include "tokenprune/limits.h"

// The emulator (emulator/) compiles the same bindings for CPU tensors, as torch.ops.tokenprune_emulated.
#if defined(TOKENPRUNE_EMULATOR)
#define TOKENPRUNE_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(tokenprune_emulated, CPU, m)
#else
#define TOKENPRUNE_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(tokenprune, CUDA, m)
#endif

namespace tokenprune {

// Makes the device of a tensor current for the life of this object, which is that of one call, and knows its current
// stream and its limits.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& t);
  CallStream& stream() const { return stream_; }
  const DeviceLimits& limits() const { return limits_; }

 private:
#if !defined(TOKENPRUNE_EMULATOR)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  DeviceLimits limits_;
  mutable CallStream stream_;  // knows what has been launched
};

struct NamedTensor {
  const char* name;
  const Tensor& tensor;
};

// Throws an error with the op, the shapes and CUDA's own words when `status` is one.
void check_launch(const char* op, cudaError_t status, std::initializer_list<NamedTensor> inputs);

// The kernels compute in float32: float64 inputs are refused, not rounded.
void check_not_float64(const char* op, std::initializer_list<NamedTensor> inputs);

// The tokens of a greedy op's sample are counted in 32 bits.
void check_greedy_tokens(const char* op, const char* name, int64_t tokens);

// An optional tensor of numbers as float32, contiguous.
OptionalTensor contiguous_floats(const char* op, const char* name, const OptionalTensor& given);

// With TOKENPRUNE_CHECK_INDICES=1, waits for the device and raises IndexError for a value outside [-1, size). Without
// it the kernels take such a value for -1.
void check_indices(const char* op, const char* name, const Tensor& indices, int64_t size);

// The bytes of a bool tensor with last stride 1, as the kernels take masks; null without one.
struct MaskArgument {
  explicit MaskArgument(const OptionalTensor& mask) : tensor(with_contiguous_rows(mask)) {}
  const uint8_t* data() const { return mask_bytes(tensor); }
  int64_t stride() const { return tensor ? tensor->stride(0) : 0; }
  OptionalTensor tensor;
};

// Does every row of a tensor of three dimensions start at a multiple of 16 bytes?
inline bool rows_start_aligned(const Tensor& t) {
  const auto fits = [&](int64_t stride) { return stride * static_cast<int64_t>(t.element_size()) % 16 == 0; };
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && fits(t.stride(0)) && fits(t.stride(1));
}

template <class T>
struct StorageTag {
  using type = T;
};

// f(StorageTag<T>{}) with the storage type of a float16, bfloat16 or float32 tensor.
template <class F>
auto dispatch_storage(const Tensor& t, F&& f) {
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return f(StorageTag<__half>{});
    case ScalarType::BFloat16:
      return f(StorageTag<__nv_bfloat16>{});
    default:
      return f(StorageTag<float>{});
  }
}

}  // namespace tokenprune
