// repulsion_sample for many tokens, in rounds of two launches.
//
// 1. choose, a block per sample: takes the best few dozen tokens as candidates, compares them with each other (one tile
//    of inner products), and runs the sampler among them. 128 or 512 threads; shared: GramTile<64>::kShared; reads n
//    keys and kCandidates rows of features.
// 2. apply, a block per 64 tokens: the inner products of all tokens with what was chosen. 128 threads;
//    GramTile<64>::kShared; reads all features once.
//
// max: a selected token never improves the objective of another. So as long as the best candidate beats the best of all
// other tokens, whose objectives are those before the round, it is the true pick: the others could only have become
// worse. The list of a round is these picks, and apply updates every token with them.
// sum: every pick changes all objectives by about the same, so that test would stop at once. Here only the first token
// of the list is a pick, the others are a prediction; apply stores the rows of all of them, and the next choose, before
// anything else, makes exact steps over all tokens for as long as the next pick has a row (20 n bytes and a barrier
// each). A wrong prediction costs time only.
//
// A round makes at least one pick, so k rounds are launched; a round that finds its sample done ends at once. Seeds
// take rounds of their own, kCandidates of them at a time, in ascending order. Before anything is selected, a list is
// one token: the start has an objective of its own.
#pragma once

#include "tokenprune/repulsion_start.cuh"

namespace tokenprune {

constexpr int kChooseThreads = 512;

using Rank = uint64_t;  // of pack_ranked: 0 is no candidate

// Descending bitonic sort of `count` (a power of two, at least 64) ranks in shared memory. All threads call it, after a
// barrier; ends with one.
__device__ __forceinline__ void sort_ranks(Rank* ranks, int count) {
  for (int size = 2; size <= count; size *= 2)
    for (int stride = size / 2; stride > 0; stride /= 2) {
      for (int t = threadIdx.x; t < count / 2; t += blockDim.x) {
        const int low = t / stride * 2 * stride + t % stride, high = low + stride;
        const Rank a = ranks[low], b = ranks[high];
        if ((a < b) == ((low & size) == 0)) {
          ranks[low] = b;
          ranks[high] = a;
        }
      }
      __syncthreads();
    }
}

// The next seeds from `cursor` on, at most kCandidates, ascending, into `picks`; how many, and where to go on.
__device__ __forceinline__ uint32_t next_seeds(const uint32_t* seed, int64_t n, uint32_t* picks, int64_t& cursor) {
  uint32_t found = 0;
  int64_t base = cursor;
  for (; base < n && found < kCandidates; base += blockDim.x) {
    const int64_t j = base + threadIdx.x;
    const bool here = j < n && seed[j] != 0;
    uint32_t total;
    const uint32_t slot = found + block_exclusive_sum(here ? 1u : 0u, total);
    if (here && slot < kCandidates) picks[slot] = static_cast<uint32_t>(j);
    found += total;
  }
  __syncthreads();  // picks are written
  if (found > kCandidates) {
    found = kCandidates;
    cursor = picks[kCandidates - 1] + 1;
  } else {
    cursor = min(base, n);
  }
  return found;
}

// The two best of the thread's tokens into its entries of `ranks`; returns the best of the others.
__device__ __forceinline__ Rank two_best(const uint32_t* key, int64_t n, Rank* ranks) {
  Rank best = 0, second = 0, third = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    const Rank rank = pack_ranked(key[i], static_cast<uint32_t>(i));
    if (rank <= third) continue;
    third = rank > second ? second : rank;
    const Rank middle = rank > best ? best : rank;
    second = rank > second ? middle : second;
    best = rank > best ? rank : best;
  }
  ranks[threadIdx.x] = best;
  ranks[threadIdx.x + blockDim.x] = second;
  return third;
}

// What a warp knows of the candidates: two per lane.
struct LaneCandidates {
  Rank rank[2];
  float state[2], inverse[2], energy[2];
};

