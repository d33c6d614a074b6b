// Checked arguments of the attention ops, shared by the CPU and the CUDA bindings.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "checks.h"

namespace tokenprune {

enum class HeadReduction { kMean, kSum, kMax, kNone };
enum class QueryReduction { kMean, kSum, kMax, kLast };

struct AttentionReductions {
  HeadReduction heads;
  std::vector<QueryReduction> rows;  // one score vector each, in the order asked for
};

inline AttentionReductions parse_reductions(const char* op, const std::string& heads, const std::string& rows) {
  AttentionReductions parsed;
  parsed.heads = static_cast<HeadReduction>(check_option(op, "head_reduction", heads, {"mean", "sum", "max", "none"}));
  const std::string_view text = rows;
  for (size_t begin = 0; begin <= text.size();) {
    size_t end = text.find('+', begin);
    if (end == std::string_view::npos) end = text.size();
    const std::string_view word = text.substr(begin, end - begin);
    constexpr const char* kNames[] = {"mean", "sum", "max", "last"};
    int found = -1;
    for (int i = 0; i < 4; ++i)
      if (word == kNames[i]) found = i;
    if (found < 0)
      fail(op, "query_reduction", "be one of mean, sum, max, last, or several joined by +", "'" + rows + "'");
    parsed.rows.push_back(static_cast<QueryReduction>(found));
    begin = end + 1;
  }
  return parsed;
}

inline void check_attention(const char* op, const Tensor& query, const Tensor& key, const OptionalTensor& lse,
                            const OptionalTensor& key_indices, const OptionalTensor& query_mask,
                            const OptionalTensor& key_mask, const OptionalTensor& query_positions) {
  check_floating(op, "query", query, "[B, Hq, M, D]", 4);
  check_floating(op, "key", key, "[B, Hkv, N, D]", 4);
  const int64_t batch = query.size(0), heads = query.size(1), rows = query.size(2), dim = query.size(3);
  const int64_t key_heads = key.size(1);
  if (key.scalar_type() != query.scalar_type())
    fail(op, "key", "have the dtype of query (" + dtype_name(query.scalar_type()) + ")", dtype_name(key.scalar_type()));
  check_beside(op, "key", key, query, "[B, Hkv, N, D]", {batch, -1, -1, dim}, std::nullopt);
  if (dim < 1) fail(op, "query", "have a last dimension D >= 1", shape_text(query));
  if (heads != key_heads && (key_heads == 0 || heads % key_heads != 0))
    fail(op, "query", "have a number of heads that is a multiple of Hkv = " + std::to_string(key_heads), heads);
  check_beside(op, "lse", lse, query, "[B, Hq, M]", {batch, heads, rows}, std::nullopt);
  check_beside(op, "key_indices", key_indices, query, "[B, V]", {batch, -1}, ScalarType::Long);
  check_beside(op, "query_mask", query_mask, query, "[B, M]", {batch, rows}, ScalarType::Bool);
  check_beside(op, "key_mask", key_mask, query, "[B, N]", {batch, key.size(2)}, ScalarType::Bool);
  check_beside(op, "query_positions", query_positions, query, "[B, M]", {batch, rows}, ScalarType::Long);
  const int64_t columns = key_indices ? key_indices->size(1) : 0;
  check_work(op, "key", "B * Hq * M * max(N, V) * D", {batch, heads, rows, std::max(key.size(2), columns), dim});
}

}  // namespace tokenprune
