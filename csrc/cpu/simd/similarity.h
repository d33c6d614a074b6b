// The vectorised kernels of the cosine ops as a table of functions, one table per capability. They read rows in their
// storage type T and widen in registers to the arithmetic type A, so that no widened copy of the features is needed.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/half.h"

namespace tokenprune {

// Unit rows that one call of few_dots takes at most.
constexpr int kFew = 4;

template <class T, class A>
struct SimilarityKernels {
  // <a, b>
  A (*dot)(const T* a, const T* b, int64_t dim);
  // sums = <a, b>, <a, a>, <b, b> in one pass
  void (*pair_sums)(const T* a, const T* b, int64_t dim, A* sums);
  // dots[r * kFew + q] = <rows[r], units[q]> for two rows and `count` <= kFew unit rows, and <rows[r], rows[r]> when
  // `squares` is given, in one pass. A row's results do not depend on its partner or on which of the pair it is.
  void (*few_dots)(const T* const* rows, int64_t dim, const A* units, int64_t unit_stride, int count, A* dots,
                   A* squares);
  // sum += scale * row, in double: means of many rows lose nothing.
  void (*add_scaled)(const T* row, int64_t dim, double scale, double* sum);
  // The row in the arithmetic type.
  void (*widen)(const T* row, int64_t dim, A* wide);
  // into = max(into, x), element by element, keeping NaN.
  void (*max_into)(const A* x, int64_t n, A* into);
};

struct SimilarityTable {
  SimilarityKernels<float, float> f32;
  SimilarityKernels<double, double> f64;
  SimilarityKernels<Half, float> f16;
  SimilarityKernels<BFloat16, float> bf16;
};

// The table for this machine, and the part of it for rows stored as T.
const SimilarityTable& similarity_table();

template <class T>
const auto& similarity_kernels() {
  const SimilarityTable& table = similarity_table();
  if constexpr (std::is_same_v<T, float>) return table.f32;
  if constexpr (std::is_same_v<T, double>) return table.f64;
  if constexpr (std::is_same_v<T, Half>) return table.f16;
  if constexpr (std::is_same_v<T, BFloat16>) return table.bf16;
}

}  // namespace tokenprune
