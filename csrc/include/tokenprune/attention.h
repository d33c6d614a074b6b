// The attention kernels as the host sees them: the problem that all of them share, the row pass (lse and entropy) and
// its launch plan. No kernel code; the launchers are templates over the storage type, defined in the .cuh files and
// instantiated for float, __half and __nv_bfloat16 in csrc/cuda/attention_rows.cu.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "tokenprune/call_stream.h"
#include "tokenprune/limits.h"
#include "tokenprune/macros.h"

namespace tokenprune {

struct VectorStrides {
  int64_t batch, head, row;  // in elements; the vectors themselves have stride 1
};

struct AttentionProblem {
  const void* query;  // [batch, query_heads, rows, dim]
  const void* key;    // [batch, key_heads, keys, dim]
  VectorStrides query_strides, key_strides;
  bool query_aligned, key_aligned;  // every vector starts at a multiple of 16 bytes and has whole 16-byte units
  int64_t batch, query_heads, key_heads, rows, keys, dim;
  const uint8_t* key_mask;  // bytes [batch, keys] with last stride 1, or null: all visible
  int64_t key_mask_stride;
  const int64_t* query_positions;  // [batch, rows] with last stride 1, or null: keys - rows + row. Read when causal
  int64_t query_positions_stride;
  float scale;
  bool causal, cosine;
  // With cosine: 1 / max(||x||, kNormFloor) of every vector, filled by launch_attention_norms.
  float* query_inverse_norms;  // [batch, query_heads, rows]
  float* key_inverse_norms;    // [batch, key_heads, keys]

  TOKENPRUNE_HD int64_t group() const {
    return key_heads == 0 ? 0 : query_heads / key_heads;
  }  // query heads per key head
  TOKENPRUNE_HD int64_t group_rows() const { return group() * rows; }
  TOKENPRUNE_HD int64_t queries() const { return batch * query_heads * rows; }
  TOKENPRUNE_HD int64_t vectors() const { return queries() + batch * key_heads * keys; }
};

// Whether 16-byte copies can read the vectors of an operand.
inline bool vectors_are_aligned(const void* data, const VectorStrides& strides, int64_t dim, int64_t element_size) {
  const auto whole = [&](int64_t elements) { return elements * element_size % 16 == 0; };
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && whole(strides.batch) && whole(strides.head) &&
         whole(strides.row) && whole(dim);
}

// --- the tile of dot products (attention_tile.cuh) ------------------------------------------------------------------

// A tile is kTileVectors x kTileVectors dot products of one block of kTileThreads threads. The vectors pass through
// shared memory in chunks of 128 bytes each; kTileStages chunks of an operand are in flight or in use.
constexpr int kTileVectors = 64, kTileThreads = 128, kTileStages = 3;
constexpr int kChunkBytes = 128;
constexpr int kChunkTileBytes = kTileVectors * kChunkBytes;

// Blocks of a tile kernel that an SM holds at once, by registers: at most 128 per thread in 16 bits, 168 in float32.
constexpr int tile_blocks_per_sm(int element_size) { return element_size == 2 ? 4 : 3; }

inline int tile_chunks(int64_t dim, int element_size) {
  return static_cast<int>(ceil_div<int64_t>(dim * element_size, kChunkBytes));
}

// Dynamic shared memory of a tile, with one operand resident (all its chunks stay) or both streamed, and what every
// thread copies of it.
inline int tile_shared_bytes(int64_t dim, int element_size, bool resident) {
  const int chunks = kTileStages + (resident ? tile_chunks(dim, element_size) : kTileStages);
  return chunks * kChunkTileBytes + kTileThreads * 2 * static_cast<int>(sizeof(void*));
}

// Up to 4 chunks (D <= 256 in 16 bits): beyond, fewer than 4 blocks would fit in an SM's shared memory.
inline bool tile_resident(int64_t dim, int element_size) { return tile_chunks(dim, element_size) <= 4; }

// --- the row pass (attention_rows.cuh) -------------------------------------------------------------------------------

// The rows of all query heads of a key head form one list, cut into tiles; the keys are cut into `splits` ranges of
// split_tiles tiles each. One block per tile of rows and range of keys. The results of the ranges are combined by the
// first block of a cluster, which the blocks of a row tile are (those beyond `splits` have no keys), or by a second
// launch.
struct AttentionRowPlan {
  int64_t row_tiles;    // per sample and key head
  int64_t split_tiles;  // key tiles of a range
  int splits, cluster;
  bool thin;  // at most kThinRows rows: the keys, not the rows, are spread over the warps
  bool resident;
  int shared;         // bytes
  int64_t blocks;     // of the first launch
  int64_t workspace;  // floats

