// The column pass: scores of keys from the rows' log-sum-exp. Nothing of size rows x keys leaves the registers.
//
//   64 columns (keys, gathered by key_indices) of a sample = operand A        a block, or a cluster of blocks
//     for each 64 rows:                                                       rows = operand B
//       for each head:  P = exp(logit - lse), summed or maximised over heads  32 values per thread
//       the parts' values meet (heads are split over teams and blocks), each part going on with some of the rows
//       rows are reduced: sum, maximum and last row of every column           per thread, for its columns
//   lanes, then parts meet in a fixed order; 64 columns are written
//
// With head_reduction none there is nothing to meet, and the rows are the inner loop. A thread has what belongs to one
// column in 4 (float32: 8) neighbouring lanes, so rows are reduced in registers. Row tiles of which no row counts
// or sees any of these keys (query_mask, causality) are skipped at both ends.
//
// Launch 1: grid items x cluster, block 128 x teams; shared memory per team 48 KiB (24 KiB + 8 KiB per 128 bytes of a
//   vector with the key tile resident) + 1 KiB, and 768 bytes per part. Every block reads its 64 keys of every key head
//   once per row tile (from L2 after the first time) and all rows' queries, from L2 as well: at the minimum, the keys
//   cross the memory bus once, and so do the queries.
// Launch 2 (several row parts only): a thread per score, reads 8 bytes per row part and score.
#pragma once

#include "tokenprune/attention_columns.h"
#include "tokenprune/attention_tile.cuh"
#include "tokenprune/math.h"

namespace tokenprune {

enum class HeadOp { kSum, kMax, kNone };

struct NanMax {
  __device__ __forceinline__ float operator()(float a, float b) const { return nan_max(a, b); }
};

// The keys of a tile's columns: where they are, or -1 for what has no score: beyond the columns, masked, or no key.
template <class T>
struct ColumnKeys {
  VectorList<T> keys;
  const int64_t* indices;  // [64], in shared memory
  int64_t count;
  bool aligned;

  __device__ __forceinline__ const T* vector(int64_t v) const {
    const int64_t key = indices[v];
    return key < 0 ? nullptr : keys.data + key * keys.row_stride;
  }
};

struct CountedRows {
  int64_t count, last;  // of the rows with query_mask; -1: there is none
  int64_t first, end;   // of those, which of [begin, limit) can see key `lowest`
};

// All threads of the block call it and get the same.
__device__ __forceinline__ CountedRows counted_rows(const ColumnProblem& c, int64_t sample, int64_t begin,
                                                    int64_t limit, int64_t lowest) {
  const AttentionProblem& p = c.attention;
  if (c.query_mask == nullptr && !p.causal) return {p.rows, p.rows - 1, begin, limit};
  const bool* mask = c.query_mask == nullptr ? nullptr : c.query_mask + sample * c.query_mask_stride;
  long long count = 0, last = -1, first = limit, end = begin;
  for (int64_t row = threadIdx.x; row < p.rows; row += blockDim.x) {
    if (mask != nullptr && !mask[row]) continue;
    ++count;
    last = row;
    if (row < begin || row >= limit || last_visible_key(p, sample, row) < lowest) continue;
    if (row < first) first = row;
    end = row + 1;
  }
  count = block_reduce(count, Sum(), 0ll);
  last = block_reduce(last, Max(), -1ll);
  first = block_reduce(first, Min(), static_cast<long long>(limit));
  end = block_reduce(end, Max(), static_cast<long long>(begin));
  return {count, last, first, end};
}

// Writes the scores of one column that its rows' sum, maximum and last value give.
__device__ __forceinline__ void write_scores(const ColumnProblem& c, int64_t sample, int64_t head, int64_t column,
                                             int64_t count, const float* sum, const float* max, const float* last) {
  const float heads = c.heads == ColumnHeads::kMean ? static_cast<float>(c.attention.query_heads) : 1.0f;
  for (int r = 0; r < c.kind_count; ++r) {
    const ColumnRows kind = c.kind(r);
    const float* value = kind == ColumnRows::kLast ? last : kind == ColumnRows::kMax ? max : sum;
    if (value == nullptr) continue;
    const float rows = kind == ColumnRows::kMean && count > 1 ? static_cast<float>(count) : 1.0f;
    c.scores[((sample * c.total_kinds + c.first_kind + r) * c.out_heads() + head) * c.columns + column] =
        *value / heads / rows;
  }
}

template <class T, HeadOp op>
struct ColumnPass {
  using Tile = DotTile<T>;
  static constexpr int kA = Tile::kThreadA, kB = Tile::kThreadB;

