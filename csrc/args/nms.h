// Checked arguments of spatial_semantic_nms, shared by the CPU and the CUDA bindings.
#pragma once

#include <algorithm>

#include "checks.h"

namespace tokenprune {

// True for mode "hard", false for "soft".
inline bool check_spatial_semantic_nms(const Tensor& scores, const Tensor& features, const Tensor& positions, int64_t k,
                                       const OptionalTensor& groups, const OptionalTensor& mask, double radius,
                                       double sigma_spatial, double sigma_semantic, const std::string& mode,
                                       double threshold) {
  const char* op = "spatial_semantic_nms";
  check_floating(op, "scores", scores, "[B, N]", 2);
  check_floating(op, "features", features, "[B, N, C]", 3);
  check_floating(op, "positions", positions, "[B, N, 2]", 3);
  const int64_t batch = scores.size(0), n = scores.size(1);
  check_beside(op, "features", features, scores, "[B, N, C]", {batch, n, -1}, std::nullopt);
  check_beside(op, "positions", positions, scores, "[B, N, 2]", {batch, n, 2}, std::nullopt);
  check_count(op, "k", k, batch);
  check_beside(op, "groups", groups, scores, "[B, N]", {batch, n}, ScalarType::Long);
  check_beside(op, "mask", mask, scores, "[B, N]", {batch, n}, ScalarType::Bool);
  check_work(op, "features", "B * min(k, N) * N * C", {batch, std::min(k, n), n, features.size(2)});
  check_real(op, "radius", radius, 0);
  check_real(op, "sigma_spatial", sigma_spatial, 0, true);
  check_real(op, "sigma_semantic", sigma_semantic, 0, true);
  const int chosen = check_option(op, "mode", mode, {"soft", "hard"});
  check_real(op, "threshold", threshold, -std::numeric_limits<double>::infinity());
  return chosen == 1;
}

}  // namespace tokenprune
