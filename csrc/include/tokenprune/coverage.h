// coverage_sample as the host sees it: the problem, the plan of its two launches, and the launcher. The template is
// instantiated for float, __half and __nv_bfloat16 in csrc/cuda/coverage.cu.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "tokenprune/call_stream.h"
#include "tokenprune/limits.h"

namespace tokenprune {

struct CoverageProblem {
  const void* similarity;  // [batch, rows, n], last stride 1
  int64_t batch_stride, row_stride;
  const float* row_weights;  // [batch, rows] contiguous, or null
  const float* quality;      // [batch, n] contiguous, or null
  const uint8_t* row_mask;   // bytes [batch, rows] with last stride 1, or null
  int64_t row_mask_stride;
  const uint8_t* mask;  // bytes [batch, n] with last stride 1, or null
  int64_t mask_stride;
  int64_t batch, rows, n, k;
  int64_t* indices;  // [batch, k]
  float* gains;      // [batch, k]
  int64_t* counts;   // [batch]
};

// Columns that exist at once take at most so many bytes (or hold one sample). A variable, because tests send samples that
// are small in parts too.
inline int64_t coverage_byte_limit = int64_t(256) << 20;

// Threads of a block that makes picks at most, its static shared memory with the system's kilobyte, and rows and tokens
// of a tile that is transposed.
constexpr int kCoverageThreads = 512, kCoverageStatic = 4096, kCoverageTile = 64;

struct CoveragePlan {
  int64_t samples;      // at once
  int cluster;          // blocks that share a sample
  int block, per_warp;  // threads of each, and tokens of a warp
  int64_t width;        // floats of a column: the rows, and zeros up to a multiple of four
  int shared;           // bytes of dynamic shared memory for the state of a block; 0: it is in a workspace
  int64_t state_floats, column_floats;
  int64_t floats() const { return state_floats + column_floats; }
};

// Words of what a block knows: C_r and the weights of all rows; keys of its tokens, and when they were evaluated.
inline int64_t coverage_state(const CoveragePlan& plan) {
  return 2 * plan.width + 2 * (plan.block / 32) * plan.per_warp;
}

inline CoveragePlan plan_coverage(const CoverageProblem& p, const DeviceLimits& limits) {
  CoveragePlan plan{};
  plan.samples = std::min(p.batch, kMaxGridX);
  plan.cluster = 1;
  plan.block = 32;
  if (p.n == 0 || p.k == 0) return plan;  // the kernel that makes the picks writes that it made none
  plan.width = round_up<int64_t>(p.rows, 4);
  const int64_t most = limits.has_clusters() ? kMaxCluster : 1;
  plan.cluster = static_cast<int>(limits.planned_power(Planned::kCoverageCluster, most, 1, most));
  const int64_t share = ceil_div<int64_t>(p.n, plan.cluster), warps = std::min<int64_t>(kCoverageThreads / 32, share);
  plan.block = static_cast<int>(32 * warps);
  plan.per_warp = static_cast<int>(ceil_div(share, warps));
  const int64_t side = kCoverageTile, tiles = ceil_div(p.n, side) * std::max<int64_t>(1, ceil_div(p.rows, side));
  plan.samples = std::clamp<int64_t>(coverage_byte_limit / std::max<int64_t>(1, 4 * p.n * plan.width), 1,
                                     std::max<int64_t>(1, kMaxGridX / std::max<int64_t>(tiles, plan.cluster)));
  plan.samples = std::min(plan.samples, p.batch);
  const int64_t bytes = 4 * coverage_state(plan);
  if (bytes <= limits.shared_per_block - kCoverageStatic)
    plan.shared = static_cast<int>(bytes);
  else
    plan.state_floats = plan.samples * plan.cluster * round_up<int64_t>(bytes / 4, 4);
  plan.column_floats = plan.samples * p.n * plan.width;
  return plan;
}

// floats is the plan's workspace.
template <class T>
cudaError_t launch_coverage(const CoverageProblem& problem, const CoveragePlan& plan, float* floats,
                            CallStream& stream);

}  // namespace tokenprune