  const ColumnProblem& c;
  const AttentionProblem& p;
  const ColumnPlan& plan;
  // Shared memory: of this team, then of the block.
  unsigned char* ring;
  float2* statistics;  // [2][64]: the factor and the lse of each row, for the tile at work and for the next one
  float* results;      // [parts][kColumnSums][64]
  int64_t* keys;       // [64], -1: hidden from every row

  int team, part;
  int64_t sample, first_column, head_begin, head_end, row_part;
  CountedRows rows;
  // Of the rows at work: the first one, how many; bit j: row b(j) counts; bit i * kB + j: it sees column a(i).
  int64_t row0;
  int present;
  uint32_t valid, visible;
  int64_t index[kA];  // the keys of this thread's columns
  float sum[kA], max[kA], last[kA];
  Tile mass;      // P, or what the heads so far make of it
  unsigned turn;  // tiles so far

  __device__ __forceinline__ ColumnPass(const ColumnProblem& problem, const ColumnPlan& plan_in)
      : c(problem), p(problem.attention), plan(plan_in), turn(0) {
    const int bytes = tile_shared_bytes(p.dim, sizeof(T), plan.resident);
    unsigned char* shared = dynamic_shared();
    team = threadIdx.x / kTileThreads;
    part = cluster_rank() * plan.teams + team;
    ring = shared + team * bytes;
    shared += plan.teams * bytes;
    statistics = reinterpret_cast<float2*>(shared) + team * 2 * kTileVectors;
    shared += plan.teams * 2 * kTileVectors * sizeof(float2);
    keys = reinterpret_cast<int64_t*>(shared);
    results = reinterpret_cast<float*>(keys + kTileVectors);
  }

  // Barrier of all that work on an item.
  __device__ __forceinline__ void meet() const {
    if (plan.cluster > 1)
      cluster_sync();
    else
      __syncthreads();
  }

  __device__ __forceinline__ void begin(int64_t item) {
    first_column = item % plan.key_tiles * kTileVectors;
    item /= plan.key_tiles;
    const int64_t range = op == HeadOp::kNone ? item % plan.head_ranges : part;
    const int64_t ranges = op == HeadOp::kNone ? plan.head_ranges : plan.parts();
    item /= plan.head_ranges;
    row_part = item % plan.row_parts;
    sample = item / plan.row_parts;
    head_begin = p.query_heads * range / ranges;
    head_end = p.query_heads * (range + 1) / ranges;

    meet();  // the last item's reads of shared memory
    if (threadIdx.x < kTileVectors) {
      const int64_t column = first_column + threadIdx.x;
      int64_t key = -1;
      if (column < c.columns) key = c.key_indices ? c.key_indices[sample * c.key_indices_stride + column] : column;
      keys[threadIdx.x] = key >= 0 && key < p.keys && key_is_unmasked(p, sample, key) ? key : -1;
    }
    __syncthreads();
    long long lowest = p.keys;
    visible = 0;
#pragma unroll
    for (int i = 0; i < kA; ++i) {
      index[i] = keys[Tile::a(i)];
      if (index[i] < 0) continue;
      visible |= ((uint64_t(1) << kB) - 1) << i * kB;
      if (index[i] < lowest) lowest = index[i];
    }
    if (p.causal) lowest = block_reduce(lowest, Min(), static_cast<long long>(p.keys));
    const int64_t from = row_part * plan.rows_per_part, to = from + plan.rows_per_part;
    rows = counted_rows(c, sample, from, to < p.rows ? to : p.rows, lowest);
    rows.first = rows.first / kTileVectors * kTileVectors;  // equal tokens of different tiles are summed alike
    if (c.last_only) {
      rows.first = rows.last < 0 ? 0 : rows.last;
      rows.end = rows.last + 1;
    }
    clear();
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kA; ++i) sum[i] = max[i] = last[i] = 0;  // P is not negative, and no row gives 0
  }

