// The column pass of attention as the host sees it: probabilities from a given lse, reduced over heads and then over
// rows to scores of keys. No kernel code; defined in attention_columns.cuh, instantiated in
// csrc/cuda/attention_columns_<type>.cu.
#pragma once

#include <algorithm>
#include <cstdint>

#include "tokenprune/attention.h"

namespace tokenprune {

enum class ColumnHeads { kMean, kSum, kMax, kNone };  // as HeadReduction and QueryReduction of args/attention.h
enum class ColumnRows { kMean, kSum, kMax, kLast };

constexpr int kMaxKinds = 32;  // row reductions of one launch, two bits each

struct ColumnProblem {
  AttentionProblem attention;
  const float* lse;            // [batch, query_heads, rows]
  const int64_t* key_indices;  // [batch, columns] with last stride 1, or null: column j is key j
  int64_t key_indices_stride;
  int64_t columns;
  const uint8_t* query_mask;  // bytes [batch, rows] with last stride 1, or null: every row counts
  int64_t query_mask_stride;
  ColumnHeads heads;
  bool every_row;       // rows are not reduced: scores [batch, out_heads, rows, columns], and no kinds
  bool last_only;       // no row reduction but kLast: one row is computed
  uint64_t kinds;       // kind r in bits 2 r and 2 r + 1
  int kind_count;       // of this launch,
  int64_t first_kind;   // which are kinds first_kind .. of
  int64_t total_kinds;  // all
  float* scores;        // [batch, total_kinds, out_heads, columns]
  float* partial;       // [batch, row_parts, 2, out_heads, columns]: sums and maxima, with more than one row part

  TOKENPRUNE_HD bool per_head() const { return heads == ColumnHeads::kNone; }
  TOKENPRUNE_HD int64_t out_heads() const { return per_head() ? attention.query_heads : 1; }
  TOKENPRUNE_HD ColumnRows kind(int r) const { return static_cast<ColumnRows>(kinds >> 2 * r & 3); }
};

// A block, or a cluster of blocks, owns 64 columns of a sample ("item") and loops over rows and heads.
struct ColumnPlan {
  int64_t key_tiles;      // per sample
  int64_t head_ranges;    // per_head: ranges of query heads, an item each; otherwise 1
  int64_t row_parts;      // ranges of rows, an item each
  int64_t rows_per_part;  // a multiple of the tile
  int cluster, teams;     // blocks of an item, teams of kTileThreads threads of a block: heads are split over both
  int group;              // query heads of a key head
  bool resident;          // the key tile of a key head stays in shared memory
  bool combine;           // a second launch combines the row parts
  int64_t items, blocks;  // blocks is the grid; they loop over the items
  int ring, shared;       // bytes of a team's tiles and of the whole block