// Runs the sampler among the candidates, for at most `limit` tokens, and lists them. max: while they beat `outside`,
// and all are picks; sum: the first one is. One warp. Without `dots` the list is one token.
__device__ __forceinline__ uint32_t pick_candidates(const RepulsionProblem& p, const RepulsionRounds& w, int64_t sample,
                                                    const Rank* ranks, Rank outside, const float* dots, uint32_t limit,
                                                    int64_t* indices, uint32_t* picks) {
  const RepulsionObjective objective(p, sample);
  LaneCandidates own;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    own.rank[e] = ranks[lane_id() + e * kWarp];
    const int64_t at = sample * p.n + (own.rank[e] == 0 ? 0 : index_of_packed(own.rank[e]));
    own.state[e] = w.state[at];
    own.inverse[e] = w.inverse[at];
    own.energy[e] = p.energy == nullptr ? 0 : p.energy[at];
  }
  for (uint32_t made = 0; made < limit; ++made) {
    const Rank mine = own.rank[0] > own.rank[1] ? own.rank[0] : own.rank[1], best = warp_reduce(mine, Max());
    if (best == 0 || (!p.sum && best < outside)) return made;
    const unsigned in_first = __ballot_sync(kAllLanes, own.rank[0] == best);
    const int owner = __ffs(__ballot_sync(kAllLanes, mine == best)) - 1, slot = in_first != 0 ? owner : owner + kWarp;
    const int64_t j = index_of_packed(best);
    if (lane_id() == 0) {
      picks[made] = static_cast<uint32_t>(j);
      if (made == 0 || !p.sum) {
        indices[made] = j;
        w.key[sample * p.n + j] = kNoKey;
      }
    }
    if (dots == nullptr) return 1;
    const float other = __shfl_sync(kAllLanes, in_first != 0 ? own.inverse[0] : own.inverse[1], owner);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (own.rank[e] == 0) continue;
      const int64_t i = index_of_packed(own.rank[e]);
      const float cosine =
          cosine_of(dots[slot * GramTile<64>::kOutPitch + lane_id() + e * kWarp], own.inverse[e], other);
      own.state[e] = objective.updated(own.state[e], cosine, i, j);
      own.rank[e] = i == j ? 0 : pack_ranked(objective.key(own.state[e], own.energy[e]), static_cast<uint32_t>(i));
    }
  }
  return limit;
}

// Applies the first token of the list to all tokens, and then those that turn out to be the next picks; stops at the
// first pick that is not in the list, or that is the last one. Returns how many picks were made.
__device__ __forceinline__ uint32_t step_through_rows(const RepulsionProblem& p, const RepulsionRounds& w,
                                                      int64_t sample, uint32_t listed, uint32_t left,
                                                      int64_t* indices) {
  TOKENPRUNE_SHARED(CandidateSlots, slots);
  const int64_t n = p.n;
  const uint32_t* list = w.picks + sample * kCandidates;
  const float* rows = w.rows + sample * kCandidates * n;
  const RepulsionObjective objective(p, sample);
  StoredRows tokens{objective,
                    p.energy == nullptr ? nullptr : p.energy + sample * n,
                    w.inverse + sample * n,
                    w.state + sample * n,
                    w.key + sample * n,
                    static_cast<int>(n)};
  const uint32_t low = lane_id(), high = lane_id() + kWarp;
  const uint32_t none = 0xFFFFFFFFu, low_token = low < listed ? list[low] : none,
                 high_token = high < listed ? list[high] : none;
  int64_t slot = 0;
  for (uint32_t made = 0;; ++made) {
    tokens.apply_pick(rows + slot * n, list[slot]);
    const Candidate best = cluster_best(tokens.mine, slots, made);
    const unsigned in_low = __ballot_sync(kAllLanes, low_token == best.index);
    const unsigned in_high = __ballot_sync(kAllLanes, high_token == best.index);
    if (best.key == kNoKey || (in_low | in_high) == 0) return made;
    slot = in_low != 0 ? __ffs(in_low) - 1 : __ffs(in_high) - 1 + kWarp;
    if (threadIdx.x == 0) indices[made] = best.index;
    if (made + 1 == left) return left;
  }
}

