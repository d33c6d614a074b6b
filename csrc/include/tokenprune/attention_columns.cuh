// The column pass: scores of keys from the rows' log-sum-exp. Nothing of size rows x keys leaves the registers.
//
//   64 columns (keys, gathered by key_indices) of a sample = operand A        a block, or a cluster of blocks
//     for each 64 rows:                                                       rows = operand B
//       for each head:  P = exp(logit - lse), summed or maximised over heads  32 values per thread
//       the parts' values are combined (heads are split over teams and blocks), each part going on with some rows
//       rows are reduced: sum, maximum and last row of every column           per thread, for its columns
//   the sums of lanes, then of parts are combined in a fixed order; 64 columns are written
//
// With head_reduction none no heads are combined, and the rows are the inner loop. With query_reduction none (every_row)
// the combined heads of a tile are written in place of the reduction of its rows. A thread has what belongs to one
// column in 4 (float32: 8) neighbouring lanes, so rows are reduced in registers. Row tiles of which no row counts
// or sees any of these keys (query_mask, causality) are skipped at both ends.
//
// Launch 1: grid items x cluster, block 128 x teams; shared memory per team 50 KiB (26 KiB + 8 KiB per 128 bytes of a
//   vector with the key tile resident) + 1.5 KiB, and 512 bytes per part. Every block reads its 64 keys of every key head
//   once per row tile (from L2 after the first time) and all rows' queries, from L2 as well: at the minimum, the keys
//   cross the memory bus once, and so do the queries.
// Launch 2 (several row parts only): attention_column_rows.cuh.
#pragma once

#include "tokenprune/attention_column_scores.cuh"
#include "tokenprune/attention_state.cuh"

namespace tokenprune {

template <class T, HeadOp op>
struct ColumnPass : ColumnScores<T, op> {
  using Scores = ColumnScores<T, op>;
  using Scores::add_rows, Scores::combine_parts, Scores::divide_by_heads, Scores::write_rows, Scores::write_zeros;
  using Scores::c, Scores::p, Scores::plan, Scores::present, Scores::mass, Scores::kA, Scores::kB, Scores::kReduced;
  using Scores::item, Scores::head_begin, Scores::head_end, Scores::ring_of, Scores::statistics;
  using Scores::part, Scores::team, Scores::sync, Scores::clear, Scores::finish, Scores::joined, Scores::per_head;
  using typename Scores::Tile;

  uint32_t visible;  // bit i * kB + j: row b(j) of those at work sees column a(i)

  __device__ __forceinline__ ColumnPass(const ColumnProblem& problem, const ColumnPlan& plan_in)
      : Scores(problem, plan_in) {}

  __device__ __forceinline__ void begin(int64_t number) {
    sync();  // the last item's reads of shared memory
    if (threadIdx.x == 0) item().number = number;
    const int64_t first_column = number % plan.key_tiles * kTileVectors;
    number /= plan.key_tiles;
    const int64_t range = per_head() ? number % plan.head_ranges : part();
    const int64_t ranges = per_head() ? plan.head_ranges : plan.parts();
    number /= plan.head_ranges;
    const int64_t row_part = number % plan.row_parts, sample = number / plan.row_parts;
    if (tile_thread() == 0) {
      item().heads[team()].x = static_cast<int>(p.query_heads * range / ranges);
      item().heads[team()].y = static_cast<int>(p.query_heads * (range + 1) / ranges);
    }

    long long lowest = p.keys;
    if (threadIdx.x < kTileVectors) {
      const int64_t column = first_column + threadIdx.x;
      int64_t key = -1;
      if (column < c.columns) key = c.key_indices ? c.key_indices[sample * c.key_indices_stride + column] : column;
      if (key < 0 || key >= p.keys || !key_is_unmasked(p, sample, key)) key = -1;
      item().keys[threadIdx.x] = key;
      if (key >= 0) lowest = key;
    }
    // Without causality every row sees the first key, whatever those of this tile are.
    lowest = p.causal ? block_reduce(lowest, Min(), static_cast<long long>(p.keys)) : 0;
    const int64_t from = row_part * plan.rows_per_part, to = from + plan.rows_per_part;
    CountedRows rows = counted_rows(c, sample, from, to < p.rows ? to : p.rows, lowest);
    rows.first = rows.first / kTileVectors * kTileVectors;  // equal tokens of different tiles are summed alike
    if (c.last_only) {
      rows.first = rows.last < 0 ? 0 : rows.last;
      rows.end = rows.last + 1;
    }
    if (threadIdx.x == 0) {
      item().sample = sample;
      item().first_column = first_column;
      item().row_part = row_part;
      item().rows = rows;
    }
    __syncthreads();
    visible = 0;
#pragma unroll
    for (int i = 0; i < kA; ++i)
      if (item().keys[Tile::a(i)] >= 0) visible |= ((uint64_t(1) << kB) - 1) << i * kB;
    clear();
    if constexpr (!kReduced) {
      if (p.query_heads == 0) rows.end = rows.first;
      write_zeros(from, rows.first);
      write_zeros(rows.end, to < p.rows ? to : p.rows);
    }
  }

