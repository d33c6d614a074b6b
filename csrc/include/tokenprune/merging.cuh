// merge_tokens: which target every token resembles most, then the mean of those that joined each target.
//
//   keys ----> merge_norms ----> merge_assign: tiles of 64 tokens x 64 targets, of which only the best of each token
//     +----------------------------^             is kept ----> assignment ----> merge_means <---- values, weights
//
//   launch           grid                            block  shared memory       global memory
//   merge_norms      batch * n / 4                   128    none                keys once
//   merge_assign     tiles of tokens * parts of the  128    GramTile::kShared,  keys once for all targets of a tile and
//                    channels (a cluster)                   1.3 KB              those once for 64 tokens, from L2
//   merge_means      batch * slots * slices          128    4.3 KB              8 bytes per token and block, the values
//                                                                               once, 2 to 4 bytes per mean
//
// A cosine is a product divided by two norms afterwards, with the exceptions of similarity.cuh. A squared distance is
// |x|^2 + |y|^2 - 2 <x, y>, from differences where that overflows. Targets with equal keys have equal likenesses, to the
// bit, and the order of candidates decides.
//
// A target's block looks through the assignment in order, 512 tokens at a time, lists those that joined and adds them up:
// a sum ascends over the tokens, and no token is read for a target that it has not joined.
#pragma once

#include "tokenprune/merging.h"
#include "tokenprune/order.h"
#include "tokenprune/repulsion_gram_tile.cuh"
#include "tokenprune/row_reads.cuh"
#include "tokenprune/squared_gap.cuh"

