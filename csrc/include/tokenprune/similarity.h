// cosine_scores and contrastive_scores as the host sees them: the problem, the launch plan, no kernel code. Both ops
// are the same computation: every feature has its cosines with a list of rows for a maximum and with a list for a mean.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "tokenprune/call_stream.h"
#include "tokenprune/limits.h"

namespace tokenprune {

// One list of rows per sample: entry i is row indices[i], without indices row i. Entries that the mask leaves out, or
// whose index is no row, do not count.
struct RowList {
  const void* rows;  // [batch, available, dim], last stride 1
  int64_t sample_stride, row_stride, available;
  const int64_t* indices;  // [batch, length] with last stride 1, or null
  int64_t index_stride;
  const uint8_t* mask;  // bytes [batch, length] with last stride 1, or null
  int64_t mask_stride;
  int64_t length;
};

struct SimilarityProblem {
  const void* features;  // [batch, n, dim], last stride 1
  int64_t sample_stride, row_stride;
  int64_t batch, n, dim;
  RowList best_of, mean_of;
  float mean_sign;   // scores = max over best_of + mean_sign * mean over mean_of
  bool aligned;      // all rows have whole 16-byte units, at multiples of 16 bytes within 2^32 of them of a sample
  float* scores;     // [batch, n]
  float* workspace;  // plan.workspace() floats, 16-byte aligned; may be null if that is 0
};

constexpr int kSimilarityThreads = 128;  // of the kernels that score
constexpr int kUnitSumThreads = 256;
// Rows that a warp compares its features with in registers.
constexpr int kDirectRows = 8;
constexpr int64_t kUnitSumRows = 32;  // at most, of a group
constexpr int64_t kUnitSumParts = 4;  // at most, when the scoring kernel adds the groups up itself
constexpr int kSimilarityTile = 64;   // features and listed rows of a tile
// A block of tiles is one or two teams of 128 threads that share its channels, with a ring of tiles each.
constexpr int kSimilarityMaxTeams = 2, kSimilarityBlocksPerMultiprocessor = 3;
constexpr int kSimilarityTeamBytes = 48 * 1024, kSimilarityStaticShared = 4 * 1024;

// Scoring is one launch: `tiles` by tiles of dot products, otherwise by one warp per feature or four. A long mean_of
// list is first summed up to one vector per sample: by groups of rows in a launch before that, whose sums a further
// launch adds up if they are many.
struct SimilarityPlan {
  bool tiles;
  int rows_per_warp;  // without tiles: 1 or 4
  unsigned cluster;   // with tiles: blocks that share the channels of a tile
  int teams;          // with tiles: of each block, that share its channels
  int64_t blocks;     // of the scoring launch
  int64_t groups;     // per sample, of the launch that sums unit rows; 0: no such launch
  int64_t rows_per_group;
  bool combine;
  int64_t batch, dim;

  int64_t group_floats() const { return batch * groups * dim; }
  int64_t sum_floats() const { return combine ? batch * dim : 0; }
  int64_t workspace() const { return groups > 0 ? group_floats() + sum_floats() + batch : 0; }
};

inline SimilarityPlan plan_similarity(int64_t batch, int64_t n, int64_t dim, int element_size, int64_t best,
                                      int64_t mean, const DeviceLimits& limits) {
  SimilarityPlan plan{};
  plan.batch = batch;
  plan.dim = dim;
  if (mean > 0 && best + mean > kDirectRows) {
    plan.rows_per_group = std::clamp<int64_t>(ceil_div(mean, kUnitSumParts), 8, kUnitSumRows);
    plan.groups = ceil_div(mean, plan.rows_per_group);
    plan.combine = plan.groups > kUnitSumParts;
  }
  plan.tiles = best > kDirectRows;
  plan.cluster = 1;
  plan.teams = 1;
  plan.rows_per_warp = 1;
  if (plan.tiles) {
    const int64_t tiles = batch * ceil_div<int64_t>(n, kSimilarityTile),
                  chunks = ceil_div<int64_t>(dim * element_size, 128);
    // Few tiles leave most of the device idle and are long: their channels are shared out, at least two chunks each,
    // until every multiprocessor has as many blocks as it holds. Where it has one, a second team hides what the first
    // one waits for.
    while (limits.has_clusters() && plan.cluster < kMaxCluster &&
           tiles * plan.cluster * 2 <= kSimilarityBlocksPerMultiprocessor * limits.sm_count &&
           chunks >= plan.cluster * 4)
      plan.cluster *= 2;
    const int64_t most = limits.has_clusters() ? std::clamp<int64_t>(chunks / 2, 1, kMaxCluster) : 1;
    plan.cluster = static_cast<unsigned>(limits.planned_power(Planned::kSimilarityCluster, plan.cluster, 1, most));
    plan.blocks = tiles * plan.cluster;
    const bool room = kSimilarityMaxTeams * kSimilarityTeamBytes + kSimilarityStaticShared <= limits.shared_per_block;
    if (room && plan.blocks <= limits.sm_count && chunks >= plan.cluster * kSimilarityMaxTeams)
      plan.teams = kSimilarityMaxTeams;
    const bool two = room && chunks >= plan.cluster * kSimilarityMaxTeams;
    plan.teams =
        static_cast<int>(limits.planned(Planned::kSimilarityTeams, plan.teams, 1, two ? kSimilarityMaxTeams : 1));
  } else {
    constexpr int kWarps = kSimilarityThreads / 32;
    // Four features per warp read the listed rows a quarter as often, once there is enough work for every SM.
    if (batch * ceil_div<int64_t>(n, 4 * kWarps) >= 4 * limits.sm_count) plan.rows_per_warp = 4;
    plan.rows_per_warp = limits.planned(Planned::kSimilarityRowsPerWarp, plan.rows_per_warp, 1, 4) < 4 ? 1 : 4;
    plan.blocks = batch * ceil_div<int64_t>(n, plan.rows_per_warp * kWarps);
  }
  return plan;
}

template <class T>
cudaError_t launch_similarity(const SimilarityProblem& problem, const SimilarityPlan& plan, CallStream& stream);

}  // namespace tokenprune
