// Squared distances of two rows from their inner products.
#pragma once

#include <cfloat>

#include "tokenprune/device.cuh"

namespace tokenprune {

// Does nothing overflow that is made of two such squares?
__device__ __forceinline__ bool is_small(float square) { return square < FLT_MAX / 4; }

template <class T>
__device__ float squared_difference(const T* x, const T* y, int64_t channels) {
  float sum = 0;
  for (int64_t c = 0; c < channels; ++c) {
    const float gap = to_float(x[c]) - to_float(y[c]);
    sum = __fmaf_rn(gap, gap, sum);
  }
  return sum;
}

// <x, x> + <y, y> - 2 <x, y>, with rounding errors below 0 cut off; rows are asked where that may overflow.
template <class Row>
__device__ __forceinline__ float squared_gap(float dot, float x_square, float y_square, int64_t channels, Row x,
                                             Row y) {
  if (!is_small(x_square) || !is_small(y_square)) return squared_difference(x, y, channels);
  const float square = __fmaf_rn(-2.0f, dot, x_square + y_square);
  return square < 0 ? 0 : square;
}

}  // namespace tokenprune
