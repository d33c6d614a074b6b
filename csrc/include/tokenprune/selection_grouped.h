// select_grouped_topk as the host sees it: the problem, the launch plan, no kernel code.
#pragma once

#include "tokenprune/selection.h"

namespace tokenprune {

// Of the tokens of every group g of a sample the budgets[g] best, together ascending, the first k of them.
struct GroupedProblem {
  const void* scores;  // [batch, n], last stride 1
  int64_t score_stride;
  const int64_t* groups;  // [batch, n], last stride 1; outside [0, group_count): never selected
  int64_t group_stride;
  const int64_t* budgets;  // [batch, group_count], last stride 1
  int64_t budget_stride;
  const uint8_t* mask;  // bytes [batch, n] with last stride 1, or null
  int64_t mask_stride;
  int64_t* indices;  // [batch, k]
  int64_t* counts;   // [batch]
  int64_t batch, n, group_count, k;
  bool largest;
  void* workspace;  // batch * plan.workspace_bytes() bytes, 16-byte aligned; may be null if that is 0
};

// What is known of one group: its tokens from `low` on (a key and a position in one integer) are chosen or, while
// `wanted` of them still have to be told apart, candidates.
struct alignas(16) OpenGroup {
  uint64_t low;
  uint32_t wanted, unused;
};

// Counters of a pass: 2^digit for each group, of which a thread of the search reads 8.
constexpr int kMinDigit = 3, kMaxDigit = 8;
constexpr int64_t kGroupedCounters = 16384;  // that a pass may have before it gets fewer bits
constexpr int64_t kGroupedMaxGroups = (int64_t(1) << 31) - 1;

enum class GroupedMemory {
  kAll,     // keys and groups of the tokens, and the tables of the groups, are in shared memory
  kTables,  // tokens are read again in every pass
  kNone,    // and so are the tables
};

struct GroupedPlan {
  unsigned cluster;  // blocks per sample
  unsigned threads;
  int digit;  // bits of a pass
  GroupedMemory memory;
  size_t shared;
  int64_t group_count;

  // Of a sample: counters and open groups.
  int64_t table_bytes() const { return group_count * ((int64_t(4) << digit) + int64_t(sizeof(OpenGroup))); }
  int64_t workspace_bytes() const { return memory == GroupedMemory::kNone ? table_bytes() : 0; }
};

inline GroupedPlan plan_grouped(int64_t batch, int64_t n, int64_t group_count, const DeviceLimits& limits) {
  constexpr int64_t kTokensPerBlock = 8192;  // half of top-k's: a token costs more, a pass between blocks the same
  const SelectPlan team = plan_team(batch, n, kTokensPerBlock, limits);
  GroupedPlan plan{team.cluster, team.threads, kMaxDigit, GroupedMemory::kAll, 0, group_count};
  while (plan.digit > kMinDigit && group_count << plan.digit > kGroupedCounters) --plan.digit;
  plan.digit = static_cast<int>(limits.planned(Planned::kSelectDigit, plan.digit, kMinDigit, kMaxDigit));
  const int64_t room = limits.shared_per_block - kSelectStaticShared;
  const int64_t tokens = round_up<int64_t>(ceil_div<int64_t>(n, plan.cluster), 32);
  while (plan.digit > kMinDigit && plan.table_bytes() > room) --plan.digit;
  const int64_t tables = plan.table_bytes(), all = tables + 8 * tokens;
  plan.memory = all <= room ? GroupedMemory::kAll : tables <= room ? GroupedMemory::kTables : GroupedMemory::kNone;
  plan.shared = static_cast<size_t>(all <= room ? all : tables <= room ? tables : 0);
  return plan;
}

template <class T>
cudaError_t launch_select_grouped(const GroupedProblem& problem, const GroupedPlan& plan, CallStream& stream);

}  // namespace tokenprune
