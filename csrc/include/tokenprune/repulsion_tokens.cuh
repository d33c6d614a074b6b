// What the blocks that make all picks of a sample in one launch have in common (repulsion_gram.cuh,
// repulsion_points.cuh): a thread keeps the objectives of its own tokens in registers, and seeds are bits of a list.
#pragma once

#include "tokenprune/repulsion_objective.cuh"

namespace tokenprune {

// The tokens of one thread: of those of its block, [first, end), every blockDim-th.
template <ObjectiveKind kind>
struct OwnTokens {
  const RepulsionObjective<kind> objective;
  const int first, end;
  float state[kOwnTokens], energy[kOwnTokens];
  unsigned available = 0;  // a bit for each
  Candidate mine = kNoCandidate;

  __device__ __forceinline__ OwnTokens(const RepulsionProblem& p, int first_, int end_)
      : objective(p), first(first_), end(end_) {}

  // f(e, i) for every token i, the e-th of the thread.
  template <class F>
  __device__ __forceinline__ void for_each(F&& f) const {
#pragma unroll
    for (int e = 0; e < kOwnTokens; ++e) {
      const int i = first + static_cast<int>(threadIdx.x) + e * static_cast<int>(blockDim.x);
      if (i < end) f(e, i);
    }
  }

  __device__ __forceinline__ void offer(int i, uint32_t key) {
    const Candidate offered = {key, static_cast<uint32_t>(i)};
    if (offered < mine) mine = offered;
  }

  // Nothing is selected yet, and seeds are not available.
  __device__ __forceinline__ void load(const RepulsionProblem& p, int64_t sample, const uint32_t* seeds) {
    for_each([&](int e, int i) {
      state[e] = objective.initial_state();
      energy[e] = p.energy == nullptr ? 0 : p.energy[sample * p.n + i];
      const bool seed = seeds[i / 32] >> (i % 32) & 1;
      if (is_valid(p, sample, i) && !seed) available |= 1u << e;
    });
  }

  // The candidates before the first pick: what the seeds make of them, else first_key(e, i).
  template <class FirstKey>
  __device__ __forceinline__ void start(bool seeded, FirstKey&& first_key) {
    mine = kNoCandidate;
    for_each([&](int e, int i) {
      if (available >> e & 1) offer(i, seeded ? objective.key(state[e], energy[e]) : first_key(e, i));
    });
  }

  // Applies j to the available tokens, of which it is none from now on, and brings `mine` up to date. cosine(e, i) and
  // distance(e, i), squared, are those of i and j.
  template <class Cosine, class Distance>
  __device__ __forceinline__ void apply(int j, Cosine&& cosine, Distance&& distance) {
    mine = kNoCandidate;
    for_each([&](int e, int i) {
      if (i == j) available &= ~(1u << e);
      if (!(available >> e & 1)) return;
      state[e] = objective.updated(state[e], cosine(e, i), [&] { return distance(e, i); });
      offer(i, objective.key(state[e], energy[e]));
    });
  }
};

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

// f(seed) for every seed, ascending and each once.
template <class F>
__device__ __forceinline__ void for_seeds(const uint32_t* marks, int n, F&& f) {
  for (int word = 0; word < (n + 31) / 32; ++word)
    for (uint32_t left = marks[word]; left != 0; left &= left - 1) f(32 * word + __ffs(left) - 1);
}

}  // namespace tokenprune
