// Checked arguments of cosine_scores and contrastive_scores, shared by the CPU and the CUDA bindings.
#pragma once

#include <algorithm>

#include "checks.h"

namespace tokenprune {

// True for reduction "mean", false for "max".
inline bool check_cosine_scores(const Tensor& features, const Tensor& queries, const OptionalTensor& query_mask,
                                const std::string& reduction) {
  const char* op = "cosine_scores";
  check_floating(op, "features", features, "[B, N, C]", 3);
  check_floating(op, "queries", queries, "[B, M, C]", 3);
  const int64_t batch = features.size(0);
  check_beside(op, "queries", queries, features, "[B, M, C]", {batch, -1, features.size(2)}, features.scalar_type());
  check_beside(op, "query_mask", query_mask, features, "[B, M]", {batch, queries.size(1)}, ScalarType::Bool);
  check_work(op, "queries", "B * N * M * C", {batch, features.size(1), queries.size(1), features.size(2)});
  return check_option(op, "reduction", reduction, {"max", "mean"}) == 1;
}

inline void check_contrastive_scores(const Tensor& features, const Tensor& anchor_indices,
                                     const Tensor& reference_indices) {
  const char* op = "contrastive_scores";
  check_floating(op, "features", features, "[B, N, C]", 3);
  const int64_t batch = features.size(0);
  check_beside(op, "anchor_indices", anchor_indices, features, "[B, A]", {batch, -1}, ScalarType::Long);
  check_beside(op, "reference_indices", reference_indices, features, "[B, R]", {batch, -1}, ScalarType::Long);
  const int64_t listed = std::max(anchor_indices.size(1), reference_indices.size(1));
  check_work(op, "features", "B * N * max(A, R) * C", {batch, features.size(1), listed, features.size(2)});
}

}  // namespace tokenprune
