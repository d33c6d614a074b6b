// repulsion_sample as the host sees it: the problem, the choice between its three algorithms with the workspaces that
// each needs, and the launcher. The template is instantiated for float, __half and __nv_bfloat16 in
// csrc/cuda/repulsion.cu.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "tokenprune/call_stream.h"
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

  // Do distances of positions matter?
  TOKENPRUNE_HD bool has_distances() const { return positions != nullptr && potential != Potential::kCosine; }
};

enum class RepulsionAlgorithm {
  kMatrix,  // all cosines of a sample are stored
  kPoints,  // tokens of few channels: all of them are in shared memory
  kRounds,  // otherwise
};

// Up to so many tokens all cosines of a sample are stored, and one block makes all its picks. The matrices that exist
// at once take at most so many bytes (or hold one sample); samples beyond that wait their turn. Variables, because
// tests send small samples the other ways too.
inline int64_t gram_token_limit = 3072;
inline int64_t gram_byte_limit = int64_t(256) << 20;
// Points have at most so many fields (channels, coordinates and a norm): each is arithmetic of every step.
inline int64_t point_field_limit = 64;
// Rounds that are made at most; fewer than one per pick do not promise all picks. A variable so that tests can see how
// many picks a round makes.
inline int64_t round_limit = std::numeric_limits<int64_t>::max();

constexpr int kCandidates = 64;  // of a round: tokens that may be picked before all objectives are brought up to date
constexpr int kDirectionParts = 32;  // the sum of all unit vectors is taken in so many parts
constexpr int kControlWords = 5;     // of a sample, see RepulsionControl
// The block that makes the picks from a matrix: tokens that a thread has in registers, and threads. Few threads with
// several tokens each: what a step costs a warp whatever it has is the larger part.
constexpr int kOwnTokens = 8, kGreedyThreads = 384;
// The kernel that takes points has room for so many marks of seeds, and so much static shared memory at most.
constexpr int kPointMostTokens = 65536, kPointStatic = 12 * 1024;
// The kernel that makes rounds: blocks per multiprocessor, as its registers allow, and what one of them takes of the
// shared memory, with static variables and the system's kilobyte.
constexpr int kRoundBlocks = 2, kRoundShared = 64 * 1024;

// What each launch of the chosen algorithm looks like. Samples go in parts of `samples`, one part after the other,
// through the same workspaces.
struct RepulsionPlan {
  RepulsionAlgorithm algorithm;
  bool start;         // tokens are compared for the first pick (outlier or isolated)
  int64_t samples;    // at once
  int tile;           // of the cosine matrix
  int parts;          // of the channels, each by one block of a cluster
  int greedy_block;   // threads of a block that makes the picks of a sample, alone or in a cluster
  int greedy_shared;  // its bytes of dynamic shared memory
  int fields;         // of a point, or 0
  int cluster;        // blocks that share the points of a sample
  int share;          // points of each of them
  // An outlier start and the rounds: so many groups of blocks, and blocks of each; all are on the device at once.
  int64_t groups, group_blocks;
  int64_t rounds;
  // Elements of the workspaces; all in all `floats` floats and `words` integers of 32 bits.
  int64_t gram_floats, token_floats, point_floats, direction_floats, row_floats, token_words, pick_words;
  int64_t floats() const { return gram_floats + token_floats + point_floats + direction_floats + row_floats; }
  int64_t words() const { return token_words + pick_words; }
};

// Threads of a block that makes picks, for two tokens each or more.
inline int pick_threads(int64_t tokens, int64_t most) {
  return static_cast<int>(std::min(most, round_up<int64_t>(ceil_div<int64_t>(tokens, 2), 32)));
}

inline void plan_matrix(const RepulsionProblem& p, const DeviceLimits& limits, RepulsionPlan& plan) {
  plan.samples = std::min(p.batch, std::max<int64_t>(1, gram_byte_limit / (p.n * p.n * 4)));
  const int64_t large = ceil_div<int64_t>(p.n, 128);
  // Large tiles read the features half as often, but only many of them occupy the device.
  if (plan.samples * (large * (large + 1) / 2) >= 2 * limits.sm_count) plan.tile = 128;
  plan.tile = limits.planned(Planned::kRepulsionTile, plan.tile, 64, 128) < 128 ? 64 : 128;
  // Blocks of a cluster share a tile, 128 channels or more each, while twice as many of them take at most 0.8 of the time:
  // where the tiles do not occupy the device, or the last of them would have it for themselves.
  plan.parts = 1;
  const int64_t side = ceil_div<int64_t>(p.n, plan.tile), tiles = plan.samples * (side * (side + 1) / 2);
  const auto waves = [&](int64_t parts) { return ceil_div<int64_t>(tiles * parts, 2 * limits.sm_count); };
  if (limits.has_clusters())
    while (plan.parts < static_cast<int>(kMaxCluster) && p.channels >= 2 * plan.parts * 128 &&
           5 * waves(2 * plan.parts) <= 8 * waves(plan.parts))
      plan.parts *= 2;
  const int64_t most = limits.has_clusters() ? std::clamp<int64_t>(p.channels / 128, 1, kMaxCluster) : 1;
  plan.parts = static_cast<int>(limits.planned_power(Planned::kRepulsionParts, plan.parts, 1, most));
  const int64_t threads = limits.planned(Planned::kRepulsionThreads, pick_threads(p.n, kGreedyThreads),
                                         ceil_div<int64_t>(p.n, kOwnTokens), kGreedyThreads);
  plan.greedy_block = static_cast<int>(round_up<int64_t>(threads, 32));
  plan.gram_floats = plan.samples * p.n * p.n;
  // Inverse norms, what the first pick minimises; and the threads of a block may read behind them.
  plan.token_floats = plan.samples * p.n * 2 + kGreedyThreads;
}

