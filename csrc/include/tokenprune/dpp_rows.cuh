// dpp_sample for many tokens: no cosine is stored, and a step computes those of its pick from the features.
//
// 1. prepare: a warp per token: inverse norm, residual, first key; the outputs' padding. Reads the features once.
// 2. picks: one cooperative launch, in which a group of blocks makes all picks of a sample, and then of the next one. A
//    warp owns every size-th token. A step is
//      the best token of every block, in device memory; a barrier of the group; the best of all blocks;
//      for every token that may still be picked, <f_i, f_j> and <c_i, c_j>, the rows read by the whole warp.
//    Token i's row of the factor is contiguous, [n, width]. A row is read by others behind the next barrier only.
//
// grid: groups * group_blocks; block: kDppRowThreads. A step reads the features once and 4 * picks so far bytes per token.
#pragma once

#include "tokenprune/block_group.cuh"
#include "tokenprune/dpp.h"
#include "tokenprune/greedy.cuh"
#include "tokenprune/repulsion_objective.cuh"
#include "tokenprune/row_sums.cuh"

namespace tokenprune {

struct DppRows {
  float *inverse, *residual;  // [samples, n]
  float* factor;              // [groups, n, width]
  uint32_t* key;              // [samples, n]; kNoKey: not available
  Candidate* best;            // [groups, 2, group_blocks]: of every block, two sets in turn
  uint32_t* counters;         // [groups]: of group_sync
  uint32_t groups;

