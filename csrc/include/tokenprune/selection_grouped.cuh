// select_grouped_topk: one launch, one team (radix.cuh) per sample, all groups in the same passes.
//
// A token is one integer, its key above its position counted from the end: all differ, and the greater one is the better
// candidate. So a group needs no rule for ties, only the least of the integers that it keeps. All groups look for theirs
// together, a digit of 3 to 8 bits in every pass:
//
//   tokens     each adds one to the counter [group][digit] of its group, if it lies in what the group has left open
//   counters   for every group, 1 to 32 threads find the bin of its wanted-th best token, which is what stays open
//
// until no group is open: a bin of which all is wanted closes its group. Then one walk in order writes what lies above
// the thresholds. A group whose budget covers all it has is closed by the first pass, one without a budget before it.
//
// In a cluster every block counts its own tokens; block r looks at the groups r, r + size, ... with the counters of all
// blocks, and tells all blocks what it has found. Counters are cleared by who has read them.
//
//   launch                 grid             block       shared memory                  global memory
//   select_grouped_kernel  batch x cluster  128 to 512  RadixScratch; 48 to 1040       scores, groups, mask and budgets once;
//                                                       bytes per group; 8 per token   twice and in every pass those that
//                                                       of the block                   shared memory does not hold
#pragma once

#include "tokenprune/selection_grouped.h"
#include "tokenprune/selection_topk.cuh"

namespace tokenprune {

constexpr uint64_t kNothing = ~uint64_t(0);  // no token is that great

struct Member {
  uint32_t key, group;  // kNoKey: masked, or of no group
};

// What a sample's kernel reads of its token i.
template <class T>
struct MemberRow {
  RowKeys<T> keys;
  const int64_t* groups;
  int64_t group_count;

  __device__ __forceinline__ Member operator()(uint32_t i) const {
    const int64_t group = __ldg(groups + i);
    const uint32_t key = keys(i);
    if (group < 0 || group >= group_count) return {kNoKey, 0};
    return {key, static_cast<uint32_t>(group)};
  }
};

struct KeptMembers {
  const Member* members;
  uint32_t first;

  __device__ __forceinline__ Member operator()(uint32_t i) const { return members[i - first]; }
};

// The tables of a team: in every block's shared memory, or once in global memory.
struct GroupTables {
  OpenGroup* groups;
  uint32_t* counters;  // [group_count][bins]
  bool shared;

  __device__ __forceinline__ uint32_t copies() const { return shared ? cluster_size() : 1; }
  template <class V>
  __device__ __forceinline__ V* of_block(V* mine, uint32_t rank) const {
    return shared ? cluster_shared(mine, rank) : mine;
  }
};

// Key and position of a token in one integer, of which no two are equal.
struct Ordering {
  int index_bits;
  uint32_t last;

  __device__ __forceinline__ uint64_t operator()(uint32_t key, uint32_t i) const {
    return static_cast<uint64_t>(key) << index_bits | (last - i);
  }
};

// Reads and clears the 8 counters of the calling thread, which are those of bins first .. first + 7 of a group.
__device__ __forceinline__ void take_counters(const GroupTables& tables, uint32_t* mine, uint32_t (&counts)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) counts[i] = 0;
  for (uint32_t block = 0; block < tables.copies(); ++block) {
    uint4* words = reinterpret_cast<uint4*>(tables.of_block(mine, block));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 four = words[half];
      counts[4 * half] += four.x;
      counts[4 * half + 1] += four.y;
      counts[4 * half + 2] += four.z;
      counts[4 * half + 3] += four.w;
      words[half] = make_uint4(0, 0, 0, 0);
    }
  }
}

