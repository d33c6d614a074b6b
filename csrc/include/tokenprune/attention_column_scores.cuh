// What becomes of the probabilities of a tile: the parts' heads are combined, then the rows are reduced to a score per
// column or, with query_reduction none, written.
#pragma once

#include "tokenprune/attention_column_item.cuh"

namespace tokenprune {

// kEveryRow: rows are written, not reduced. What becomes of the heads is asked at run time there, so that a storage type
// has one instantiation more and not three.
enum class HeadOp { kSum, kMax, kNone, kEveryRow };

template <class T, HeadOp op>
struct ColumnScores : ColumnMemory {
  using Tile = DotTile<T>;
  static constexpr int kA = Tile::kThreadA, kB = Tile::kThreadB;
  static constexpr bool kReduced = op != HeadOp::kEveryRow;
  // b(j) is in 8 unit(j) .. 8 unit(j) + 7, for all lanes.
  __device__ __forceinline__ static constexpr int unit(int j) { return j * 8 / kB; }

  const ColumnProblem& c;
  const AttentionProblem& p;
  int present;  // rows at work
  float sum[kA], max[kA];
  Tile mass;  // P, or what the heads so far make of it

  __device__ __forceinline__ ColumnScores(const ColumnProblem& problem, const ColumnPlan& plan_in)
      : ColumnMemory{plan_in}, c(problem), p(problem.attention) {}

  __device__ __forceinline__ bool per_head() const { return kReduced ? op == HeadOp::kNone : c.per_head(); }

  // What the heads so far and one more make of a probability.
  __device__ __forceinline__ float joined(float heads, float probability) const {
    if (kReduced ? op == HeadOp::kMax : c.heads == ColumnHeads::kMax) return nan_max(heads, probability);
    return heads + probability;
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kA; ++i) sum[i] = max[i] = 0;  // P is not negative, and no row gives 0
  }

  // Rows 8 n .. 8 n + 7 of a tile are unit n, which one part reduces.
  __device__ __forceinline__ bool is_mine(int n, int mine) const {
    return plan.parts() == 1 || n * plan.parts() / 8 == mine;
  }

