// repulsion_sample with all cosines of a sample in device memory, up to `gram_token_limit` tokens.
//
// 1. gram: the inner products of all pairs, n x n float32. grid: samples * tiles on and above the diagonal * parts of
//    the channels, a cluster for each tile; block: GramTile (128 threads for tiles of 64, 256 for tiles of 128); shared:
//    GramTile::kShared. Reads tiles * 2 * kTile rows (from the L2 cache but for the first time: n * channels elements),
//    writes n * n floats. Tiles are written twice, mirrored; those on the diagonal write the inverse norms, so that
//    nothing has to be launched before.
// 2. gram_rows, for starts that compare tokens, and for potentials other than the cosine, which it puts in the place of
//    the inner products: a warp per row. 256 threads; reads, and writes, n * n floats.
// 3. gram_greedy: one block per sample makes all picks. A thread owns every blockDim-th token, kOwnTokens at most; what it
//    knows of them is in its registers. A step is one barrier and one row of the matrix (4 n bytes), read coalesced, and
//    for every token an addition or a maximum.
#pragma once

#include "tokenprune/repulsion_seeds.cuh"

namespace tokenprune {

// The inner products of tile `at` of the pairs of a sample's n tokens; `tokens`, in shared memory, gets which they are.
template <class T, int kTile>
__device__ __forceinline__ float* pair_tile(const TokenRows& rows, int64_t n, int2 at, int (&tokens)[2][kTile]) {
  constexpr int kThreads = GramTile<kTile>::kThreads;
  for (int r = threadIdx.x; r < kTile; r += kThreads) {
    tokens[0][r] = at.x * kTile + r < n ? at.x * kTile + r : kNoRow;
    tokens[1][r] = at.y * kTile + r < n ? at.y * kTile + r : kNoRow;
  }
  __syncthreads();
  return gram_tile<T, kTile, kThreads>(rows, tokens[0], tokens[1], kTile, dynamic_shared());
}

// A cluster shares a tile: every block multiplies its part of the channels, and adds up the parts of its share of the
// rows, in the order of the blocks.
template <class T, int kTile>
__global__ void __launch_bounds__(GramTile<kTile>::kThreads, GramTile<kTile>::kBlocks)
    gram_kernel(const RepulsionProblem p, uint32_t tiles, float* gram, float* inverse) {
  using Tile = GramTile<kTile>;
  const uint32_t parts = cluster_size(), part = cluster_rank(), tile = blockIdx.x / parts, sample = tile / tiles;
  const int64_t n = p.n;
  TOKENPRUNE_SHARED(int[2][kTile], tokens);
  let_next_launch_start();
  const TokenRows rows = channels_of<T>(rows_of(p, sample, sizeof(T)), part, parts);
  float* dots = pair_tile<T>(rows, n, tile_of(tile % tiles), tokens);
  const int row0 = tokens[0][0], column0 = tokens[1][0];  // kept in registers meanwhile, they would spill
  const int own_shift = __ffs(kTile / parts) - 1, own = 1 << own_shift, first = static_cast<int>(part) * own;
  add_up_parts<kTile>(dots);
  wait_for_launch_before();  // which may still read the products of other samples
  gram += sample * n * n;
  for (int q = threadIdx.x; q < own * kTile; q += Tile::kThreads) {
    const int r = first + q / kTile, c = q % kTile;
    if (row0 + r < n && column0 + c < n) gram[(row0 + r) * n + column0 + c] = dots[r * Tile::kOutPitch + c];
    const int mirrored_r = first + (q & (own - 1)), mirrored_c = q >> own_shift;
    if (row0 != column0 && column0 + mirrored_c < n && row0 + mirrored_r < n)
      gram[(column0 + mirrored_c) * n + row0 + mirrored_r] = dots[mirrored_r * Tile::kOutPitch + mirrored_c];
  }
  if (row0 == column0)
    for (int r = first + threadIdx.x; r < first + own && row0 + r < n; r += Tile::kThreads)
      inverse[sample * n + row0 + r] = inverse_norm(dots[r * (Tile::kOutPitch + 1)]);
}

constexpr int kStartThreads = 256, kStartTokens = kStartThreads / kWarp;  // tokens per block

// What the first pick minimises, for every token (with `start`): the sum of its cosines with the valid tokens (outlier:
// the cosine with the sum of all unit vectors, but for a factor that all tokens share), or the largest with another
// valid one. phi(i, j) and phi(j, i) are the same bits: nothing in them tells i from j.
__global__ void __launch_bounds__(kStartThreads)
    gram_rows_kernel(const RepulsionProblem p, int64_t blocks, float* gram, const float* inverse, float* start) {
  let_next_launch_start();
  wait_for_launch_before();
  const int64_t sample = blockIdx.x / blocks, n = p.n, i = blockIdx.x % blocks * kStartTokens + warp_id();
  if (i >= n) return;
  float* row = gram + (sample * n + i) * n;
  inverse += sample * n;
  const float* positions = positions_of(p, sample);
  const bool outlier = p.first == FirstPick::kOutlier;
  const float own = inverse[i];
  float result = outlier ? 0 : -INFINITY;
#pragma unroll 2
  for (int64_t j = lane_id(); j < n; j += kWarp) {
    const float cosine = cosine_of(row[j], own, inverse[j]);
    if (start != nullptr && is_valid(p, sample, j) && (j != i || outlier))
      result = outlier ? result + cosine : nan_max(result, cosine);
    if (p.potential == Potential::kCosine) continue;
    const float distance = squared_distance(positions, static_cast<int>(p.axes), i, j);
    row[j] = p.potential == Potential::kRiesz ? potential<Potential::kRiesz>(cosine, distance, p.weights)
                                              : potential<Potential::kGaussian>(cosine, distance, p.weights);
  }
  if (start == nullptr) return;
  result = outlier ? warp_reduce(result, Sum()) : warp_reduce(result, NanMax());
  if (lane_id() == 0) start[sample * n + i] = result;
}

// The rule of the block that makes the picks. The loads of a row are all under way before the first one is used. Nothing
// asks whether a token is there: rows are read as far as the threads go, into the next one or the workspace behind the
// matrix, and what is no token is never available.
struct GramRule {
  const float* matrix;  // [samples, n, n], fewer than 2^32 elements: an address is one instruction then
  const float* norms;   // [samples, n] inverse ones, where the matrix has inner products; null where it has potentials
  int64_t* indices;
  uint32_t first_row;  // of the sample
  int n;
  bool sum;
  float state[kOwnTokens] = {}, inverse[kOwnTokens] = {}, energy[kOwnTokens] = {};
  uint32_t available[kOwnTokens] = {};  // all bits, or none
  Candidate mine = kNoCandidate;