  TOKENPRUNE_HD int parts() const { return cluster * teams; }
  int launches() const { return blocks == 0 ? 0 : combine ? 2 : 1; }
  int64_t partial_elements(int64_t batch, int64_t out_heads, int64_t columns) const {
    return combine ? batch * row_parts * 2 * out_heads * columns : 0;
  }
};

constexpr int kMaxTeams = 3;          // of 128 threads: leaves a thread 168 registers
constexpr int kMaxColumnCluster = 8;  // what every device with clusters can do
constexpr int kBlocksPerSm = 64;      // cap of the grid: more items are looped over
constexpr int kCombineThreads = 256;
constexpr int64_t kPartialFloor = 1 << 20;  // bytes of partial results that are always allowed

// Shared memory of a block: tiles and three sets of row statistics of every team, what is known of the item, and the
// parts' results at the end.
constexpr int kStatistics = kTileVectors + 1;  // pairs of floats, of a tile
constexpr int kStatisticsBytes = 3 * kStatistics * 2 * sizeof(float);
constexpr int kColumnItemBytes = (kTileVectors + 12) * sizeof(int64_t);
constexpr int kColumnStaticBytes = 1024;  // of block_reduce, and what the system keeps
constexpr int kResultBytes = 2 * kTileVectors * sizeof(float);

inline int column_shared_bytes(int64_t dim, int element_size, bool resident, int cluster, int teams) {
  return teams * (tile_shared_bytes(dim, element_size, resident) + kStatisticsBytes) + kColumnItemBytes +
         kTileVectors * static_cast<int>(sizeof(float)) + cluster * teams * kResultBytes;
}

struct ColumnShape {
  int64_t batch, query_heads, key_heads, rows, dim, columns;
  int element_size;
  bool per_head, every_row, last_only;
  bool one_launch;  // a second launch is not wanted, however long the first one takes
};

// Heads are split first, by the number of columns alone: their order of summation does not depend on the rows or on
// which row reductions are asked for, so `last` alone gives the bits of `last` among others. Rows are split when blocks
// would still be missing and each keeps enough to do.
inline ColumnPlan plan_attention_columns(const ColumnShape& s, const DeviceLimits& limits) {
  ColumnPlan plan{};
  plan.key_tiles = ceil_div<int64_t>(s.columns, kTileVectors);
  plan.group = s.key_heads > 0 ? static_cast<int>(s.query_heads / s.key_heads) : 0;
  plan.cluster = plan.teams = 1;
  plan.head_ranges = plan.row_parts = 1;
  const int64_t rows = s.last_only ? std::min<int64_t>(s.rows, 1) : s.rows;
  const int64_t tiles = s.every_row && rows == 0 ? 0 : s.batch * plan.key_tiles, wanted = 2 * int64_t(limits.sm_count);
  const int64_t row_tiles = ceil_div<int64_t>(rows, kTileVectors);
  const bool fits = tile_resident(s.dim, s.element_size);
  const bool grouped = s.key_heads > 0 && s.query_heads > s.key_heads;
  if (s.per_head) {
    plan.resident = fits && (grouped || row_tiles > 1);
    if (tiles > 0) plan.head_ranges = std::max<int64_t>(1, std::min(s.query_heads, ceil_div<int64_t>(wanted, tiles)));
  } else if (tiles > 0) {
    const auto room = [&](int parts) { return parts <= s.query_heads && tiles * parts <= wanted; };
    if (limits.has_clusters())
      while (plan.cluster < kMaxColumnCluster && room(2 * plan.cluster)) plan.cluster *= 2;
    plan.cluster = static_cast<int>(
        limits.planned_power(Planned::kAttentionCluster, plan.cluster, 1,
                             limits.has_clusters() ? std::min<int64_t>(kMaxColumnCluster, s.query_heads) : 1));
    const auto fits_with = [&](int teams) {
      return column_shared_bytes(s.dim, s.element_size, false, plan.cluster, teams) + kColumnStaticBytes <=
             limits.shared_per_block;
    };
    const auto heads_each = [&](int teams) { return ceil_div<int64_t>(s.query_heads, plan.cluster * teams); };
    for (int teams = 2; teams <= kMaxTeams; ++teams)
      if (room(plan.cluster * teams) && fits_with(teams) && heads_each(teams) < heads_each(plan.teams))
        plan.teams = teams;
    const auto teams = static_cast<int>(limits.planned(Planned::kAttentionTeams, plan.teams, 1, kMaxTeams));
    if (plan.cluster * teams <= s.query_heads && fits_with(teams)) plan.teams = teams;
    plan.resident = fits && grouped && plan.teams == 1;
  }
  const int64_t units = tiles * plan.head_ranges * plan.parts();
  if ((s.every_row || !s.one_launch) && units > 0 && row_tiles > 1) {
    const int64_t slots = 3 * int64_t(limits.sm_count);  // teams that run at once, by registers
    constexpr int64_t kSteps = 8;  // tiles a block should have to compute: below, a second launch costs more
    const int64_t heads = ceil_div(s.query_heads, plan.head_ranges * plan.parts());
    const int64_t bytes = 2 * s.batch * (s.per_head ? s.query_heads : 1) * s.columns * int64_t(sizeof(float));
    const int64_t small =  // 1% of the rows x columns matrices
        s.every_row ? row_tiles : std::max(row_tiles / 4, kPartialFloor / std::max<int64_t>(1, bytes));
    plan.row_parts = std::max<int64_t>(1, std::min({slots / units, row_tiles, row_tiles * heads / kSteps, small}));
    plan.row_parts = limits.planned(Planned::kAttentionRowParts, plan.row_parts, 1, row_tiles);
  }
  plan.rows_per_part = std::max<int64_t>(1, ceil_div(row_tiles, plan.row_parts)) * kTileVectors;
  plan.row_parts = std::max<int64_t>(1, ceil_div<int64_t>(rows, plan.rows_per_part));
  plan.combine = plan.row_parts > 1 && !s.every_row;
  plan.items = tiles * plan.head_ranges * plan.row_parts;
  plan.blocks = std::min(plan.items, int64_t(kBlocksPerSm) * limits.sm_count) * plan.cluster;
  plan.ring = tile_shared_bytes(s.dim, s.element_size, plan.resident);
  plan.shared = column_shared_bytes(s.dim, s.element_size, plan.resident, plan.cluster, plan.teams);
  return plan;
}

// Launches the column pass, and the combination of row parts when there are several.
template <class T>
cudaError_t launch_attention_columns(const ColumnProblem& problem, const ColumnPlan& plan, CallStream& stream);

// The column pass of a problem with every_row: one launch.
template <class T>
cudaError_t launch_attention_every_row(const ColumnProblem& problem, const ColumnPlan& plan, CallStream& stream);

// Its second launch.
cudaError_t launch_attention_columns_combine(const ColumnProblem& problem, const ColumnPlan& plan, CallStream& stream);

}  // namespace tokenprune
