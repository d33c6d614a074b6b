// repulsion_sample for many tokens, in rounds: one cooperative launch, in which a group of blocks makes all picks of a
// sample, and then of the next one. A round is
//
// 1. choose, by one block of the group: takes the best few dozen tokens as candidates, compares them with each other
//    (one tile of inner products), and runs the sampler among them. Reads n keys and kCandidates rows of features.
// 2. apply, by all blocks, 64 tokens at a time: the inner products of all tokens with what was chosen. Reads all
//    features once.
//
// with a barrier of the group after each.
//
// max: a selected token never improves the objective of another. So as long as the best candidate beats the best of all
// other tokens, whose objectives are those before the round, it is the true pick: the others could only have become
// worse. The list of a round is these picks, and apply updates every token with them.
// sum: every pick changes all objectives by about the same, so that test would stop at once. Here only the first token
// of the list is a pick, the others are a prediction; apply stores the rows of all of them, and the next choose, before
// anything else, makes exact steps over all tokens for as long as the next pick has a row (20 n bytes and a barrier
// each). A wrong prediction costs time only.
//
// A round makes at least one pick. Seeds take rounds of their own, kCandidates of them at a time, in ascending order.
// Before anything is selected, a list is one token: the start has an objective of its own.
//
// grid: groups * group_blocks; block: kRoundThreads; shared: GramTile<64>::kShared.
#pragma once

#include "tokenprune/repulsion_points.cuh"

namespace tokenprune {

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
#pragma unroll 4
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

// All tokens of a sample, in device memory.
struct StoredTokens {
  RepulsionObjective<> objective;
  const float *energy, *positions;  // or null
  const float* inverse;
  float* state;
  uint32_t* key;  // kNoKey: not available
  int n, axes;

  __device__ __forceinline__ StoredTokens(const RepulsionProblem& p, const RepulsionWorkspace& w, uint32_t sample)
      : objective(p),
        energy(p.energy == nullptr ? nullptr : p.energy + sample * p.n),
        positions(positions_of(p, sample)),
        inverse(w.inverse + sample * p.n),
        state(w.state + sample * p.n),
        key(w.key + sample * p.n),
        n(static_cast<int>(p.n)),
        axes(static_cast<int>(p.axes)) {}

  __device__ __forceinline__ float updated(float before, float cosine, int64_t i, int64_t j) const {
    return objective.updated(before, cosine, [&] { return squared_distance(positions, axes, i, j); });
  }

