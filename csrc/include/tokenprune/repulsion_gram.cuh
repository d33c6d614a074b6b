// repulsion_sample with all cosines of a sample in device memory, up to `gram_token_limit` tokens.
//
// 1. gram: the inner products of all pairs, n x n float32. grid: samples * tiles on and above the diagonal; block:
//    GramTile (128 threads for tiles of 64, 256 for tiles of 128); shared: GramTile::kShared. Reads tiles * 2 * kTile
//    rows (from the L2 cache but for the first time: n * channels elements), writes n * n floats. Tiles are written
//    twice, mirrored; those on the diagonal write the inverse norms, so that nothing has to be launched before.
// 2. gram_start, for the starts that compare tokens: a warp per token reads a row of the matrix. 256 threads.
// 3. gram_greedy: one block per sample makes all picks. A thread owns every blockDim-th token, kOwnTokens at most; their
//    states, inverse norms and energies are in its registers. A step is one barrier and one row of the matrix (4 n
//    bytes), read coalesced.
#pragma once

#include "tokenprune/repulsion_tokens.cuh"

namespace tokenprune {

// Tiles of a triangle in one dimension: 0 is (0, 0), then (0, 1), (1, 1), (0, 2), ...
__device__ __forceinline__ int2 tile_of(int64_t index) {
  int column = static_cast<int>((sqrtf(8.0f * static_cast<float>(index) + 1) - 1) / 2);
  while (int64_t(column) * (column + 1) / 2 > index) --column;  // the root is rounded
  while (int64_t(column + 1) * (column + 2) / 2 <= index) ++column;
  return {static_cast<int>(index - int64_t(column) * (column + 1) / 2), column};
}

// The inner products of tile `at` of the pairs of a sample's n tokens; `tokens`, in shared memory, gets which they are.
template <class T, int kTile>
__device__ __forceinline__ const float* pair_tile(const TokenRows& rows, int64_t n, int2 at, int (&tokens)[2][kTile]) {
  for (int r = threadIdx.x; r < kTile; r += blockDim.x) {
    tokens[0][r] = at.x * kTile + r < n ? at.x * kTile + r : kNoRow;
    tokens[1][r] = at.y * kTile + r < n ? at.y * kTile + r : kNoRow;
  }
  __syncthreads();
  return gram_tile<T, kTile>(rows, tokens[0], tokens[1], kTile, dynamic_shared());
}

template <class T, int kTile>
__global__ void __launch_bounds__(GramTile<kTile>::kThreads, GramTile<kTile>::kBlocks)
    gram_kernel(const RepulsionProblem p, uint32_t tiles, float* gram, float* inverse) {
  using Tile = GramTile<kTile>;
  const uint32_t sample = blockIdx.x / tiles;
  const int64_t n = p.n;
  TOKENPRUNE_SHARED(int[2][kTile], tokens);
  const float* dots = pair_tile<T>(rows_of(p, sample, sizeof(T)), n, tile_of(blockIdx.x % tiles), tokens);
  const int row0 = tokens[0][0], column0 = tokens[1][0];  // kept in registers meanwhile, they would spill
  gram += sample * n * n;
  for (int q = threadIdx.x; q < kTile * kTile; q += Tile::kThreads) {
    const int r = q / kTile, c = q % kTile;
    if (row0 + r < n && column0 + c < n) gram[(row0 + r) * n + column0 + c] = dots[r * Tile::kOutPitch + c];
    if (row0 != column0 && column0 + r < n && row0 + c < n)
      gram[(column0 + r) * n + row0 + c] = dots[c * Tile::kOutPitch + r];
  }
  if (row0 == column0)
    for (int r = threadIdx.x; r < kTile && row0 + r < n; r += Tile::kThreads)
      inverse[sample * n + row0 + r] = inverse_norm(dots[r * (Tile::kOutPitch + 1)]);
}

constexpr int kStartThreads = 256, kStartTokens = kStartThreads / kWarp;  // tokens per block

// What the first pick minimises, for every token: the sum of its cosines with the valid tokens (outlier: the cosine
// with the sum of all unit vectors, but for a factor that all tokens share), or the largest with another valid one.
__global__ void __launch_bounds__(kStartThreads)
    gram_start_kernel(const RepulsionProblem p, int64_t blocks, const float* gram, const float* inverse, float* start) {
  const int64_t sample = blockIdx.x / blocks, n = p.n, i = blockIdx.x % blocks * kStartTokens + warp_id();
  if (i >= n) return;
  const float* row = gram + (sample * n + i) * n;
  inverse += sample * n;
  const bool outlier = p.first == FirstPick::kOutlier;
  const float own = inverse[i];
  float result = outlier ? 0 : -INFINITY;
  for (int64_t j = lane_id(); j < n; j += kWarp) {
    if (!is_valid(p, sample, j) || (j == i && !outlier)) continue;
    const float cosine = cosine_of(row[j], own, inverse[j]);
    result = outlier ? result + cosine : nan_max(result, cosine);
  }
  result = outlier ? warp_reduce(result, Sum()) : warp_reduce(result, NanMax());
  if (lane_id() == 0) start[sample * n + i] = result;
}

// The rule of the block that makes the picks. The loads of a row are all under way before the first one is used.
template <ObjectiveKind kind>
struct GramRule {
  OwnTokens<kind> tokens;
  const float *gram, *inverse_norms;  // of the sample
  const float* positions;             // or null
  int axes;
  int64_t* indices;
  float inverse[kOwnTokens] = {};

