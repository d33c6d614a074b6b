// select_topk, select_two_tailed and mask_to_indices: one launch each, one team (radix.cuh) per sample.
//
// Top-k is two-tailed selection without a low tail. Scores become keys once: they stay in shared memory, where every
// pass of the radix selection finds them again, or, for rows too long for that, are made from global memory in every
// pass. The low tail is a second selection, over the reversed keys of what the first one left. Then one walk in order
// writes the chosen positions, ascending, and the padding.
//
//   launch         grid                   block              shared memory         global memory
//   select_kernel  batch x cluster (1 up  128 to 512 (a      RadixScratch and 4    scores and mask once (keys in shared
//                  to 16384 tokens, then  thread for every   bytes per token, or   memory) or up to 2 x 6 times (not),
//                  to 8)                  2 tokens)          RadixScratch          8 bytes per slot: the minimum when
//                                                                                  read once
//   mask_kernel    the same               the same           RadixScratch          mask twice, 8 bytes per slot
#pragma once

#include "tokenprune/order.h"
#include "tokenprune/radix.cuh"
#include "tokenprune/selection.h"

namespace tokenprune {

static_assert(sizeof(RadixScratch<uint32_t>) <= kSelectStaticShared);

// keys(i) from the tensors. They have the width of the storage type: a pass of the selection less for every 8 bits that
// it does not have. The mask is an argument of the call, but the scores may be what a launch in front has written: a
// read-only load of theirs could be made before that.
template <class T>
struct RowKeys {
  const T* scores;
  const uint8_t* mask;
  bool largest;

  __device__ __forceinline__ uint32_t operator()(uint32_t i) const {
    const bool visible = mask == nullptr || __ldg(mask + i) != 0;
    const T score = scores[i];
    const uint32_t key = order_key_of<uint32_t>(score, to_float(score));
    return !visible ? kNoKey : (largest ? key : reversed_key<T>(key));
  }
};

// keys(i) that the same thread has left in shared memory.
struct KeptKeys {
  const uint32_t* keys;
  uint32_t first;

  __device__ __forceinline__ uint32_t operator()(uint32_t i) const { return keys[i - first]; }
};

template <class T, class Keys>
__device__ __forceinline__ void select_tails(const SelectProblem& p, int64_t sample, const Keys& keys, Stretch of_warp,
                                             RadixScratch<uint32_t>& scratch) {
  const auto within = [&](int64_t asked) { return asked < 0 ? 0 : (asked < p.k ? asked : p.k); };
  const int64_t budget = p.budgets == nullptr ? p.k : within(p.budgets[sample * p.budget_stride]);
  const int64_t tail = p.num_low == nullptr ? 0 : within(p.num_low[sample * p.num_low_stride]);
  // First the high tail; then, with the order reversed, the low one of what the high one did not take. Its ties are one
  // key of the reversed order, the first ones of which are taken.
  Threshold<uint32_t> high = no_candidate<uint32_t>(), low = high, taken = {0, 0};
#pragma unroll 1
  for (int turn = 0; turn < 2; ++turn) {
    const uint32_t bound = high.key;
    const auto open = [&](uint32_t i) {
      const uint32_t key = keys(i);
      return key > bound ? kNoKey : (turn == 0 ? key : reversed_key<T>(key));
    };
    const Threshold<uint32_t> found =
        threshold_of_best(open, of_warp, turn == 0 ? budget - tail : tail, taken, scratch);
    if (turn == 0) {
      high = found;
      taken = {reversed_key<T>(high.key), high.ties};
    } else {
      low = found;
    }
  }
  const bool same_key = taken.ties > 0 && low.key == taken.key;
  const uint32_t high_ties = high.ties + (same_key ? low.ties : 0);

  enum { kChosen = 1, kHighTie = 2, kLowTie = 4 };
  const auto classify = [&](uint32_t i) -> uint32_t {
    const uint32_t key = keys(i), reversed = reversed_key<T>(key);
    if (key == kNoKey) return 0;
    if (key > high.key || reversed > low.key) return kChosen;
    if (key == high.key && high_ties > 0) return kHighTie;
    return reversed == low.key ? kLowTie : 0;
  };
  int64_t* out = p.indices + sample * p.k;
  const MarkCounts found = ranked<3>(
      of_warp, classify,
      [&](uint32_t i, uint32_t flags, const uint32_t (&ranks)[3]) {
        const bool chosen =
            flags & kChosen || (flags & kHighTie && ranks[1] < high_ties) || (flags & kLowTie && ranks[2] < low.ties);
        if (chosen) out[ranks[0] + min(ranks[1], high_ties) + min(ranks[2], low.ties)] = i;
      },
      scratch);
  finish_list(out, p.k, p.counts + sample, found.of[0] + min(found.of[1], high_ties) + min(found.of[2], low.ties));
}

template <class T, bool kept>
__global__ void __launch_bounds__(kSelectMaxThreads) select_kernel(const SelectProblem p) {
  using Scratch = RadixScratch<uint32_t>;
  TOKENPRUNE_SHARED(Scratch, scratch);
  wait_for_launch_before();  // for the scores of density_peaks; select_topk is one launch
  const int64_t sample = blockIdx.x / cluster_size();
  const Stretch of_block = stretch_of_block(static_cast<uint32_t>(p.n)), of_warp = stretch_of_warp(of_block);
  const RowKeys<T> row = {static_cast<const T*>(p.scores) + sample * p.score_stride,
                          p.mask == nullptr ? nullptr : p.mask + sample * p.mask_stride, p.largest};
  if constexpr (kept) {
    auto* keys = reinterpret_cast<uint32_t*>(dynamic_shared());
    each_token(of_warp, row, [&](uint32_t i, uint32_t key) { keys[i - of_block.begin] = key; });
    __syncwarp();  // lanes that have no tokens left look at their neighbour's last one
    select_tails<T>(p, sample, KeptKeys{keys, of_block.begin}, of_warp, scratch);
  } else {
    select_tails<T>(p, sample, row, of_warp, scratch);
  }
}

__global__ void __launch_bounds__(kSelectMaxThreads) mask_kernel(const MaskProblem p) {
  using Scratch = RadixScratch<uint32_t>;
  TOKENPRUNE_SHARED(Scratch, scratch);
  const int64_t sample = blockIdx.x / cluster_size();
  const Stretch of_warp = stretch_of_warp(stretch_of_block(static_cast<uint32_t>(p.n)));
  const uint8_t* mask = p.mask + sample * p.mask_stride;
  int64_t* out = p.indices + sample * p.capacity;
  const MarkCounts found = ranked<1>(
      of_warp, [&](uint32_t i) -> uint32_t { return __ldg(mask + i) != 0; },
      [&](uint32_t i, uint32_t flags, const uint32_t (&ranks)[1]) {
        if (flags && ranks[0] < p.capacity) out[ranks[0]] = i;
      },
      scratch);
  finish_list(out, p.capacity, p.counts + sample, min(static_cast<int64_t>(found.of[0]), p.capacity));
}

inline Launch select_launch(int64_t batch, const SelectPlan& plan, CallStream& stream) {
  return {batch * plan.cluster, dim3(plan.threads), plan.shared, stream, plan.cluster};
}

template <class T>
cudaError_t launch_select(const SelectProblem& p, const SelectPlan& plan, CallStream& stream) {
  const auto kernel = plan.keys_in_shared ? select_kernel<T, true> : select_kernel<T, false>;
  return launch(select_launch(p.batch, plan, stream), kernel, p);
}

}  // namespace tokenprune
