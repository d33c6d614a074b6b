// score_entropy: one block per sample, two passes over its scores (the second one hits the cache).
#pragma once

#include "tokenprune/math.h"
#include "tokenprune/selection.h"
#include "tokenprune/warp.cuh"

namespace tokenprune {

constexpr int kEntropyThreads = 256;

// Sums in float64: a few hundred additions per thread cost nothing beside the latency of the loads.
template <class T>
__global__ void __launch_bounds__(kEntropyThreads) score_entropy_kernel(const EntropyProblem p) {
  const T* scores = static_cast<const T*>(p.scores) + blockIdx.x * p.score_stride;
  const bool* mask = p.mask == nullptr ? nullptr : p.mask + blockIdx.x * p.mask_stride;
  const auto mass = [&](int64_t i) {
    const float value = to_float(scores[i]);
    return value > 0 && (mask == nullptr || mask[i]) ? value : 0.0f;  // NaN counts as 0
  };
  double total = 0;
  long long tokens = 0;
  for (int64_t i = threadIdx.x; i < p.n; i += kEntropyThreads) {
    total += mass(i);
    tokens += mask == nullptr || mask[i];
  }
  total = block_reduce(total, Sum(), 0.0);
  tokens = block_reduce(tokens, Sum(), 0ll);
  double sum = 0;
  if (total > 0) {
    const double inverse = 1 / total;
    for (int64_t i = threadIdx.x; i < p.n; i += kEntropyThreads)
      sum += entropy_term(static_cast<float>(mass(i) * inverse));
    sum = block_reduce(sum, Sum(), 0.0);
  }
  if (threadIdx.x != 0) return;
  if (tokens <= 1) {
    sum = 0;
  } else {
    const double uniform = log(static_cast<double>(tokens));
    if (total == 0) sum = uniform;
    if (p.normalized) sum = sum < 0 ? 0 : (sum > uniform ? 1 : sum / uniform);
  }
  p.entropy[blockIdx.x] = static_cast<float>(sum);
}

template <class T>
cudaError_t launch_score_entropy(const EntropyProblem& p, cudaStream_t stream) {
  return launch({dim3(p.batch), dim3(kEntropyThreads), 0, stream}, score_entropy_kernel<T>, p);
}

}  // namespace tokenprune