// Shared memory of a block of `share` points: their fields and states, and two sets of candidates of the cluster.
inline int64_t point_shared(int64_t fields, int64_t share) {
  return 4 * ((fields + 1) * share + fields * 2 * kMaxCluster);
}

// False if one block, or one cluster, cannot hold the tokens of a sample as points.
inline bool plan_points(const RepulsionProblem& p, const DeviceLimits& limits, RepulsionPlan& plan) {
  const int64_t most = limits.has_clusters() ? kMaxCluster : 1;
  const int64_t cluster = limits.planned_power(Planned::kRepulsionCluster, most, 1, most),
                share = ceil_div(p.n, cluster);
  const int64_t fields = p.channels + (p.has_distances() ? p.axes : 0) + 1;
  if (fields > point_field_limit || p.n > kPointMostTokens) return false;
  if (point_shared(fields, share) > limits.shared_per_block - kPointStatic) return false;
  plan.algorithm = RepulsionAlgorithm::kPoints;
  plan.fields = static_cast<int>(fields);
  plan.cluster = static_cast<int>(cluster);
  plan.share = static_cast<int>(share);
  plan.greedy_block = pick_threads(share, 1024);
  plan.greedy_shared = static_cast<int>(point_shared(fields, share));
  return true;
}

// Points and rounds, which begin in the same way.
inline void plan_picks(const RepulsionProblem& p, const DeviceLimits& limits, RepulsionPlan& plan) {
  const bool points = plan_points(p, limits, plan);
  const int64_t pairs = ceil_div<int64_t>(p.n, 128);
  // The largest grid whose blocks follow from the samples, for one of them.
  const int64_t blocks = std::max<int64_t>(
      {ceil_div<int64_t>(p.n, 8), plan.cluster, p.first == FirstPick::kIsolated ? pairs * (pairs + 1) / 2 : 0});
  plan.samples = std::min(p.batch, std::max<int64_t>(1, kMaxGridX / blocks));
  // Blocks of a group wait for each other; where the device does not promise that all are there, one is a group.
  const int64_t places =
      limits.sm_count * std::clamp<int64_t>((limits.shared_per_block + 1024) / kRoundShared, 1, kRoundBlocks);
  plan.groups = std::min(plan.samples, places);
  const bool rows = !points && p.sum;
  if (rows) plan.groups = std::min(plan.groups, std::max<int64_t>(1, gram_byte_limit / (p.n * kCandidates * 4)));
  plan.group_blocks = 1;
  if (limits.cooperative && plan.groups > 0) {
    plan.group_blocks = std::min(ceil_div<int64_t>(p.n, 64), places / plan.groups);
    plan.group_blocks = limits.planned(Planned::kRepulsionBlocks, plan.group_blocks, 1, plan.group_blocks);
  }
  // Every round but those of seeds makes a pick.
  plan.rounds = std::min(round_limit, std::min(p.k, p.n) + ceil_div<int64_t>(std::min(p.n_seeds, p.n), kCandidates));
  plan.token_floats = plan.samples * p.n * 2;                                        // inverse norms, states
  plan.token_words = plan.samples * p.n * 2;                                         // keys, seeds
  plan.pick_words = plan.groups * (kCandidates + 2) + plan.samples * kControlWords;  // lists, counters
  plan.point_floats = plan.samples * p.n * plan.fields;
  if (rows) plan.row_floats = plan.groups * p.n * kCandidates;
  if (plan.start && p.first == FirstPick::kOutlier)
    plan.direction_floats = plan.groups * (kDirectionParts + 1) * p.channels;
}

inline RepulsionPlan plan_repulsion(const RepulsionProblem& p, const DeviceLimits& limits) {
  RepulsionPlan plan{};
  const bool nothing = p.n == 0 || p.k == 0;  // the block that makes the picks writes that it made none
  plan.start = !nothing && p.energy == nullptr && p.first != FirstPick::kIndex;
  plan.tile = 64;
  plan.samples = std::min(p.batch, kMaxGridX);
  plan.greedy_block = 32;
  plan.algorithm = RepulsionAlgorithm::kRounds;
  constexpr int64_t kMost = kOwnTokens * kGreedyThreads;
  if (nothing ||
      p.n <= limits.planned(Planned::kRepulsionMatrix, std::min<int64_t>(gram_token_limit, kMost), 0, kMost)) {
    plan.algorithm = RepulsionAlgorithm::kMatrix;
    if (!nothing) plan_matrix(p, limits, plan);
  } else {
    plan_picks(p, limits, plan);
  }
  return plan;
}

// The inner products of all pairs of tokens, [batch, n, n], and the inverse norms, [batch, n], by the plan's tiles and
// parts. Of the problem it looks at the features and sizes alone.
template <class T>
cudaError_t launch_gram(const RepulsionProblem& problem, const RepulsionPlan& plan, float* gram, float* inverse,
                        CallStream& stream);

// floats and words are the plan's workspaces.
template <class T>
cudaError_t launch_repulsion(const RepulsionProblem& problem, const RepulsionPlan& plan, float* floats, uint32_t* words,
                             CallStream& stream);

}  // namespace tokenprune
