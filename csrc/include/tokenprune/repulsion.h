// repulsion_sample as the host sees it: the problem, the choice between its two algorithms with the workspaces that
// each needs, and the launcher. The template is instantiated for float, __half and __nv_bfloat16 in
// csrc/cuda/repulsion.cu.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "tokenprune/limits.h"
#include "tokenprune/math.h"

namespace tokenprune {

struct RepulsionProblem {
  const void* features;  // [batch, n, channels], last stride 1
  int64_t batch_stride, row_stride;
  bool aligned;            // every row starts at a multiple of 16 bytes
  const float* positions;  // [batch, n, axes] contiguous, or null
  int64_t axes;
  const int64_t* seeds;  // [batch, n_seeds] contiguous, or null
  int64_t n_seeds;
  const float* energy;  // [batch, n] contiguous, or null
  const uint8_t* mask;  // bytes [batch, n] with last stride 1, or null
  int64_t mask_stride;
  Potential potential;
  PotentialWeights<float> weights;
  bool sum;  // the aggregate; else the maximum
  FirstPick first;
  int64_t batch, n, channels, k;
  int64_t* indices;  // [batch, k]
  int64_t* counts;   // [batch]
};

// Up to so many tokens all cosines of a sample are stored, and one block makes all its picks. The matrices that exist
// at once take at most so many bytes (or hold one sample); samples beyond that wait their turn. Variables, because
// tests send small samples the other ways too.
inline int64_t gram_token_limit = 3072;
inline int64_t gram_byte_limit = int64_t(256) << 20;
// Rounds that are launched at most; fewer than one per pick do not promise all picks. A variable so that tests can see
// how many a round makes.
inline int64_t round_limit = std::numeric_limits<int64_t>::max();

constexpr int kCandidates = 64;  // of a round: tokens that may be picked before all objectives are brought up to date
constexpr int kDirectionParts = 32;  // the sum of all unit vectors is taken in so many parts
constexpr int kControlWords = 5;     // of a sample, see RepulsionControl

// What each launch of the chosen algorithm looks like. Samples go in groups of `samples`, one group after the other,
// through the same workspaces.
struct RepulsionPlan {
  bool gram;          // else rounds
  bool start;         // tokens are compared for the first pick (outlier or isolated)
  int64_t samples;    // at once
  int tile;           // of the cosine matrix
  int greedy_block;   // threads of the block that makes the picks, or that chooses a round's candidates
  int greedy_shared;  // its bytes of shared memory
  int64_t rounds;
  // Elements of the workspaces; all in all `floats` floats and `words` integers of 32 bits.
  int64_t gram_floats, token_floats, direction_floats, row_floats, token_words, pick_words;
  int64_t floats() const { return gram_floats + token_floats + direction_floats + row_floats; }
  int64_t words() const { return token_words + pick_words; }
};

// Shared memory of the block that makes all picks: state, key, inverse norm and energy of every token.
inline int gram_greedy_shared(int64_t n, bool energy) { return static_cast<int>(n) * (energy ? 16 : 12); }

inline RepulsionPlan plan_repulsion(const RepulsionProblem& p, const DeviceLimits& limits) {
  RepulsionPlan plan{};
  const bool nothing = p.n == 0 || p.k == 0;  // the block that makes the picks writes that it made none
  plan.gram = nothing || p.n <= gram_token_limit;
  plan.start = !nothing && p.energy == nullptr && p.first != FirstPick::kIndex;
  plan.tile = 64;
  plan.samples = std::min(p.batch, kMaxGridX);
  if (nothing) {
    plan.greedy_block = 32;
    return plan;
  }
  const int64_t n = p.n;
  if (plan.gram) {
    plan.samples = std::min(p.batch, std::max<int64_t>(1, gram_byte_limit / (n * n * 4)));
    const int64_t large = ceil_div<int64_t>(n, 128);
    // Large tiles read the features half as often, but only many of them occupy the device.
    if (plan.samples * (large * (large + 1) / 2) >= 2 * limits.sm_count) plan.tile = 128;
    // Two tokens per thread: a barrier of fewer warps is quicker.
    plan.greedy_block = static_cast<int>(std::min<int64_t>(1024, round_up<int64_t>(ceil_div<int64_t>(n, 2), 32)));
    plan.greedy_shared = gram_greedy_shared(n, p.energy != nullptr);
    plan.gram_floats = plan.samples * n * n;
    plan.token_floats = plan.samples * n * 2;  // inverse norms, what the first pick minimises
    return plan;
  }
  const int64_t tiles = ceil_div<int64_t>(n, 64), pairs = ceil_div<int64_t>(n, 128);
  const int64_t parts = kDirectionParts * ceil_div<int64_t>(p.channels, 256);
  // The largest grid of the launches in repulsion_start.cuh and repulsion_rounds.cuh, for one sample.
  const int64_t blocks = std::max(
      {tiles, p.first == FirstPick::kIsolated ? pairs * (pairs + 1) / 2 : 0, parts, n / 8 + 1, p.n_seeds / 256 + 1});
  plan.samples = std::min(p.batch, std::max<int64_t>(1, kMaxGridX / blocks));
  if (p.sum) {
    plan.samples = std::min(plan.samples, std::max<int64_t>(1, gram_byte_limit / (n * kCandidates * 4)));
    plan.row_floats = plan.samples * n * kCandidates;
  }
  plan.greedy_block = n > 256 ? 512 : 128;  // a power of two, and at least the threads of a tile
  plan.rounds = std::min(round_limit, std::min(p.k, n) + ceil_div<int64_t>(std::min(p.n_seeds, n), kCandidates));
  plan.token_floats = plan.samples * n * 2;  // inverse norms, states
  plan.token_words = plan.samples * n * 2;   // keys, seeds
  plan.pick_words = plan.samples * (kCandidates + kControlWords);
  if (plan.start && p.first == FirstPick::kOutlier)
    plan.direction_floats = plan.samples * (kDirectionParts + 1) * p.channels;
  return plan;
}

// floats and words are the plan's workspaces.
template <class T>
cudaError_t launch_repulsion(const RepulsionProblem& problem, const RepulsionPlan& plan, float* floats, uint32_t* words,
                             cudaStream_t stream);

}  // namespace tokenprune
