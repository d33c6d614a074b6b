// repulsion_sample with all cosines of a sample in device memory, up to `gram_token_limit` tokens.
//
// 1. gram: the inner products of all pairs, n x n float32. grid: samples * tiles on and above the diagonal; block:
//    GramTile (128 threads for tiles of 64, 256 for tiles of 128); shared: GramTile::kShared. Reads tiles * 2 * kTile
//    rows (from the L2 cache but for the first time: n * channels elements), writes n * n floats. Tiles are written
//    twice, mirrored; those on the diagonal write the inverse norms, so that nothing has to be launched before.
// 2. gram_start, for the starts that compare tokens: a warp per token reads a row of the matrix. 256 threads.
// 3. gram_greedy: one block per sample makes all picks. A thread owns every blockDim-th token; state, key, inverse norm
//    and energy of its tokens are in shared memory (16 bytes per token), untouched by other threads. A step is one
//    barrier and one row of the matrix (4 n bytes), read coalesced.
#pragma once

#include "tokenprune/repulsion_objective.cuh"

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

// The objectives of a sample's tokens and how a selected token changes them. Of `state` and `key` only the thread that
// owns a token, one of every blockDim, touches its entry.
struct StoredRows {
  const RepulsionObjective& objective;
  const float* energy;  // or null
  const float* inverse;
  float* state;
  uint32_t* key;  // kNoKey: not available
  int n;
  Candidate mine = kNoCandidate;  // the best of the thread's tokens

  // f(token, row[token]) for the thread's tokens. Three loads run ahead: all there are when a matrix is in memory.
  template <class F>
  __device__ __forceinline__ void for_own(const float* row, F&& f) const {
    const int step = blockDim.x;
    const auto load = [&](int i) { return i < n ? row[i] : 0; };
    int i = threadIdx.x;
    float here = load(i), next = load(i + step), last = load(i + 2 * step);
#pragma unroll 1
    for (; i < n; i += step) {
      const float ahead = load(i + 3 * step);
      f(i, here);
      here = next;
      next = last;
      last = ahead;
    }
  }

  __device__ __forceinline__ void offer(int i, uint32_t value) {
    key[i] = value;
    const Candidate offered = {value, static_cast<uint32_t>(i)};
    if (offered < mine) mine = offered;
  }

  __device__ __forceinline__ uint32_t key_of(int i) const {
    return objective.key(state[i], energy == nullptr ? 0 : energy[i]);
  }

  // Applies j, whose inner products are `row`, to all tokens.
  __device__ __forceinline__ void apply(const float* row, int64_t j) {
    const float other = inverse[j];
    for_own(row,
            [&](int i, float dot) { state[i] = objective.updated(state[i], cosine_of(dot, inverse[i], other), i, j); });
  }

  // Applies j to the available tokens, of which it is none from now on, and brings `mine` up to date.
  __device__ __forceinline__ void apply_pick(const float* row, int64_t j) {
    mine = kNoCandidate;
    const float other = inverse[j];
    for_own(row, [&](int i, float dot) {
      if (key[i] == kNoKey) return;
      if (i == j) {
        key[i] = kNoKey;
        return;
      }
      state[i] = objective.updated(state[i], cosine_of(dot, inverse[i], other), i, j);
      offer(i, key_of(i));
    });
  }
};

struct GramRule {
  StoredRows tokens;
  const float* gram;  // of the sample
  int64_t* indices;

  __device__ __forceinline__ const float* row(int64_t j) const { return gram + j * tokens.n; }
  __device__ __forceinline__ Candidate best() const { return tokens.mine; }
  __device__ __forceinline__ void commit(int64_t slot, Candidate pick) {
    if (threadIdx.x == 0) indices[slot] = pick.index;
    tokens.apply_pick(row(pick.index), pick.index);
  }
};

// Keys until the seeds are known.
constexpr uint32_t kMasked = 0, kAvailable = 1, kSeed = 2;

// Applies the seeds to all tokens, in ascending order and each once; true if there are any.
__device__ __forceinline__ bool apply_seeds(GramRule& rule, const int64_t* seeds, int64_t n_seeds) {
  StoredRows& tokens = rule.tokens;
  const int n = tokens.n;
  bool any = false;
  for (int64_t s = threadIdx.x; s < n_seeds; s += blockDim.x) {
    const int64_t j = valid_seed(seeds[s], n);
    if (j < 0) continue;
    atomicMax(&tokens.key[j], kSeed);
    any = true;
  }
  any = __syncthreads_or(any);
  for (int base = 0; any && base < n; base += kWarp) {
    const int j = base + lane_id();
    unsigned found = __ballot_sync(kAllLanes, j < n && tokens.key[j] == kSeed);
    for (; found != 0; found &= found - 1) {
      const int seed = base + __ffs(found) - 1;
      tokens.apply(rule.row(seed), seed);
    }
  }
  __syncthreads();  // all have seen the marks
  return any;
}

__global__ void __launch_bounds__(1024)
    gram_greedy_kernel(const RepulsionProblem p, const float* gram, const float* inverse, const float* start) {
  TOKENPRUNE_SHARED(CandidateSlots, slots);
  const int64_t sample = blockIdx.x;
  const int n = static_cast<int>(p.n);
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  float *state = shared, *norms = shared + n, *energy = p.energy == nullptr ? nullptr : shared + 3 * n;
  const RepulsionObjective objective(p, sample);
  int64_t* indices = p.indices + sample * p.k;
  uint32_t* key = reinterpret_cast<uint32_t*>(shared + 2 * n);
  GramRule rule{{objective, energy, norms, state, key, n}, gram + sample * n * n, indices};
  StoredRows& tokens = rule.tokens;
  if (p.k > 0) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      state[i] = objective.initial_state();
      norms[i] = inverse[sample * n + i];
      key[i] = is_valid(p, sample, i) ? kAvailable : kMasked;
      if (energy != nullptr) energy[i] = p.energy[sample * n + i];
    }
    __syncthreads();
    const bool started = p.seeds != nullptr && apply_seeds(rule, p.seeds + sample * p.n_seeds, p.n_seeds);
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      if (key[i] != kAvailable) {
        key[i] = kNoKey;
      } else if (started) {
        tokens.offer(i, tokens.key_of(i));
      } else {
        const float first = energy != nullptr ? energy[i] : (start != nullptr ? start[sample * n + i] : 0);
        tokens.offer(i, order_key(-first));
      }
    }
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
  return launch({dim3(p.batch), dim3(plan.greedy_block), static_cast<size_t>(plan.greedy_shared), stream},
                gram_greedy_kernel, p, gram, inverse, plan.start ? start : nullptr);
}

}  // namespace tokenprune
