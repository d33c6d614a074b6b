// select_mixture (AdaFV): one launch, one block per sample.
//
//   text scores   ---> keys ---> k - b best (radix selection) ---> sorted ---> prefix sums of all but the first b ---+
//   visual scores ---> keys ---> the same                     ---> sorted ---> the same                           ---+
//                                                                                                                    |
//   indices, counts, num_text <-- one walk in order <-- fill (radix selection) <-- kept <-- r (greatest product) <---+
//
// Only values are sorted. Which tokens the first m of a list are follows from its m-th value: those with a greater one,
// and of those with this one the first in order; `cut` is where these end. So "kept" is a function of a token's two
// keys and its index, and nothing per token is stored but the keys.
//
// Prefix sums are in float64, in chunks: within a chunk from left to right, then from chunk to chunk, each chunk
// starting with what the last one ended with. That keeps what a tree would lose: adding zeros changes no bit, so that
// products that are equal because a list has run out of mass are equal here too, and the smallest r wins.
//
// Free slots go by descending max(t / T, v / V), with T and V the sums of the lists. All are compared as
// max(t * V, v * T): the same order without a division, and equal shares of the two lists give equal products where
// these are exact.
//
// Keys are made once from the scores and have one form whatever the dtypes are: an array per list, in shared memory or,
// when they are too many, in global memory. So are the lists that are sorted.
//
// Grid B, block 128 to 512 (a thread for every two tokens), static shared memory two RadixScratch; dynamic: 8 bytes
// per sorted key, 16 per summed one, and 8 per token, as far as there is room. Scores are read once, which is the
// minimum; keys in global memory are read up to 26 times.
#pragma once

#include "tokenprune/mixture.h"
#include "tokenprune/order.h"
#include "tokenprune/radix.cuh"

namespace tokenprune {

static_assert(sizeof(RadixScratch<uint32_t>) + sizeof(RadixScratch<uint64_t>) + 1024 <= kMixtureStaticShared);

// The type is looked at twice, once to load and once to convert: a branch for each, around all of it, would write the
// loop over the tokens once for every pair of types.
__device__ __forceinline__ float score_at(const ScoreRows& rows, int64_t i) {
  const bool wide = rows.type == ScoreType::kFloat;
  const uint32_t bits = wide ? static_cast<const uint32_t*>(rows.data)[i] : static_cast<const uint16_t*>(rows.data)[i];
  __half half;
  memcpy(&half, &bits, sizeof half);  // its low half
  return rows.type == ScoreType::kHalf ? to_float(half) : __uint_as_float(wide ? bits : bits << 16);
}

// Negative scores and NaN count as 0.
__device__ __forceinline__ uint32_t mixture_key(const ScoreRows& rows, int64_t sample, uint32_t i, bool visible) {
  const float score = score_at(rows, sample * rows.stride + i);
  return visible ? nonnegative_key(score > 0 ? score : 0.0f) : kNoKey;
}

__device__ __forceinline__ float score_of(uint32_t key) { return key == kNoKey ? 0.0f : nonnegative_value_of_key(key); }

// Sorts both lists of `length` keys (a power of two), best first. A warp compares 32 neighbouring pairs; up to a stride
// of 32 they lie among the same 64 keys in every step, so that the warp need not wait for the others.
__device__ __forceinline__ void sort_lists(uint32_t* text, uint32_t* visual, uint32_t length) {
  const uint32_t half = length / 2;
  uint32_t last_stride = 2 * kWarp;  // as after a step in which all warps write to each other's keys
  for (uint32_t size = 2; size <= length; size *= 2)
    for (uint32_t stride = size / 2; stride > 0; stride /= 2) {
      if (max(stride, last_stride) > kWarp)
        __syncthreads();
      else
        __syncwarp();
      last_stride = stride;
#pragma unroll 1
      for (uint32_t pair = threadIdx.x; pair < length; pair += blockDim.x) {
        uint32_t* list = pair < half ? text : visual;
        const uint32_t of_list = pair & (half - 1), i = 2 * of_list - (of_list & (stride - 1)), j = i + stride;
        const uint32_t a = list[i], b = list[j];
        if ((a < b) == ((i & size) == 0)) {
          list[i] = b;
          list[j] = a;
        }
      }
    }
  __syncthreads();
}

// mass[r] = the sum of the first r of `count` sorted scores, by half a block, whose threads are 0 .. threads - 1. All
// threads of the block call it.
__device__ __forceinline__ void prefix_sums(const uint32_t* sorted, uint32_t count, double* mass, uint32_t thread,
                                            uint32_t threads) {
  // At least as long as there are chunks, whose sums are added up one by one.
  const uint32_t chunk = max(ceil_div(count, threads), static_cast<uint32_t>(ceil(sqrt(static_cast<double>(count)))));
  const uint32_t begin = min(thread * chunk, count), end = min(begin + chunk, count);
  double sum = 0;
  for (uint32_t r = begin; r < end; ++r) mass[r + 1] = sum += score_of(sorted[r]);
  __syncthreads();
  if (thread == 0) {
    mass[0] = sum = 0;
    for (uint32_t last = chunk; last < count + chunk; last += chunk)
      mass[min(last, count)] = sum += mass[min(last, count)];
  }
  __syncthreads();
  if (begin > 0)
    for (uint32_t r = begin + 1; r < end; ++r) mass[r] += mass[begin];
  __syncthreads();
}

// The smallest r that maximises text(r) * visual(rest - r); 0 * inf counts as 0. An r beyond the text list's end is
// never better than its end.
__device__ __forceinline__ int64_t best_split(const double* text, int64_t text_count, const double* visual,
                                              int64_t visual_count, int64_t rest) {
  double most = -1;
  int64_t split = 0;
  for (int64_t r = threadIdx.x; r <= min(rest, text_count); r += blockDim.x) {
    double product = text[r] * visual[min(rest - r, visual_count)];
    if (product != product) product = 0;
    if (product > most) {
      most = product;
      split = r;
    }
  }
  const double best = block_reduce(most, Max(), -1.0);
  return block_reduce(most == best ? split : rest, Min(), rest);
}

// The first `count` of a sorted list as a threshold.
__device__ __forceinline__ Threshold<uint32_t> threshold_of_sorted(const uint32_t* sorted, uint32_t count) {
  if (count == 0) return no_candidate<uint32_t>();
  const uint32_t key = sorted[count - 1];
  uint32_t low = 0, high = count - 1;  // the first one with this key
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    if (sorted[middle] > key)
      low = middle + 1;
    else
      high = middle;
  }
  return {key, count - low};
}

