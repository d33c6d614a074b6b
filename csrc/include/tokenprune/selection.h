// The selection launchers as the host sees them: plain problem descriptions, no kernel code. The templates are defined
// in the .cuh files and instantiated for float, __half and __nv_bfloat16 in csrc/cuda/selection.cu.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace tokenprune {

struct EntropyProblem {
  const void* scores;  // [batch, n], last stride 1
  int64_t score_stride;
  const bool* mask;  // [batch, n] with last stride 1, or null
  int64_t mask_stride;
  float* entropy;  // [batch]
  int64_t batch, n;
  bool normalized;
};

template <class T>
cudaError_t launch_score_entropy(const EntropyProblem& problem, cudaStream_t stream);

}  // namespace tokenprune
