// spatial_semantic_nms as the host sees it: the problem, the plan of its three launches, and the launcher's
// declaration. The algorithm is described in nms.cuh; the launcher is instantiated for the storage types of the
// features in csrc/cuda/nms.cu. Scores and positions are read through FloatRows, whatever their type: they are small.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "tokenprune/call_stream.h"
#include "tokenprune/limits.h"

namespace tokenprune {

constexpr int kNmsAxes = 2;  // positions are those on the grid of patches: two coordinates

enum class FloatType { kFloat32, kFloat16, kBfloat16 };

struct FloatRows {
  const void* data;
  FloatType type;
  int64_t batch_stride, token_stride;  // in elements; the last dimension is contiguous
};

// Which tokens a pick suppresses, and how much.
struct NmsSuppression {
  float max_squared_distance;  // near means d^2 <= this, see largest_square_within
  float two_spatial2, two_semantic2, threshold;
  bool hard;
};

struct NmsProblem {
  FloatRows scores, positions;  // [batch, n], [batch, n, kNmsAxes]
  const void* features;         // [batch, n, dim], last stride 1
  int64_t feature_batch_stride, feature_row_stride;
  const int64_t* groups;  // [batch, n] with last stride 1, or null
  int64_t group_stride;
  const uint8_t* mask;  // bytes [batch, n] with last stride 1, or null
  int64_t mask_stride;
  int64_t batch, n, dim, k;
  NmsSuppression by;
  void* workspace;  // plan.workspace bytes
  int64_t* indices;
  float* selected;
  int64_t* counts;
};

// sqrt(d2) <= radius is the same as d2 <= this value, because the square root rounds monotonically.
inline float largest_square_within(float radius) {
  const float infinity = std::numeric_limits<float>::infinity();
  float square = radius * radius;
  while (square > 0 && std::sqrt(square) > radius) square = std::nextafter(square, 0.0f);
  while (square < infinity && std::sqrt(std::nextafter(square, infinity)) <= radius)
    square = std::nextafter(square, infinity);
  return square;
}

inline NmsSuppression nms_suppression(double radius, double sigma_spatial, double sigma_semantic, double threshold,
                                      bool hard) {
  return {largest_square_within(static_cast<float>(radius)), static_cast<float>(2 * sigma_spatial * sigma_spatial),
          static_cast<float>(2 * sigma_semantic * sigma_semantic), static_cast<float>(threshold), hard};
}

constexpr int kNmsRowTile = 16;     // picks whose lists one block makes, the rows of one mma
constexpr int kNmsColumnTile = 64;  // neighbours that it multiplies at a time
constexpr int kNmsPrepareThreads = 128, kNmsThreads = 256, kNmsMostSelectThreads = 384;
constexpr int kNmsWeightTile = 64, kNmsWeightThreads = 128, kNmsWeightCluster = 4, kNmsWeightShared = 48 * 1024;
constexpr int64_t kNmsAlwaysListBytes = 16 << 20;  // bytes of lists, or of a table of weights, that are always allowed
constexpr int64_t kNmsFeatureCapacity = 128;       // allowed beyond that when the features are as large
constexpr int64_t kNmsFewestEntries = 32;          // shorter lists than this would mostly overflow
constexpr int64_t kNmsSelectStatic = 9 * 1024;     // bytes of static shared memory of the selection kernel

struct NmsPlan {
  int64_t steps;                  // picks that can be made at most
  int64_t weight_blocks;          // that make the table of the weights of all pairs; 0: no table
  int64_t capacity;               // entries of a token's list; 0: no lists, weights are computed when a pick is made
  int64_t splits, split_columns;  // the columns are shared out to `splits` blocks per row tile
  int64_t prepare_blocks, list_blocks;
  int64_t cluster, owned;  // blocks that select for one sample, and tokens that each of them owns
  int64_t select_threads;  // a multiple of 128
  bool keys_in_shared;
  int64_t shared;     // bytes of dynamic shared memory of the selection kernel
  int64_t workspace;  // bytes
};

// `reach` is the distance beyond which nothing is suppressed; it and the shapes only decide how fast it is.
inline NmsPlan plan_nms(int64_t batch, int64_t n, int64_t dim, int64_t element_size, int64_t k, double reach,
                        const DeviceLimits& limits) {
  NmsPlan plan{};
  plan.steps = std::min(k, n);
  plan.cluster = 1;
  plan.owned = n;
  plan.select_threads = 128;
  if (batch == 0 || plan.steps == 0) return plan;
  const int64_t tokens = batch * n;
  // Weights in advance pay off when they are used a few times: those of a token cost about what the update after one
  // pick costs. A table of all of them is made faster than lists, and a step that reads it has one barrier less.
  const bool table = limits.has_clusters() && 4 * tokens <= kNmsAlwaysListBytes / n &&
                     kNmsWeightShared + kNmsSelectStatic <= limits.shared_per_block;
  if (plan.steps > 2 && table && limits.planned(Planned::kNmsTable, 1, 0, 1) == 1) {
    const int64_t tiles = ceil_div<int64_t>(n, kNmsWeightTile);
    plan.weight_blocks = batch * tiles * (tiles / 2 + 1) * kNmsWeightCluster;
  } else if (plan.steps > 2) {
    const int64_t always = kNmsAlwaysListBytes / 8 / tokens;
    const int64_t within_features = std::min(kNmsFeatureCapacity, dim * element_size / 8);
    plan.capacity = std::min(n - 1, std::max(always, within_features));
    if (plan.capacity < std::min(n - 1, kNmsFewestEntries)) plan.capacity = 0;
    plan.capacity = limits.planned(Planned::kNmsCapacity, plan.capacity, 0, n - 1);
  }
  plan.prepare_blocks = std::min(ceil_div<int64_t>(tokens, kNmsPrepareThreads / 32), kMaxGridX);
  if (plan.capacity > 0) {
    const int64_t tiles = batch * ceil_div<int64_t>(n, kNmsRowTile);
    const int64_t most = ceil_div<int64_t>(n, kNmsColumnTile);
    const int64_t wanted = std::clamp<int64_t>(ceil_div<int64_t>(3 * limits.sm_count, tiles), 1, most);
    const int64_t splits = limits.planned(Planned::kNmsSplits, wanted, 1, most);
    plan.split_columns = round_up(ceil_div(n, splits), int64_t(kNmsColumnTile));
    plan.splits = ceil_div(n, plan.split_columns);
    plan.list_blocks = std::min(tiles * plan.splits, kMaxGridX);
  }
  // Several blocks per sample where a step is long: many tokens to look through, or picks that overflow their lists.
  const bool overflows =
      plan.weight_blocks == 0 && plan.capacity < n - 1 && (plan.capacity == 0 || 3.2 * reach * reach > plan.capacity);
  const int64_t useful = std::max(n / 4096, overflows ? n / 256 : int64_t(0));
  while (limits.has_clusters() && plan.cluster < kMaxCluster && 2 * plan.cluster <= useful &&
         2 * plan.cluster * batch <= limits.sm_count)
    plan.cluster *= 2;
  const bool shared_out = limits.has_clusters() && plan.weight_blocks == 0;  // a table is read by one block
  plan.cluster = limits.planned_power(Planned::kNmsCluster, plan.cluster, 1, shared_out ? kMaxCluster : 1);
  plan.owned = ceil_div(n, plan.cluster);
  const int64_t threads = limits.planned(Planned::kNmsThreads, plan.owned, 128, kNmsMostSelectThreads);
  plan.select_threads = std::min(round_up<int64_t>(threads, 128), int64_t(kNmsMostSelectThreads));
  plan.keys_in_shared = 4 * plan.owned + kNmsSelectStatic <= limits.shared_per_block;
  plan.shared = plan.keys_in_shared ? 4 * plan.owned : 0;
  plan.workspace = tokens * (16 + 8 * plan.capacity + (plan.weight_blocks > 0 ? 4 * n : 0));
  return plan;
}

template <class T>
cudaError_t launch_spatial_semantic_nms(const NmsProblem& problem, const NmsPlan& plan, CallStream& stream);

}  // namespace tokenprune
