// The selection launchers as the host sees them: plain problem descriptions and launch plans, no kernel code. The
// launchers are defined in the .cuh files and instantiated in csrc/cuda/selection.cu.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "tokenprune/call_stream.h"
#include "tokenprune/limits.h"

namespace tokenprune {

struct EntropyProblem {
  const void* scores;  // [batch, n], last stride 1
  int64_t score_stride;
  const uint8_t* mask;  // bytes [batch, n] with last stride 1, or null
  int64_t mask_stride;
  float* entropy;  // [batch]
  int64_t batch, n;
  bool normalized;
};

// Top-k, of each sample clamp(budgets, 0, k) where there are budgets; or the k - n highest and the n lowest,
// n = clamp(num_low, 0, k).
struct SelectProblem {
  const void* scores;  // [batch, n], last stride 1
  int64_t score_stride;
  const uint8_t* mask;  // bytes [batch, n] with last stride 1, or null
  int64_t mask_stride;
  const int64_t* num_low;  // [batch], or null: none
  int64_t num_low_stride;
  const int64_t* budgets;  // [batch], or null: k
  int64_t budget_stride;
  int64_t* indices;  // [batch, k]
  int64_t* counts;   // [batch]
  int64_t batch, n, k;
  bool largest;
};

struct MaskProblem {
  const uint8_t* mask;  // bytes [batch, n], last stride 1
  int64_t mask_stride;
  int64_t* indices;  // [batch, capacity]
  int64_t* counts;   // [batch]
  int64_t batch, n, capacity;
};

constexpr int kSelectMaxThreads = 512;
constexpr int kSelectStaticShared = 6 * 1024;  // bytes that the kernels have beside the keys
// Counters and positions within a sample have 32 bits, one of them spare.
constexpr int64_t kSelectMaxTokens = (int64_t(1) << 31) - 1;

struct SelectPlan {
  unsigned cluster;  // blocks per sample
  unsigned threads;
  bool keys_in_shared;
  size_t shared;
};

// One block up to `tokens_per_block` tokens: an exchange between blocks costs more than a block needs for them. Beyond
// that a cluster of 2, 4 or 8, as long as the device has room for the whole batch at once.
inline SelectPlan plan_team(int64_t batch, int64_t n, int64_t tokens_per_block, const DeviceLimits& limits) {
  constexpr int64_t kTokensPerThread = 2, kMinThreads = 128;
  int64_t cluster = 1;
  while (limits.has_clusters() && cluster < kMaxCluster && n > cluster * tokens_per_block &&
         batch <= limits.sm_count / (2 * cluster))
    cluster *= 2;
  cluster = limits.planned_power(Planned::kSelectCluster, cluster, 1, limits.has_clusters() ? kMaxCluster : 1);
  const int64_t tokens = round_up<int64_t>(ceil_div(n, cluster), 32);  // of a block
  const int64_t threads =
      round_up<int64_t>(limits.planned(Planned::kSelectThreads, ceil_div(tokens, kTokensPerThread), 32, 512), 32);
  const bool kept = tokens <= (limits.shared_per_block - kSelectStaticShared) / 4;
  return {static_cast<unsigned>(cluster),
          static_cast<unsigned>(std::clamp<int64_t>(threads, kMinThreads, kSelectMaxThreads)), kept,
          kept ? static_cast<size_t>(4 * tokens) : 0};
}

inline SelectPlan plan_select(int64_t batch, int64_t n, const DeviceLimits& limits) {
  return plan_team(batch, n, 16384, limits);
}

inline SelectPlan plan_mask(int64_t batch, int64_t n, const DeviceLimits& limits) {
  SelectPlan plan = plan_select(batch, n, limits);
  plan.keys_in_shared = false;
  plan.shared = 0;
  return plan;
}

inline unsigned plan_entropy_threads(int64_t n) {
  return static_cast<unsigned>(
      std::clamp<int64_t>(round_up<int64_t>(ceil_div<int64_t>(n, 4), 32), 128, kSelectMaxThreads));
}

template <class T>
cudaError_t launch_score_entropy(const EntropyProblem& problem, CallStream& stream);

template <class T>
cudaError_t launch_select(const SelectProblem& problem, const SelectPlan& plan, CallStream& stream);

cudaError_t launch_mask_to_indices(const MaskProblem& problem, const SelectPlan& plan, CallStream& stream);

}  // namespace tokenprune
