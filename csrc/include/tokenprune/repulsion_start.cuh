// The beginning of repulsion_sample for many tokens: what the points (repulsion_points.cuh) and the rounds
// (repulsion_rounds.cuh) start from.
//
// 1. prepare: a warp per token: inverse norm, state, first key; the outputs' padding; points as float32. Reads the
//    features once.
// 2. isolated: isolated_keys compares all pairs, tile by tile of 128 x 128 (256 threads, GramTile::kShared), each pair
//              once: n * n / 2 inner products. A key is the minimum over the tiles, in whatever order they come.
//    outlier:  groups of blocks add up the unit vectors, a thread per channel and part of the tokens, in a fixed order;
//              a warp per token takes the product with the sum. Reads the features twice.
#pragma once

#include "tokenprune/block_group.cuh"
#include "tokenprune/repulsion_gram.cuh"
#include "tokenprune/row_sums.cuh"

namespace tokenprune {

struct RepulsionControl {
  uint32_t picked;    // tokens
  uint32_t selected;  // tokens in the list of the last round
  uint32_t stored;    // their rows are kept, see repulsion_rounds.cuh; else they are in the state of every token
  uint32_t cursor;    // seeds before this token have been selected
  uint32_t started;   // is anything selected yet?
};
static_assert(sizeof(RepulsionControl) == kControlWords * sizeof(uint32_t), "kControlWords");

// Workspaces. Samples of a launch go in `groups`, each on its own blocks, one sample after the other.
struct RepulsionWorkspace {
  float *inverse, *state;     // [samples, n]
  float* points;              // [samples, n, fields]; null without points
  float* direction;           // [groups, kDirectionParts + 1, channels]; the last one is the sum
  float* rows;                // [groups, kCandidates, n], for a sum
  uint32_t *key, *seed;       // [samples, n]; kNoKey: not available
  uint32_t* picks;            // [groups, kCandidates]: the list of the last round
  uint32_t* counters;         // [2, groups]: of group_sync
  RepulsionControl* control;  // [samples]
  uint32_t groups;
  int fields;

  RepulsionWorkspace(const RepulsionPlan& plan, float* floats, uint32_t* words, int64_t n)
      : inverse(floats),
        state(floats + plan.samples * n),
        points(floats + plan.token_floats),
        direction(points + plan.point_floats),
        rows(direction + plan.direction_floats),
        key(words),
        seed(words + plan.samples * n),
        picks(words + plan.token_words),
        counters(picks + plan.groups * kCandidates),
        control(reinterpret_cast<RepulsionControl*>(counters + 2 * plan.groups)),
        groups(static_cast<uint32_t>(plan.groups)),
        fields(plan.fields) {}

