// density_peaks as the host sees it: the problem, the workspaces and launches that sizes ask for, the launcher. The
// template is instantiated for float, __half and __nv_bfloat16 in csrc/cuda/density.cu.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "tokenprune/call_stream.h"
#include "tokenprune/limits.h"

namespace tokenprune {

struct DensityProblem {
  const void* features;  // [batch, n, channels], last stride 1
  int64_t batch_stride, row_stride;
  bool aligned;         // every row starts at a multiple of 16 bytes
  const uint8_t* mask;  // bytes [batch, n] with last stride 1, or null
  int64_t mask_stride;
  int64_t neighbors;
  int64_t batch, n, channels;
  float* density;   // [batch, n]
  float* distance;  // [batch, n]
  float* value;     // [batch, n]: log(distance) - m, which the selection ranks
};

constexpr int kDensityTile = 64, kDensityThreads = 128;
constexpr int64_t kDensityMostTokens = (int64_t(1) << 31) - 1;  // positions have 32 bits
// Products that are in memory at once take at most so many bytes, or belong to 64 tokens. A variable, because tests send
// small samples the way of large ones.
inline int64_t density_byte_limit = int64_t(256) << 20;

// Samples go `samples` at a time. Where the products of one do not fit, it goes by strips of `rows` tokens, and every
// product is made twice: once for the means, once for the distances.
struct DensityPlan {
  int64_t samples, rows;
  bool strips;
  int parts;  // of the channels, each by one block of a cluster
  int64_t batch, n;

  int64_t product_floats() const { return samples * rows * n; }
  int64_t token_floats() const { return samples * n * 3; }  // squares, means, largest squared distances
  int64_t floats() const { return product_floats() + token_floats(); }
};

inline DensityPlan plan_density(int64_t batch, int64_t n, int64_t channels, const DeviceLimits& limits) {
  DensityPlan plan{1, n, false, 1, batch, n};
  if (batch * n == 0) return plan;
  const int64_t most = density_byte_limit / (4 * n);  // rows of products
  plan.strips = n > std::max<int64_t>(most, kDensityTile);
  if (plan.strips)
    plan.rows = std::max<int64_t>(most / kDensityTile, 1) * kDensityTile;
  else
    plan.samples = std::clamp<int64_t>(most / n, 1, batch);
  const int64_t side = ceil_div<int64_t>(n, kDensityTile);
  const int64_t tiles = plan.strips ? plan.rows / kDensityTile * side : plan.samples * (side * (side + 1) / 2);
  plan.parts = channel_parts(tiles, channels, limits);
  return plan;
}

// Everything but the selection; `floats` is the plan's workspace.
template <class T>
cudaError_t launch_density(const DensityProblem& problem, const DensityPlan& plan, float* floats, CallStream& stream);

}  // namespace tokenprune
