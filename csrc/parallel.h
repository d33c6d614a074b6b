// Work sharing through torch's own thread pool. Results must not depend on how many threads there are.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace tokenprune {

// f(begin, end) over pieces of [0, n); runs inline when one piece of `grain` covers it. f must not throw.
template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  if (n <= grain) {
    f(int64_t(0), n);
    return;
  }
  torch::stable::parallel_for(0, n, grain, f);
}

}  // namespace tokenprune