  __device__ __forceinline__ uint32_t* list_of(uint32_t group) const { return picks + group * kCandidates; }
  __device__ __forceinline__ float* rows_of(uint32_t group, int64_t n) const { return rows + group * kCandidates * n; }
};

template <class T>
__global__ void __launch_bounds__(kStartThreads)
    prepare_kernel(const RepulsionProblem p, const RepulsionWorkspace w, int64_t blocks) {
  let_next_launch_start();
  wait_for_launch_before();
  const int64_t sample = blockIdx.x / blocks, block = blockIdx.x % blocks, i = block * kStartTokens + warp_id();
  for (int64_t slot = block * kStartThreads + threadIdx.x; slot < p.k; slot += blocks * kStartThreads)
    p.indices[sample * p.k + slot] = -1;
  if (block == 0 && threadIdx.x == 0) {
    p.counts[sample] = 0;
    w.control[sample] = {0, 0, 0, p.seeds == nullptr ? 0xFFFFFFFFu : 0, 0};
    if (sample < w.groups) w.counters[sample] = w.counters[w.groups + sample] = 0;
  }
  if (i >= p.n) return;
  const TokenRows rows = rows_of(p, sample, sizeof(T));
  const float squares = sum_over_row<T>(rows, i, [](float x, int64_t) { return x * x; });
  const int64_t at = sample * p.n + i;
  if (w.fields > 0) {
    const T* row = static_cast<const T*>(rows.data) + i * rows.stride;
    const float* position = positions_of(p, sample);
    float* point = w.points + at * w.fields;
    const int channels = static_cast<int>(p.channels);
    for (int f = lane_id(); f < w.fields; f += kWarp)
      point[f] = f < channels       ? to_float(row[f])
                 : f < w.fields - 1 ? position[i * p.axes + f - channels]
                                    : inverse_norm(squares);
  }
  if (lane_id() != 0) return;
  const float first = p.energy != nullptr ? p.energy[at] : (p.first == FirstPick::kIsolated ? -INFINITY : 0);
  w.inverse[at] = inverse_norm(squares);
  w.state[at] = RepulsionObjective<>(p).initial_state();
  w.key[at] = order_key(-first, is_valid(p, sample, i));
  w.seed[at] = 0;
}

// Part `part` of the sum of all valid unit vectors, in `channel`.
template <class T>
__device__ __forceinline__ float direction_part(const RepulsionProblem& p, const RepulsionWorkspace& w, int64_t sample,
                                                int64_t part, int64_t channel) {
  const int64_t share = (p.n + kDirectionParts - 1) / kDirectionParts, end = min((part + 1) * share, p.n);
  const T* column = static_cast<const T*>(rows_of(p, sample, sizeof(T)).data) + channel;
  float sum = 0;
#pragma unroll 8
  for (int64_t i = part * share; i < end; ++i)
    if (is_valid(p, sample, i)) sum += to_float(column[i * p.row_stride]) * w.inverse[sample * p.n + i];
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kStartThreads, kRoundBlocks)
    outlier_keys_kernel(const RepulsionProblem p, const RepulsionWorkspace w) {
  TOKENPRUNE_SHARED(BlockGroup, group);
  let_next_launch_start();
  wait_for_launch_before();
  group.form(w.counters, w.groups);
  const int64_t threads = int64_t(group.size) * kStartThreads,
                thread = int64_t(group.rank) * kStartThreads + threadIdx.x;
  float* parts = w.direction + group.index * (kDirectionParts + 1) * p.channels;
  float* direction = parts + kDirectionParts * p.channels;
  for (int64_t sample = group.index; sample < p.batch; sample += w.groups) {
    for (int64_t q = thread; q < kDirectionParts * p.channels; q += threads)
      parts[q] = direction_part<T>(p, w, sample, q / p.channels, q % p.channels);
    group.sync();
    for (int64_t channel = thread; channel < p.channels; channel += threads) {
      float sum = 0;
#pragma unroll 8
      for (int part = 0; part < kDirectionParts; ++part) sum += parts[part * p.channels + channel];
      direction[channel] = sum;
    }
    group.sync();  // the next sum is written behind the first barrier of the next sample: all have read this one
    for (int64_t i = thread / kWarp; i < p.n; i += threads / kWarp) {
      const float dot = sum_over_row<T>(rows_of(p, sample, sizeof(T)), i,
                                        [&](float x, int64_t channel) { return x * direction[channel]; });
      const int64_t at = sample * p.n + i;
      if (lane_id() == 0 && w.key[at] != kNoKey) w.key[at] = order_key(-(dot * w.inverse[at]));
    }
  }
}

template <class T>
__global__ void __launch_bounds__(GramTile<128>::kThreads, GramTile<128>::kBlocks)
    isolated_keys_kernel(const RepulsionProblem p, const RepulsionWorkspace w, int64_t tiles) {
  using Tile = GramTile<128>;
  const int64_t sample = blockIdx.x / tiles, n = p.n;
  const int2 at = tile_of(blockIdx.x % tiles);
  TOKENPRUNE_SHARED(int[2][128], tokens);
  let_next_launch_start();
  const float* dots = pair_tile<T>(rows_of(p, sample, sizeof(T)), n, at, tokens);
  wait_for_launch_before();  // for norms and keys: features are there before the first launch
  // The first half of the threads own a row each, the second half a column.
  const bool row = threadIdx.x < 128;
  const int mine = threadIdx.x % 128, step = row ? 1 : Tile::kOutPitch;
  const int64_t i = (row ? at.x : at.y) * 128 + mine, others = (row ? at.y : at.x) * 128;
  if (i >= n || !is_valid(p, sample, i) || (!row && at.x == at.y)) return;
  const float* line = dots + mine * (row ? Tile::kOutPitch : 1);
  const float* inverse = w.inverse + sample * n;
  float largest = -INFINITY;
  for (int c = 0; c < 128 && others + c < n; ++c)
    if (others + c != i && is_valid(p, sample, others + c))
      largest = nan_max(largest, cosine_of(line[c * step], inverse[i], inverse[others + c]));
  atomicMin(&w.key[sample * n + i], order_key(-largest));
}

// A launch of the plan's groups of blocks.
inline Launch in_groups(const RepulsionPlan& plan, int threads, size_t shared, CallStream& stream) {
  return {plan.groups * plan.group_blocks, dim3(threads), shared, stream, 1, plan.group_blocks > 1};
}

template <class T>
cudaError_t launch_start(const RepulsionProblem& p, const RepulsionPlan& plan, const RepulsionWorkspace& w,
                         CallStream& stream) {
  const int64_t blocks = ceil_div<int64_t>(p.n, kStartTokens);
  const cudaError_t status =
      launch({p.batch * blocks, dim3(kStartThreads), 0, stream}, prepare_kernel<T>, p, w, blocks);
  if (status != cudaSuccess || !plan.start) return status;
  if (p.first == FirstPick::kOutlier)
    return launch(in_groups(plan, kStartThreads, 0, stream), outlier_keys_kernel<T>, p, w);
  const int64_t side = ceil_div<int64_t>(p.n, 128), tiles = side * (side + 1) / 2;
  return launch({p.batch * tiles, dim3(GramTile<128>::kThreads), GramTile<128>::kShared, stream},
                isolated_keys_kernel<T>, p, w, tiles);
}

}  // namespace tokenprune
