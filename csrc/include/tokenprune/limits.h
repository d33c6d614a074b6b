// What the launch planners know of a device. Plain data, so that planners run and are tested without one.
#pragma once

#include <algorithm>
#include <cstdint>

#include "tokenprune/macros.h"
#include "tokenprune/overrides.h"

namespace tokenprune {

struct DeviceLimits {
  int sm_count = 132;
  int shared_per_block = 227 * 1024;  // bytes of dynamic shared memory a block may opt in to
  int architecture = 90;              // compute capability, 10 * major + minor
  bool cooperative = true;            // can blocks of one launch wait for each other?
  bool clusters = true;               // has it room for kMaxCluster blocks as one? The smallest MIG instances do not
  const PlanOverrides* overrides = nullptr;
  bool has_clusters() const { return architecture >= 90 && clusters; }

  // `own`, the planner's choice, unless a debug run asks for another value; of that, what lies in [low, high].
  int64_t planned(Planned what, int64_t own, int64_t low, int64_t high) const {
    const auto asked = overrides == nullptr ? std::nullopt : overrides->values[static_cast<size_t>(what)];
    return asked ? std::clamp(*asked, low, std::max(low, high)) : own;
  }
  // The same for what must be a power of two: the next smaller one.
  int64_t planned_power(Planned what, int64_t own, int64_t low, int64_t high) const {
    int64_t power = 1;
    const int64_t value = planned(what, own, low, high);
    while (2 * power <= value) power *= 2;
    return power;
  }
};

// Blocks of a launch. All grids are one row: in y and z they would be limited to 65535.
constexpr int64_t kMaxGridX = 2147483647;
// Tokens of a sample in the greedy ops: positions, and what a loop adds to the last one, have 31 bits.
constexpr int64_t kGreedyMostTokens = int64_t(1) << 30;
// Blocks of a cluster, on every device that has clusters (DeviceLimits::has_clusters).
constexpr unsigned kMaxCluster = 8;

template <class Int>
TOKENPRUNE_HD constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

template <class Int>
TOKENPRUNE_HD constexpr Int round_up(Int a, Int b) {
  return ceil_div(a, b) * b;
}

// Parts of the channels for tiles of products, each part by one block of a cluster. Few tiles leave most of the device
// idle: their channels are shared out, 128 or more to a block, until every multiprocessor has two blocks.
inline int channel_parts(int64_t tiles, int64_t channels, const DeviceLimits& limits) {
  int parts = 1;
  while (limits.has_clusters() && parts < static_cast<int>(kMaxCluster) && channels >= 2 * parts * 128 &&
         tiles * parts * 2 <= 2 * limits.sm_count)
    parts *= 2;
  return parts;
}

}  // namespace tokenprune
