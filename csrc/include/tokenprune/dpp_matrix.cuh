// dpp_sample with all cosines of a sample in device memory, up to `gram_token_limit` tokens: behind the inner products of
// all pairs (repulsion_gram.cuh), one block, or one cluster of blocks, per sample makes all picks (greedy.cuh).
//
// L = diag(q) S diag(q), so that the factor is that of the cosines S alone: with rows c_i and residuals r_i of S, a token
// multiplies the determinant by q_i^2 r_i, and neither overflows. Block r of the cluster owns the tokens
// [r * share, (r + 1) * share). Of its part of the factor, as many columns as fit are in its shared memory, the others in
// device memory; both are [width, pitch], one row for every pick. A step is
//
// 1. the best of all tokens: one barrier of the block and one of the cluster;
// 2. the pick's column, from the block that owns it, through distributed shared memory; a barrier of the block;
// 3. for every token, S_ij minus the product of two columns. A warp takes 8 tokens, 4 lanes each: lane part p has the
//    terms p, p + 4, ..., whatever the plan is, so that equal tokens have equal residuals.
//
// grid: samples * cluster; block: up to kDppThreads; shared: DppPlan::shared. A step reads a row of the matrix (4 n bytes)
// and what of the factor is in device memory.
#pragma once

#include "tokenprune/dpp.h"
#include "tokenprune/greedy.cuh"
#include "tokenprune/repulsion_objective.cuh"

namespace tokenprune {

struct DppMatrix {
  const float *gram, *inverse;  // [samples, n, n] inner products, [samples, n]
  float* factor;                // [samples, width - shared_rows, cluster, pitch]
  int share, pitch;
  int64_t shared_rows;
};

// The rule of a block that owns `own` tokens from `first` on.
struct DppRule {
  const float* const row0;      // of the sample's matrix
  const float* const inverses;  // of the sample
  const int n, first, own, share, pitch;
  const float epsilon;
  float *const residual, *const inverse, *const square;  // [share] in shared memory: r_i, 1 / |f_i|, q_i^2
  float* const column;                                   // [width]: c_j
  float* const near;                                     // [near_rows, pitch] in shared memory
  float* const far;                                      // the rows behind them, far_pitch apart
  const int near_rows;
  const int64_t far_pitch;
  int64_t* const indices;  // null but for the first block
  float* const gains;
  int made = 0;            // picks that count: rows of the factor
  unsigned available = 0;  // a bit for each of the thread's tokens, in the first of their lanes
  Candidate mine = kNoCandidate;

  // f(e, l) for every token first + l of the thread's lanes, the e-th. All lanes of a warp call f; behind the last token, l
  // is -1.
  template <class F>
  __device__ __forceinline__ void for_own(F&& f) const {
    const int step = static_cast<int>(blockDim.x) / kDppParts;
#pragma unroll 1
    for (int e = 0, begin = warp_id() * kDppTokens; begin < own; ++e, begin += step) {
      const int l = begin + lane_id() % kDppTokens;
      f(e, l < own ? l : -1);
    }
  }

  // Entry (row, l) of the factor of block `rank`.
  __device__ __forceinline__ float entry(int row, int l, uint32_t rank) const {
    if (row < near_rows) return cluster_shared(near, rank)[row * pitch + l];
    return far[(row - near_rows) * far_pitch + (static_cast<int64_t>(rank) - cluster_rank()) * pitch + l];
  }

  // The product of the columns of the pick and of token l, over the rows so far, in all of the token's lanes.
  __device__ __forceinline__ float product(int l) const {
    const int part = lane_id() / kDppTokens, near_end = min(made, near_rows), at = max(l, 0);
    float sum = 0;
    int s = part;
#pragma unroll 4
    for (; s < near_end; s += kDppParts) sum = __fmaf_rn(near[s * pitch + at], column[s], sum);
#pragma unroll 4
    for (; s < made; s += kDppParts) sum = __fmaf_rn(far[(s - near_rows) * far_pitch + at], column[s], sum);
    sum += __shfl_xor_sync(kAllLanes, sum, kDppTokens);
    return sum + __shfl_xor_sync(kAllLanes, sum, 2 * kDppTokens);
  }

  // Offers come in the order of the tokens, so that equals leave the one with the lower index.
  __device__ __forceinline__ void offer(int e, int l) {
    const uint32_t key = order_key(square[l] * residual[l], available >> e & 1);
    if (key > mine.key) mine = {key, static_cast<uint32_t>(first + l)};
  }

  __device__ __forceinline__ Candidate best() const { return mine; }

