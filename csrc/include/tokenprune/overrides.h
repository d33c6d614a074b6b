// What a debug run fixes of the launch plans: TOKENPRUNE_PLAN="attention.splits=4,repulsion.matrix=2048". Planners ask
// DeviceLimits::planned for every choice that may be fixed, with the range in which any value gives the same results:
// a value outside is clamped, so that an override changes how fast a call is and nothing else.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

namespace tokenprune {

enum class Planned {
  kAttentionSplits,
  kAttentionCluster,
  kAttentionTeams,
  kAttentionRowParts,
  kRepulsionMatrix,
  kRepulsionTile,
  kRepulsionParts,
  kRepulsionThreads,
  kRepulsionCluster,
  kRepulsionBlocks,
  kNmsTable,
  kNmsCapacity,
  kNmsSplits,
  kNmsCluster,
  kNmsThreads,
  kSimilarityCluster,
  kSimilarityTeams,
  kSimilarityRowsPerWarp,
  kSimilarityPairWarps,
  kSelectCluster,
  kSelectThreads,
  kSelectDigit,
  kMixtureThreads,
  kGatherVectors,
  kDppMatrix,
  kDppCluster,
  kCoverageCluster,
  kCount,
};

// In the order of the enumeration; bench/gpu_suite/tune.py has the values that are tried of each.
constexpr std::array<const char*, static_cast<size_t>(Planned::kCount)> kPlannedNames{
    "attention.splits",
    "attention.cluster",
    "attention.teams",
    "attention.row_parts",
    "repulsion.matrix",
    "repulsion.tile",
    "repulsion.parts",
    "repulsion.threads",
    "repulsion.cluster",
    "repulsion.blocks",
    "nms.table",
    "nms.capacity",
    "nms.splits",
    "nms.cluster",
    "nms.threads",
    "similarity.cluster",
    "similarity.teams",
    "similarity.rows_per_warp",
    "similarity.pair_warps",
    "select.cluster",
    "select.threads",
    "select.digit",
    "mixture.threads",
    "gather.vectors",
    "dpp.matrix",
    "dpp.cluster",
    "coverage.cluster",
};

struct PlanOverrides {
  std::array<std::optional<int64_t>, kPlannedNames.size()> values;

  // Throws for anything but NAME=INTEGER, separated by commas.
  static PlanOverrides parse(const std::string& text) {
    PlanOverrides parsed;
    for (size_t begin = 0; begin < text.size();) {
      const size_t end = std::min(text.find(',', begin), text.size());
      parsed.add(text.substr(begin, end - begin));
      begin = end + 1;
    }
    return parsed;
  }

 private:
  void add(const std::string& entry) {
    const size_t equals = entry.find('=');
    const std::string name = entry.substr(0, equals);
    size_t which = 0;
    while (which < kPlannedNames.size() && name != kPlannedNames[which]) ++which;
    if (which == kPlannedNames.size()) {
      std::string known;
      for (const char* each : kPlannedNames) known += (known.empty() ? "" : ", ") + std::string(each);
      throw std::runtime_error("TOKENPRUNE_PLAN: expected one of " + known + ", got '" + name + "'");
    }
    const std::string value = equals == std::string::npos ? "" : entry.substr(equals + 1);
    char* rest = nullptr;
    values[which] = std::strtoll(value.c_str(), &rest, 10);
    if (value.empty() || *rest != '\0')
      throw std::runtime_error("TOKENPRUNE_PLAN: " + name + " must be an integer, got '" + value + "'");
  }
};

// The overrides of this process: those of the environment, read once, until the suite sets others between calls.
inline PlanOverrides& plan_overrides() {
  static PlanOverrides overrides = [] {
    const char* text = std::getenv("TOKENPRUNE_PLAN");
    return PlanOverrides::parse(text == nullptr ? "" : text);
  }();
  return overrides;
}

}  // namespace tokenprune
