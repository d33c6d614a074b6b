// The row pass: log-sum-exp and entropy of every query row over its visible keys, without storing a logit.
//
//   rows of a key head's group (head 0: rows 0 .. M-1, head 1: ...)      tiles of 64      block (tile, key range)
//   keys                                                                 ranges of tiles    64 x 64 dot products a step
//
// Every thread keeps, for each row it has sums of, the softmax statistics of the keys it has seen
// (attention_state.cuh). At the end those of the lanes of a row are combined in a fixed order, then those of the ranges
// of keys: in the first block of a cluster, or in a second launch.
//
// `wide` takes the rows as operand A: a warp has 16 rows and all 64 keys. Of at most 16 rows three warps would have
// nothing to do: there `thin` takes the keys as A, a warp has 16 keys and all rows, and at the end the warps'
// statistics are combined.
//
// Launch 1: grid row tiles * ranges (or blocks of a cluster) * key heads * batch, 128 threads, 34 to 58 KiB shared
//   memory. The rows of a group are read once per range; K is read once per row tile, the tiles of one range running
//   side by side: from L2 but once.
// Launch 2, only with several ranges and no cluster: a warp per row; 16 bytes per row and range.
#pragma once

#include "tokenprune/attention_state.cuh"
#include "tokenprune/attention_tile.cuh"

namespace tokenprune {

// What a block of the first launch works on.
template <class T>
struct RowBlock {
  int sample, key_head, split;
  int64_t begin;  // first key
  int range;      // keys
  GroupVectors<T> rows;
  const T* keys;  // the first of the range

  // With causality the last rows see most keys and start first.
  __device__ __forceinline__ RowBlock(const AttentionProblem& p, const AttentionRowPlan& plan) {
    // The grid is below 2^31, and so are its factors. The blocks of a cluster follow each other.
    const auto row_tiles = static_cast<unsigned>(plan.row_tiles), key_heads = static_cast<unsigned>(p.key_heads);
    unsigned rest = blockIdx.x / plan.cluster, row_tile = rest % row_tiles;
    rest /= row_tiles;
    if (p.causal) row_tile = row_tiles - 1 - row_tile;
    split = static_cast<int>(plan.cluster > 1 ? blockIdx.x % plan.cluster : rest % plan.splits);
    if (plan.cluster == 1) rest /= plan.splits;
    sample = static_cast<int>(rest / key_heads);
    key_head = static_cast<int>(rest % key_heads);
    begin = split * plan.split_tiles * kTileVectors;
    const int64_t left = p.keys - begin, wanted = plan.split_tiles * kTileVectors;
    range = static_cast<int>(left < 0 ? 0 : left < wanted ? left : wanted);
    rows = query_rows_of_group<T>(p, sample, key_head, int64_t(row_tile) * kTileVectors);
    keys = keys_of_head<T>(p, sample, key_head) + begin * p.key_strides.row;
  }

  __device__ __forceinline__ HeadVectors<T> key_tile(const AttentionProblem& p, int t) const {
    const int first = t * kTileVectors, left = range - first;
    return {keys, p.key_strides.row, first, range - 1, left < kTileVectors ? left : kTileVectors, p.key_aligned};
  }

  // Of row r of the tile: how many keys of the range it sees, none if it does not exist.
  __device__ __forceinline__ int sees(const AttentionProblem& p, int r) const {
    if (r >= rows.present) return 0;
    const int64_t seen = last_visible_key(p, sample, (rows.first + r) % p.rows) + 1 - begin;
    return seen < 0 ? 0 : seen < range ? static_cast<int>(seen) : range;
  }

  // What makes logits of its dot products, together with key_factor.
  __device__ __forceinline__ float factor(const AttentionProblem& p, int r) const {
    if (r >= rows.present) return 0;
    const int64_t index = rows.first + r;
    return p.scale * row_factor(p, sample, key_head * p.group() + index / p.rows, index % p.rows);
  }

  // The tiles of keys that any row sees; `most` is the largest sees() of the thread's rows. All threads call it. After a
  // reduction in one instruction the compiler knows that loops over tiles keep a warp together.
  __device__ __forceinline__ int tiles(const AttentionProblem& p, int most) const {
    if (p.causal) most = block_reduce(most, Max(), 0);
    return __reduce_max_sync(kAllLanes, ((p.causal ? most : range) + kTileVectors - 1) / kTileVectors);
  }

  __device__ __forceinline__ int64_t row(const AttentionProblem& p, int r) const {
    return (sample * p.key_heads + key_head) * p.group_rows() + rows.first + r;
  }

