// The row pass: log-sum-exp and entropy of every query row over its visible keys, without storing a logit.
//
//   rows of a key head's group (head 0: rows 0 .. M-1, head 1: ...)      tiles of 64      block (tile, key range)
//   keys                                                                 ranges of tiles    64 x 64 dot products a step
//
// Every thread keeps, for each row it has sums of, the maximum m of its logits s, sum exp(s - m) and
// sum (s - m) exp(s - m); they are rescaled when m grows. At the end the lanes of a row meet (fixed order), then the
// ranges of keys (a second launch, a warp per row, fixed order). lse = m + log(sum), H = log(sum) - weighted / sum.
//
// Launch 1: grid row tiles * ranges * key heads * batch, 128 threads, 40 to 56 KiB shared memory (48 when D is large).
//   A key head's K is read once per row tile, from L2 when other tiles read it too; Q once per range.
// Launch 2 (only with several ranges): a warp per row; 16 bytes per row and range.
#pragma once

#include "tokenprune/attention_state.cuh"
#include "tokenprune/attention_tile.cuh"

namespace tokenprune {

// Adds the logits of one row of a tile; hidden ones are -inf.
template <class T>
__device__ __forceinline__ RowState with_logits(const RowState& state, DotTile<T>& logits, int i) {
  float max = state.max;
#pragma unroll
  for (int j = 0; j < DotTile<T>::kThreadB; ++j) max = logits.at(i, j) > max ? logits.at(i, j) : max;
  const float shift = RowState::shift(max);
  float sum = 0, weighted = 0;  // of the tile first: fewer roundings than one long sum
#pragma unroll
  for (int j = 0; j < DotTile<T>::kThreadB; ++j) {
    const float t = bounded_exponent(logits.at(i, j) - shift), e = expf(t);
    sum += e;
    weighted = __fmaf_rn(e, t, weighted);
  }
  const RowState before = raised(state, max);
  return {max, before.sum + sum, before.weighted + weighted};
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, tile_blocks_per_sm(sizeof(T)))
    attention_rows_kernel(const AttentionProblem p, const AttentionRowPlan plan, const AttentionRowOutputs out) {
  using Tile = DotTile<T>;
  // Row tiles of the same keys are neighbours in time. With causality the last rows see most and start first.
  int64_t rest = blockIdx.x;
  int64_t row_tile = rest % plan.row_tiles;
  rest /= plan.row_tiles;
  if (p.causal) row_tile = plan.row_tiles - 1 - row_tile;
  const int split = static_cast<int>(rest % plan.splits);
  rest /= plan.splits;  // sample * key_heads + key_head
  const int64_t sample = rest / p.key_heads, key_head = rest % p.key_heads;

  const TileVectors<T> rows{query_rows_of_group<T>(p, sample, key_head), row_tile * kTileVectors};
  const VectorList<T> keys = keys_of_head<T>(p, sample, key_head);
  const bool active = 16 * warp_id() < rows.present();

  const int64_t begin = split * plan.split_tiles * kTileVectors;
  const int64_t left = p.keys - begin, wanted = plan.split_tiles * kTileVectors;
  const int range = static_cast<int>(left < wanted ? left : wanted);  // keys of this block

  // Of this thread's rows: how many of these keys they see, and what a dot product becomes a logit with.
  int sees[Tile::kThreadA];
  float factor[Tile::kThreadA];
  RowState state[Tile::kThreadA];
  int most = 0;
#pragma unroll
  for (int i = 0; i < Tile::kThreadA; ++i) {
    state[i] = RowState::empty();
    sees[i] = 0;
    factor[i] = 0;
    if (Tile::a(i) >= rows.present()) continue;
    const int64_t r = rows.first + Tile::a(i), row = r % p.rows;
    const int64_t seen = last_visible_key(p, sample, row) + 1 - begin;
    sees[i] = seen < 0 ? 0 : seen < range ? static_cast<int>(seen) : range;
    factor[i] = p.scale * row_factor(p, sample, key_head * p.group() + r / p.rows, row);
    most = sees[i] > most ? sees[i] : most;
  }
  if (p.causal) most = block_reduce(most, Max(), 0);
  const int tiles = ((p.causal ? most : range) + kTileVectors - 1) / kTileVectors;

  for_each_tile<T>(
      dynamic_shared(), static_cast<int>(p.dim), plan.resident, tiles, [&](int) { return rows; },
      [&](int t) { return TileVectors<T>{keys, begin + int64_t(t) * kTileVectors}; },
      [&](int t, Tile& logits) {
        if (!active) return;
        const int64_t first = begin + int64_t(t) * kTileVectors;
        uint32_t unmasked = 0xFFFFFFFFu;
        if (p.key_mask != nullptr || p.cosine) {
#pragma unroll
          for (int j = 0; j < Tile::kThreadB; ++j) {
            const int64_t key = first + Tile::b(j);
            if (key >= p.keys) continue;
            if (!key_is_unmasked(p, sample, key)) unmasked &= ~(1u << j);
            const float by = key_factor(p, sample, key_head, key);
#pragma unroll
            for (int i = 0; i < Tile::kThreadA; ++i) logits.at(i, j) *= by;
          }
        }
#pragma unroll
        for (int i = 0; i < Tile::kThreadA; ++i) {
#pragma unroll
          for (int j = 0; j < Tile::kThreadB; ++j) logits.at(i, j) *= factor[i];
          const int visible = sees[i] - t * kTileVectors;
          if (visible < kTileVectors || unmasked != 0xFFFFFFFFu) {
#pragma unroll
            for (int j = 0; j < Tile::kThreadB; ++j)
              if (Tile::b(j) >= visible || (unmasked >> j & 1) == 0) logits.at(i, j) = -INFINITY;
          }
          state[i] = with_logits(state[i], logits, i);
        }
      });

  if (!active) return;
#pragma unroll
  for (int i = 0; i < Tile::kThreadA; ++i) {
    const RowState total = warp_merged(state[i], Tile::kLanesPerA);
    if (lane_id() % Tile::kLanesPerA != 0 || Tile::a(i) >= rows.present()) continue;
    const int64_t row = rest * p.group_rows() + rows.first + Tile::a(i);
    if (plan.splits == 1)
      write_row(out, row, total);
    else
      reinterpret_cast<float4*>(out.workspace)[row * plan.splits + split] =
          make_float4(total.max, total.sum, total.weighted, 0.0f);
  }
}

// `rows` is that of the whole batch.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    attention_rows_combine_kernel(const int64_t rows, const int splits, const AttentionRowOutputs out) {
  const int64_t row = int64_t(blockIdx.x) * (kThreads / kWarp) + warp_id();
  if (row >= rows) return;
  const RowState total = combined_row(out.workspace, row, splits);
  if (lane_id() == 0) write_row(out, row, total);
}

template <class T>
cudaError_t launch_attention_rows(const AttentionProblem& p, const AttentionRowPlan& plan,
                                  const AttentionRowOutputs& out, cudaStream_t stream) {
  const Launch tiles{dim3(static_cast<unsigned>(plan.blocks)), dim3(kTileThreads), static_cast<size_t>(plan.shared),
                     stream};
  const cudaError_t status = launch(tiles, attention_rows_kernel<T>, p, plan, out);
  if (status != cudaSuccess || plan.splits == 1) return status;
  constexpr int kCombineThreads = 128;
  const int64_t rows = p.batch * p.key_heads * p.group_rows();
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(rows, kCombineThreads / kWarp)));
  return launch({grid, dim3(kCombineThreads), 0, stream}, attention_rows_combine_kernel<kCombineThreads>, rows,
                plan.splits, out);
}

}  // namespace tokenprune
