// The vectorised parts of merge_tokens as a table of functions, one table per capability.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/half.h"

namespace tokenprune {

template <class T, class A>
struct MergingKernels {
  // For each of n rows of one panel's results, [n, panel_lanes]: where the largest sign * value exceeds best[row], that
  // becomes best[row] and its lane (the first of equals) + first_slot becomes at[row]; -1 at first, with -infinity.
  // NaN is passed over, and -infinity taken where nothing else is.
  void (*best_lanes)(const A* values, int64_t n, A sign, int64_t first_slot, A* best, int64_t* at);
  // mean[d] = the sum over `count` tokens, in their order, of weights[token] * columns[token * row_stride + d], divided by
  // size and rounded to T, for n columns. No weights: they are 1.
  void (*mean_of)(const T* columns, int64_t row_stride, const int64_t* tokens, int64_t count, const A* weights, A size,
                  int64_t n, T* mean);
};

struct MergingTable {
  MergingKernels<float, float> f32;
  MergingKernels<double, double> f64;
  MergingKernels<Half, float> f16;
  MergingKernels<BFloat16, float> bf16;
};

// The table for this machine, and the part of it for values stored as T.
const MergingTable& merging_table();

template <class T>
const auto& merging_kernels() {
  const MergingTable& table = merging_table();
  if constexpr (std::is_same_v<T, float>) return table.f32;
  if constexpr (std::is_same_v<T, double>) return table.f64;
  if constexpr (std::is_same_v<T, Half>) return table.f16;
  if constexpr (std::is_same_v<T, BFloat16>) return table.bf16;
}

}  // namespace tokenprune