// For the groups of this block: which bin is left open, and how many of its tokens are wanted. `width` bits of a bin are
// not told apart yet. Returns whether one of them is open still.
__device__ __forceinline__ bool narrow_groups(const GroupTables& tables, uint32_t group_count, int digit, int width) {
  const uint32_t lanes = 1u << (digit - kMinDigit), lane = threadIdx.x % lanes;  // of a group
  const uint32_t at_once = blockDim.x / lanes, blocks = cluster_size();
  bool open = false;
  // Whole warps go round together: a group's threads exchange sums.
  for (uint32_t start = 0; start < ceil_div(group_count, blocks); start += at_once) {
    const uint32_t g = (start + threadIdx.x / lanes) * blocks + cluster_rank();
    const bool mine = g < group_count && tables.groups[g].wanted > 0;
    const OpenGroup group = mine ? tables.groups[g] : OpenGroup{};
    const uint32_t first = 8 * (lanes - 1 - lane);  // from the last bin down
    uint32_t counts[8] = {}, sum = 0;
    if (mine) take_counters(tables, tables.counters + (static_cast<size_t>(g) << digit) + first, counts);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += counts[i];
    uint32_t above = sum;  // in the bins of the lanes before this one, when it is subtracted
    for (uint32_t offset = 1; offset < lanes; offset *= 2) {
      const uint32_t before = __shfl_up_sync(kAllLanes, above, offset, lanes);
      if (lane >= offset) above += before;
    }
    const uint32_t total = __shfl_sync(kAllLanes, above, lanes - 1, lanes);
    above -= sum;
    __syncwarp();                            // all lanes of the group have read it
    const bool all = total <= group.wanted;  // from the lower end of what was open
    OpenGroup found = {group.low, 0, 0};
    bool here = mine && all && lane == 0;
#pragma unroll
    for (int i = 7; i >= 0; --i) {
      const uint32_t wanted = group.wanted - above;
      if (!all && group.wanted > above && wanted <= counts[i]) {
        here = true;
        found = {group.low + (static_cast<uint64_t>(first + i) << width), wanted < counts[i] ? wanted : 0, 0};
      }
      above += counts[i];
    }
    if (!here) continue;
    open = open || found.wanted > 0;
    for (uint32_t block = 0; block < tables.copies(); ++block) *tables.of_block(tables.groups + g, block) = found;
  }
  return open;
}

template <class Members>
__device__ __forceinline__ void select_members(const GroupedProblem& p, int64_t sample, const Members& members,
                                               const GroupTables& tables, int digit, Stretch of_warp,
                                               RadixScratch<uint32_t>& scratch, uint32_t (&open_blocks)[kMaxCluster]) {
  const uint32_t group_count = static_cast<uint32_t>(p.group_count), n = static_cast<uint32_t>(p.n);
  const Ordering order = {bits_of(n - 1), n - 1};
  Extent<uint32_t> extent = extent_of_none<uint32_t>();
  each_token(of_warp, members, [&](uint32_t, Member member) {
    if (member.key == kNoKey) return;
    extent.low = min(extent.low, member.key);
    extent.high = max(extent.high, member.key);
    ++extent.count;
  });
  team_sync();  // all blocks of the cluster have started
  extent = over_team(extent, scratch);
  const uint64_t lowest = static_cast<uint64_t>(extent.low) << order.index_bits;

  // Every block has tables of its own to set up, or a share of the common ones.
  const uint32_t thread = tables.shared ? threadIdx.x : cluster_rank() * blockDim.x + threadIdx.x;
  const uint32_t threads = tables.shared ? blockDim.x : cluster_size() * blockDim.x;
  const int64_t* budgets = p.budgets + sample * p.budget_stride;
  for (uint32_t g = thread; g < group_count; g += threads) {
    const int64_t budget = __ldg(budgets + g);
    tables.groups[g] =
        budget > 0 ? OpenGroup{lowest, static_cast<uint32_t>(min(budget, p.n)), 0} : OpenGroup{kNothing, 0, 0};
  }
  const size_t vectors = (static_cast<size_t>(group_count) << digit) / 4;
  for (size_t i = thread; i < vectors; i += threads)
    reinterpret_cast<uint4*>(tables.counters)[i] = make_uint4(0, 0, 0, 0);
  team_sync();

  bool open = extent.count > 0;
  int width = bits_of(extent.high - extent.low) + order.index_bits;
  while (open) {
    const uint64_t bins = uint64_t(1) << min(width, digit);
    width = max(width - digit, 0);
    each_token(of_warp, members, [&](uint32_t i, Member member) {
      if (member.key == kNoKey) return;
      const OpenGroup group = tables.groups[member.group];
      const uint64_t place = order(member.key, i), bin = (place - group.low) >> width;
      if (group.wanted > 0 && place >= group.low && bin < bins)
        atomicAdd(&tables.counters[(static_cast<size_t>(member.group) << digit) + bin], 1u);
    });
    team_sync();
    open = __syncthreads_or(narrow_groups(tables, group_count, digit, width));
    if (cluster_size() == 1) continue;
    if (threadIdx.x < cluster_size()) cluster_shared(open_blocks, threadIdx.x)[cluster_rank()] = open;
    cluster_sync();
    for (uint32_t block = 0; block < cluster_size(); ++block) open = open || open_blocks[block] != 0;
  }

  int64_t* out = p.indices + sample * p.k;
  const MarkCounts found = ranked<1>(
      of_warp,
      [&](uint32_t i) -> uint32_t {
        const Member member = members(i);
        return member.key != kNoKey && order(member.key, i) >= tables.groups[member.group].low;
      },
      [&](uint32_t i, uint32_t flags, const uint32_t (&ranks)[1]) {
        if (flags && ranks[0] < p.k) out[ranks[0]] = i;
      },
      scratch);
  finish_list(out, p.k, p.counts + sample, min(static_cast<int64_t>(found.of[0]), p.k));
}

