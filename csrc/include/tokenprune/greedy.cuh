// The engine of the greedy ops: one persistent block, or one cluster of blocks, makes all the picks of a sample in one
// launch. What differs between the ops is the rule: who is the best of a thread's own tokens, and what a pick changes.
#pragma once

#include "tokenprune/order.h"
#include "tokenprune/ptx.cuh"
#include "tokenprune/warp.cuh"

namespace tokenprune {

using Candidate = Ranked<uint32_t, uint32_t>;
constexpr Candidate kNoCandidate = {kNoKey, 0xFFFFFFFFu};

__device__ __forceinline__ Candidate warp_best(Candidate mine) {
  const uint32_t key = __reduce_max_sync(kAllLanes, mine.key);
  return {key, __reduce_min_sync(kAllLanes, mine.key == key ? mine.index : 0xFFFFFFFFu)};
}

// Where the warps of a cluster leave their candidates; two sets in turn, so that one barrier per step is enough: none
// can write the set of step s + 2 before all have passed the barrier of step s + 1, that is, has read set s.
struct CandidateSlots {
  Candidate warps[2][kWarp], blocks[2][kMaxCluster];
};

// The samples [first, first + count) as a problem of their own, in what all greedy ops have: `input` with its elements,
// the mask, and where picks and counts go.
template <class Problem>
Problem samples_of(const Problem& p, const void* Problem::* input, int64_t first, int64_t count, int64_t element_size) {
  Problem part = p;
  part.*input = static_cast<const unsigned char*>(p.*input) + first * p.batch_stride * element_size;
  if (p.mask != nullptr) part.mask += first * p.mask_stride;
  part.indices += first * p.k;
  part.counts += first;
  part.batch = count;
  return part;
}

struct PublishNothing {
  __device__ __forceinline__ void operator()(Candidate, unsigned) const {}
};

// The best candidate of the whole cluster, in every thread. `step` counts the calls. Every block is a multiple of 32
// threads. The barrier inside also orders what threads wrote to shared memory before the call. In a cluster of several
// blocks, all threads call publish(the best of their block, step % 2) before the barrier of the cluster: it may write
// to the others what they would have to fetch if its candidate is the pick, in one of two sets as the slots.
template <class Publish = PublishNothing>
__device__ __forceinline__ Candidate cluster_best(Candidate mine, CandidateSlots& slots, unsigned step,
                                                  Publish publish = {}) {
  const unsigned set = step % 2, warps = blockDim.x / kWarp;
  const Candidate none = kNoCandidate;  // a reference to the constant itself would not exist on the device
  mine = warp_best(mine);
  if (lane_id() == 0) slots.warps[set][warp_id()] = mine;
  __syncthreads();
  mine = warp_best(static_cast<unsigned>(lane_id()) < warps ? slots.warps[set][lane_id()] : none);
  if (cluster_size() == 1) return mine;
  if (threadIdx.x < cluster_size()) cluster_shared(&slots, threadIdx.x)->blocks[set][cluster_rank()] = mine;
  publish(mine, set);
  cluster_sync();
  return warp_best(static_cast<unsigned>(lane_id()) < cluster_size() ? slots.blocks[set][lane_id()] : none);
}

// Picks up to k tokens, best first. A rule has
//   Candidate best()                           the best of the calling thread's own tokens,
//   void commit(int64_t slot, Candidate pick)  takes the pick out and updates the objective; all threads call it.
// `publish` is that of cluster_best. Returns how many were picked.
template <class Rule, class Publish = PublishNothing>
__device__ __forceinline__ int64_t greedy_select(Rule& rule, CandidateSlots& slots, int64_t k, Publish publish = {}) {
  for (int64_t slot = 0; slot < k; ++slot) {
    const Candidate pick = cluster_best(rule.best(), slots, static_cast<unsigned>(slot), publish);
    if (pick.key == kNoKey) return slot;
    rule.commit(slot, pick);
  }
  return k;
}

}  // namespace tokenprune
