// What the bindings of the attention ops share of their arguments, on the CPU and on CUDA.
#pragma once

#include <string>
#include <vector>

#include "checks.h"

namespace tokenprune {

// In the order of the words in tokenprune_kernels/ops/_attention.py.
enum class HeadReduction { kMean, kSum, kMax, kNone };
enum class QueryReduction { kMean, kSum, kMax, kLast, kNone };  // kNone stands alone: every row has scores of its own

struct AttentionReductions {
  HeadReduction heads;
  std::vector<QueryReduction> rows;  // one score vector each, in the order asked for

  bool every_row() const { return rows[0] == QueryReduction::kNone; }
};

// [B, R, V] of R row reductions; kept heads and rows come between them: [B, R, Hq, M, V].
inline Shape scores_shape(const Tensor& query, const AttentionReductions& reductions, int64_t columns) {
  Shape shape{query.size(0), static_cast<int64_t>(reductions.rows.size())};
  if (reductions.heads == HeadReduction::kNone) shape.push_back(query.size(1));
  if (reductions.every_row()) shape.push_back(query.size(2));
  shape.push_back(columns);
  return shape;
}

// From what check_attention_scores or check_cross_attention_scores returned.
template <class Choices>
AttentionReductions reductions_of(const Choices& choices) {
  AttentionReductions reductions{static_cast<HeadReduction>(choices.head_reduction), {}};
  for (const int row : choices.query_reduction) reductions.rows.push_back(static_cast<QueryReduction>(row));
  return reductions;
}

// More heads than tokens, and a number of heads that no model has; ops/_attention.py has the rule.
inline bool looks_swapped(int64_t heads, int64_t tokens) {
  return heads > tokens && (heads > 128 || (heads > 16 && heads % 4 != 0));
}

inline void check_heads(const char* op, const Tensor& query, const Tensor& key) {
  if (query.size(3) < 1) fail(op, "query", "have a last dimension D >= 1", shape_text(query));
  const int64_t heads = query.size(1), key_heads = key.size(1);
  if (heads == key_heads || (key_heads != 0 && heads % key_heads == 0)) return;
  fail(op, "query", "have a number of heads that is a multiple of Hkv = " + std::to_string(key_heads), heads,
       looks_swapped(key_heads, key.size(2))
           ? "key looks like [B, N, Hkv, D]: pass layout=\"blhd\", or key.transpose(1, 2)"
           : "");
}

}  // namespace tokenprune