  // The rows from `row` on are the next ones at work.
  __device__ __forceinline__ void take_rows(int64_t row) {
    const int64_t left = item().rows.end - row, sample = item().sample;
    present = left < kTileVectors ? static_cast<int>(left) : kTileVectors;
    if (!p.causal) return;
    visible = 0;  // -1 as an unsigned number is beyond every limit
#pragma unroll
    for (int j = 0; j < kB; ++j) {
      const int64_t r = row + Tile::b(j);
      if (Tile::b(j) >= present) continue;
      const int64_t limit = last_visible_key(p, sample, r);
      if (limit < 0) continue;
#pragma unroll
      for (int i = 0; i < kA; ++i)
        if (static_cast<uint64_t>(item().keys[Tile::a(i)]) <= static_cast<uint64_t>(limit))
          visible |= 1u << (i * kB + j);
    }
  }

  // The exponents of 2 that logits become: of 16 bits already with the factor of dot products and with lse, which adds a
  // rounding to each, far below those of the inputs.
  static constexpr float kFolded = Tile::kMma ? kLog2e : 1.0f, kUnfolded = Tile::kMma ? 1.0f : kLog2e;

  // What row `thread of the team` of the tile (head, row) multiplies dot products with, and its lse: times kFolded.
  __device__ __forceinline__ float2 statistics_of(int head, int64_t row) const {
    const int v = tile_thread();
    if (v >= kTileVectors || row + v >= item().rows.end || head >= head_end()) return make_float2(0.0f, 0.0f);
    const int64_t sample = item().sample;
    return make_float2(p.scale * row_factor(p, sample, head, row + v) * kFolded,
                       c.lse[(sample * p.query_heads + head) * p.rows + row + v] * kFolded);
  }

  // Whole warps call it; the last entry says for either of the two warps whether one of its rows has lse -inf or NaN,
  // with which exp(logit - lse) is not 0 where it should be.
  __device__ __forceinline__ void put_statistics(int tile, float2 value) {
    if (tile_thread() >= kTileVectors) return;
    statistics(tile)[tile_thread()] = value;
    const bool special = __any_sync(kAllLanes, !(value.y > -INFINITY));
    if (lane_id() == 0) (&statistics(tile)[kTileVectors].x)[tile_warp()] = special;
  }

