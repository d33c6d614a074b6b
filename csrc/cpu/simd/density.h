// The vectorised passes of density_peaks over a row of squared distances; `density_kernels<A>()` gives the best table.
#pragma once

#include <cstdint>

namespace tokenprune {

template <class A>
struct DensityKernels {
  // The first index from `begin` on, below n, with row[j] < limit; n where there is none.
  int64_t (*next_below)(const A* row, int64_t begin, int64_t n, A limit);
  // The largest number of a row of numbers that are not negative, 0 without any. NaN is passed over.
  A (*largest)(const A* row, int64_t n);
  // The smallest row[j] of the tokens denser than one: mean[j] < own, or equal with j < earlier. NaN is passed over, and
  // the result without any number.
  A (*nearest_denser)(const A* row, const A* mean, int64_t n, int64_t earlier, A own);
};

template <class A>
const DensityKernels<A>& density_kernels();

}  // namespace tokenprune
