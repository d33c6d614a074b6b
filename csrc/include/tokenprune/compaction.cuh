// gather_compact: the selected tokens of many tensors, in one launch.
//
// A tensor is a list of output vectors of 16, 8, 4, 2 or 1 bytes, as wide as its addresses and strides allow. A block
// finds its tensor in the table of its launch by the numbers of its blocks, and copies up to 1024 consecutive vectors
// of it, 4 per thread. Where a vector comes from follows from its number: the row, then the step of each loop over
// the row's dimensions (divisions by multiplication), the token from `indices`, and an offset of 64 bits. The vectors
// of a thread lie 256 apart, so that neighbouring threads write neighbouring addresses, and their loads are all on
// their way before the first is stored. A token outside the input gives zeros.
//   grid: ceil(vectors / 1024) blocks per tensor (fewer vectors while there are under two blocks per multiprocessor),
//   block: 256, shared memory: none. Bytes: every kept element read and written once, and the indices (8 B per row of
//   8 B and more, from cache).
//
// invert_indices: for every token its slot among the kept ones. A block owns up to 4096 tokens of a sample, fills them
// with -1 and scans all indices for those within them; of several slots with one token the last counts.
//   grid: samples x token ranges, block: 256, shared memory: none. Bytes: slots written once, indices read per range.
#pragma once

#include "tokenprune/compaction.h"
#include "tokenprune/ptx.cuh"

namespace tokenprune {

// Vectors [begin, end) of one tensor.
template <class Vector>
__device__ __forceinline__ void copy_vectors(const CompactTable& table, const CompactGroup& group,
                                             const CompactPointers& tensor, uint32_t begin, uint32_t end) {
  uint32_t row[kCompactUnroll];
  int64_t offset[kCompactUnroll], slot[kCompactUnroll];
#pragma unroll
  for (int u = 0; u < kCompactUnroll; ++u) {
    const uint32_t vector = begin + u * kCompactThreads + threadIdx.x;
    row[u] = divide(vector, group.row);
    offset[u] = static_cast<int64_t>(vector - row[u] * group.row.value) * sizeof(Vector);
    slot[u] = group.index_offset;
  }
  for (int l = 0; l < group.loops; ++l) {
    const CompactStep& loop = table.loop[group.first_loop + l];
#pragma unroll
    for (int u = 0; u < kCompactUnroll; ++u) {
      const uint32_t outer = divide(row[u], loop.size);
      const int64_t at = row[u] - outer * loop.size.value;
      row[u] = outer;
      offset[u] += at * loop.stride;
      slot[u] += at * loop.index_stride;
    }
  }
  int64_t token[kCompactUnroll];
  Vector value[kCompactUnroll];
#pragma unroll
  for (int u = 0; u < kCompactUnroll; ++u)
    token[u] = begin + u * kCompactThreads + threadIdx.x < end ? table.indices[slot[u]] : -1;
#pragma unroll
  for (int u = 0; u < kCompactUnroll; ++u)
    value[u] = token[u] >= 0 && token[u] < group.tokens
                   ? *reinterpret_cast<const Vector*>(tensor.from + offset[u] + token[u] * group.token_stride)
                   : Vector{};
#pragma unroll
  for (int u = 0; u < kCompactUnroll; ++u) {
    const uint32_t vector = begin + u * kCompactThreads + threadIdx.x;
    if (vector < end) reinterpret_cast<Vector*>(tensor.to)[vector] = value[u];
  }
}

__global__ void __launch_bounds__(kCompactThreads) gather_compact_kernel(const __grid_constant__ CompactTable table) {
  let_next_launch_start();
  int low = 0;
  for (int high = table.groups; high - low > 1;) {  // the last group that begins at or before this block
    const int middle = (low + high) / 2;
    (table.group[middle].first_block <= blockIdx.x ? low : high) = middle;
  }
  const CompactGroup& group = table.group[low];
  const uint32_t block = blockIdx.x - group.first_block;
  const uint32_t which = divide(block, group.blocks);
  const CompactPointers& tensor = table.tensor[group.first_tensor + which];
  const uint32_t begin = (block - which * group.blocks.value) * table.vectors_per_block;
  const uint32_t end = min(begin + table.vectors_per_block, group.vectors);
  switch (group.width) {
    case 16:
      copy_vectors<uint4>(table, group, tensor, begin, end);
      break;
    case 8:
      copy_vectors<uint2>(table, group, tensor, begin, end);
      break;
    case 4:
      copy_vectors<uint32_t>(table, group, tensor, begin, end);
      break;
    case 2:
      copy_vectors<uint16_t>(table, group, tensor, begin, end);
      break;
    default:
      copy_vectors<uint8_t>(table, group, tensor, begin, end);
  }
  wait_for_launch_before();  // at the end: the table before is of other tensors
}

constexpr int kInvertThreads = 256, kInvertTokens = 4096;

__global__ void __launch_bounds__(kInvertThreads) invert_indices_kernel(const InvertProblem p) {
  const int64_t ranges = (p.size + kInvertTokens - 1) / kInvertTokens;
  for (int64_t item = blockIdx.x; item < p.batch * ranges; item += gridDim.x) {
    const int64_t sample = item / ranges, begin = item % ranges * kInvertTokens;
    const int64_t end = min(begin + kInvertTokens, p.size);
    int64_t* slots = p.slots + sample * p.size;
    for (int64_t t = begin + threadIdx.x; t < end; t += kInvertThreads) slots[t] = -1;
    __syncthreads();
    const int64_t* indices = p.indices + sample * p.batch_stride;
    for (int64_t n = threadIdx.x; n < p.kept; n += kInvertThreads) {
      const int64_t token = indices[n * p.entry_stride];
      if (token >= begin && token < end)
        atomicMax(reinterpret_cast<long long*>(slots + token), static_cast<long long>(n));
    }
  }
}

}  // namespace tokenprune