// One block of a multiprocessor is enough for ptxas, which would spill for the sake of three.
template <class T, GroupedMemory memory>
__global__ void __launch_bounds__(kSelectMaxThreads, 1) select_grouped_kernel(const GroupedProblem p, int digit) {
  using Scratch = RadixScratch<uint32_t>;
  TOKENPRUNE_SHARED(Scratch, scratch);
  TOKENPRUNE_SHARED(uint32_t[kMaxCluster], open_blocks);
  const int64_t sample = blockIdx.x / cluster_size();
  const Stretch of_block = stretch_of_block(static_cast<uint32_t>(p.n)), of_warp = stretch_of_warp(of_block);
  const MemberRow<T> row = {{static_cast<const T*>(p.scores) + sample * p.score_stride,
                             p.mask == nullptr ? nullptr : p.mask + sample * p.mask_stride, p.largest},
                            p.groups + sample * p.group_stride,
                            p.group_count};
  constexpr bool kShared = memory != GroupedMemory::kNone;
  const size_t counters = static_cast<size_t>(p.group_count) << digit;
  const size_t table_bytes = p.group_count * sizeof(OpenGroup) + 4 * counters;
  unsigned char* place = kShared ? dynamic_shared() : static_cast<unsigned char*>(p.workspace) + sample * table_bytes;
  auto* groups = reinterpret_cast<OpenGroup*>(place);
  const GroupTables tables = {groups, reinterpret_cast<uint32_t*>(groups + p.group_count), kShared};
  if constexpr (memory == GroupedMemory::kAll) {
    auto* members = reinterpret_cast<Member*>(tables.counters + counters);
    each_token(of_warp, row, [&](uint32_t i, Member member) { members[i - of_block.begin] = member; });
    __syncwarp();  // lanes that have no tokens left look at their neighbour's last one
    select_members(p, sample, KeptMembers{members, of_block.begin}, tables, digit, of_warp, scratch, open_blocks);
  } else {
    select_members(p, sample, row, tables, digit, of_warp, scratch, open_blocks);
  }
}

template <class T>
cudaError_t launch_select_grouped(const GroupedProblem& p, const GroupedPlan& plan, CallStream& stream) {
  const Launch where = {p.batch * plan.cluster, dim3(plan.threads), plan.shared, stream, plan.cluster};
  const auto kernel = plan.memory == GroupedMemory::kAll      ? select_grouped_kernel<T, GroupedMemory::kAll>
                      : plan.memory == GroupedMemory::kTables ? select_grouped_kernel<T, GroupedMemory::kTables>
                                                              : select_grouped_kernel<T, GroupedMemory::kNone>;
  return launch(where, kernel, p, plan.digit);
}

}  // namespace tokenprune
