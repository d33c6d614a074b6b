// Unit vectors of the tokens of a sample, in rows that the vector code can read without tails.
#pragma once

#include <algorithm>

#include "cpu/simd/repulsion.h"
#include "cpu/simd/rows.h"
#include "cpu/team.h"
#include "tensor.h"

namespace tokenprune {

constexpr int64_t kParallelWork = 1 << 17;  // multiply-adds that are worth handing to another thread of a team

inline int64_t padded(int64_t n) { return (n + kRowMultiple - 1) / kRowMultiple * kRowMultiple; }

// Elements between two rows: rows a power of two apart would compete for the same cache sets.
inline int64_t unit_stride(int64_t dim) { return padded(dim) + kRowMultiple; }

// Tokens per piece when one token costs `work` multiply-adds.
inline int64_t grain(int64_t work) { return std::max<int64_t>(kMaxPairRows, kParallelWork / (work + 1)); }

// Rows unit_stride(dim) apart, zero-padded, from features [B, N, C] with contiguous rows.
template <class T, class A = Wide<T>>
void normalize_sample(Team& team, const Tensor& features, int64_t b, A* unit) {
  const T* from = static_cast<const T*>(features.const_data_ptr()) + b * features.stride(0);
  const RowKernels<A>& kernels = row_kernels<A>();
  const int64_t dim = features.size(2), row_stride = features.stride(1), stride = unit_stride(dim);
  team.parallel_for(features.size(1), grain(dim), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      A* to = unit + i * stride;
      normalize_row(kernels, from + i * row_stride, dim, to);
      std::fill(to + dim, to + padded(dim), A(0));
    }
  });
}

}  // namespace tokenprune
