// How the work of an attention op is cut, from shapes alone: results must not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd/attention.h"

namespace tokenprune {

struct AttentionShape {
  int64_t batch, query_heads, key_heads, rows, keys, dim;
  int64_t element_size;  // of the inputs
  int64_t wide_size;     // of the arithmetic
  bool scores;           // false: lse and entropy only
  bool per_head;         // head_reduction none: every head is reduced on its own
};

struct AttentionPlan {
  bool few;            // layout of the logits, see simd/attention.h
  int64_t rows;        // query rows of a block
  int64_t blocks;      // blocks per sample
  int64_t groups;      // runs of blocks, each reduced in order by one work item
  int64_t splits;      // ranges of key heads, each gathered by one work item
  bool combine_later;  // the splits' gathered probabilities are kept and reduced over rows in a second phase
  int64_t stride;      // of the logits: lanes or keys in whole vectors
  int64_t gathered;    // elements of one array of gathered probabilities
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline AttentionPlan plan_attention(const AttentionShape& shape, int64_t width) {
  constexpr int64_t kBlockBytes = 4 << 20;    // logits and gathered probabilities of one block
  constexpr int64_t kSharedBytes = 16 << 20;  // gathered probabilities or partial scores that wait for a second phase
  const int64_t group = shape.query_heads / shape.key_heads;
  const double products = 2.0 * shape.batch * shape.query_heads * shape.rows * shape.keys * shape.dim;
  const double bytes = 1.0 * shape.batch * shape.key_heads * shape.keys * shape.dim * shape.element_size;
  const int64_t wanted = std::clamp<int64_t>(static_cast<int64_t>(std::max(products / 4e6, bytes / 5e5)), 1, 16);
  AttentionPlan plan{};
  plan.few = group * shape.rows <= kAttentionFewLanes;
  plan.rows = shape.rows;
  if (!plan.few) {
    // The fewest vectors of lanes over all blocks; each block also streams all keys once, counted as a quarter vector.
    const int64_t kept = shape.scores ? shape.keys : 0;
    // With few heads, blocks are what can be worked on side by side.
    const int64_t side_by_side = std::min<int64_t>(wanted, 4), heads = shape.batch * shape.key_heads;
    int64_t best = 0;
    for (int64_t rows = 1; rows <= std::min<int64_t>(shape.rows, 128); ++rows) {
      const int64_t vectors = ceil_div(group * rows, width), full = shape.rows / rows, rest = shape.rows % rows;
      const int64_t bytes = kept * (vectors + ceil_div(rows, width)) * width * shape.wide_size;
      if (rows > 1 && (bytes > kBlockBytes || vectors * width > std::max<int64_t>(128, width))) break;
      if (vectors > 1 && rows > 1 && heads * ceil_div(shape.rows, rows) < side_by_side) break;
      const int64_t cost = full * (4 * vectors + 1) + (rest ? 4 * ceil_div(group * rest, width) + 1 : 0);
      if (rows == 1 || cost <= best) {
        best = cost;
        plan.rows = rows;
      }
    }
  }
  plan.blocks = ceil_div(shape.rows, plan.rows);
  plan.stride = plan.few ? round_up(shape.keys, width) : round_up(group * plan.rows, width);
  plan.gathered = plan.few ? plan.rows * plan.stride : shape.keys * round_up(plan.rows, width);

  if (!shape.scores) {
    plan.groups = plan.blocks;
    plan.splits = shape.key_heads;
  } else if (shape.per_head) {
    plan.splits = shape.key_heads;
    plan.groups = std::clamp<int64_t>(ceil_div(8, shape.batch * shape.key_heads), 1, plan.blocks);
  } else {
    const int64_t items = shape.batch * plan.blocks;
    const int64_t room = kSharedBytes / std::max<int64_t>(1, items * plan.gathered * shape.wide_size);
    plan.splits = std::max<int64_t>(1, std::min({ceil_div(wanted, items), shape.key_heads, room}));
    plan.combine_later = plan.splits > 1;
    const int64_t partial = kSharedBytes / 4 / std::max<int64_t>(1, shape.batch * shape.keys * shape.wide_size);
    plan.groups =
        plan.combine_later ? plan.blocks : std::clamp<int64_t>(std::min<int64_t>(partial, 64), 1, plan.blocks);
  }
  return plan;
}

}  // namespace tokenprune
