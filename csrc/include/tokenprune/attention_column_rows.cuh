// What the rows mean to a column: which of them count, how their sum, maximum and last value become scores, and how
// the results of row parts are combined.
//
// Launch (several row parts only): grid scores / 256, block 256, shared memory of block_reduce; reads 8 bytes per row
//   part and score, which is what the first launch wrote.
#pragma once

#include "tokenprune/attention_columns.h"
#include "tokenprune/attention_tile.cuh"
#include "tokenprune/math.h"

namespace tokenprune {

struct CountedRows {
  int64_t count, last;  // of the rows with query_mask; -1: there is none
  int64_t first, end;   // of those, which of [begin, limit) can see key `lowest`
};

// All threads of the block call it and get the same.
__device__ __forceinline__ CountedRows counted_rows(const ColumnProblem& c, int64_t sample, int64_t begin,
                                                    int64_t limit, int64_t lowest) {
  const AttentionProblem& p = c.attention;
  if (c.query_mask == nullptr && !p.causal) return {p.rows, p.rows - 1, begin, limit};
  const uint8_t* mask = c.query_mask == nullptr ? nullptr : c.query_mask + sample * c.query_mask_stride;
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

// What the rows of a column give.
struct ColumnSums {
  float sum, max, last;
};

// Writes those scores of a column that are asked for: `all` but the last row's, and `last`, that one.
__device__ __forceinline__ void write_scores(const ColumnProblem& c, int64_t sample, int64_t head, int64_t column,
                                             int64_t count, const ColumnSums& sums, bool all, bool last) {
  const int64_t over = c.heads == ColumnHeads::kMean ? c.attention.query_heads : 1;
  const float heads = over > 1 ? static_cast<float>(over) : 1.0f;
  float* to = c.scores + ((sample * c.total_kinds + c.first_kind) * c.out_heads() + head) * c.columns + column;
  for (int r = 0; r < c.kind_count; ++r, to += c.out_heads() * c.columns) {
    const ColumnRows kind = c.kind(r);
    if (!(kind == ColumnRows::kLast ? last : all)) continue;
    const float value = kind == ColumnRows::kLast ? sums.last : kind == ColumnRows::kMax ? sums.max : sums.sum;
    const float rows = kind == ColumnRows::kMean && count > 1 ? static_cast<float>(count) : 1.0f;
    *to = value / heads / rows;
  }
}

// Combines the row parts' sums and maxima in order. A block has kThreads scores of a sample.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    attention_columns_combine_kernel(const ColumnProblem c, const ColumnPlan plan) {
  let_next_launch_start();
  wait_for_launch_before();
  const int64_t size = c.out_heads() * c.columns, blocks = (size + kThreads - 1) / kThreads;
  const int64_t sample = blockIdx.x / blocks, i = blockIdx.x % blocks * kThreads + threadIdx.x;
  long long count = c.attention.rows;
  if (c.query_mask != nullptr) {
    count = 0;
    for (int64_t row = threadIdx.x; row < c.attention.rows; row += kThreads)
      count += c.query_mask[sample * c.query_mask_stride + row] != 0;
    count = block_reduce(count, Sum(), 0ll);
  }
  if (i >= size) return;
  const float* partial = c.partial + sample * plan.row_parts * 2 * size + i;
  ColumnSums sums{0, 0, 0};
  for (int64_t part = 0; part < plan.row_parts; ++part) {
    sums.sum += partial[2 * part * size];
    sums.max = nan_max(sums.max, partial[(2 * part + 1) * size]);
  }
  write_scores(c, sample, i / c.columns, i % c.columns, count, sums, true, false);
}

}  // namespace tokenprune