  // f(e, i) for the thread's tokens i, the e-th, while the block has any.
  template <class F>
  __device__ __forceinline__ void for_own(F&& f) const {
#pragma unroll
    for (int e = 0; e < kOwnTokens; ++e)
      if (static_cast<int>(e * blockDim.x) < n) f(e, static_cast<int>(threadIdx.x + e * blockDim.x));
  }

  // Offers come in the order of the tokens, so that equals leave the one with the lower index.
  __device__ __forceinline__ void offer(int e, int i, float objective) {
    const uint32_t key = order_key(-objective) & available[e];
    if (key > mine.key) mine = {key, static_cast<uint32_t>(i)};
  }

  // Applies j, which is not available from now on.
  __device__ __forceinline__ void apply(int j) {
    const uint32_t row = (first_row + j) * n + threadIdx.x;
    const float other = norms == nullptr ? 1 : norms[first_row + j];
    float value[kOwnTokens] = {};
    for_own([&](int e, int) { value[e] = matrix[row + e * blockDim.x]; });
    mine = kNoCandidate;
    for_own([&](int e, int i) {
      if (i == j) available[e] = 0;
      const float potential = cosine_of(value[e], inverse[e], other);
      state[e] = sum ? state[e] + potential : nan_max(state[e], potential);
      offer(e, i, state[e] + energy[e]);
    });
  }