  // The rows from `row` on are the next ones at work.
  __device__ __forceinline__ void take_rows(int64_t row) {
    row0 = row;
    present = rows.end - row < kTileVectors ? static_cast<int>(rows.end - row) : kTileVectors;
    valid = 0;
    if (p.causal) visible = 0;
#pragma unroll
    for (int j = 0; j < kB; ++j) {
      const int64_t r = row + Tile::b(j);
      if (Tile::b(j) >= present) continue;
      if (c.query_mask == nullptr || c.query_mask[sample * c.query_mask_stride + r]) valid |= 1u << j;
      if (!p.causal) continue;
      const int64_t limit = last_visible_key(p, sample, r);
#pragma unroll
      for (int i = 0; i < kA; ++i)
        if (index[i] >= 0 && index[i] <= limit) visible |= 1u << (i * kB + j);
    }
  }

  // What row `thread of the team` of the tile (head, row) multiplies dot products with, and its lse. A row or head that
  // does not exist sees nothing.
  __device__ __forceinline__ float2 statistics_of(int64_t head, int64_t row) const {
    const int v = tile_thread();
    if (v >= kTileVectors || row + v >= rows.end || head >= head_end) return make_float2(0.0f, -INFINITY);
    return make_float2(p.scale * row_factor(p, sample, head, row + v),
                       c.lse[(sample * p.query_heads + head) * p.rows + row + v]);
  }

  __device__ __forceinline__ void put_statistics(unsigned for_turn, float2 value) {
    if (tile_thread() < kTileVectors) statistics[for_turn % 2 * kTileVectors + tile_thread()] = value;
  }

  // Turns dot products into probabilities and adds them to the heads before.
  __device__ __forceinline__ void add_head(Tile& dots, int64_t head) {
    const float2* of_row = statistics + turn % 2 * kTileVectors;
    float by[kA];
#pragma unroll
    for (int i = 0; i < kA; ++i) by[i] = 1.0f;
    if (p.cosine && head < head_end) {
#pragma unroll
      for (int i = 0; i < kA; ++i)
        if (index[i] >= 0) by[i] = key_factor(p, sample, head / p.group(), index[i]);
    }
#pragma unroll
    for (int j = 0; j < kB; ++j) {
      if (16 * Tile::block(j) >= present) break;
      const float2 row = of_row[Tile::b(j)];
#pragma unroll
      for (int i = 0; i < kA; ++i) {
        const float logit = dots.at(i, j) * by[i] * row.x;
        const bool seen = (visible >> (i * kB + j) & 1) != 0 && logit != -INFINITY && row.y != -INFINITY;
        const float probability = seen ? expf(logit - row.y) : 0.0f;
        if constexpr (op == HeadOp::kNone)
          mass.at(i, j) = probability;
        else if constexpr (op == HeadOp::kMax)
          mass.at(i, j) = nan_max(mass.at(i, j), probability);
        else
          mass.at(i, j) += probability;
      }
    }
  }

  // Rows 8 n .. 8 n + 7 of a tile are reduced by one part.
  __device__ __forceinline__ bool is_mine(int n) const { return plan.parts() == 1 || n * plan.parts() / 8 == part; }