// The weights that make max(text * of_text, visual * of_visual) compare as the greater of two shares does. A list whose
// sum is 0 or infinite has no shares.
struct ShareWeights {
  double of_text, of_visual;

  __device__ __forceinline__ ShareWeights(double text_sum, double visual_sum) {
    const bool text = text_sum > 0 && text_sum * 0 == 0, visual = visual_sum > 0 && visual_sum * 0 == 0;
    of_text = !text ? 0 : (visual ? visual_sum : 1);
    of_visual = !visual ? 0 : (text ? text_sum : 1);
  }
  __device__ __forceinline__ double share(uint32_t text_key, uint32_t visual_key) const {
    const double text = of_text > 0 ? of_text * score_of(text_key) : 0;
    const double visual = of_visual > 0 ? of_visual * score_of(visual_key) : 0;
    return text > visual ? text : visual;
  }
};

__global__ void __launch_bounds__(kMixtureMaxThreads, 1)
    mixture_kernel(const MixtureProblem p, const MixturePlan plan) {
  using ListScratch = RadixScratch<uint32_t>;
  using FillScratch = RadixScratch<uint64_t>;
  using Token = Ranked<uint32_t, uint32_t>;
  TOKENPRUNE_SHARED(ListScratch, list_scratch);
  TOKENPRUNE_SHARED(FillScratch, scratch);
  TOKENPRUNE_SHARED(uint32_t[2], cuts);
  const int64_t sample = blockIdx.x;
  const auto n = static_cast<uint32_t>(p.n);
  const Stretch of_warp = stretch_of_warp({0, n});

  // In this order: prefix sums, sorted keys, the keys of all tokens.
  unsigned char *shared = dynamic_shared(), *workspace = p.workspace + sample * plan.bytes(false);
  unsigned char* lists = plan.lists_in_shared ? shared : workspace;
  unsigned char* keys = (plan.keys_in_shared ? shared : workspace) +
                        (plan.lists_in_shared == plan.keys_in_shared ? plan.list_bytes() : 0);
  double *text_mass = reinterpret_cast<double*>(lists), *visual_mass = text_mass + plan.summed + 1;
  uint32_t *text_sorted = reinterpret_cast<uint32_t*>(visual_mass + plan.summed + 1),
           *visual_sorted = text_sorted + plan.sorted;
  uint32_t *text_keys = reinterpret_cast<uint32_t*>(keys), *visual_keys = text_keys + n;
  const uint8_t* mask = p.mask == nullptr ? nullptr : p.mask + sample * p.mask_stride;
  each_token(
      of_warp,
      [&](uint32_t i) -> uint2 {
        const bool visible = mask == nullptr || mask[i] != 0;
        return {mixture_key(p.text, sample, i, visible), mixture_key(p.visual, sample, i, visible)};
      },
      [&](uint32_t i, uint2 keys) {
        text_keys[i] = keys.x;
        visual_keys[i] = keys.y;
      });
  const auto text = [&](uint32_t i) { return text_keys[i]; };
  const auto visual = [&](uint32_t i) { return visual_keys[i]; };

  // Sums of everything, for the shares.
  double text_sum = 0, visual_sum = 0;
  uint32_t tokens = 0;
  for (uint32_t i = of_warp.begin + lane_id(); i < of_warp.end; i += kWarp) {
    const uint32_t key = text(i);
    tokens += key != kNoKey;
    text_sum += score_of(key);
    visual_sum += score_of(visual(i));
  }
  tokens = block_reduce(tokens, Sum(), 0u);
  const ShareWeights weights(block_reduce(text_sum, Sum(), 0.0), block_reduce(visual_sum, Sum(), 0.0));

  // The best of both lists, sorted.
  const int64_t wanted = p.k - p.reserved, rest = wanted - p.reserved;
  const auto listed = static_cast<uint32_t>(min(wanted, static_cast<int64_t>(tokens)));
  Threshold<uint32_t> of_text{}, of_visual{};
#pragma unroll 1
  for (int turn = 0; turn < 2; ++turn) {
    const uint32_t* list = turn == 0 ? text_keys : visual_keys;
    of_visual = threshold_of_best([&](uint32_t i) { return list[i]; }, of_warp, wanted, {0, 0}, list_scratch);
    if (turn == 0) of_text = of_visual;
  }
  const MarkCounts above = ranked<2>(
      of_warp, [&](uint32_t i) -> uint32_t { return (text(i) > of_text.key) + 2 * (visual(i) > of_visual.key); },
      [&](uint32_t i, uint32_t flags, const uint32_t (&ranks)[2]) {
        if (flags & 1) text_sorted[ranks[0]] = text(i);
        if (flags & 2) visual_sorted[ranks[1]] = visual(i);
      },
      scratch);
  for (int64_t i = threadIdx.x; i < plan.sorted; i += blockDim.x) {
    if (i >= above.of[0]) text_sorted[i] = i < listed ? of_text.key : 0;
    if (i >= above.of[1]) visual_sorted[i] = i < listed ? of_visual.key : 0;
  }
  sort_lists(text_sorted, visual_sorted, static_cast<uint32_t>(plan.sorted));

  // How many to keep of each.
  const auto reserved = static_cast<uint32_t>(min(p.reserved, static_cast<int64_t>(listed)));
  const uint32_t summed = listed - reserved, half = blockDim.x / 2;
  const bool for_text = threadIdx.x < half;
  prefix_sums((for_text ? text_sorted : visual_sorted) + reserved, summed, for_text ? text_mass : visual_mass,
              for_text ? threadIdx.x : threadIdx.x - half, half);
  const int64_t split = best_split(text_mass, summed, visual_mass, summed, rest);
  of_text =
      threshold_of_sorted(text_sorted, static_cast<uint32_t>(min(p.reserved + split, static_cast<int64_t>(listed))));
  of_visual =
      threshold_of_sorted(visual_sorted, static_cast<uint32_t>(min(wanted - split, static_cast<int64_t>(listed))));

  // Where the last token of each lies that is kept among equal ones.
  if (threadIdx.x < 2) cuts[threadIdx.x] = 0;
  ranked<2>(
      of_warp, [&](uint32_t i) -> uint32_t { return (text(i) == of_text.key) + 2 * (visual(i) == of_visual.key); },
      [&](uint32_t i, uint32_t flags, const uint32_t (&ranks)[2]) {
        if (flags & 1 && ranks[0] + 1 == of_text.ties) cuts[0] = i + 1;
        if (flags & 2 && ranks[1] + 1 == of_visual.ties) cuts[1] = i + 1;
      },
      scratch);
  __syncthreads();
  // What is better than these is kept.
  const Token text_end = {of_text.key, cuts[0]}, visual_end = {of_visual.key, cuts[1]};

  // The free slots.
  const auto fill_key = [&](uint32_t i) -> uint64_t {  // kNoKey: kept already, or masked
    const uint32_t text_key = text(i), visual_key = visual(i);
    if (text_key == kNoKey || Token{text_key, i} < text_end || Token{visual_key, i} < visual_end) return kNoKey;
    return nonnegative_key(weights.share(text_key, visual_key));
  };
  uint32_t open = 0;
  for (uint32_t i = of_warp.begin + lane_id(); i < of_warp.end; i += kWarp) open += fill_key(i) != kNoKey;
  const int64_t kept = tokens - block_reduce(open, Sum(), 0u);
  const Threshold<uint64_t> fill = threshold_of_best(fill_key, of_warp, p.k - kept, {0, 0}, scratch);

  int64_t* out = p.indices + sample * p.k;
  const MarkCounts found = ranked<2>(
      of_warp,
      [&](uint32_t i) -> uint32_t {
        const uint64_t key = fill_key(i);
        if (key == kNoKey) return text(i) != kNoKey;
        return key > fill.key ? 1 : (key == fill.key ? 2 : 0);
      },
      [&](uint32_t i, uint32_t flags, const uint32_t (&ranks)[2]) {
        if (flags & 1 || (flags & 2 && ranks[1] < fill.ties)) out[ranks[0] + min(ranks[1], fill.ties)] = i;
      },
      scratch);
  finish_list(out, p.k, p.counts + sample, static_cast<int64_t>(found.of[0]) + min(found.of[1], fill.ties));
  if (threadIdx.x == 0) p.num_text[sample] = p.reserved + split;
}

}  // namespace tokenprune
