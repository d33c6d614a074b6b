#include "cpu/simd/coverage.h"

#include "cpu/simd/vec.h"

namespace tokenprune::TOKENPRUNE_SIMD {

namespace {

template <class A>
A uncovered(const A* column, const A* covered, const A* weight, int64_t rows) {
  constexpr int width = kWidth<A>;
  static_assert(kCoverMultiple % (4 * width) == 0);
  const Vec<A> zero = {};
  Vec<A> sum[4] = {};
  for (int64_t r = 0; r < rows; r += 4 * width)
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      const Vec<A> more = load(column + r + u * width) - load(covered + r + u * width);
      sum[u] += load(weight + r + u * width) * (more > zero ? more : zero);
    }
  return horizontal_sum<A>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

}  // namespace

extern const CoverageKernels<float> coverage_f32;
extern const CoverageKernels<double> coverage_f64;
const CoverageKernels<float> coverage_f32 = {uncovered<float>};
const CoverageKernels<double> coverage_f64 = {uncovered<double>};

}  // namespace tokenprune::TOKENPRUNE_SIMD
