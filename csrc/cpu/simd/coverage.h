// The vectorised part of facility location, one table per capability; `coverage_kernels<A>()` gives the best one.
#pragma once

#include <cstdint>

namespace tokenprune {

// Columns given to these kernels are zero-padded to multiples of this many rows: no tails.
constexpr int64_t kCoverMultiple = 64;

template <class A>
struct CoverageKernels {
  // sum over r of weight[r] * max(column[r] - covered[r], 0). The order of the sum depends on `rows` alone, and every
  // operation is monotone in covered[r]: rounding included, the sum only falls as rows are covered better.
  A (*uncovered)(const A* column, const A* covered, const A* weight, int64_t rows);
};

template <class A>
const CoverageKernels<A>& coverage_kernels();

}  // namespace tokenprune
