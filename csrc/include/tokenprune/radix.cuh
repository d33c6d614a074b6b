// Radix selection of one sample by a team: a block, or the blocks of a cluster.
//
//   threshold_of_best   finds the key that separates the `count` best tokens from the others: histograms of 8 bits of
//                       the keys, most significant bits first, each pass over the keys that the last one left open.
//   ranked              walks the tokens in order and tells each how many marked tokens come before it: the slot of its
//                       output, and whether it is still among the best of the tokens with its key.
//
// Keys are those of order.h. Nothing here knows of indices, ties or NaN beyond that: equal keys are counted, and the
// first ones in order win.
//
// Tokens are dealt out in order: a stretch to each block of the cluster, of it a stretch to each warp, whose lanes walk
// it 32 neighbours at a time. A thread always has the same tokens, so that what it keeps in shared memory of its own
// tokens needs no barrier, and ranks need only one exchange of totals between the warps.
//
// Every thread of the team calls the functions that take a RadixScratch: they contain barriers, the first one before
// anything is written. A sample has fewer than 2^31 tokens.
#pragma once

#include "tokenprune/order.h"
#include "tokenprune/ptx.cuh"
#include "tokenprune/warp.cuh"

namespace tokenprune {

constexpr int kRadixBits = 8, kRadixBins = 1 << kRadixBits;

struct Stretch {
  uint32_t begin, end;
};

// Part `rank` of `parts` of a stretch, a multiple of 32 tokens but for the last.
__device__ __forceinline__ Stretch part_of(Stretch whole, uint32_t parts, uint32_t rank) {
  const uint32_t size = round_up<uint32_t>(ceil_div(whole.end - whole.begin, parts), kWarp);
  return {min(whole.begin + rank * size, whole.end), min(whole.begin + (rank + 1) * size, whole.end)};
}

__device__ __forceinline__ Stretch stretch_of_block(uint32_t tokens) {
  return part_of({0, tokens}, cluster_size(), cluster_rank());
}

__device__ __forceinline__ Stretch stretch_of_warp(Stretch of_block) {
  return part_of(of_block, blockDim.x / kWarp, warp_id());
}

// f(i, read(i)) for the tokens of the calling thread, in order; i is past the end in the lanes that have none left,
// with what read() says of the last token. Reads kAhead rounds before the first f: the loads are on their way together.
constexpr int kAhead = 4;

template <class Read, class F>
__device__ __forceinline__ void each_round(Stretch of_warp, const Read& read, const F& f) {
  for (uint32_t start = of_warp.begin; start < of_warp.end; start += kAhead * kWarp) {
    decltype(read(start)) values[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) values[a] = read(min(start + a * kWarp + lane_id(), of_warp.end - 1));
#pragma unroll
    for (int a = 0; a < kAhead; ++a) f(start + a * kWarp + lane_id(), values[a]);
  }
}

// The same without the lanes past the end.
template <class Read, class F>
__device__ __forceinline__ void each_token(Stretch of_warp, const Read& read, const F& f) {
  each_round(of_warp, read, [&](uint32_t i, auto value) {
    if (i < of_warp.end) f(i, value);
  });
}

__device__ __forceinline__ void team_sync() {
  if (cluster_size() == 1)
    __syncthreads();
  else
    cluster_sync();
}

// --- exchange between the warps and blocks of a team -----------------------------------------------------------------

// What the candidates of a team span, and how many they are.
template <class Key>
struct Extent {
  Key low, high;
  uint32_t count;
};

template <class Key>
__device__ __forceinline__ Extent<Key> extent_of_none() {
  return {static_cast<Key>(~Key(0)), 0, 0};
}

template <class Key>
__device__ __forceinline__ Extent<Key> over_warp(Extent<Key> e) {
  const uint32_t count = __reduce_add_sync(kAllLanes, e.count);
  if constexpr (sizeof(Key) == 4)
    return {__reduce_min_sync(kAllLanes, e.low), __reduce_max_sync(kAllLanes, e.high), count};
  else
    return {warp_reduce(e.low, Min()), warp_reduce(e.high, Max()), count};
}

constexpr int kMaxMarks = 4;

struct MarkCounts {
  uint32_t of[kMaxMarks];
};

template <class Key>
struct RadixScratch {
  // Three histograms in turn: a block clears the next one while the others may still read the last one.
  alignas(16) uint32_t histogram[3][kRadixBins];
  alignas(16) uint32_t total[kRadixBins];  // of all blocks
  uint32_t bin, above, inside;
  Extent<Key> warp_extents[kWarp], block_extents[kMaxCluster];
  MarkCounts warp_marks[kWarp], block_marks[kMaxCluster];
};

template <class Key>
__device__ __forceinline__ Extent<Key> over_team(Extent<Key> mine, RadixScratch<Key>& scratch) {
  const uint32_t lane = lane_id(), warps = blockDim.x / kWarp;
  mine = over_warp(mine);
  if (lane == 0) scratch.warp_extents[warp_id()] = mine;
  __syncthreads();
  mine = over_warp(lane < warps ? scratch.warp_extents[lane] : extent_of_none<Key>());
  if (cluster_size() == 1) return mine;
  if (threadIdx.x < cluster_size()) cluster_shared(&scratch, threadIdx.x)->block_extents[cluster_rank()] = mine;
  cluster_sync();
  return over_warp(lane < cluster_size() ? scratch.block_extents[lane] : extent_of_none<Key>());
}

// --- selection -------------------------------------------------------------------------------------------------------

// The candidates above `key` and the first `ties` of those equal to it.
template <class Key>
struct Threshold {
  Key key;
  uint32_t ties;
};

template <class Key>
__device__ __forceinline__ Threshold<Key> all_candidates() {
  return {kNoKey, 0};
}

template <class Key>
__device__ __forceinline__ Threshold<Key> no_candidate() {
  return {static_cast<Key>(~Key(0)), 0};  // no key is that great
}

// One warp finds the bin of the `wanted`-th best token, counted down from the last bin. `taken` tokens of one bin do
// not count.
template <class Key>
__device__ __forceinline__ void find_bin(const uint32_t* bins, uint32_t wanted, uint32_t taken_bin, uint32_t taken,
                                         RadixScratch<Key>& scratch) {
  constexpr int kPerLane = kRadixBins / kWarp;
  static_assert(kPerLane == 8);
  const uint32_t first = kRadixBins - kPerLane * (lane_id() + 1);
  const uint4 low = *reinterpret_cast<const uint4*>(bins + first),
              high = *reinterpret_cast<const uint4*>(bins + first + 4);
  uint32_t counts[kPerLane] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}, sum = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (first + i == taken_bin) counts[i] -= taken;
    sum += counts[i];
  }
  uint32_t above = warp_inclusive_sum(sum) - sum;
