// spatial_semantic_nms (AdaptPrune, arXiv 2503.08019): at most three launches, whatever k is.
//
// A pick changes only the tokens of its group within the radius: 80 on a grid with radius 5. Which ones those are and
// with which weights does not depend on the order of the picks, so it is worked out in parallel beforehand, and what is
// left of a step is a search for the best key and a handful of multiplications:
//   prepare  one warp per token: the norm of its features, its position and score as float32.
//   weights  the weights of all pairs of tokens as a table, if that is small: one cluster per pair of 64 tokens, with
//            tiles of dot products (tensor cores for 16-bit features); otherwise
//   lists    one block per 16 tokens and range of columns: finds the tokens that they reach, and computes those weights
//            with 16 x 64 tiles of dot products.
//   select   one block, or one cluster, per sample: all k steps (greedy.cuh) on keys in shared memory.
// Lists have a fixed capacity. A token that reaches more than that has no list: should it be picked, the selecting
// blocks compute its weights on the spot, with the same sums. With k <= 2 there are no lists at all.
//
//            grid                  block   shared memory             bytes moved
//   prepare  tokens / 4            128     none                      the features once (the minimum)
//   weights  pairs of tiles * 4    128     48 KiB                    128 rows per pair of tiles with neighbours, from
//                                                                    L2; 4 per pair of tokens written
//   lists    tokens / 16 * splits  256     NmsListShared             (16 + reached columns) rows per tile, from L2;
//                                                                    8 per list entry written
//   select   samples * cluster     <= 384  NmsSelectShared, and 4    4 per token; a row or list of every pick
//                                          per token
#pragma once

#include "tokenprune/nms_weights.cuh"

namespace tokenprune {

constexpr int kLooksPerThread = 4;  // at tokens between two barriers, where a pick has no list

struct NmsSelectShared {
  CandidateSlots slots;
  int32_t reached[kLooksPerThread * kNmsMostSelectThreads];
  int32_t reached_count;
  float partial[kSegments][kNmsMostSelectThreads / kWarp / kSegments * kDotColumns];
};
static_assert(sizeof(NmsSelectShared) <= kNmsSelectStatic, "the planner reserves this much");

// The rule of the greedy engine. A block owns the tokens [first, first + owned) of its sample; kNoKey is the key of
// a token that is picked, dropped or masked.
template <class T>
struct NmsRule {
  const NmsProblem& p;
  const NmsWorkspace& w;
  NmsSelectShared& s;
  uint32_t* keys;  // of the owned tokens
  int64_t sample, first, owned, capacity, steps;
  bool table;

  __device__ __forceinline__ Candidate best() const {
    Candidate mine = kNoCandidate;
    for (int64_t i = threadIdx.x; i < owned; i += blockDim.x) {
      const uint32_t key = keys[i];
      if (key > mine.key) mine = {key, static_cast<uint32_t>(first + i)};
    }
    return mine;
  }

  // Applies a pick to an available token.
  __device__ __forceinline__ void suppress(int64_t token, float weight) const {
    const uint32_t key = keys[token - first];
    if (key == kNoKey) return;
    if (!p.by.hard) {
      keys[token - first] = order_key(value_of_key(key) * (1 - weight));
    } else if (weight >= p.by.threshold) {
      keys[token - first] = kNoKey;
    }
  }

  __device__ __forceinline__ bool owns(int64_t token) const { return token >= first && token < first + owned; }

  __device__ __forceinline__ void commit(int64_t slot, Candidate pick) {
    if (threadIdx.x == 0 && cluster_rank() == 0) {
      p.indices[sample * p.k + slot] = pick.index;
      p.selected[sample * p.k + slot] = value_of_key(pick.key);
    }
    if (table) return apply_row(pick.index);
    if (threadIdx.x == 0 && owns(pick.index)) keys[pick.index - first] = kNoKey;
    if (slot + 1 == steps) return;  // no further pick is made
    if (capacity == 0)
      apply_to_neighbours(pick.index);
    else
      apply_list(pick.index);
    __syncthreads();
  }

  // A thread reads the weights of its own tokens, all at once, and no barrier is needed: it is the only one that looks
  // at their keys.
  __device__ __forceinline__ void apply_row(int64_t pick_index) const {
    const float* row = w.weights + (sample * p.n + pick_index) * p.n;
    for (int64_t from = threadIdx.x; from < owned; from += kLooksPerThread * blockDim.x) {
      float weights[kLooksPerThread];
#pragma unroll
      for (int a = 0; a < kLooksPerThread; ++a) {
        const int64_t i = from + a * blockDim.x;
        weights[a] = i < owned ? row[first + i] : kNoWeight;
      }
#pragma unroll
      for (int a = 0; a < kLooksPerThread; ++a) {
        const int64_t i = from + a * blockDim.x;
        if (first + i == pick_index)
          keys[i] = kNoKey;
        else if (!(weights[a] < 0))  // NaN is a weight
          suppress(first + i, weights[a]);
      }
    }
  }