  // Combines the parts' heads: each part reads the values of its rows from all parts, in order. A thread's values go to
  // the thread of the same number. The ring is free between tiles.
  __device__ __forceinline__ void combine_parts() {
    float4* const values_of = reinterpret_cast<float4*>(ring_of(team()));
    const int mine = part();
    __syncthreads();
#pragma unroll
    for (int n = 0; n < 8; ++n)
      if (8 * n < present)
        values_of[n * kTileThreads + tile_thread()] =
            make_float4(mass.sums[n][0], mass.sums[n][1], mass.sums[n][2], mass.sums[n][3]);
    sync();
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      if (8 * n >= present || !is_mine(n, mine)) continue;
      const int at = n * kTileThreads + tile_thread();
      for (int rank = 0; rank < plan.cluster; ++rank) {
        for (int t = 0; t < plan.teams; ++t) {
          const float4 x = reinterpret_cast<const float4*>(cluster_shared(ring_of(t), rank))[at];
          const float values[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& total = mass.sums[n][e];
            total = rank + t == 0 ? values[e] : joined(total, values[e]);
          }
        }
      }
    }
    sync();
  }

  __device__ __forceinline__ bool row_counts(int64_t row) const {
    return c.query_mask == nullptr || c.query_mask[item().sample * c.query_mask_stride + row];
  }

  // Adds the rows at work, from `row` on, to the columns' sums. The rows of a tile are added up first: fewer roundings
  // than one long sum.
  __device__ __forceinline__ void add_rows(Tile& from, int64_t row) {
    const int mine = part();
    float of_tile[kA] = {};
#pragma unroll
    for (int j = 0; j < kB; ++j) {
      if (8 * unit(j) >= present) break;
      const int64_t r = row + Tile::b(j);
      if (!is_mine(unit(j), mine) || Tile::b(j) >= present || !row_counts(r)) continue;
#pragma unroll
      for (int i = 0; i < kA; ++i) {
        of_tile[i] += from.at(i, j);
        max[i] = nan_max(max[i], from.at(i, j));
        if (r == item().rows.last) cluster_shared(last_values(), 0)[Tile::a(i)] = from.at(i, j);
      }
    }
#pragma unroll
    for (int i = 0; i < kA; ++i) sum[i] += of_tile[i];
  }

  __device__ __forceinline__ float* scores_of_row(int head, int64_t row) const {
    return c.scores + ((item().sample * c.out_heads() + head) * p.rows + row) * c.columns + item().first_column;
  }

  // Makes of the heads' sums their mean: x / n, rounded once and without the branches of a division. The remainder of
  // q = x (1 / n) is exact; where x is infinite it is NaN, and q is the quotient.
  __device__ __forceinline__ void divide_by_heads() {
    const float n = static_cast<float>(p.query_heads), inverse = 1 / n;
#pragma unroll
    for (int j = 0; j < kB; ++j)
#pragma unroll
      for (int i = 0; i < kA; ++i) {
        const float q = mass.at(i, j) * inverse, mean = __fmaf_rn(__fmaf_rn(-q, n, mass.at(i, j)), inverse, q);
        mass.at(i, j) = mean == mean ? mean : q;
      }
  }

  // Writes the combined heads of the rows at work, from `row` on. A row that does not count has scores of 0.
  __device__ __forceinline__ void write_rows(Tile& from, int head, int64_t row) {
    const int mine = part();
    const int64_t columns = c.columns - item().first_column;
    float* const to = scores_of_row(head, row);
#pragma unroll
    for (int j = 0; j < kB; ++j) {
      if (8 * unit(j) >= present) break;
      if (!is_mine(unit(j), mine) || Tile::b(j) >= present) continue;
      const bool counts = row_counts(row + Tile::b(j));
#pragma unroll
      for (int i = 0; i < kA; ++i)
        if (Tile::a(i) < columns) to[Tile::b(j) * c.columns + Tile::a(i)] = counts ? from.at(i, j) : 0.0f;
    }
  }

  // The rows [begin, end), of which none counts and sees one of these keys.
  __device__ __forceinline__ void write_zeros(int64_t begin, int64_t end) {
    const int column = threadIdx.x % kTileVectors, step = blockDim.x / kTileVectors;
    if (cluster_rank() != 0 || item().first_column + column >= c.columns) return;
    const int first_head = per_head() ? head_begin() : 0, end_head = per_head() ? head_end() : 1;
    for (int head = first_head; head < end_head; ++head)
      for (int64_t row = begin + threadIdx.x / kTileVectors; row < end; row += step)
        scores_of_row(head, row)[column] = 0;
  }

  // Combines the lanes' and the parts' sums in the first block, which writes them.
  __device__ __forceinline__ void finish(int head) {
    float* const to = cluster_shared(results_of(part()), 0);
#pragma unroll
    for (int i = 0; i < kA; ++i) {
      const float s = warp_reduce(sum[i], Sum(), Tile::kLanesPerA), m = warp_reduce(max[i], NanMax(), Tile::kLanesPerA);
      if (lane_id() % Tile::kLanesPerA != 0) continue;
      to[Tile::a(i)] = s;
      to[kTileVectors + Tile::a(i)] = m;
    }
    clear();
    sync();
    const int64_t column = item().first_column + threadIdx.x;
    if (cluster_rank() != 0 || threadIdx.x >= kTileVectors || column >= c.columns) return;
    const CountedRows& rows = item().rows;
    const int64_t sample = item().sample, row_part = item().row_part;
    ColumnSums sums{0, 0, 0};
    for (int q = 0; q < plan.parts(); ++q) {
      sums.sum += results_of(q)[threadIdx.x];
      sums.max = nan_max(sums.max, results_of(q)[kTileVectors + threadIdx.x]);
    }
    if (rows.last >= rows.first && rows.last < rows.end) sums.last = last_values()[threadIdx.x];
    const bool alone = plan.row_parts == 1;
    const bool has_last = alone || row_part == (rows.last < 0 ? 0 : rows.last / plan.rows_per_part);
    write_scores(c, sample, head, column, rows.count, sums, alone, has_last);
    if (alone) return;
    float* partial = c.partial + ((sample * plan.row_parts + row_part) * 2 * c.out_heads() + head) * c.columns + column;
    partial[0] = sums.sum;
    partial[c.out_heads() * c.columns] = sums.max;
  }
};

}  // namespace tokenprune