#pragma unroll
  for (int i = kPerLane - 1; i >= 0; --i) {
    if (wanted > above && wanted <= above + counts[i]) {
      scratch.bin = first + i;
      scratch.above = above;
      scratch.inside = counts[i];
    }
    above += counts[i];
  }
}

template <class Key>
__device__ __forceinline__ int bits_of(Key key) {
  return 64 - __clzll(static_cast<long long>(key));
}

// The threshold of the `count` best of the candidates keys(i). `taken` of them are out already, though keys() offers
// them: the first taken.ties of those whose key is taken.key.
// Passes: one for the extent, then at most one per 8 bits in which the candidates differ; it ends as soon as all that
// is left open is wanted, for N random scores after about log2(N) bits.
template <class Key, class Keys>
__device__ __forceinline__ Threshold<Key> threshold_of_best(const Keys& keys, Stretch of_warp, int64_t count,
                                                            Threshold<Key> taken, RadixScratch<Key>& scratch) {
  if (count <= 0) return no_candidate<Key>();
  team_sync();
  for (int i = threadIdx.x; i < kRadixBins; i += blockDim.x) scratch.histogram[0][i] = 0;
  Extent<Key> open = extent_of_none<Key>();
  each_token(of_warp, keys, [&](uint32_t, Key key) {
    if (key == kNoKey) return;
    open.low = min(open.low, key);
    open.high = max(open.high, key);
    ++open.count;
  });
  open = over_team(open, scratch);
  if (count >= static_cast<int64_t>(open.count) - taken.ties) return all_candidates<Key>();
  uint32_t wanted = static_cast<uint32_t>(count);
  Key low = open.low;  // the threshold lies in [low, low + 2^width)
  int width = bits_of(static_cast<Key>(open.high - open.low));
  for (uint32_t set = 0; width > 0; set = (set + 1) % 3) {
    const uint32_t next = (set + 1) % 3, bins = 1u << min(width, kRadixBits);
    width = max(width - kRadixBits, 0);
    for (int i = threadIdx.x; i < kRadixBins; i += blockDim.x) scratch.histogram[next][i] = 0;
    // Increments whose result is not read: the hardware adds those of a warp that hit the same bin in one go.
    uint32_t* histogram = scratch.histogram[set];
    each_token(of_warp, keys, [&](uint32_t, Key key) {
      const Key bin = static_cast<Key>(key - low) >> width;
      if (key >= low && bin < bins) atomicAdd(&histogram[bin], 1u);
    });
    team_sync();
    if (cluster_size() > 1) {
      for (uint32_t i = threadIdx.x; i < kRadixBins; i += blockDim.x) {
        uint32_t sum = 0;
        for (uint32_t block = 0; block < cluster_size(); ++block) sum += cluster_shared(histogram, block)[i];
        scratch.total[i] = sum;
      }
      __syncthreads();
      histogram = scratch.total;
    }
    const Key taken_bin = static_cast<Key>(taken.key - low) >> width;
    const bool open_taken = taken.key >= low && taken_bin < bins;
    if (warp_id() == 0)
      find_bin(histogram, wanted, open_taken ? static_cast<uint32_t>(taken_bin) : kRadixBins, taken.ties, scratch);
    __syncthreads();
    wanted -= scratch.above;
    low += static_cast<Key>(scratch.bin) << width;
    if (wanted == scratch.inside) return {static_cast<Key>(low - 1), 0};
  }
  return {low, wanted};
}

