// The beginning of repulsion_sample for many tokens: what the rounds (repulsion_rounds.cuh) start from.
//
// 1. prepare: a warp per token: inverse norm, state, first key; the outputs' padding. Reads the features once.
// 2. mark_seeds, with seeds: a thread per entry.
// 3. outlier:  direction_parts and direction_sum add up the unit vectors, a thread per channel and part of the tokens,
//              in a fixed order; outlier_keys, a warp per token, takes the product with the sum. Reads the features
//              twice.
//    isolated: isolated_keys compares all pairs, tile by tile of 128 x 128 (256 threads, GramTile::kShared), each pair
//              once: n * n / 2 inner products. A key is the minimum over the tiles, in whatever order they come.
#pragma once

#include "tokenprune/repulsion_gram.cuh"

namespace tokenprune {

struct RepulsionControl {
  uint32_t picked;    // tokens
  uint32_t selected;  // tokens in the list of the last round
  uint32_t stored;    // their rows are kept, see repulsion_rounds.cuh; else they are in the state of every token
  uint32_t cursor;    // seeds before this token have been selected
  uint32_t started;   // is anything selected yet?
};
static_assert(sizeof(RepulsionControl) == kControlWords * sizeof(uint32_t), "kControlWords");

// Workspaces of a group of samples.
struct RepulsionRounds {
  float *inverse, *state;  // [samples, n]
  float* direction;        // [samples, kDirectionParts + 1, channels]; the last one is the sum
  float* rows;             // [samples, kCandidates, n], for a sum
  uint32_t *key, *seed;    // [samples, n]; kNoKey: not available
  uint32_t* picks;         // [samples, kCandidates]: the list of the last round
  RepulsionControl* control;

  RepulsionRounds(const RepulsionProblem& p, const RepulsionPlan& plan, float* floats, uint32_t* words)
      : inverse(floats),
        state(floats + plan.samples * p.n),
        direction(floats + plan.token_floats),
        rows(direction + plan.direction_floats),
        key(words),
        seed(words + plan.samples * p.n),
        picks(words + plan.token_words),
        control(reinterpret_cast<RepulsionControl*>(picks + plan.samples * kCandidates)) {}
};

// The sum over a row's channels of f(element, channel), by a warp, in an order that is the same for every row.
template <class T, class F>
__device__ __forceinline__ float sum_over_row(const TokenRows& rows, int64_t token, F&& f) {
  constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
  const T* row = static_cast<const T*>(rows.data) + token * rows.stride;
  const int64_t whole = rows.aligned ? rows.channels / kChunk * kChunk : 0;
  float sum = 0;
  for (int64_t c = lane_id() * kChunk; c < whole; c += kWarp * kChunk) {
    const uint4 packed = *reinterpret_cast<const uint4*>(row + c);
    const T* element = reinterpret_cast<const T*>(&packed);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) sum += f(to_float(element[e]), c + e);
  }
  for (int64_t c = whole + lane_id(); c < rows.channels; c += kWarp) sum += f(to_float(row[c]), c);
  return warp_reduce(sum, Sum());
}

template <class T>
__global__ void __launch_bounds__(kStartThreads)
    prepare_kernel(const RepulsionProblem p, const RepulsionRounds w, int64_t blocks) {
  const int64_t sample = blockIdx.x / blocks, block = blockIdx.x % blocks, i = block * kStartTokens + warp_id();
  for (int64_t slot = block * kStartThreads + threadIdx.x; slot < p.k; slot += blocks * kStartThreads)
    p.indices[sample * p.k + slot] = -1;
  if (block == 0 && threadIdx.x == 0) {
    p.counts[sample] = 0;
    w.control[sample] = {0, 0, 0, p.seeds == nullptr ? 0xFFFFFFFFu : 0, 0};
  }
  if (i >= p.n) return;
  const float squares = sum_over_row<T>(rows_of(p, sample, sizeof(T)), i, [](float x, int64_t) { return x * x; });
  if (lane_id() != 0) return;
  const int64_t at = sample * p.n + i;
  const float first = p.energy != nullptr ? p.energy[at] : (p.first == FirstPick::kIsolated ? -INFINITY : 0);
  w.inverse[at] = inverse_norm(squares);
  w.state[at] = RepulsionObjective(p, sample).initial_state();
  w.key[at] = order_key(-first, is_valid(p, sample, i));
  w.seed[at] = 0;
}

__global__ void __launch_bounds__(kStartThreads) mark_seeds_kernel(const RepulsionProblem p, const RepulsionRounds w) {
  const int64_t entry = int64_t(blockIdx.x) * kStartThreads + threadIdx.x;
  if (entry >= p.batch * p.n_seeds) return;
  const int64_t sample = entry / p.n_seeds, j = valid_seed(p.seeds[entry], p.n);
  if (j < 0) return;
  atomicExch(&w.seed[sample * p.n + j], 1u);
  atomicExch(&w.key[sample * p.n + j], kNoKey);
  atomicExch(&w.control[sample].started, 1u);
}