  __device__ __forceinline__ void apply_list(int64_t pick_index) {
    const NmsEntry* list = w.lists + (sample * p.n + pick_index) * capacity;
    // Asked for together with the thread's own first entry: one wait for memory.
    const int32_t head = list[0].index;
    NmsEntry entry = threadIdx.x < capacity ? list[threadIdx.x] : NmsEntry{kEnd, 0};
    if (head == kOverflow) return apply_to_neighbours(pick_index);
    for (int64_t e = threadIdx.x; entry.index != kEnd;) {
      if (owns(entry.index)) suppress(entry.index, entry.weight);
      e += blockDim.x;
      if (e >= capacity) break;
      entry = list[e];
    }
  }

  // The weights of a pick without a list, computed now.
  __device__ void apply_to_neighbours(int64_t pick_index) {
    const NmsToken pick = load_token(p, w, sample, pick_index);
    for (int64_t from = 0; from < owned; from += kLooksPerThread * blockDim.x) {
      if (threadIdx.x == 0) s.reached_count = 0;
      __syncthreads();
      const int64_t end = min(owned, from + kLooksPerThread * blockDim.x);
      for (int64_t i = from + threadIdx.x; i < end; i += blockDim.x)
        if (keys[i] != kNoKey && first + i != pick_index && reaches(p.by, pick, load_token(p, w, sample, first + i)))
          s.reached[atomicAdd(&s.reached_count, 1)] = static_cast<int32_t>(first + i);
      // In any order: each of them is a sum of its own.
      __syncthreads();
      const int count = s.reached_count, at_once = blockDim.x / kWarp / kSegments * kDotColumns;
      for (int done = 0; done < count; done += at_once)
        apply_to_reached(pick_index, pick, done, min(count - done, at_once));
      __syncthreads();
    }
  }

  __device__ __forceinline__ void apply_to_reached(int64_t pick_index, const NmsToken& pick, int done, int columns) {
    const int mine = warp_id() / kSegments * kDotColumns;
    if (mine < columns) {
      float* partial = s.partial[warp_id() % kSegments] + mine;
      warp_dots_of_one<T>(
          feature_row<T>(p, sample, pick_index),
          [&](int c) { return feature_row<T>(p, sample, s.reached[done + min(mine + c, columns - 1)]); },
          segment_of(warp_id() % kSegments, semantic_dim(p)), wide_features<T>(p, sample),
          [&](int c, float dot) { partial[c] = dot; });
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < columns) {
      const int c = threadIdx.x;
      const float shares[kSegments] = {s.partial[0][c], s.partial[1][c], s.partial[2][c], s.partial[3][c]};
      const int64_t token = s.reached[done + c];
      suppress(token, weight_of(p.by, pick, load_token(p, w, sample, token), sum_of_segments(shares)));
    }
    __syncthreads();
  }
};

template <class T>
__global__ void __launch_bounds__(kNmsMostSelectThreads, 1)
    nms_select_kernel(const NmsProblem p, int64_t capacity, int64_t steps, int64_t owned, bool keys_in_shared,
                      bool table) {
  TOKENPRUNE_SHARED(NmsSelectShared, s);
  wait_for_launch_before();
  const NmsWorkspace w = nms_workspace(p);
  const int64_t sample = blockIdx.x / cluster_size(), first = min(cluster_rank() * owned, p.n);
  owned = min(owned, p.n - first);
  uint32_t* keys = w.keys + sample * p.n + first;
  if (keys_in_shared) {
    auto* copy = reinterpret_cast<uint32_t*>(dynamic_shared());
    for (int64_t i = threadIdx.x; i < owned; i += blockDim.x) copy[i] = keys[i];
    keys = copy;
  }
  // A thread's first search reads only what it has copied itself, or what an earlier launch has written. The barrier is
  // for the other blocks' shared memory: it may be written once they have started.
  cluster_sync();
  NmsRule<T> rule{p, w, s, keys, sample, first, owned, capacity, steps, table};
  const int64_t picked = greedy_select(rule, s.slots, steps);
  if (cluster_rank() != 0) return;
  if (threadIdx.x == 0) p.counts[sample] = picked;
  for (int64_t slot = picked + threadIdx.x; slot < p.k; slot += blockDim.x) {
    p.indices[sample * p.k + slot] = -1;
    p.selected[sample * p.k + slot] = 0;
  }
}

template <class T>
cudaError_t launch_spatial_semantic_nms(const NmsProblem& p, const NmsPlan& plan, CallStream& stream) {
  cudaError_t status = launch({plan.prepare_blocks, dim3(kNmsPrepareThreads), 0, stream}, nms_prepare_kernel<T>, p);
  if (status != cudaSuccess) return status;
  Launch second{plan.list_blocks, dim3(kNmsThreads), 0, stream};
  if (plan.weight_blocks > 0) {
    second.blocks = plan.weight_blocks;
    second.block = dim3(kNmsWeightThreads);
    second.shared = kNmsWeightShared;
    second.cluster = kNmsWeightCluster;
    status = launch(second, nms_weights_kernel<T>, p);
  } else {
    status = launch(second, nms_lists_kernel<T>, p, plan.capacity, plan.splits, plan.split_columns);
  }
  if (status != cudaSuccess) return status;
  const Launch third{p.batch * plan.cluster, dim3(plan.select_threads), static_cast<size_t>(plan.shared), stream,
                     static_cast<unsigned>(plan.cluster)};
  return launch(third, nms_select_kernel<T>, p, plan.capacity, plan.steps, plan.owned, plan.keys_in_shared,
                plan.weight_blocks > 0);
}

}  // namespace tokenprune