  // Adds the probabilities of the tile to the heads before; with kEvery no value is hidden.
  template <bool kEvery>
  __device__ __forceinline__ void add_probabilities(Tile& dots, const float2* of_row, uint32_t seen) {
    Tile& into = op == HeadOp::kNone ? dots : mass;
#pragma unroll
    for (int j = 0; j < kB; ++j) {
      if (16 * Tile::block(j) >= present) break;
      const float2 row = of_row[Tile::b(j)];
#pragma unroll
      for (int i = 0; i < kA; ++i) {
        float probability = exp2_approx(__fmaf_rn(dots.at(i, j), row.x, -row.y) * kUnfolded);
        if (!kEvery && (seen >> (i * kB + j) & 1) == 0) probability = 0.0f;
        into.at(i, j) = op == HeadOp::kNone ? probability : joined(into.at(i, j), probability);
      }
    }
  }

  // Turns dot products into probabilities and adds them to the heads before. No branch depends on a value: the
  // exponentials of several overlap.
  __device__ __forceinline__ void add_head(Tile& dots, int head, int tile) {
    const float2* of_row = statistics(tile);
    if (p.cosine && head < head_end()) {
#pragma unroll
      for (int i = 0; i < kA; ++i) {
        const int64_t key = item().keys[Tile::a(i)];
        if (key < 0) continue;
        const float by = key_factor(p, item().sample, head / plan.group, key);
#pragma unroll
        for (int j = 0; j < kB; ++j) dots.at(i, j) = by_key_norm(dots.at(i, j), by);
      }
    }
    uint32_t seen = head < head_end() ? visible : 0;
    if (of_row[kTileVectors].x + of_row[kTileVectors].y != 0) {
#pragma unroll
      for (int j = 0; j < kB; ++j) {
        const float2 row = of_row[Tile::b(j)];
#pragma unroll
        for (int i = 0; i < kA; ++i)
          if (row.y == -INFINITY || dots.at(i, j) * row.x == -INFINITY) seen &= ~(1u << (i * kB + j));
      }
    }
    if (seen == 0xFFFFFFFFu)
      add_probabilities<true>(dots, of_row, seen);
    else
      add_probabilities<false>(dots, of_row, seen);
  }

  __device__ __forceinline__ int64_t row_of_tile(int tile) const {
    return item().rows.first + int64_t(tile) * kTileVectors;
  }

  // The tiles of heads head_begin + first .. (over_rows false) or of row tiles from `row_tile` on (true).
  __device__ __forceinline__ void run_tiles(int first_head, int row_tile, int tiles, bool over_rows) {
    const auto head_of = [&](int t) { return first_head + (over_rows ? 0 : t); };
    const auto row_of = [&](int t) { return row_of_tile(row_tile + (over_rows ? t : 0)); };
    // A team with fewer heads than others multiplies its last one again, for nothing.
    const auto loaded_head = [&](int t) { return head_of(t) < head_end() ? head_of(t) : head_end() - 1; };
    const auto keys_of = [&](int t) {
      return ColumnKeys<T>{keys_of_head<T>(p, item().sample, loaded_head(t) / plan.group), p.key_strides.row,
                           item().keys, tile_present(c.columns - item().first_column), p.key_aligned};
    };
    const auto queries_of = [&](int t) {
      return query_rows_of_head<T>(p, item().sample, loaded_head(t), row_of(t), item().rows.end);
    };
    __syncthreads();  // the last run's reads of statistics
    put_statistics(0, statistics_of(head_of(0), row_of(0)));
    put_statistics(1, statistics_of(head_of(1), row_of(1)));
    const auto visit = [&](int t, Tile& dots) {
      // Read before the work and stored after it: the store waits for nothing, and no register holds the values while a
      // tile is multiplied.
      const float2 after_next = statistics_of(head_of(t + 2), row_of(t + 2));
      if (per_head() && over_rows) take_rows(row_of(t));
      if (!kReduced && per_head()) mass.clear();
      add_head(dots, head_of(t), t);
      put_statistics(t + 2, after_next);
      if constexpr (op == HeadOp::kNone) {
        add_rows(dots, row_of(t));
        if (!over_rows || t == tiles - 1) finish(head_of(t));
      }
      if (!kReduced && per_head()) write_rows(mass, head_of(t), row_of(t));
    };
    constexpr bool kVote = false;  // sm_100 would spill
    for_each_tile<T, false, 4, kVote>(ring_of(team()), static_cast<int>(p.dim), plan.resident, tiles, keys_of,
                                      queries_of, visit);
  }