  __device__ __forceinline__ void load(const RepulsionProblem& p, int64_t sample, const uint32_t* seeds) {
    tokens.load(p, sample, seeds);
    tokens.for_each([&](int e, int i) { inverse[e] = inverse_norms[i]; });
  }
  __device__ __forceinline__ void apply(int j) {
    const float* row = gram + int64_t(j) * tokens.end;
    const float other = inverse_norms[j];
    float dots[kOwnTokens];
    tokens.for_each([&](int e, int i) { dots[e] = row[i]; });
    tokens.apply(
        j, [&](int e, int) { return cosine_of(dots[e], inverse[e], other); },
        [&](int, int i) {
          return positions == nullptr ? 0 : squared_distance(positions + i * axes, 1, positions + j * axes, 1, axes);
        });
  }
  __device__ __forceinline__ Candidate best() const { return tokens.mine; }
  __device__ __forceinline__ void commit(int64_t slot, Candidate pick) {
    if (threadIdx.x == 0) indices[slot] = pick.index;
    apply(static_cast<int>(pick.index));
  }
};

template <ObjectiveKind kind>
__global__ void __launch_bounds__(1024)
    gram_greedy_kernel(const RepulsionProblem p, const float* gram, const float* inverse, const float* start) {
  TOKENPRUNE_SHARED(CandidateSlots, slots);
  TOKENPRUNE_SHARED(uint32_t[kBlockTokens / 32], seeds);
  const int64_t sample = blockIdx.x;
  const int n = static_cast<int>(p.n);
  int64_t* indices = p.indices + sample * p.k;
  GramRule<kind> rule{
      {p, 0, n}, gram + sample * p.n * n, inverse + sample * n, positions_of(p, sample), static_cast<int>(p.axes),
      indices};
  if (p.k > 0) {
    const bool seeded = mark_seeds(p.seeds + sample * p.n_seeds, p.n_seeds, n, seeds);
    rule.load(p, sample, seeds);
    for_seeds(seeds, n, [&](int seed) { rule.apply(seed); });
    rule.tokens.start(seeded, [&](int e, int i) {
      return order_key(-(p.energy == nullptr && start != nullptr ? start[sample * n + i] : rule.tokens.energy[e]));
    });
  }
  const int64_t picked = greedy_select(rule, slots, p.k);
  for (int64_t slot = picked + threadIdx.x; slot < p.k; slot += blockDim.x) indices[slot] = -1;
  if (threadIdx.x == 0) p.counts[sample] = picked;
}

template <class T, int kTile>
cudaError_t launch_gram(const RepulsionProblem& p, float* gram, float* inverse, cudaStream_t stream) {
  using Tile = GramTile<kTile>;
  const int64_t side = ceil_div<int64_t>(p.n, kTile), tiles = side * (side + 1) / 2;
  return launch({dim3(p.batch * tiles), dim3(Tile::kThreads), Tile::kShared, stream}, gram_kernel<T, kTile>, p, tiles,
                gram, inverse);
}

// All picks of a group of samples.
template <class T>
cudaError_t launch_repulsion_gram(const RepulsionProblem& p, const RepulsionPlan& plan, float* floats,
                                  cudaStream_t stream) {
  float *gram = floats, *inverse = gram + plan.gram_floats, *start = inverse + plan.samples * p.n;
  if (p.k > 0 && p.n > 0) {
    const cudaError_t status =
        plan.tile == 128 ? launch_gram<T, 128>(p, gram, inverse, stream) : launch_gram<T, 64>(p, gram, inverse, stream);
    if (status != cudaSuccess) return status;
  }
  if (plan.start) {
    const int64_t blocks = ceil_div<int64_t>(p.n, kStartTokens);
    const cudaError_t status = launch({dim3(p.batch * blocks), dim3(kStartThreads), 0, stream}, gram_start_kernel, p,
                                      blocks, gram, inverse, start);
    if (status != cudaSuccess) return status;
  }
  return dispatch_objective(p, [&](auto kind) {
    return launch({dim3(p.batch), dim3(plan.greedy_block), 0, stream}, gram_greedy_kernel<decltype(kind)::value>, p,
                  gram, inverse, plan.start ? start : nullptr);
  });
}

}  // namespace tokenprune