  // The parts' heads meet: each part reads the values of its rows from all parts, in order. A thread's values go to the
  // thread of the same number. The ring is free between tiles.
  __device__ __forceinline__ void meet_parts() {
    float4* const mine = reinterpret_cast<float4*>(ring);
    const int ring_bytes = tile_shared_bytes(p.dim, sizeof(T), plan.resident);
    unsigned char* const first_ring = ring - team * ring_bytes;
    __syncthreads();
#pragma unroll
    for (int n = 0; n < 8; ++n)
      if (8 * n < present)
        mine[n * kTileThreads + tile_thread()] =
            make_float4(mass.sums[n][0], mass.sums[n][1], mass.sums[n][2], mass.sums[n][3]);
    meet();
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      if (8 * n >= present || !is_mine(n)) continue;
      for (int q = 0; q < plan.parts(); ++q) {
        const unsigned char* theirs = cluster_shared(first_ring, q / plan.teams) + q % plan.teams * ring_bytes;
        const float4 x = reinterpret_cast<const float4*>(theirs)[n * kTileThreads + tile_thread()];
        const float values[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& total = mass.sums[n][e];
          if (q == 0)
            total = values[e];
          else if constexpr (op == HeadOp::kMax)
            total = nan_max(total, values[e]);
          else
            total += values[e];
        }
      }
    }
    meet();
  }

  // Adds the rows at work to the columns' sums. The rows of a tile are added up first: fewer roundings than one long
  // sum.
  __device__ __forceinline__ void add_rows() {
    float of_tile[kA] = {};
#pragma unroll
    for (int j = 0; j < kB; ++j) {
      const int unit = j * 8 / kB;
      if (8 * unit >= present) break;
      if (!is_mine(unit) || (valid >> j & 1) == 0) continue;
#pragma unroll
      for (int i = 0; i < kA; ++i) {
        of_tile[i] += mass.at(i, j);
        max[i] = nan_max(max[i], mass.at(i, j));
        if (row0 + Tile::b(j) == rows.last) last[i] = mass.at(i, j);
      }
    }
#pragma unroll
    for (int i = 0; i < kA; ++i) sum[i] += of_tile[i];
  }

  // The lanes' and the parts' sums meet in the first block, which writes them.
  __device__ __forceinline__ void finish(int64_t head) {
    float* const to = cluster_shared(results, 0) + part * kColumnSums * kTileVectors;
#pragma unroll
    for (int i = 0; i < kA; ++i) {
      const float s = warp_reduce(sum[i], Sum(), Tile::kLanesPerA), m = warp_reduce(max[i], NanMax(), Tile::kLanesPerA);
      const float l = warp_reduce(last[i], Sum(), Tile::kLanesPerA);  // of one lane
      if (lane_id() % Tile::kLanesPerA != 0) continue;
      to[Tile::a(i)] = s;
      to[kTileVectors + Tile::a(i)] = m;
      to[2 * kTileVectors + Tile::a(i)] = l;
    }
    clear();
    meet();
    const int64_t column = first_column + threadIdx.x;
    if (part - team != 0 || threadIdx.x >= kTileVectors || column >= c.columns) return;
    float s = 0, m = 0, l = 0;
    for (int q = 0; q < plan.parts(); ++q) {
      const float* of_part = results + q * kColumnSums * kTileVectors + threadIdx.x;
      s += of_part[0];
      m = nan_max(m, of_part[kTileVectors]);
      l += of_part[2 * kTileVectors];
    }
    const bool alone = plan.row_parts == 1;
    const bool has_last = alone || row_part == (rows.last < 0 ? 0 : rows.last / plan.rows_per_part);
    write_scores(c, sample, head, column, rows.count, alone ? &s : nullptr, alone ? &m : nullptr,
                 has_last ? &l : nullptr);
    if (alone) return;
    float* partial = c.partial + ((sample * plan.row_parts + row_part) * 2 * c.out_heads() + head) * c.columns + column;
    partial[0] = s;
    partial[c.out_heads() * c.columns] = m;
  }

  // The tiles of heads head_begin + first .. (over_rows false) or of row tiles from `row` on (true).
  __device__ __forceinline__ void run_tiles(int64_t first_head, int64_t row, int tiles, bool over_rows) {
    const auto head_of = [&](int t) { return first_head + (over_rows ? 0 : t); };
    const auto row_of = [&](int t) { return row + (over_rows ? int64_t(t) * kTileVectors : 0); };
    const int64_t columns = c.columns - first_column < kTileVectors ? c.columns - first_column : kTileVectors;
    const auto keys_of = [&](int t) {
      const int64_t head = head_of(t);
      if (head >= head_end) return TileVectors<T, ColumnKeys<T>>{};
      const VectorList<T> list = keys_of_head<T>(p, sample, head / p.group());
      return TileVectors<T, ColumnKeys<T>>{{list, keys, columns, list.aligned}, 0};
    };
    const auto queries_of = [&](int t) {
      const int64_t head = head_of(t);
      if (head >= head_end) return TileVectors<T>{};
      VectorList<T> list = query_rows_of_head<T>(p, sample, head);
      list.count = rows.end;
      return TileVectors<T>{list, row_of(t)};
    };
    put_statistics(turn, statistics_of(head_of(0), row_of(0)));
    float2 next = statistics_of(head_of(1), row_of(1));
    for_each_tile<T>(ring, static_cast<int>(p.dim), plan.resident, tiles, keys_of, queries_of,
                     [&](int t, Tile& dots) {
                       put_statistics(turn + 1, next);
                       next = statistics_of(head_of(t + 2), row_of(t + 2));
                       if (op == HeadOp::kNone && over_rows) take_rows(row_of(t));
                       add_head(dots, head_of(t));
                       ++turn;
                       if constexpr (op == HeadOp::kNone) {
                         add_rows();
                         if (!over_rows || t == tiles - 1) finish(head_of(t));
                       }
                     });
  }

  __device__ __forceinline__ void run() {
    // Teams pass the same barriers, so they go through the same number of tiles.
    const int64_t heads = plan.teams > 1 ? ceil_div<int64_t>(p.query_heads, plan.parts()) : head_end - head_begin;
    const bool over_rows = op == HeadOp::kNone && rows.end - rows.first > kTileVectors;
    int64_t row = rows.first, done = 0;
    while (row < rows.end && done < heads) {
      if (done == 0 && !over_rows) {
        take_rows(row);
        mass.clear();
      }
      int64_t tiles = heads - done;
      if (over_rows) {
        tiles = ceil_div<int64_t>(rows.end - row, kTileVectors);
      } else if (plan.resident) {
        const int64_t left = p.group() - (head_begin + done) % p.group();  // heads of the same key head
        if (left < tiles) tiles = left;
      }
      run_tiles(head_begin + done, row, static_cast<int>(tiles), over_rows);
      done += over_rows ? 1 : tiles;
      if (over_rows || done < heads) continue;
      if constexpr (op != HeadOp::kNone) {
        if (plan.parts() > 1) meet_parts();
        add_rows();
        done = 0;
      }
      row += kTileVectors;
    }
    const bool nothing = rows.first >= rows.end;
    const int64_t from = op == HeadOp::kNone ? head_begin : 0, to = op != HeadOp::kNone ? 1 : nothing ? head_end : from;
    for (int64_t head = from; head < to; ++head) {
      __syncthreads();
      finish(head);
    }
  }
};

