// paired_cosine as the host sees it: the problem, the launch plan, no kernel code.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "tokenprune/call_stream.h"
#include "tokenprune/limits.h"

namespace tokenprune {

// A list of rows [batch, n, dim] with last stride 1. The two lists may overlap.
struct PairedRows {
  const void* rows;
  int64_t sample_stride, row_stride;
};

struct PairedProblem {
  PairedRows a, b;
  int64_t batch, n, dim;
  bool aligned;   // all rows have whole 16-byte units, at multiples of 16 bytes
  float* scores;  // [batch, n]
};

constexpr int kPairedThreads = 256, kPairedWarps = kPairedThreads / 32;
constexpr int kPairedInFlight = 4;  // units of 16 bytes of each row that a thread has on their way

struct PairedPlan {
  int warps;  // that share the channels of a pair: 1, 2, 4 or 8
  int64_t blocks;
};

// A warp per pair, as long as there are warps enough to keep the memory busy. Fewer pairs are shared between the warps
// of a block, until all of a row is on its way at once.
inline PairedPlan plan_paired(int64_t batch, int64_t n, int64_t dim, int element_size, const DeviceLimits& limits) {
  constexpr int64_t kWarpsPerMultiprocessor = 16;
  const int64_t pairs = batch * n, units = ceil_div<int64_t>(dim * element_size, 16);
  int64_t warps = 1;
  while (warps < kPairedWarps && pairs * warps < kWarpsPerMultiprocessor * limits.sm_count &&
         units > warps * 32 * kPairedInFlight)
    warps *= 2;
  warps = limits.planned_power(Planned::kSimilarityPairWarps, warps, 1, kPairedWarps);
  return {static_cast<int>(warps), ceil_div<int64_t>(pairs, kPairedWarps / warps)};
}

template <class T>
cudaError_t launch_paired_cosine(const PairedProblem& problem, const PairedPlan& plan, CallStream& stream);

}  // namespace tokenprune