  __device__ __forceinline__ void commit(int64_t slot, Candidate pick) {
    const int j = static_cast<int>(pick.index), local = j % share;
    const uint32_t owner = static_cast<uint32_t>(j / share);
    const float gain = value_of_key(pick.key);
    if (indices != nullptr && threadIdx.x == 0) {
      indices[slot] = j;
      gains[slot] = gain;
    }
    // Of a pick, neither of them changes any more: its owner may be ahead.
    const float left = cluster_shared(residual, owner)[local], squared = cluster_shared(square, owner)[local];
    const bool counts = gain > epsilon * squared;  // beyond the rank a gain is a rounding error: no divisor
    if (counts) {
      for (int s = threadIdx.x; s < made; s += blockDim.x) column[s] = entry(s, local, owner);
      __syncthreads();
    }
    const float root = sqrtf(left), other = inverses[j];
    const float* row = row0 + static_cast<int64_t>(j) * n + first;
    float* const kept = made < near_rows ? near + made * pitch : far + (made - near_rows) * far_pitch;
    const bool writes = lane_id() < kDppTokens;
    mine = kNoCandidate;
    for_own([&](int e, int l) {
      const float dot = counts && l >= 0 ? row[l] : 0, inner = counts ? product(l) : 0;
      if (!writes || l < 0) return;
      if (first + l == j) available &= ~(1u << e);
      if (counts) {
        const float c = (cosine_of(dot, inverse[l], other) - inner) / root;
        kept[l] = c;
        if (available >> e & 1) residual[l] -= c * c;
      }
      offer(e, l);
    });
    made += counts;
  }
};

__global__ void __launch_bounds__(kDppThreads, 1) dpp_matrix_kernel(const DppProblem p, const DppMatrix w) {
  TOKENPRUNE_SHARED(CandidateSlots, slots);
  wait_for_launch_before();
  const uint32_t rank = cluster_rank(), blocks = cluster_size();
  const int64_t sample = blockIdx.x / blocks, n = p.n, at = sample * n, width = p.width();
  const int first = min(static_cast<int>(rank) * w.share, static_cast<int>(n));
  float *residual = reinterpret_cast<float*>(dynamic_shared()), *inverse = residual + w.pitch,
        *square = inverse + w.pitch, *column = square + w.pitch, *near = column + round_up<int64_t>(width, 4);
  const int64_t far_pitch = int64_t(blocks) * w.pitch;
  DppRule rule{w.gram + at * n,
               w.inverse + at,
               static_cast<int>(n),
               first,
               min(w.share, static_cast<int>(n) - first),
               w.share,
               w.pitch,
               p.epsilon,
               residual,
               inverse,
               square,
               column,
               near,
               w.factor + sample * max(width - w.shared_rows, int64_t(0)) * far_pitch + rank * w.pitch,
               static_cast<int>(w.shared_rows),
               far_pitch,
               rank == 0 ? p.indices + sample * p.k : nullptr,
               p.gains + sample * p.k};
  rule.for_own([&](int e, int l) {
    if (lane_id() >= kDppTokens || l < 0) return;
    const int64_t i = first + l;
    const float q = p.quality == nullptr ? 1 : p.quality[at + i];
    inverse[l] = w.inverse[at + i];
    residual[l] = std::isfinite(q) ? cosine_of(rule.row0[i * n + i], inverse[l], inverse[l]) : NAN;
    square[l] = q * q;
    if (is_valid(p, sample, i)) rule.available |= 1u << e;
    rule.offer(e, l);
  });
  if (blocks > 1) cluster_sync();  // all blocks are there: their shared memory can be written
  const int64_t picked = greedy_select(rule, slots, p.k);
  if (blocks > 1) cluster_sync();  // nobody reads this block's shared memory any more
  if (rank != 0) return;
  for (int64_t slot = picked + threadIdx.x; slot < p.k; slot += blockDim.x) {
    rule.indices[slot] = -1;
    rule.gains[slot] = 0;
  }
  if (threadIdx.x == 0) p.counts[sample] = picked;
}

template <class T>
cudaError_t launch_dpp_matrix(const DppProblem& p, const DppPlan& plan, float* floats, CallStream& stream) {
  float *gram = floats, *inverse = gram + plan.gram_floats;
  if (p.k > 0 && p.n > 0) {
    const cudaError_t status = launch_gram<T>(pairs_of(p), plan.pairs, gram, inverse, stream);
    if (status != cudaSuccess) return status;
  }
  const DppMatrix w{gram, inverse, inverse + plan.token_floats, plan.share, plan.pitch, plan.shared_rows};
  return launch({p.batch * plan.cluster, dim3(plan.block), static_cast<size_t>(plan.shared), stream,
                 static_cast<unsigned>(plan.cluster)},
                dpp_matrix_kernel, p, w);
}

}  // namespace tokenprune