  __device__ __forceinline__ Candidate best() const { return mine; }
  __device__ __forceinline__ void commit(int64_t slot, Candidate pick) {
    if (threadIdx.x == 0) indices[slot] = pick.index;
    apply(static_cast<int>(pick.index));
  }
};

// `inverse` is null where the matrix has potentials; `start` is null, or what the first pick minimises.
__global__ void __launch_bounds__(kGreedyThreads)
    gram_greedy_kernel(const RepulsionProblem p, const float* gram, const float* inverse, const float* start) {
  TOKENPRUNE_SHARED(CandidateSlots, slots);
  TOKENPRUNE_SHARED(uint32_t[kOwnTokens * kGreedyThreads / 32], seeds);
  wait_for_launch_before();
  const int64_t sample = blockIdx.x, at = sample * p.n;
  int64_t* indices = p.indices + sample * p.k;
  GramRule rule{gram, inverse, indices, static_cast<uint32_t>(at), static_cast<int>(p.n), p.sum};
  if (p.k > 0) {
    const bool seeded = mark_seeds(p.seeds + sample * p.n_seeds, p.n_seeds, rule.n, seeds);
    rule.for_own([&](int e, int i) {
      if (i >= rule.n) return;
      rule.state[e] = p.sum ? 0 : -INFINITY;
      rule.inverse[e] = inverse == nullptr ? 1 : inverse[at + i];
      rule.energy[e] = p.energy == nullptr ? 0 : p.energy[at + i];
      rule.available[e] = is_valid(p, sample, i) && !is_seed(seeds, i) ? 0xFFFFFFFFu : 0;
      if (!seeded) rule.offer(e, i, start == nullptr ? rule.energy[e] : start[at + i]);
    });
    for_seeds(seeds, rule.n, [&](int seed) { rule.apply(seed); });
  }
  const int64_t picked = greedy_select(rule, slots, p.k);
  for (int64_t slot = picked + threadIdx.x; slot < p.k; slot += blockDim.x) indices[slot] = -1;
  if (threadIdx.x == 0) p.counts[sample] = picked;
}

template <class T, int kTile>
cudaError_t launch_gram_tiles(const RepulsionProblem& p, const RepulsionPlan& plan, float* gram, float* inverse,
                              CallStream& stream) {
  using Tile = GramTile<kTile>;
  const int64_t side = ceil_div<int64_t>(p.n, kTile), tiles = side * (side + 1) / 2;
  return launch(
      {p.batch * tiles * plan.parts, dim3(Tile::kThreads), Tile::kShared, stream, static_cast<unsigned>(plan.parts)},
      gram_kernel<T, kTile>, p, tiles, gram, inverse);
}

template <class T>
cudaError_t launch_gram(const RepulsionProblem& p, const RepulsionPlan& plan, float* gram, float* inverse,
                        CallStream& stream) {
  return plan.tile == 128 ? launch_gram_tiles<T, 128>(p, plan, gram, inverse, stream)
                          : launch_gram_tiles<T, 64>(p, plan, gram, inverse, stream);
}

// All picks of a group of samples.
template <class T>
cudaError_t launch_repulsion_gram(const RepulsionProblem& p, const RepulsionPlan& plan, float* floats,
                                  CallStream& stream) {
  float *gram = floats, *inverse = gram + plan.gram_floats, *start = inverse + plan.samples * p.n;
  if (p.k > 0 && p.n > 0) {
    const cudaError_t status = launch_gram<T>(p, plan, gram, inverse, stream);
    if (status != cudaSuccess) return status;
  }
  const bool potentials = p.k > 0 && p.n > 0 && p.potential != Potential::kCosine;
  if (plan.start || potentials) {
    const int64_t blocks = ceil_div<int64_t>(p.n, kStartTokens);
    const cudaError_t status = launch({p.batch * blocks, dim3(kStartThreads), 0, stream}, gram_rows_kernel, p, blocks,
                                      gram, inverse, plan.start ? start : nullptr);
    if (status != cudaSuccess) return status;
  }
  return launch({p.batch, dim3(plan.greedy_block), 0, stream}, gram_greedy_kernel, p, gram,
                potentials ? nullptr : inverse, plan.start ? start : nullptr);
}

}  // namespace tokenprune
