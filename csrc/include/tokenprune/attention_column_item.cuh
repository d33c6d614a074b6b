// What a block of the column pass works on: 64 keys of a sample, some of its heads and some of its rows.
#pragma once

#include "tokenprune/attention_column_rows.cuh"

namespace tokenprune {

// The keys of a tile's columns: their indices, or -1 for what has no score: beyond the columns, masked, or no key. Those
// without a key are copies of the head's first.
template <class T>
struct ColumnKeys {
  const T* data;  // the head's first key
  int64_t row_stride;
  const int64_t* indices;  // [64], in shared memory
  int present;
  bool aligned;

  __device__ __forceinline__ const T* vector(int v) const {
    const int64_t key = indices[v];
    return data + (key < 0 ? 0 : key) * row_stride;
  }
};

// What a block knows of the item at work, in shared memory: it is needed rarely, registers always.
struct ColumnItem {
  int64_t keys[kTileVectors];  // of the columns; -1: hidden from every row
  int64_t number, sample, first_column, row_part;
  int2 heads[kMaxTeams + kMaxTeams % 2];  // of the teams: first and past the last
  CountedRows rows;
};
static_assert(sizeof(ColumnItem) == kColumnItemBytes);

// The shared memory of a block: rings of the teams; statistics of the teams, [3][64 + 1] each, of the rows of the tile at
// work and of the next two; the item; the last row's values [64], of the first block; results [parts][2][64]. Addresses
// are found again where needed: registers are short.
struct ColumnMemory {
  const ColumnPlan& plan;

  __device__ __forceinline__ static int team() { return threadIdx.x / kTileThreads; }
  __device__ __forceinline__ int part() const { return cluster_rank() * plan.teams + team(); }

  __device__ __forceinline__ unsigned char* ring_of(int t) const { return dynamic_shared() + t * plan.ring; }
  __device__ __forceinline__ float2* statistics(int tile) const {
    return reinterpret_cast<float2*>(ring_of(plan.teams)) + (team() * 3 + tile % 3) * kStatistics;
  }
  __device__ __forceinline__ ColumnItem& item() const {
    return *reinterpret_cast<ColumnItem*>(ring_of(plan.teams) + plan.teams * kStatisticsBytes);
  }
  __device__ __forceinline__ int head_begin() const { return item().heads[team()].x; }
  __device__ __forceinline__ int head_end() const { return item().heads[team()].y; }
  __device__ __forceinline__ float* last_values() const { return reinterpret_cast<float*>(&item() + 1); }
  __device__ __forceinline__ float* results_of(int q) const { return last_values() + (1 + 2 * q) * kTileVectors; }

  // Barrier of all threads that work on an item.
  __device__ __forceinline__ void sync() const {
    if (plan.cluster > 1)
      cluster_sync();
    else
      __syncthreads();
  }
};

}  // namespace tokenprune