template <class T, HeadOp op>
__global__ void __launch_bounds__(kTileThreads* kMaxTeams)
    attention_columns_kernel(const ColumnProblem c, const ColumnPlan plan) {
  ColumnPass<T, op> pass(c, plan);
  for (int64_t item = blockIdx.x / plan.cluster; item < plan.items; item += gridDim.x / plan.cluster) {
    pass.begin(item);
    pass.run();
  }
}

// The row parts' sums and maxima meet in order. A block has kCombineThreads scores of a sample.
__global__ void __launch_bounds__(kCombineThreads)
    attention_columns_combine_kernel(const ColumnProblem c, const ColumnPlan plan) {
  const int64_t size = c.out_heads() * c.columns, blocks = ceil_div<int64_t>(size, kCombineThreads);
  const int64_t sample = blockIdx.x / blocks, i = blockIdx.x % blocks * kCombineThreads + threadIdx.x;
  long long count = c.attention.rows;
  if (c.query_mask != nullptr) {
    count = 0;
    for (int64_t row = threadIdx.x; row < c.attention.rows; row += kCombineThreads)
      count += c.query_mask[sample * c.query_mask_stride + row];
    count = block_reduce(count, Sum(), 0ll);
  }
  if (i >= size) return;
  const float* partial = c.partial + sample * plan.row_parts * 2 * size + i;
  float sum = 0, max = 0;
  for (int64_t part = 0; part < plan.row_parts; ++part) {
    sum += partial[2 * part * size];
    max = nan_max(max, partial[(2 * part + 1) * size]);
  }
  write_scores(c, sample, i / c.columns, i % c.columns, count, &sum, &max, nullptr);
}

template <class T>
cudaError_t launch_attention_columns(const ColumnProblem& c, const ColumnPlan& plan, cudaStream_t stream) {
  const Launch where{dim3(static_cast<unsigned>(plan.blocks)), dim3(kTileThreads * plan.teams),
                     static_cast<size_t>(plan.shared), stream, static_cast<unsigned>(plan.cluster)};
  const auto kernel = c.per_head()                    ? attention_columns_kernel<T, HeadOp::kNone>
                      : c.heads == ColumnHeads::kMax ? attention_columns_kernel<T, HeadOp::kMax>
                                                      : attention_columns_kernel<T, HeadOp::kSum>;
  const cudaError_t status = launch(where, kernel, c, plan);
  if (status != cudaSuccess || plan.launches() < 2) return status;
  const int64_t blocks = c.attention.batch * ceil_div<int64_t>(c.out_heads() * c.columns, kCombineThreads);
  return launch({dim3(static_cast<unsigned>(blocks)), dim3(kCombineThreads), 0, stream},
                attention_columns_combine_kernel, c, plan);
}

}  // namespace tokenprune