  // Applies j, whose inner products are `row`, to the available tokens, of which it is none from now on; returns the
  // best of those of the thread, one of every blockDim. Three loads run ahead.
  __device__ __forceinline__ Candidate apply_pick(const float* row, int64_t j) const {
    Candidate mine = kNoCandidate;
    const int step = blockDim.x;
    const float other = inverse[j];
    const auto load = [&](int i) { return i < n ? row[i] : 0; };
    int i = threadIdx.x;
    float here = load(i), next = load(i + step), last = load(i + 2 * step);
#pragma unroll 1
    for (; i < n; i += step) {
      const float ahead = load(i + 3 * step);
      if (i == j) {
        key[i] = kNoKey;
      } else if (key[i] != kNoKey) {
        state[i] = updated(state[i], cosine_of(here, inverse[i], other), i, j);
        key[i] = objective.key(state[i], energy == nullptr ? 0 : energy[i]);
        const Candidate offered = {key[i], static_cast<uint32_t>(i)};
        if (offered < mine) mine = offered;
      }
      here = next;
      next = last;
      last = ahead;
    }
    return mine;
  }
};

// What a warp knows of the candidates: two per lane.
struct LaneCandidates {
  Rank rank[2];
  float state[2], inverse[2], energy[2];
};

// Runs the sampler among the candidates, for at most `limit` tokens, and lists them. max: while they beat `outside`,
// and all are picks; sum: the first one is. One warp. Without `dots` the list is one token.
__device__ __forceinline__ uint32_t pick_candidates(const StoredTokens& tokens, bool sum, const Rank* ranks,
                                                    Rank outside, const float* dots, uint32_t limit, int64_t* indices,
                                                    uint32_t* picks) {
  LaneCandidates own;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    own.rank[e] = ranks[lane_id() + e * kWarp];
    const int64_t at = own.rank[e] == 0 ? 0 : index_of_packed(own.rank[e]);
    own.state[e] = tokens.state[at];
    own.inverse[e] = tokens.inverse[at];
    own.energy[e] = tokens.energy == nullptr ? 0 : tokens.energy[at];
  }
  for (uint32_t made = 0; made < limit; ++made) {
    const Rank mine = own.rank[0] > own.rank[1] ? own.rank[0] : own.rank[1], best = warp_reduce(mine, Max());
    if (best == 0 || (!sum && best < outside)) return made;
    const unsigned in_first = __ballot_sync(kAllLanes, own.rank[0] == best);
    const int owner = __ffs(__ballot_sync(kAllLanes, mine == best)) - 1, slot = in_first != 0 ? owner : owner + kWarp;
    const int64_t j = index_of_packed(best);
    if (lane_id() == 0) {
      picks[made] = static_cast<uint32_t>(j);
      if (made == 0 || !sum) {
        indices[made] = j;
        tokens.key[j] = kNoKey;
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
      own.state[e] = tokens.updated(own.state[e], cosine, i, j);
      own.rank[e] =
          i == j ? 0 : pack_ranked(tokens.objective.key(own.state[e], own.energy[e]), static_cast<uint32_t>(i));
    }
  }
  return limit;
}

// Applies the first token of the list to all tokens, and then those that turn out to be the next picks; stops at the
// first pick that is not in the list, or that is the last one. Returns how many picks were made.
__device__ __forceinline__ uint32_t step_through_rows(const StoredTokens& tokens, const float* rows,
                                                      const uint32_t* list, uint32_t listed, uint32_t left,
                                                      int64_t* indices) {
  TOKENPRUNE_SHARED(CandidateSlots, slots);
  const uint32_t low = lane_id(), high = lane_id() + kWarp;
  const uint32_t none = 0xFFFFFFFFu, low_token = low < listed ? list[low] : none,
                 high_token = high < listed ? list[high] : none;
  int64_t slot = 0;
  for (uint32_t made = 0;; ++made) {
    const Candidate best = cluster_best(tokens.apply_pick(rows + slot * tokens.n, list[slot]), slots, made);
    const unsigned in_low = __ballot_sync(kAllLanes, low_token == best.index);
    const unsigned in_high = __ballot_sync(kAllLanes, high_token == best.index);
    if (best.key == kNoKey || (in_low | in_high) == 0) return made;
    slot = in_low != 0 ? __ffs(in_low) - 1 : __ffs(in_high) - 1 + kWarp;
    if (threadIdx.x == 0) indices[made] = best.index;
    if (made + 1 == left) return left;
  }
}

constexpr int kRoundThreads = 256;  // a power of two, and at least the threads of a tile

// The next list of a sample, by one block; empty once all picks are made. What is
// known of the sample waits in memory while the candidates are compared, which needs the registers.
template <class T>
__device__ __forceinline__ void choose(const RepulsionProblem& p, const RepulsionWorkspace& w, uint32_t sample,
                                       uint32_t group) {
  TOKENPRUNE_SHARED(Rank[2 * kRoundThreads], ranks);
  TOKENPRUNE_SHARED(int[kCandidates], candidates);
  static_assert(kCandidates == 64 && kCandidates == 2 * kWarp, "a tile, and two candidates per lane");
  const uint32_t total = static_cast<uint32_t>(min(p.k, p.n));
  RepulsionControl control = w.control[sample];
  __syncthreads();  // all have read it
  if (control.stored)
    control.picked +=
        step_through_rows(StoredTokens(p, w, sample), w.rows_of(group, p.n), w.list_of(group), control.selected,
                          total - control.picked, p.indices + sample * p.k + control.picked);
  control.selected = control.stored = 0;
  if (control.cursor < p.n && control.started) {
    int64_t cursor = control.cursor;
    control.selected = next_seeds(w.seed + sample * p.n, p.n, w.list_of(group), cursor);
    control.cursor = static_cast<uint32_t>(cursor);
  }
  if (threadIdx.x == 0) {
    p.counts[sample] = control.picked;
    w.control[sample] = control;
  }
  if (control.selected > 0 || control.picked == total) return;  // the same for all threads
  const Rank rest = two_best(w.key + sample * p.n, p.n, ranks);
  __syncthreads();
  sort_ranks(ranks, 2 * blockDim.x);
  const Rank outside = block_reduce(rest, Max(), Rank(0));
  if (threadIdx.x == 0 && outside > ranks[kCandidates]) ranks[kCandidates] = outside;
  for (int r = threadIdx.x; r < kCandidates; r += blockDim.x)
    candidates[r] = ranks[r] == 0 ? kNoRow : static_cast<int>(index_of_packed(ranks[r]));
  const float* dots = nullptr;
  __syncthreads();
  if (control.started && control.picked + 1 < total && ranks[1] != 0)
    dots = gram_tile<T, 64, kRoundThreads>(rows_of(p, sample, sizeof(T)), candidates, candidates, kCandidates,
                                           dynamic_shared());
  if (warp_id() != 0) return;
  control = w.control[sample];
  const uint32_t left = total - control.picked;
  control.selected = pick_candidates(StoredTokens(p, w, sample), p.sum, ranks, ranks[kCandidates], dots,
                                     left < kCandidates ? left : kCandidates, p.indices + sample * p.k + control.picked,
                                     w.list_of(group));
  control.picked += p.sum && control.selected > 0 ? 1 : control.selected;
  if (control.picked == total) control.selected = 0;  // nobody needs to know
  control.stored = p.sum && control.selected > 0;
  control.started = 1;
  __syncwarp();  // all have read it
  if (threadIdx.x == 0) {
    p.counts[sample] = control.picked;
    w.control[sample] = control;
  }
}

// Brings 64 tokens up to date with the list, or stores their inner products with it.
template <class T>
__device__ __forceinline__ void apply(const RepulsionProblem& p, const RepulsionWorkspace& w, uint32_t sample,
                                      uint32_t group, int first, int count, bool stored) {
  TOKENPRUNE_SHARED(int[64], tokens);
  TOKENPRUNE_SHARED(int[kCandidates], selected);
  TOKENPRUNE_SHARED(float[kCandidates], norms);
  __syncthreads();  // everybody is done with the tile before
  if (threadIdx.x < 64) {
    const int i = first + threadIdx.x;
    tokens[threadIdx.x] = i < p.n && w.key[sample * p.n + i] != kNoKey ? i : kNoRow;
  } else if (threadIdx.x < 64 + kCandidates) {
    const int r = threadIdx.x - 64;
    selected[r] = r < count ? static_cast<int>(w.list_of(group)[r]) : kNoRow;
    norms[r] = r < count ? w.inverse[sample * p.n + selected[r]] : 0;
  }
  __syncthreads();
  const float* dots =
      gram_tile<T, 64, kRoundThreads>(rows_of(p, sample, sizeof(T)), tokens, selected, count, dynamic_shared());
  if (stored) {
    float* rows = w.rows_of(group, p.n) + first;
    for (int q = threadIdx.x; q < count * 64; q += kRoundThreads)
      if (first + q % 64 < p.n) rows[q / 64 * p.n + q % 64] = dots[q % 64 * GramTile<64>::kOutPitch + q / 64];
    return;
  }
  if (threadIdx.x >= 64 || tokens[threadIdx.x] == kNoRow) return;
  const StoredTokens all(p, w, sample);
  const int i = tokens[threadIdx.x];
  const float* row = dots + threadIdx.x * GramTile<64>::kOutPitch;
  const float inverse = all.inverse[i];
  float state = all.state[i];
  for (int r = 0; r < count; ++r) state = all.updated(state, cosine_of(row[r], inverse, norms[r]), i, selected[r]);
  all.state[i] = state;
  all.key[i] = all.objective.key(state, all.energy == nullptr ? 0 : all.energy[i]);
}

// Seeds are not available, and something is selected when there are any. By one block.
__device__ __forceinline__ void mark_stored_seeds(const RepulsionProblem& p, const RepulsionWorkspace& w,
                                                  uint32_t sample) {
  bool any = false;
  for (int64_t s = threadIdx.x; s < p.n_seeds; s += blockDim.x) {
    const int64_t j = valid_seed(p.seeds[sample * p.n_seeds + s], p.n);
    if (j < 0) continue;
    atomicExch(&w.seed[sample * p.n + j], 1u);
    atomicExch(&w.key[sample * p.n + j], kNoKey);
    any = true;
  }
  any = __syncthreads_or(any);
  if (threadIdx.x == 0 && any) w.control[sample].started = 1;
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kRoundThreads, kRoundBlocks)
    rounds_kernel(const RepulsionProblem p, const RepulsionWorkspace w, uint32_t rounds) {
  TOKENPRUNE_SHARED(BlockGroup, group);
  wait_for_launch_before();
  group.form(w.counters + w.groups, w.groups);
  for (uint32_t sample = group.index; sample < p.batch; sample += w.groups) {
    if (group.rank == 0) mark_stored_seeds(p, w, sample);
    for (uint32_t round = 0; round < rounds; ++round) {
      if (group.rank == 0) choose<T>(p, w, sample, group.index);
      group.sync();
      const int count = static_cast<int>(w.control[sample].selected);
      if (count == 0) break;
      const bool stored = w.control[sample].stored != 0;
      for (int first = static_cast<int>(group.rank) * 64; first < p.n; first += static_cast<int>(group.size) * 64)
        apply<T>(p, w, sample, group.index, first, count, stored);
      group.sync();
    }
  }
}

template <class T>
cudaError_t launch_rounds(const RepulsionProblem& p, const RepulsionPlan& plan, const RepulsionWorkspace& w,
                          CallStream& stream) {
  static_assert(GramTile<64>::kShared + 9 * 1024 <= kRoundShared, "the planner reserves this much");
  return launch(in_groups(plan, kRoundThreads, GramTile<64>::kShared, stream), rounds_kernel<T>, p, w, plan.rounds);
}

}  // namespace tokenprune
