// Checked arguments of the selection ops, shared by the CPU and the CUDA bindings.
#pragma once

#include "checks.h"

namespace tokenprune {

// Scores [B, N], a count, and the optional mask of every selecting op.
inline void check_scored(const char* op, const Tensor& scores, int64_t k, const OptionalTensor& mask) {
  check_floating(op, "scores", scores, "[B, N]", 2);
  check_count(op, "k", k, scores.size(0));
  if (mask) check_beside(op, "mask", *mask, scores, "[B, N]", {scores.size(0), scores.size(1)}, ScalarType::Bool);
}

inline void check_select_topk(const Tensor& scores, int64_t k, const OptionalTensor& mask) {
  check_scored("select_topk", scores, k, mask);
}

inline void check_select_two_tailed(const Tensor& scores, const Tensor& num_low, int64_t k,
                                    const OptionalTensor& mask) {
  const char* op = "select_two_tailed";
  check_scored(op, scores, k, mask);
  check_beside(op, "num_low", num_low, scores, "[B]", {scores.size(0)}, ScalarType::Long);
}

inline void check_select_mixture(const Tensor& text, const Tensor& visual, int64_t k, double floor,
                                 const OptionalTensor& mask) {
  const char* op = "select_mixture";
  check_floating(op, "text_scores", text, "[B, N]", 2);
  const int64_t batch = text.size(0), n = text.size(1);
  check_floating(op, "visual_scores", visual, "[B, N]", 2);
  check_beside(op, "visual_scores", visual, text, "[B, N]", {batch, n}, std::nullopt);
  check_count(op, "k", k, batch);
  check_real(op, "floor", floor, 0.0, false, 0.5);
  if (mask) check_beside(op, "mask", *mask, text, "[B, N]", {batch, n}, ScalarType::Bool);
}

inline void check_mask_to_indices(const Tensor& mask, int64_t capacity) {
  check_beside("mask_to_indices", "mask", mask, mask, "[B, N]", {-1, -1}, ScalarType::Bool);
  check_count("mask_to_indices", "capacity", capacity, mask.size(0));
}

inline void check_score_entropy(const Tensor& scores, const OptionalTensor& mask) {
  const char* op = "score_entropy";
  check_floating(op, "scores", scores, "[B, N]", 2);
  if (mask) check_beside(op, "mask", *mask, scores, "[B, N]", {scores.size(0), scores.size(1)}, ScalarType::Bool);
}

}  // namespace tokenprune