namespace tokenprune {

using MergeTile = GramTile<kMergeTile>;
static_assert(MergeTile::kThreads == kMergeThreads);

template <class T>
__device__ __forceinline__ const T* key_of(const AssignProblem& p, int64_t sample, int64_t token) {
  return static_cast<const T*>(p.keys) + sample * p.key_batch_stride + token * p.key_row_stride;
}

template <class T>
__global__ void __launch_bounds__(kMergeThreads) merge_norms_kernel(const AssignProblem p) {
  let_next_launch_start();
  const int64_t token = int64_t(blockIdx.x) * (kMergeThreads / kWarp) + warp_id();
  if (token >= p.batch * p.n) return;
  const T* row = key_of<T>(p, token / p.n, token % p.n);
  const bool aligned = p.aligned && p.channels % kReadUnit<T> == 0;
  float squares = 0;
  for (int64_t c = lane_id() * kReadUnit<T>; c < p.channels; c += kWarp * kReadUnit<T>) {
    float x[kReadUnit<T>];
    read_unit(row, c, p.channels, aligned, x);
    squares = add_dot(x, x, squares);
  }
  squares = warp_reduce(squares, Sum());
  const float norm = p.euclidean ? squares : row_inverse_norm(squares, row, p.channels, true);
  if (lane_id() == 0) p.norms[token] = norm;
}

// What decides between the targets of a token, the greater the better: the cosine times the norm of the token, or the
// squared distance with its sign changed.
template <class T>
__device__ __forceinline__ float likeness(const AssignProblem& p, float dot, float of_token, float of_target,
                                          const T* token, const T* target) {
  if (p.euclidean) return -squared_gap(dot, of_token, of_target, p.channels, token, target);
  return of_token == 0 ? 0 * of_target : over_norm(dot, of_target);
}

struct AssignShared {
  int tokens[kMergeTile], targets[kMergeTile], own_slot[kMergeTile];
  uint64_t best[kMergeTile];  // pack_ranked of likeness and slot
};

template <class T>
__global__ void __launch_bounds__(kMergeThreads, MergeTile::kBlocks) merge_assign_kernel(const AssignProblem p) {
  TOKENPRUNE_SHARED(AssignShared, s);
  let_next_launch_start();
  const int parts = cluster_size(), part = cluster_rank(), thread = threadIdx.x;
  const int64_t tiles = ceil_div<int64_t>(p.n, kMergeTile), tile = blockIdx.x / parts;
  const int64_t sample = tile / tiles;
  const int first = static_cast<int>(tile % tiles) * kMergeTile, n = static_cast<int>(p.n);
  const int64_t* targets = p.targets + sample * p.target_stride;
  const float* norms = p.norms + sample * p.n;
  const TokenRows rows =
      channels_of<T>({key_of<T>(p, sample, 0), p.key_row_stride, p.channels, p.aligned}, part, parts);
  const int own = kMergeTile / parts;  // this block decides for the tokens part * own ...
  if (thread < kMergeTile) {
    s.tokens[thread] = first + thread < n ? first + thread : kNoRow;
    s.own_slot[thread] = -1;
    s.best[thread] = 0;
  }
  for (int64_t at = 0; at < p.slots; at += kMergeTile) {
    const int columns = static_cast<int>(min(p.slots - at, int64_t(kMergeTile)));
    __syncthreads();  // the tile before has been looked at
    if (thread < kMergeTile) {
      const int64_t target = thread < columns ? targets[at + thread] : -1;
      const bool exists = target >= 0 && target < n;
      s.targets[thread] = exists ? static_cast<int>(target) : kNoRow;
      if (exists && target >= first && target < first + kMergeTile)
        atomicMax(&s.own_slot[target - first], static_cast<int>(at) + thread);
    }
    __syncthreads();
    float* dots = gram_tile<T, kMergeTile, kMergeThreads>(rows, s.tokens, s.targets, columns, dynamic_shared());
    add_up_parts<kMergeTile>(dots);
    wait_for_launch_before();                     // for the norms: keys and targets are there before the first launch
    constexpr int kTargets = kMergeTile / kWarp;  // of a lane
    float of_target[kTargets];
#pragma unroll
    for (int e = 0; e < kTargets; ++e) {
      const int target = s.targets[lane_id() + e * kWarp];
      of_target[e] = target == kNoRow ? 0 : norms[target];
    }
    for (int r = part * own + warp_id(); r < (part + 1) * own && first + r < n; r += kMergeThreads / kWarp) {
      const T* token = key_of<T>(p, sample, first + r);
      const float of_token = norms[first + r];
      uint64_t best = 0;
#pragma unroll
      for (int e = 0; e < kTargets; ++e) {
        const int c = lane_id() + e * kWarp;
        if (s.targets[c] == kNoRow) continue;
        const float value = likeness(p, dots[r * MergeTile::kOutPitch + c], of_token, of_target[e], token,
                                     key_of<T>(p, sample, s.targets[c]));
        if (value == value) best = Max()(best, pack_ranked(order_key(value), static_cast<uint32_t>(at) + c));
      }
      best = warp_reduce(best, Max());
      if (lane_id() == 0) s.best[r] = Max()(s.best[r], best);
    }
  }
  wait_for_launch_before();  // without targets too
  __syncthreads();
  const int r = part * own + thread;
  if (thread >= own || first + r >= n) return;
  const uint64_t best = s.best[r];
  float value = value_of_key(static_cast<uint32_t>(best >> 32));
  if (p.euclidean)
    value = -std::sqrt(-value);
  else
    value = over_norm(value, norms[first + r]);
  const bool takes_part = p.mask == nullptr || p.mask[sample * p.mask_stride + first + r];
  const bool joins = best != 0 && value == value && takes_part && (!p.limited || value >= p.limit);
  const int64_t slot = joins ? static_cast<int64_t>(index_of_packed(best)) : -1;
  const int own_slot = s.own_slot[r];
  p.assignment[sample * p.n + first + r] = own_slot < 0 ? slot : p.include_targets ? own_slot : -1;
}

__global__ void __launch_bounds__(kMergeThreads)
    copy_assignment_kernel(const int64_t* given, int64_t stride, int64_t n, int64_t total, int64_t slots,
                           int64_t* assignment) {
  let_next_launch_start();
  const int64_t i = int64_t(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (i >= total) return;
  const int64_t slot = given[i / n * stride + i % n];
  assignment[i] = slot >= 0 && slot < slots ? slot : -1;
}

struct MeanShared {
  int token[kMergeRound];
  float weight[kMergeRound];
};

template <class T>
__global__ void __launch_bounds__(kMergeThreads, 6) merge_means_kernel(const MeanProblem p, int64_t slices) {
  TOKENPRUNE_SHARED(MeanShared, s);
  wait_for_launch_before();
  constexpr int kUnit = kReadUnit<T>;
  const int64_t at = blockIdx.x / slices, sample = at / p.slots, slot = at % p.slots;
  const int64_t channel = (blockIdx.x % slices * kMergeThreads + threadIdx.x) * kUnit;
  const T* column = static_cast<const T*>(p.values) + sample * p.batch_stride;
  const int64_t* joined = p.assignment + sample * p.n;
  const float* weights = p.weights == nullptr ? nullptr : p.weights + sample * p.n;
  float size = 0, sum[kUnit] = {};
  for (int64_t start = 0; start < p.n; start += kMergeRound) {
    // Thread t has the tokens kMergeAhead * t ... of the round, so that places in the list ascend with the tokens.
    const int64_t mine = start + threadIdx.x * kMergeAhead;
    float weight[kMergeAhead];
    int count = 0, total;
#pragma unroll
    for (int a = 0; a < kMergeAhead; ++a) {
      const bool joins = mine + a < p.n && joined[mine + a] == slot;
      weight[a] = !joins ? 0 : weights == nullptr ? 1 : weights[mine + a];
      count += weight[a] > 0;
    }
    int place = block_exclusive_sum(count, total);
#pragma unroll
    for (int a = 0; a < kMergeAhead; ++a) {
      if (!(weight[a] > 0)) continue;
      s.token[place] = static_cast<int>(mine) + a;
      s.weight[place++] = weight[a];
    }
    __syncthreads();
    for (int m = 0; m < total; m += kMergeAhead) {
      float x[kMergeAhead][kUnit];  // all on their way together
#pragma unroll
      for (int a = 0; a < kMergeAhead; ++a)
        if (m + a < total && channel < p.channels)
          read_unit(column + s.token[m + a] * p.row_stride, channel, p.channels, p.aligned, x[a]);
#pragma unroll
      for (int a = 0; a < kMergeAhead; ++a) {
        if (m + a >= total) break;
        const float of_token = s.weight[m + a];
        size += of_token;
        if (channel >= p.channels) continue;
#pragma unroll
        for (int e = 0; e < kUnit; ++e) sum[e] = __fmaf_rn(of_token, x[a][e], sum[e]);
      }
    }
    __syncthreads();  // before the list is written anew
  }
  if (blockIdx.x % slices == 0 && threadIdx.x == 0) p.sizes[at] = size;
  T* out = static_cast<T*>(p.merged) + at * p.channels + channel;
#pragma unroll
  for (int e = 0; e < kUnit; ++e)
    if (channel + e < p.channels) out[e] = from_float<T>(size > 0 ? sum[e] / size : 0);
}

template <class T>
cudaError_t launch_assign(const AssignProblem& p, const AssignPlan& plan, CallStream& stream) {
  const cudaError_t status = launch({plan.norm_blocks, dim3(kMergeThreads), 0, stream}, merge_norms_kernel<T>, p);
  if (status != cudaSuccess) return status;
  return launch(
      {plan.tiles * plan.parts, dim3(kMergeThreads), MergeTile::kShared, stream, static_cast<unsigned>(plan.parts)},
      merge_assign_kernel<T>, p);
}

template <class T>
cudaError_t launch_means(const MeanProblem& p, CallStream& stream) {
  // One slice at least, which writes the sizes.
  const int64_t slices = std::max<int64_t>(1, mean_slices(p.channels, sizeof(T)));
  return launch({p.batch * p.slots * slices, dim3(kMergeThreads), 0, stream}, merge_means_kernel<T>, p, slices);
}

}  // namespace tokenprune
