// The vectorised parts of repulsion sampling, one table per capability; `repulsion_kernels<A>()` gives the best one.
#pragma once

#include <cstdint>

#include "tokenprune/math.h"

namespace tokenprune {

// Row lengths given to these kernels are multiples of this many elements (zero-padded): no tails, and one order of
// summation for every pair.
constexpr int64_t kRowMultiple = 16;
constexpr int64_t kMaxPairRows = 4;

template <class A>
struct RepulsionKernels {
  // out[r * n_others + s] = <rows[r], others[s]>, n_rows <= kMaxPairRows. The bits of a product do not depend on what
  // else is in the call, nor on which of the two vectors is the row.
  void (*pair_dots)(const A* const* rows, int64_t n_rows, const A* const* others, int64_t n_others, int64_t dim,
                    A* out);
  // Cosines with one token become potentials, in place; n is a multiple of kRowMultiple.
  void (*potentials)(Potential kind, const PotentialWeights<A>& w, const A* squared_distances, int64_t n, A* row);
  // totals[i] += row[i]; the index of the smallest totals[i] + energy[i] below infinity (the lowest one of equals), or
  // -1. n is a multiple of kRowMultiple.
  int64_t (*add_and_pick)(const A* row, const A* energy, int64_t n, A* totals);
};

template <class A>
const RepulsionKernels<A>& repulsion_kernels();

}  // namespace tokenprune