template <class T>
__global__ void __launch_bounds__(kStartThreads)
    direction_parts_kernel(const RepulsionProblem p, const RepulsionRounds w, int64_t blocks) {
  const int64_t part = blockIdx.x / blocks % kDirectionParts, sample = blockIdx.x / blocks / kDirectionParts;
  const int64_t channel = blockIdx.x % blocks * kStartThreads + threadIdx.x;
  if (channel >= p.channels) return;
  const int64_t share = (p.n + kDirectionParts - 1) / kDirectionParts, end = min((part + 1) * share, p.n);
  const T* column = static_cast<const T*>(rows_of(p, sample, sizeof(T)).data) + channel;
  float sum = 0;
#pragma unroll 8
  for (int64_t i = part * share; i < end; ++i)
    if (is_valid(p, sample, i)) sum += to_float(column[i * p.row_stride]) * w.inverse[sample * p.n + i];
  w.direction[(sample * (kDirectionParts + 1) + part) * p.channels + channel] = sum;
}

__global__ void __launch_bounds__(kStartThreads)
    direction_sum_kernel(const RepulsionProblem p, const RepulsionRounds w, int64_t blocks) {
  const int64_t sample = blockIdx.x / blocks, channel = blockIdx.x % blocks * kStartThreads + threadIdx.x;
  if (channel >= p.channels) return;
  float* column = w.direction + sample * (kDirectionParts + 1) * p.channels + channel;
  float sum = 0;
#pragma unroll 8
  for (int part = 0; part < kDirectionParts; ++part) sum += column[part * p.channels];
  column[kDirectionParts * p.channels] = sum;
}

template <class T>
__global__ void __launch_bounds__(kStartThreads)
    outlier_keys_kernel(const RepulsionProblem p, const RepulsionRounds w, int64_t blocks) {
  const int64_t sample = blockIdx.x / blocks, i = blockIdx.x % blocks * kStartTokens + warp_id();
  if (i >= p.n) return;
  const float* direction = w.direction + (sample * (kDirectionParts + 1) + kDirectionParts) * p.channels;
  const float dot = sum_over_row<T>(rows_of(p, sample, sizeof(T)), i,
                                    [&](float x, int64_t channel) { return x * direction[channel]; });
  const int64_t at = sample * p.n + i;
  if (lane_id() == 0 && w.key[at] != kNoKey) w.key[at] = order_key(-(dot * w.inverse[at]));
}

template <class T>
__global__ void __launch_bounds__(GramTile<128>::kThreads, GramTile<128>::kBlocks)
    isolated_keys_kernel(const RepulsionProblem p, const RepulsionRounds w, int64_t tiles) {
  using Tile = GramTile<128>;
  const int64_t sample = blockIdx.x / tiles, n = p.n;
  const int2 at = tile_of(blockIdx.x % tiles);
  TOKENPRUNE_SHARED(int[2][128], tokens);
  const float* dots = pair_tile<T>(rows_of(p, sample, sizeof(T)), n, at, tokens);
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

template <class T>
cudaError_t launch_start(const RepulsionProblem& p, const RepulsionPlan& plan, const RepulsionRounds& w,
                         cudaStream_t stream) {
  const dim3 threads(kStartThreads);
  const int64_t blocks = ceil_div<int64_t>(p.n, kStartTokens);
  cudaError_t status = launch({dim3(p.batch * blocks), threads, 0, stream}, prepare_kernel<T>, p, w, blocks);
  if (status == cudaSuccess && p.seeds != nullptr)
    status = launch({dim3(ceil_div<int64_t>(p.batch * p.n_seeds, kStartThreads)), threads, 0, stream},
                    mark_seeds_kernel, p, w);
  if (status != cudaSuccess || !plan.start) return status;
  if (p.first == FirstPick::kIsolated) {
    const int64_t side = ceil_div<int64_t>(p.n, 128), tiles = side * (side + 1) / 2;
    return launch({dim3(p.batch * tiles), dim3(GramTile<128>::kThreads), GramTile<128>::kShared, stream},
                  isolated_keys_kernel<T>, p, w, tiles);
  }
  const int64_t slices = ceil_div<int64_t>(p.channels, kStartThreads);
  status =
      launch({dim3(p.batch * kDirectionParts * slices), threads, 0, stream}, direction_parts_kernel<T>, p, w, slices);
  if (status == cudaSuccess)
    status = launch({dim3(p.batch * slices), threads, 0, stream}, direction_sum_kernel, p, w, slices);
  if (status == cudaSuccess)
    status = launch({dim3(p.batch * blocks), threads, 0, stream}, outlier_keys_kernel<T>, p, w, blocks);
  return status;
}

}  // namespace tokenprune
