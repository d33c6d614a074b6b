// Seeds as bits of a list in shared memory, for the blocks that make all picks of a sample (repulsion_gram.cuh,
// repulsion_points.cuh).
#pragma once

#include "tokenprune/repulsion_objective.cuh"

namespace tokenprune {

// The tokens that are seeds, as bits; true if there are any. Contains barriers, the last one after everything is
// written.
__device__ __forceinline__ bool mark_seeds(const int64_t* seeds, int64_t n_seeds, int n, uint32_t* marks) {
  for (int word = threadIdx.x; word < (n + 31) / 32; word += blockDim.x) marks[word] = 0;
  __syncthreads();
  bool any = false;
  for (int64_t s = threadIdx.x; s < n_seeds; s += blockDim.x) {
    const int64_t j = valid_seed(seeds[s], n);
    if (j < 0) continue;
    atomicOr(&marks[j / 32], 1u << (j % 32));
    any = true;
  }
  return __syncthreads_or(any);
}

__device__ __forceinline__ bool is_seed(const uint32_t* marks, int i) { return marks[i / 32] >> (i % 32) & 1; }

// f(seed) for every seed, ascending and each once.
template <class F>
__device__ __forceinline__ void for_seeds(const uint32_t* marks, int n, F&& f) {
  for (int word = 0; word < (n + 31) / 32; ++word)
    for (uint32_t left = marks[word]; left != 0; left &= left - 1) f(32 * word + __ffs(left) - 1);
}

}  // namespace tokenprune
