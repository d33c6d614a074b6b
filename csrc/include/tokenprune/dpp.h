// dpp_sample as the host sees it: the problem, the choice between its two algorithms with the workspaces that each
// needs, and the launcher. The template is instantiated for float, __half and __nv_bfloat16 in csrc/cuda/dpp.cu.
#pragma once

#include "tokenprune/repulsion.h"

namespace tokenprune {

struct DppProblem {
  const void* features;  // [batch, n, channels], last stride 1
  int64_t batch_stride, row_stride;
  bool aligned;          // every row starts at a multiple of 16 bytes
  const float* quality;  // [batch, n] contiguous, or null
  const uint8_t* mask;   // bytes [batch, n] with last stride 1, or null
  int64_t mask_stride;
  float epsilon;
  int64_t batch, n, channels, k;
  int64_t* indices;  // [batch, k]
  float* gains;      // [batch, k]
  int64_t* counts;   // [batch]

  // Of the Cholesky factor: one column for every pick that may count.
  TOKENPRUNE_HD int64_t width() const { return k < n ? k : n; }
};

// The kernel that has a matrix: threads of a block at most, tokens of a warp at once (the lanes that remain share out
// the terms of their sums), and the static shared memory with the system's kilobyte.
constexpr int kDppThreads = 768, kDppTokens = 8, kDppParts = 32 / kDppTokens, kDppStatic = 2048;
// The kernel that reads the features in every step: threads, tokens of a block at least, blocks per multiprocessor.
constexpr int kDppRowThreads = 256, kDppRowTokens = 16, kDppRowBlocks = 2;

// What each launch looks like. Samples go in parts of `samples`, one part after the other, through the same workspaces.
struct DppPlan {
  bool matrix;          // all cosines of a sample are stored
  int64_t samples;      // at once
  RepulsionPlan pairs;  // with a matrix: of their inner products
  // With a matrix: blocks that share a sample, tokens of each, floats between two rows of its factor, its threads and
  // bytes of dynamic shared memory, and how many rows of the factor are there.
  int cluster, share, pitch, block, shared;
  int64_t shared_rows;
  // Otherwise: so many groups of blocks, and blocks of each; all are on the device at once.
  int64_t groups, group_blocks;
  // Elements of the workspaces; all in all `floats` floats and `words` integers of 32 bits.
  int64_t gram_floats, token_floats, factor_floats, token_words, pick_words;
  int64_t floats() const { return gram_floats + token_floats + factor_floats; }
  int64_t words() const { return token_words + pick_words; }
};

// The features and sizes as repulsion_sample has them, for its product of all pairs.
inline RepulsionProblem pairs_of(const DppProblem& p) {
  RepulsionProblem pairs{};
  pairs.features = p.features;
  pairs.batch_stride = p.batch_stride;
  pairs.row_stride = p.row_stride;
  pairs.aligned = p.aligned;
  pairs.batch = p.batch;
  pairs.n = p.n;
  pairs.channels = p.channels;
  pairs.k = p.k;
  return pairs;
}

// Floats of shared memory beside the rows of the factor: what a block knows of its tokens, and the pick's column.
inline int64_t dpp_floats(int64_t pitch, int64_t width) { return 3 * pitch + round_up<int64_t>(width, 4); }

inline void plan_dpp_matrix(const DppProblem& p, const DeviceLimits& limits, DppPlan& plan) {
  plan_matrix(pairs_of(p), limits, plan.pairs);
  plan.samples = plan.pairs.samples;
  plan.gram_floats = plan.pairs.gram_floats;
  plan.token_floats = plan.samples * p.n;  // inverse norms
  const int64_t most = limits.has_clusters() ? kMaxCluster : 1, width = p.width();
  plan.cluster = static_cast<int>(limits.planned_power(Planned::kDppCluster, most, 1, most));
  plan.share = static_cast<int>(ceil_div<int64_t>(p.n, plan.cluster));
  // Eight neighbouring floats of four rows are in 32 different banks, and in whole sectors of device memory.
  plan.pitch = round_up(std::max(plan.share, kDppTokens) - kDppTokens, 32) + kDppTokens;
  plan.block = std::min(kDppThreads, 32 * ceil_div(plan.share, kDppTokens));
  const int64_t beside = dpp_floats(plan.pitch, width), room = (limits.shared_per_block - kDppStatic) / 4 - beside;
  plan.shared_rows = std::clamp<int64_t>(room / plan.pitch / kDppParts * kDppParts, 0, round_up<int64_t>(width, 4));
  plan.shared = static_cast<int>(4 * (beside + plan.shared_rows * plan.pitch));
  plan.factor_floats = plan.samples * std::max<int64_t>(0, width - plan.shared_rows) * plan.cluster * plan.pitch;
}

inline void plan_dpp_rows(const DppProblem& p, const DeviceLimits& limits, DppPlan& plan) {
  plan.samples = std::min(p.batch, std::max<int64_t>(1, kMaxGridX / ceil_div<int64_t>(p.n, 8)));
  const int64_t places = limits.sm_count * kDppRowBlocks;
  plan.groups = std::min({plan.samples, places, std::max<int64_t>(1, gram_byte_limit / (p.n * p.width() * 4))});
  plan.group_blocks = 1;
  if (limits.cooperative && plan.groups > 0)
    plan.group_blocks = std::min(ceil_div<int64_t>(p.n, kDppRowTokens), places / plan.groups);
  plan.token_floats = plan.samples * p.n * 2;  // inverse norms, residuals
  plan.factor_floats = plan.groups * p.n * p.width();
  plan.token_words = plan.samples * p.n;                        // keys
  plan.pick_words = plan.groups * (1 + 4 * plan.group_blocks);  // counters, two sets of candidates
}

inline DppPlan plan_dpp(const DppProblem& p, const DeviceLimits& limits) {
  DppPlan plan{};
  plan.samples = std::min(p.batch, kMaxGridX);
  plan.cluster = 1;
  plan.block = 32;
  plan.matrix = true;  // with nothing to pick too: that kernel writes that it made no picks
  if (p.n == 0 || p.k == 0) return plan;
  constexpr int64_t kMost = 4096;  // a block alone holds what it knows of so many tokens
  plan.matrix = p.n <= limits.planned(Planned::kDppMatrix, std::min(gram_token_limit, kMost), 0, kMost);
  if (plan.matrix)
    plan_dpp_matrix(p, limits, plan);
  else
    plan_dpp_rows(p, limits, plan);
  return plan;
}

// floats and words are the plan's workspaces.
template <class T>
cudaError_t launch_dpp(const DppProblem& problem, const DppPlan& plan, float* floats, uint32_t* words,
                       CallStream& stream);

}  // namespace tokenprune
