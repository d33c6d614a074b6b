// merge_tokens as the host sees it: the problem, the launch plan, the launchers. The templates are instantiated for
// float, __half and __nv_bfloat16 in csrc/cuda/merging.cu: keys and values may differ in type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "tokenprune/call_stream.h"
#include "tokenprune/limits.h"

namespace tokenprune {

// Who joins which target.
struct AssignProblem {
  const void* keys;  // [batch, n, channels], last stride 1
  int64_t key_batch_stride, key_row_stride;
  bool aligned;            // every key starts at a multiple of 16 bytes
  const int64_t* targets;  // [batch, slots], last stride 1
  int64_t target_stride;
  const uint8_t* mask;  // bytes [batch, n] with last stride 1, or null
  int64_t mask_stride;
  bool euclidean, include_targets;
  bool limited;  // join nothing below `limit`: a cosine, or a distance with its sign changed
  float limit;
  int64_t batch, n, channels, slots;
  float* norms;         // [batch, n]: inverse norms, or squares for distances
  int64_t* assignment;  // [batch, n]
};

// The means of those that joined.
struct MeanProblem {
  const void* values;  // [batch, n, channels], last stride 1
  int64_t batch_stride, row_stride;
  bool aligned;          // all rows have whole 16-byte units, at multiples of 16 bytes
  const float* weights;  // [batch, n] contiguous, or null: all 1
  const int64_t* assignment;
  int64_t batch, n, channels, slots;
  void* merged;  // [batch, slots, channels], like the values
  float* sizes;  // [batch, slots]
};

constexpr int kMergeTile = 64;  // tokens, and targets, of a tile
constexpr int kMergeThreads = 128;
constexpr int kMergeAhead = 4;                                              // tokens that a thread reads at once
constexpr int kMergeRound = kMergeThreads * kMergeAhead;                    // tokens that are looked through together
constexpr int64_t kMergeMostTokens = (int64_t(1) << 31) - kMergeRound - 1;  // positions have 32 bits

struct AssignPlan {
  int64_t norm_blocks;  // a warp for each token
  int64_t tiles;        // of tokens, in all samples
  int parts;            // of the channels, each by one block of a cluster
};

inline AssignPlan plan_assign(int64_t batch, int64_t n, int64_t channels, const DeviceLimits& limits) {
  const int64_t tiles = batch * ceil_div<int64_t>(n, kMergeTile);
  return {ceil_div<int64_t>(batch * n, kMergeThreads / 32), tiles, channel_parts(tiles, channels, limits)};
}

// Slices of the columns of a mean: a thread of a block has 16 bytes of every row.
inline int64_t mean_slices(int64_t channels, int64_t element_size) {
  return ceil_div<int64_t>(channels * element_size, 16 * kMergeThreads);
}

template <class T>
cudaError_t launch_assign(const AssignProblem& problem, const AssignPlan& plan, CallStream& stream);

// A given assignment, in which what names no slot becomes -1.
cudaError_t launch_copy_assignment(const int64_t* given, int64_t stride, int64_t batch, int64_t n, int64_t slots,
                                   int64_t* assignment, CallStream& stream);

template <class T>
cudaError_t launch_means(const MeanProblem& problem, CallStream& stream);

}  // namespace tokenprune
