// What a block of the column pass works on: 64 keys of a sample, some of its heads and some of its rows.
#pragma once

#include "tokenprune/attention_column_rows.cuh"

namespace tokenprune {

// The keys of a tile's columns: their indices, or -1 for what has no score: beyond the columns, masked, or no key.
template <class T>
struct ColumnKeys {
  VectorList<T> keys;
  const int64_t* indices;  // [64], in shared memory
  int64_t count;
  bool aligned;

  __device__ __forceinline__ const T* vector(int64_t v) const {
    const int64_t key = v < count ? indices[v] : -1;
    return keys.data + (key < 0 ? 0 : key) * keys.row_stride;
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

}  // namespace tokenprune
