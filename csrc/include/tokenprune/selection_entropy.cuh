// score_entropy: one block per sample, two passes over its scores: their sum, then the entropy of the shares. The
// second pass hits the cache.
//
//   launch                grid   block                 shared memory    global memory
//   score_entropy_kernel  batch  128 to 512 (a thread  of block_reduce  scores and mask twice (the second time from L1
//                                for every 4 tokens)                    or L2), 4 bytes per sample
#pragma once

#include "tokenprune/math.h"
#include "tokenprune/radix.cuh"
#include "tokenprune/selection.h"
#include "tokenprune/warp.cuh"

namespace tokenprune {

// Sums in float64: a few additions per thread cost nothing beside the latency of the loads. Which thread adds what
// depends on n alone, so that a sample's result does not depend on its batch.
template <class T>
__global__ void __launch_bounds__(kSelectMaxThreads) score_entropy_kernel(const EntropyProblem p) {
  const int64_t sample = blockIdx.x;
  const T* scores = static_cast<const T*>(p.scores) + sample * p.score_stride;
  const uint8_t* mask = p.mask == nullptr ? nullptr : p.mask + sample * p.mask_stride;
  const Stretch of_warp = stretch_of_warp({0, static_cast<uint32_t>(p.n)});
  struct Token {
    float mass;
    bool counts;
  };
  const auto read = [&](uint32_t i) -> Token {
    const bool counts = mask == nullptr || __ldg(mask + i) != 0;
    const float score = to_float(__ldg(scores + i));
    return {counts && score > 0 ? score : 0.0f, counts};  // NaN counts as 0
  };
  double total = 0;
  int tokens = 0;
  each_token(of_warp, read, [&](uint32_t, Token token) {
    total += token.mass;
    tokens += token.counts;
  });
  total = block_reduce(total, Sum(), 0.0);
  tokens = block_reduce(tokens, Sum(), 0);
  double sum = 0;
  if (total > 0) {
    const double inverse = 1 / total;
    each_token(of_warp, read,
               [&](uint32_t, Token token) { sum += entropy_term(static_cast<float>(token.mass * inverse)); });
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
  p.entropy[sample] = static_cast<float>(sum);
}

template <class T>
cudaError_t launch_score_entropy(const EntropyProblem& p, CallStream& stream) {
  const Launch where = {p.batch, dim3(plan_entropy_threads(p.n)), 0, stream};
  return launch(where, score_entropy_kernel<T>, p);
}

}  // namespace tokenprune
