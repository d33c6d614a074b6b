// select_mixture as the host sees it: the problem and its launch plan, no kernel code.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "tokenprune/call_stream.h"
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
  unsigned char* workspace;  // plan.workspace_bytes(batch), 16-byte aligned; may be null if that is 0
};

constexpr int kMixtureMaxThreads = 512;
// Counters and positions within a sample have 32 bits, one of them spare.
constexpr int64_t kMixtureMaxTokens = (int64_t(1) << 31) - 1;
constexpr int kMixtureStaticShared = 12 * 1024;  // bytes that the kernel has beside its lists

// One block per sample. Of both lists it sorts the part that may be kept and sums up what is not reserved of it; beside
// that it holds the keys of all tokens. Each of the two lies in shared memory, or in global memory when it is too long.
struct MixturePlan {
  unsigned threads;
  int64_t n;
  int64_t sorted;  // keys per list, a power of two
  int64_t summed;  // at most, per list
  bool lists_in_shared, keys_in_shared;

  TOKENPRUNE_HD int64_t list_bytes() const { return 2 * (sizeof(double) * (summed + 1) + sizeof(uint32_t) * sorted); }
  TOKENPRUNE_HD int64_t key_bytes() const { return 2 * sizeof(uint32_t) * n; }
  // Of a sample: what lies in shared memory, or what does not.
  TOKENPRUNE_HD int64_t bytes(bool in_shared) const {
    return (lists_in_shared == in_shared ? list_bytes() : 0) + (keys_in_shared == in_shared ? key_bytes() : 0);
  }
  int64_t workspace_bytes(int64_t batch) const { return batch * bytes(false); }
};

inline MixturePlan plan_mixture(int64_t n, int64_t k, int64_t reserved, const DeviceLimits& limits) {
  constexpr int64_t kTokensPerThread = 2, kMinThreads = 128;
  MixturePlan plan{};
  const int64_t listed = std::min(k - reserved, n);
  const int64_t threads =
      limits.planned(Planned::kMixtureThreads, ceil_div(n, kTokensPerThread), kMinThreads, kMixtureMaxThreads);
  plan.threads =
      static_cast<unsigned>(std::clamp<int64_t>(round_up<int64_t>(threads, 32), kMinThreads, kMixtureMaxThreads));
  plan.n = n;
  plan.sorted = 2;
  while (plan.sorted < listed) plan.sorted *= 2;
  plan.summed = std::max<int64_t>(listed - reserved, 0);
  int64_t left = limits.shared_per_block - kMixtureStaticShared;
  plan.lists_in_shared = plan.list_bytes() <= left;
  if (plan.lists_in_shared) left -= plan.list_bytes();
  plan.keys_in_shared = plan.key_bytes() <= left;
  return plan;
}

cudaError_t launch_mixture(const MixtureProblem& problem, const MixturePlan& plan, CallStream& stream);

}  // namespace tokenprune