template <class T>
__global__ void __launch_bounds__(kChooseThreads, 1) choose_kernel(const RepulsionProblem p, const RepulsionRounds w) {
  TOKENPRUNE_SHARED(Rank[2 * kChooseThreads], ranks);
  TOKENPRUNE_SHARED(int[kCandidates], tokens);
  static_assert(kCandidates == 64 && kCandidates == 2 * kWarp, "a tile, and two candidates per lane");
  const int64_t sample = blockIdx.x, n = p.n;
  const uint32_t total = static_cast<uint32_t>(min(p.k, n));
  RepulsionControl control = w.control[sample];
  uint32_t* picks = w.picks + sample * kCandidates;
  int64_t* indices = p.indices + sample * p.k;
  __syncthreads();  // all have read it
  if (control.stored && control.picked < total)
    control.picked +=
        step_through_rows(p, w, sample, control.selected, total - control.picked, indices + control.picked);
  control.selected = control.stored = 0;
  if (control.cursor < n && control.started) {
    int64_t cursor = control.cursor;
    control.selected = next_seeds(w.seed + sample * n, n, picks, cursor);
    control.cursor = static_cast<uint32_t>(cursor);
  }
  const uint32_t left = total - control.picked;
  if (control.selected == 0 && left > 0) {  // the same for all threads
    const Rank rest = two_best(w.key + sample * n, n, ranks);
    __syncthreads();
    sort_ranks(ranks, 2 * blockDim.x);
    Rank outside = block_reduce(rest, Max(), Rank(0));
    if (ranks[kCandidates] > outside) outside = ranks[kCandidates];
    const float* dots = nullptr;
    if (control.started && left > 1 && ranks[1] != 0) {
      for (int r = threadIdx.x; r < kCandidates; r += blockDim.x)
        tokens[r] = ranks[r] == 0 ? kNoRow : static_cast<int>(index_of_packed(ranks[r]));
      __syncthreads();
      dots = gram_tile<T, 64>(rows_of(p, sample, sizeof(T)), tokens, tokens, kCandidates, dynamic_shared());
    }
    if (warp_id() == 0) {
      control.selected = pick_candidates(p, w, sample, ranks, outside, dots, left < kCandidates ? left : kCandidates,
                                         indices + control.picked, picks);
      control.stored = p.sum && control.selected > 0;
      control.picked += control.stored ? 1 : control.selected;
      control.started = 1;
    }
  }
  if (threadIdx.x == 0) {
    p.counts[sample] = control.picked;
    w.control[sample] = control;
  }
}

constexpr int kApplyThreads = GramTile<64>::kThreads;

template <class T>
__global__ void __launch_bounds__(kApplyThreads, GramTile<64>::kBlocks)
    apply_kernel(const RepulsionProblem p, const RepulsionRounds w, int64_t tiles) {
  TOKENPRUNE_SHARED(int[64], tokens);
  TOKENPRUNE_SHARED(int[kCandidates], selected);
  TOKENPRUNE_SHARED(float[kCandidates], norms);
  const int64_t sample = blockIdx.x / tiles, n = p.n, first = blockIdx.x % tiles * 64;
  const RepulsionControl control = w.control[sample];
  const int count = static_cast<int>(control.selected);
  if (count == 0) return;
  if (threadIdx.x < 64) {
    const int64_t i = first + threadIdx.x;
    tokens[threadIdx.x] = i < n && w.key[sample * n + i] != kNoKey ? static_cast<int>(i) : kNoRow;
  } else {
    const int r = threadIdx.x - 64;
    selected[r] = r < count ? static_cast<int>(w.picks[sample * kCandidates + r]) : kNoRow;
    norms[r] = r < count ? w.inverse[sample * n + selected[r]] : 0;
  }
  __syncthreads();
  const float* dots = gram_tile<T, 64>(rows_of(p, sample, sizeof(T)), tokens, selected, count, dynamic_shared());
  if (control.stored) {
    float* rows = w.rows + sample * kCandidates * n + first;
    for (int q = threadIdx.x; q < count * 64; q += kApplyThreads)
      if (first + q % 64 < n) rows[q / 64 * n + q % 64] = dots[q % 64 * GramTile<64>::kOutPitch + q / 64];
    return;
  }
  if (threadIdx.x >= 64 || tokens[threadIdx.x] == kNoRow) return;
  const RepulsionObjective objective(p, sample);
  const int64_t i = tokens[threadIdx.x], at = sample * n + i;
  const float* row = dots + threadIdx.x * GramTile<64>::kOutPitch;
  const float inverse = w.inverse[at];
  float state = w.state[at];
  for (int r = 0; r < count; ++r)
    state = objective.updated(state, cosine_of(row[r], inverse, norms[r]), i, selected[r]);
  w.state[at] = state;
  w.key[at] = objective.key(state, p.energy == nullptr ? 0 : p.energy[at]);
}

// All picks of a group of samples.
template <class T>
cudaError_t launch_repulsion_rounds(const RepulsionProblem& p, const RepulsionPlan& plan, float* floats,
                                    uint32_t* words, cudaStream_t stream) {
  const RepulsionRounds w(p, plan, floats, words);
  const int64_t tiles = ceil_div<int64_t>(p.n, 64);
  cudaError_t status = launch_start<T>(p, plan, w, stream);
  for (int64_t round = 0; round < plan.rounds && status == cudaSuccess; ++round) {
    status = launch({dim3(p.batch), dim3(plan.greedy_block), GramTile<64>::kShared, stream}, choose_kernel<T>, p, w);
    if (status == cudaSuccess && round + 1 < plan.rounds)
      status = launch({dim3(p.batch * tiles), dim3(kApplyThreads), GramTile<64>::kShared, stream}, apply_kernel<T>, p,
                      w, tiles);
  }
  return status;
}

}  // namespace tokenprune