  // Writes the state of row r of the tile, in a cluster to its first block's shared memory, [splits][64].
  __device__ __forceinline__ void write(const AttentionProblem& p, const AttentionRowPlan& plan,
                                        const AttentionRowOutputs& out, int r, const RowState& state) const {
    if (plan.cluster > 1)
      cluster_shared(reinterpret_cast<RowState*>(dynamic_shared()), 0)[split * kTileVectors + r] = state;
    else
      write_row(out, row(p, r), state, split, plan.splits);
  }

  // Between the last tile and the first write(): all blocks of the cluster have started and use no tile any more.
  __device__ __forceinline__ static void begin_writing(const AttentionRowPlan& plan) {
    if (plan.cluster > 1) cluster_sync();
  }

  // After the last write(). The first block combines the ranges in order.
  __device__ __forceinline__ void end_writing(const AttentionProblem& p, const AttentionRowPlan& plan,
                                              const AttentionRowOutputs& out) const {
    if (plan.cluster == 1) return;
    cluster_sync();
    const int r = threadIdx.x;
    if (split > 0 || r >= rows.present) return;
    const RowState* const states = reinterpret_cast<const RowState*>(dynamic_shared()) + r;
    RowState total = states[0];
    for (int q = 1; q < plan.splits; ++q) total = merged(total, states[q * kTileVectors]);
    write_row(out, row(p, r), total);
  }
};
static_assert(kMaxCluster * kTileVectors * sizeof(RowState) <= kTileStages * kChunkTileBytes);

template <class T, bool kResident>
__global__ void __launch_bounds__(kTileThreads, tile_blocks_per_sm(sizeof(T)))
    attention_rows_wide_kernel(const AttentionProblem p, const AttentionRowPlan plan, const AttentionRowOutputs out) {
  using Tile = DotTile<T>;
  let_next_launch_start();
  wait_for_launch_before();  // for the inverse norms
  constexpr int kRows = Tile::kThreadA, kKeys = Tile::kThreadB;
  const RowBlock<T> block(p, plan);
  const bool active = 16 * warp_id() < block.rows.present;
  int sees[kRows], most = 0, least = block.range;
  float factor[kRows];
  RowState state[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    sees[i] = block.sees(p, Tile::a(i));
    factor[i] = block.factor(p, Tile::a(i));
    state[i] = RowState::empty();
    most = max(most, sees[i]);
    least = min(least, sees[i]);
  }
  const bool by_key = p.key_mask != nullptr || p.cosine;

  const auto add_tile = [&](int t, Tile& logits) {
    const int first = t * kTileVectors;
    if (!__any_sync(kAllLanes, first < most)) return;
    uint32_t unmasked = 0xFFFFFFFFu;
    if (by_key) {
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        if (first + Tile::b(j) >= block.range) continue;
        const int64_t key = block.begin + first + Tile::b(j);
        if (!key_is_unmasked(p, block.sample, key)) unmasked &= ~(1u << j);
        if (!p.cosine) continue;
        const float by = key_factor(p, block.sample, block.key_head, key);
#pragma unroll
        for (int i = 0; i < kRows; ++i) logits.at(i, j) = by_key_norm(logits.at(i, j), by);
      }
    }
    // All rows at once, where nothing is hidden and their sums do not grow much. In float32 products take the time, and
    // registers are short.
    if (Tile::kMma && __all_sync(kAllLanes, least - first >= kTileVectors && unmasked == 0xFFFFFFFFu)) {
      RowState part[kRows];
      bool little = true;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        part[i] = dots_from<kKeys>(state[i].max, factor[i], [&](int j) { return logits.at(i, j); });
        little = little && part[i].is_little();
      }
      if (__all_sync(kAllLanes, little)) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) state[i] = added(state[i], part[i]);
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int visible = sees[i] - first;
      const bool every = visible >= kTileVectors && unmasked == 0xFFFFFFFFu;
      if (every && add_dots<kKeys>(state[i], factor[i], [&](int j) { return logits.at(i, j); })) continue;
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        const float logit = logits.at(i, j) * factor[i];
        const bool hidden = (Tile::b(j) >= visible) | ((unmasked >> j & 1) == 0);
        logits.at(i, j) = hidden ? -INFINITY : logit;
      }
      add_logits<kKeys>(state[i], [&](int j) { return logits.at(i, j); });
    }
  };
  for_each_tile<T>(
      dynamic_shared(), static_cast<int>(p.dim), kResident, block.tiles(p, most), [&](int) { return block.rows; },
      [&](int t) { return block.key_tile(p, t); }, add_tile);

  block.begin_writing(plan);
  if (active) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const RowState total = warp_merged(state[i], Tile::kLanesPerA);
      if (lane_id() % Tile::kLanesPerA == 0 && Tile::a(i) < block.rows.present)
        block.write(p, plan, out, Tile::a(i), total);
    }
  }
  block.end_writing(p, plan, out);
}