  TOKENPRUNE_HD int launches() const { return splits > 1 && cluster == 1 ? 2 : 1; }
};

constexpr int kThinRows = 16;
constexpr int64_t kMaxSplitTiles = 1 << 24;  // keys of a range are counted in 32 bits
constexpr int kPartialFloats = 4;            // a range's result for one row: maximum, sum, weighted sum, padding

// Ranges are what fills the GPU when there are few rows: as many as make the shortest schedule, in units of one tile of
// keys, counting a block's start and the meeting of a cluster as one each and a second launch as three.
inline AttentionRowPlan plan_attention_rows(int64_t batch, int64_t key_heads, int64_t group_rows, int64_t keys,
                                            int64_t dim, int element_size, const DeviceLimits& limits) {
  AttentionRowPlan plan{};
  const int64_t key_tiles = ceil_div<int64_t>(keys, kTileVectors);
  plan.row_tiles = ceil_div<int64_t>(group_rows, kTileVectors);
  plan.thin = group_rows <= kThinRows;
  plan.resident = tile_resident(dim, element_size);
  plan.shared = tile_shared_bytes(dim, element_size, plan.resident);
  const int64_t tiles = batch * key_heads * plan.row_tiles;
  plan.split_tiles = std::min(key_tiles, kMaxSplitTiles);
  plan.splits = key_tiles == 0 ? 1 : static_cast<int>(ceil_div(key_tiles, plan.split_tiles));
  plan.cluster = 1;
  const int64_t slots =
      limits.sm_count * std::clamp(limits.shared_per_block / plan.shared, 1, tile_blocks_per_sm(element_size));
  int64_t best = ceil_div(tiles * plan.splits, slots) * (plan.split_tiles + 1);
  const auto consider = [&](int64_t splits, int cluster) {
    if (splits <= plan.splits && cluster == 1) return;
    const int64_t each = ceil_div(key_tiles, splits), used = ceil_div(key_tiles, each);
    const int64_t cost = ceil_div(tiles * (cluster > 1 ? cluster : used), slots) * (each + 1) + (cluster > 1 ? 1 : 3);
    if (used == 1 || each > kMaxSplitTiles || cost >= best) return;
    best = cost;
    plan.splits = static_cast<int>(used);
    plan.split_tiles = each;
    plan.cluster = cluster;
  };
  if (tiles > 0 && key_tiles > 0) {
    for (int64_t waves = 1; waves <= 4; ++waves) consider(std::min(waves * slots / tiles, key_tiles), 1);
    for (int cluster = 2; limits.has_clusters() && cluster <= int(kMaxCluster) && tiles * cluster <= 4 * slots;
         cluster *= 2)
      consider(cluster, cluster);
  }
  const int64_t splits =
      limits.planned(Planned::kAttentionSplits, plan.splits, ceil_div(key_tiles, kMaxSplitTiles), key_tiles);
  if (splits != plan.splits && key_tiles > 0) {  // up to kMaxCluster ranges meet in a cluster then
    plan.split_tiles = ceil_div(key_tiles, splits);
    plan.splits = static_cast<int>(ceil_div(key_tiles, plan.split_tiles));
    for (plan.cluster = 1; limits.has_clusters() && plan.splits <= int(kMaxCluster) && plan.cluster < plan.splits;)
      plan.cluster *= 2;
  }
  plan.blocks = tiles * (plan.cluster > 1 ? plan.cluster : plan.splits);
  if (plan.launches() > 1) plan.workspace = batch * key_heads * group_rows * plan.splits * kPartialFloats;
  return plan;
}

struct AttentionRowOutputs {
  float *lse, *entropy;  // [batch, query_heads, rows]
  float* workspace;      // plan.workspace floats, 16-byte aligned
};

// One launch, two when the plan splits the keys. Needs the inverse norms when p.cosine.
template <class T>
cudaError_t launch_attention_rows(const AttentionProblem& p, const AttentionRowPlan& plan,
                                  const AttentionRowOutputs& out, CallStream& stream);

// --- inverse norms (attention_norms.cuh) ----------------------------------------------------------------------------

// One launch for all vectors of both operands; none when there are none.
template <class T>
cudaError_t launch_attention_norms(const AttentionProblem& problem, CallStream& stream);

}  // namespace tokenprune