  __device__ __forceinline__ int64_t rows_after(int row_tile) const {
    return item().rows.end - item().rows.first - int64_t(row_tile) * kTileVectors;
  }

  __device__ __forceinline__ void run() {
    // Teams pass the same barriers, so they go through the same number of tiles.
    const int heads = plan.teams > 1 ? static_cast<int>((p.query_heads + plan.parts() - 1) / plan.parts())
                                     : head_end() - head_begin();
    const bool over_rows = per_head() && rows_after(1) > 0;
    int row_tile = 0, done = 0;
    while (rows_after(row_tile) > 0 && done < heads) {
      const int64_t row = row_of_tile(row_tile);
      if (done == 0 && !over_rows) {
        take_rows(row);
        mass.clear();
      }
      int tiles = heads - done;
      if (over_rows) {
        tiles = static_cast<int>((rows_after(0) + kTileVectors - 1) / kTileVectors);
      } else if (plan.resident) {
        const int left = plan.group - (head_begin() + done) % plan.group;  // heads of the same key head
        if (left < tiles) tiles = left;
      }
      run_tiles(head_begin() + done, row_tile, tiles, over_rows);
      done += over_rows ? 1 : tiles;
      if (over_rows || done < heads) continue;
      if (!per_head()) {
        if (plan.parts() > 1) combine_parts();
        if constexpr (kReduced) {
          add_rows(mass, row);
        } else {
          if (c.heads == ColumnHeads::kMean) divide_by_heads();
          write_rows(mass, 0, row);
        }
        done = 0;
      }
      ++row_tile;
    }
    if constexpr (kReduced) {
      const int from = op == HeadOp::kNone ? head_begin() : 0;
      const int to = op != HeadOp::kNone ? 1 : rows_after(0) > 0 ? from : head_end();  // with rows, heads are finished
      for (int head = from; head < to; ++head) {
        __syncthreads();
        finish(head);
      }
    }
  }
};

template <class T, HeadOp op>
__global__ void __launch_bounds__(kTileThreads* kMaxTeams, 1)
    attention_columns_kernel(const ColumnProblem c, const ColumnPlan plan) {
  let_next_launch_start();
  wait_for_launch_before();  // for lse and the inverse norms
  ColumnPass<T, op> pass(c, plan);
  for (int64_t item = blockIdx.x / plan.cluster; item < plan.items;) {
    pass.begin(item);
    pass.run();
    item = pass.item().number + gridDim.x / plan.cluster;
  }
}

inline Launch column_launch(const ColumnPlan& plan, CallStream& stream) {
  return {plan.blocks, dim3(kTileThreads * plan.teams), static_cast<size_t>(plan.shared), stream,
          static_cast<unsigned>(plan.cluster)};
}

template <class T>
cudaError_t launch_attention_columns(const ColumnProblem& c, const ColumnPlan& plan, CallStream& stream) {
  const auto kernel = c.per_head()                   ? attention_columns_kernel<T, HeadOp::kNone>
                      : c.heads == ColumnHeads::kMax ? attention_columns_kernel<T, HeadOp::kMax>
                                                     : attention_columns_kernel<T, HeadOp::kSum>;
  const cudaError_t status = launch(column_launch(plan, stream), kernel, c, plan);
  if (status != cudaSuccess || plan.launches() < 2) return status;
  return launch_attention_columns_combine(c, plan, stream);
}

template <class T>
cudaError_t launch_attention_every_row(const ColumnProblem& c, const ColumnPlan& plan, CallStream& stream) {
  return launch(column_launch(plan, stream), attention_columns_kernel<T, HeadOp::kEveryRow>, c, plan);
}

}  // namespace tokenprune