template <class T, bool kResident>
__global__ void __launch_bounds__(kTileThreads, tile_blocks_per_sm(sizeof(T)))
    attention_rows_thin_kernel(const AttentionProblem p, const AttentionRowPlan plan, const AttentionRowOutputs out) {
  using Tile = DotTile<T>;
  let_next_launch_start();
  wait_for_launch_before();  // for the inverse norms
  constexpr int kRows = Tile::kThreadB / 4, kKeys = Tile::kThreadA, kStride = Tile::kLanesPerA;
  static_assert(Tile::block(kRows - 1) == 0 && Tile::block(kRows) == 1, "the sums of one block of B vectors");
  const RowBlock<T> block(p, plan);
  int sees[kRows], most = 0;
  float factor[kRows];
  RowState state[kRows];
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    sees[j] = block.sees(p, Tile::b(j));
    factor[j] = block.factor(p, Tile::b(j));
    state[j] = RowState::empty();
    most = sees[j] > most ? sees[j] : most;
  }

  const auto add_logits = [&](int t, Tile& logits) {
    const int first = t * kTileVectors;
    bool unmasked[kKeys];
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      unmasked[i] = first + Tile::a(i) < block.range;
      if (!unmasked[i]) continue;
      const int64_t key = block.begin + first + Tile::a(i);
      unmasked[i] = key_is_unmasked(p, block.sample, key);
      if (!p.cosine) continue;
      const float by = key_factor(p, block.sample, block.key_head, key);
#pragma unroll
      for (int j = 0; j < kRows; ++j) logits.at(i, j) = by_key_norm(logits.at(i, j), by);
    }
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int visible = sees[j] - first;
      float max = state[j].max;
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        float& logit = logits.at(i, j);
        logit = unmasked[i] && Tile::a(i) < visible ? logit * factor[j] : -INFINITY;
        max = fmaxf(max, logit);
      }
      const float reference = reference_logit(max);
      state[j] = raised(state[j], max);
#pragma unroll
      for (int i = 0; i < kKeys; ++i) add_term(logits.at(i, j), reference, state[j].sum, state[j].weighted);
    }
  };
  for_each_tile<T, true, 1>(
      dynamic_shared(), static_cast<int>(p.dim), kResident, block.tiles(p, most), [&](int) { return block.rows; },
      [&](int t) { return block.key_tile(p, t); }, add_logits);

  TOKENPRUNE_SHARED(RowState[kTileThreads / kWarp][kThinRows], partial);
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    const RowState total = warp_merged(state[j], kWarp, kStride);
    if (lane_id() < kStride) partial[warp_id()][Tile::b(j)] = total;
  }
  __syncthreads();
  block.begin_writing(plan);
  const int r = threadIdx.x;
  if (r < block.rows.present) {
    RowState total = partial[0][r];
#pragma unroll
    for (int warp = 1; warp < kTileThreads / kWarp; ++warp) total = merged(total, partial[warp][r]);
    block.write(p, plan, out, r, total);
  }
  block.end_writing(p, plan, out);
}

// `rows` is that of the whole batch.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    attention_rows_combine_kernel(const int64_t rows, const int splits, const AttentionRowOutputs out) {
  let_next_launch_start();
  wait_for_launch_before();
  const int64_t row = int64_t(blockIdx.x) * (kThreads / kWarp) + warp_id();
  if (row >= rows) return;
  const RowState total = combined_row(out.workspace, row, splits);
  if (lane_id() == 0) write_row(out, row, total);
}

template <class T>
cudaError_t launch_attention_rows(const AttentionProblem& p, const AttentionRowPlan& plan,
                                  const AttentionRowOutputs& out, CallStream& stream) {
  const Launch tiles{plan.blocks, dim3(kTileThreads), static_cast<size_t>(plan.shared), stream,
                     static_cast<unsigned>(plan.cluster)};
  const auto kernel = plan.thin
                          ? plan.resident ? attention_rows_thin_kernel<T, true> : attention_rows_thin_kernel<T, false>
                      : plan.resident ? attention_rows_wide_kernel<T, true>
                                      : attention_rows_wide_kernel<T, false>;
  const cudaError_t status = launch(tiles, kernel, p, plan, out);
  if (status != cudaSuccess || plan.launches() == 1) return status;
  constexpr int kCombineThreads = 128;
  const int64_t rows = p.batch * p.key_heads * p.group_rows();
  return launch({ceil_div<int64_t>(rows, kCombineThreads / kWarp), dim3(kCombineThreads), 0, stream},
                attention_rows_combine_kernel<kCombineThreads>, rows, plan.splits, out);
}

}  // namespace tokenprune