  DppRows(const DppPlan& plan, float* floats, uint32_t* words, int64_t n)
      : inverse(floats),
        residual(floats + plan.samples * n),
        factor(floats + plan.token_floats),
        key(words),
        best(reinterpret_cast<Candidate*>(words + plan.token_words)),
        counters(reinterpret_cast<uint32_t*>(best + 2 * plan.groups * plan.group_blocks)),
        groups(static_cast<uint32_t>(plan.groups)) {}
};

__device__ __forceinline__ float squared_quality(const DppProblem& p, int64_t at) {
  return p.quality == nullptr ? 1 : p.quality[at] * p.quality[at];
}

template <class T>
__global__ void __launch_bounds__(kDppRowThreads)
    dpp_prepare_kernel(const DppProblem p, const DppRows w, int64_t blocks) {
  wait_for_launch_before();
  const int64_t sample = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const int64_t i = block * (kDppRowThreads / kWarp) + warp_id(), at = sample * p.n + i;
  for (int64_t slot = block * kDppRowThreads + threadIdx.x; slot < p.k; slot += blocks * kDppRowThreads) {
    p.indices[sample * p.k + slot] = -1;
    p.gains[sample * p.k + slot] = 0;
  }
  if (block == 0 && threadIdx.x == 0 && sample < w.groups) w.counters[sample] = 0;
  if (i >= p.n) return;
  const float squares = sum_over_row<T>(rows_of(p, sample, sizeof(T)), i, [](float x, int64_t) { return x * x; });
  if (lane_id() != 0) return;
  const float inverse = inverse_norm(squares), square = squared_quality(p, at);
  const float residual =
      p.quality == nullptr || std::isfinite(p.quality[at]) ? cosine_of(squares, inverse, inverse) : NAN;
  w.inverse[at] = inverse;
  w.residual[at] = residual;
  w.key[at] = order_key(square * residual, is_valid(p, sample, i));
}

// The best of what the warps of a group know, in every thread. Contains barriers.
__device__ __forceinline__ Candidate group_best(Candidate mine, CandidateSlots& slots, const DppRows& w,
                                                BlockGroup& group, unsigned step) {
  // A cluster of one block: the best of the block, and its barrier. The slots are two sets in turn, as these are.
  mine = cluster_best(mine, slots, step);
  if (group.size == 1) return mine;
  Candidate* all = w.best + (int64_t(group.index) * 2 + step % 2) * group.size;
  if (threadIdx.x == 0) all[group.rank] = mine;
  group.sync();
  mine = kNoCandidate;
  for (uint32_t block = lane_id(); block < group.size; block += kWarp)
    if (all[block] < mine) mine = all[block];
  return warp_best(mine);
}

template <class T>
__global__ void __launch_bounds__(kDppRowThreads, kDppRowBlocks) dpp_rows_kernel(const DppProblem p, const DppRows w) {
  TOKENPRUNE_SHARED(BlockGroup, group);
  TOKENPRUNE_SHARED(CandidateSlots, slots);
  wait_for_launch_before();
  group.form(w.counters, w.groups);
  constexpr int kWarps = kDppRowThreads / kWarp;
  const int64_t n = p.n, width = p.width();
  const int64_t begin = int64_t(group.rank) * kWarps + warp_id(), step = int64_t(group.size) * kWarps;
  float* factor = w.factor + group.index * n * width;
  unsigned searches = 0;
  for (int64_t sample = group.index; sample < p.batch; sample += w.groups) {
    const TokenRows rows = rows_of(p, sample, sizeof(T));
    const int64_t at = sample * n;
    Candidate mine = kNoCandidate;
    const auto offer = [&](int64_t i) {
      const Candidate offered = {w.key[at + i], static_cast<uint32_t>(i)};
      if (offered.key != kNoKey && offered < mine) mine = offered;
    };
    if (lane_id() == 0)
      for (int64_t i = begin; i < n; i += step) offer(i);
    int64_t made = 0, slot = 0;  // picks that count, and all picks
    for (; slot < p.k; ++slot) {
      const Candidate pick = group_best(mine, slots, w, group, searches++);
      if (pick.key == kNoKey) break;
      const int64_t j = pick.index;
      const float gain = value_of_key(pick.key);
      if (group.rank == 0 && threadIdx.x == 0) {
        p.indices[sample * p.k + slot] = j;
        p.gains[sample * p.k + slot] = gain;
      }
      const bool counts = gain > p.epsilon * squared_quality(p, at + j);  // see DppRule
      const float root = sqrtf(w.residual[at + j]), other = w.inverse[at + j];
      const float* column = factor + j * width;
      mine = kNoCandidate;
      for (int64_t i = begin; i < n; i += step) {
        const bool available = w.key[at + i] != kNoKey;
        __syncwarp();  // all lanes have read it
        if (i == j && lane_id() == 0) w.key[at + i] = kNoKey;
        if (i == j || !available) continue;
        if (counts) {
          const float dot = dot_of_rows<T>(rows, i, j);
          float inner = 0;
          for (int64_t s = lane_id(); s < made; s += kWarp) inner = __fmaf_rn(factor[i * width + s], column[s], inner);
          inner = warp_reduce(inner, Sum());
          if (lane_id() == 0) {
            const float c = (cosine_of(dot, w.inverse[at + i], other) - inner) / root;
            factor[i * width + made] = c;
            const float left = w.residual[at + i] - c * c;
            w.residual[at + i] = left;
            w.key[at + i] = order_key(squared_quality(p, at + i) * left);
          }
        }
        if (lane_id() == 0) offer(i);
        __syncwarp();  // the row is there for all lanes
      }
      made += counts;
    }
    if (group.rank == 0 && threadIdx.x == 0) p.counts[sample] = slot;
    group.sync();  // all are done with the factor
  }
}

template <class T>
cudaError_t launch_dpp_rows(const DppProblem& p, const DppPlan& plan, float* floats, uint32_t* words,
                            CallStream& stream) {
  const DppRows w(plan, floats, words, p.n);
  const int64_t blocks = ceil_div<int64_t>(p.n, kDppRowThreads / kWarp);
  const cudaError_t status =
      launch({p.batch * blocks, dim3(kDppRowThreads), 0, stream}, dpp_prepare_kernel<T>, p, w, blocks);
  if (status != cudaSuccess) return status;
  return launch({plan.groups * plan.group_blocks, dim3(kDppRowThreads), 0, stream, 1, plan.group_blocks > 1},
                dpp_rows_kernel<T>, p, w);
}

}  // namespace tokenprune
