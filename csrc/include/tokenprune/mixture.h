// select_mixture as the host sees it: the problem and its launch plan, no kernel code.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "tokenprune/limits.h"
#include "tokenprune/macros.h"

namespace tokenprune {

// The two lists may differ in dtype. One kernel reads all of them, by a branch that is the same for all threads: a
// kernel for each of the nine pairs would be nine times the code for loads that are not what takes the time.
enum class ScoreType { kFloat, kHalf, kBFloat16 };

struct ScoreRows {
  const void* data;  // [batch, n], last stride 1
  int64_t stride;
  ScoreType type;
};

struct MixtureProblem {
  ScoreRows text, visual;
  const uint8_t* mask;  // bytes [batch, n] with last stride 1, or null
  int64_t mask_stride;
  int64_t* indices;            // [batch, k]
  int64_t *counts, *num_text;  // [batch]
  int64_t batch, n, k;
  int64_t reserved;          // of each list; 2 * reserved <= k
  unsigned char* workspace;  // plan.workspace_bytes(batch), 16-byte aligned
};

constexpr int kMixtureMaxThreads = 512;
// Counters and positions within a sample have 32 bits, one of them spare.
constexpr int64_t kMixtureMaxTokens = (int64_t(1) << 31) - 1;
constexpr int kMixtureStaticShared = 12 * 1024;  // bytes that the kernel has beside its lists

// One block per sample. Of both lists it sorts the part that may be kept and sums up what is not reserved of it; that
// lies in shared memory, or in global memory when it is too long. The keys of all tokens lie there too if they fit.
struct MixturePlan {
  unsigned threads;
  int64_t sorted;  // keys per list, a power of two
  int64_t summed;  // at most, per list
  bool in_workspace, keys_in_shared;
  size_t shared;

  TOKENPRUNE_HD int64_t list_bytes() const { return 2 * (sizeof(double) * (summed + 1) + sizeof(uint32_t) * sorted); }
  int64_t workspace_bytes(int64_t batch) const { return in_workspace ? batch * list_bytes() : 0; }
};

inline MixturePlan plan_mixture(int64_t n, int64_t k, int64_t reserved, const DeviceLimits& limits) {
  constexpr int64_t kTokensPerThread = 2, kMinThreads = 128;
  MixturePlan plan{};
  const int64_t listed = std::min(k - reserved, n);
  plan.threads = static_cast<unsigned>(
      std::clamp<int64_t>(round_up<int64_t>(ceil_div(n, kTokensPerThread), 32), kMinThreads, kMixtureMaxThreads));
  plan.sorted = 2;
  while (plan.sorted < listed) plan.sorted *= 2;
  plan.summed = std::max<int64_t>(listed - reserved, 0);
  int64_t left = limits.shared_per_block - kMixtureStaticShared;
  plan.in_workspace = plan.list_bytes() > left;
  if (!plan.in_workspace) left -= plan.list_bytes();
  const int64_t key_bytes = 2 * sizeof(uint32_t) * n;
  plan.keys_in_shared = key_bytes <= left;
  plan.shared = (plan.in_workspace ? 0 : plan.list_bytes()) + (plan.keys_in_shared ? key_bytes : 0);
  return plan;
}

cudaError_t launch_mixture(const MixtureProblem& problem, const MixturePlan& plan, cudaStream_t stream);

}  // namespace tokenprune
