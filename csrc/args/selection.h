// Checked arguments of the selection ops, shared by the CPU and the CUDA bindings.
#pragma once

#include "checks.h"

namespace tokenprune {

inline void check_mask_to_indices(const Tensor& mask, int64_t capacity) {
  check_beside("mask_to_indices", "mask", mask, mask, "[B, N]", {-1, -1}, ScalarType::Bool);
  check_count("mask_to_indices", "capacity", capacity);
}

}  // namespace tokenprune