// --- ranks -----------------------------------------------------------------------------------------------------------

// f(i, flags, ranks) for the tokens of the calling thread, in order: bit g of flags = classify(i) marks token i for
// list g, and ranks[g] is how many tokens before it have that mark, in the whole sample. Returns how many all have.
// All lanes of a warp call f together, past the end with flags 0.
template <int lists, class Key, class Classify, class F>
__device__ __forceinline__ MarkCounts ranked(Stretch of_warp, const Classify& classify, const F& f,
                                             RadixScratch<Key>& scratch) {
  static_assert(lists <= kMaxMarks);
  const uint32_t lane = lane_id(), below = (1u << lane) - 1;
  MarkCounts mine = {};
  each_token(of_warp, classify, [&](uint32_t, uint32_t flags) {
#pragma unroll
    for (int g = 0; g < lists; ++g) mine.of[g] += flags >> g & 1;
  });
  team_sync();
#pragma unroll
  for (int g = 0; g < lists; ++g) {
    mine.of[g] = __reduce_add_sync(kAllLanes, mine.of[g]);
    if (lane == 0) scratch.warp_marks[warp_id()].of[g] = mine.of[g];
  }
  __syncthreads();
  MarkCounts before = {}, total = {};
#pragma unroll
  for (int g = 0; g < lists; ++g) {
    const uint32_t of_lane = lane < blockDim.x / kWarp ? scratch.warp_marks[lane].of[g] : 0;
    before.of[g] = __reduce_add_sync(kAllLanes, lane < static_cast<uint32_t>(warp_id()) ? of_lane : 0);
    total.of[g] = __reduce_add_sync(kAllLanes, of_lane);
  }
  if (cluster_size() > 1) {
    if (threadIdx.x < cluster_size()) cluster_shared(&scratch, threadIdx.x)->block_marks[cluster_rank()] = total;
    cluster_sync();
#pragma unroll
    for (int g = 0; g < lists; ++g) {
      const uint32_t of_lane = lane < cluster_size() ? scratch.block_marks[lane].of[g] : 0;
      before.of[g] += __reduce_add_sync(kAllLanes, lane < cluster_rank() ? of_lane : 0);
      total.of[g] = __reduce_add_sync(kAllLanes, of_lane);
    }
  }
  each_round(of_warp, classify, [&](uint32_t i, uint32_t flags) {
    if (i >= of_warp.end) flags = 0;
    uint32_t ranks[lists];
#pragma unroll
    for (int g = 0; g < lists; ++g) {
      const uint32_t votes = __ballot_sync(kAllLanes, flags >> g & 1);
      ranks[g] = before.of[g] + __popc(votes & below);
      before.of[g] += __popc(votes);
    }
    f(i, flags, ranks);
  });
  return total;
}

// indices[count], ..., indices[capacity - 1] = -1 and the count itself, by the whole team.
__device__ __forceinline__ void finish_list(int64_t* indices, int64_t capacity, int64_t* counts, int64_t count) {
  const int64_t threads = static_cast<int64_t>(blockDim.x) * cluster_size();
  const int64_t thread = static_cast<int64_t>(blockDim.x) * cluster_rank() + threadIdx.x;
  for (int64_t i = count + thread; i < capacity; i += threads) indices[i] = -1;
  if (thread == 0) *counts = count;
}

}  // namespace tokenprune
