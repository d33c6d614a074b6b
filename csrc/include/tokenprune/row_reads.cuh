// Rows of vectors read by units of 16 bytes, and their norms.
#pragma once

#include <limits>

#include "tokenprune/math.h"
#include "tokenprune/warp.cuh"

namespace tokenprune {

constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();

template <class T>
constexpr int kReadUnit = 16 / sizeof(T);  // elements read at once

// Elements c .. c + kReadUnit - 1 of a row, zeros from `dim` on.
template <class T>
__device__ __forceinline__ void read_unit(const T* row, int64_t c, int64_t dim, bool aligned,
                                          float (&out)[kReadUnit<T>]) {
  T elements[kReadUnit<T>];
  if (aligned) {
    const uint4 words = *reinterpret_cast<const uint4*>(row + c);
    memcpy(elements, &words, sizeof words);
#pragma unroll
    for (int e = 0; e < kReadUnit<T>; ++e) out[e] = to_float(elements[e]);
  } else {
#pragma unroll
    for (int e = 0; e < kReadUnit<T>; ++e) out[e] = c + e < dim ? to_float(row[c + e]) : 0.0f;
  }
}

template <int size>
__device__ __forceinline__ float add_dot(const float (&a)[size], const float (&b)[size], float sum) {
#pragma unroll
  for (int e = 0; e < size; ++e) sum = __fmaf_rn(a[e], b[e], sum);
  return sum;
}

// 0, or NaN when one of the elements first, first + step, ... is NaN or infinite.
template <class T>
__device__ float taint_of(const T* row, int64_t dim, int first, int step) {
  float taint = 0;
  for (int64_t c = first; c < dim; c += step) taint += 0 * to_float(row[c]);
  return taint;
}

// 1 / max(||x||, kNormFloor); 0 when only the squares overflow; NaN for a row with NaN or infinite elements. By the
// threads first, first + step, ... of a warp (all 32 of them), or by one thread alone.
template <class T>
__device__ __forceinline__ float row_inverse_norm(float squares, const T* row, int64_t dim, bool by_warp) {
  if (squares < kInfinity) return 1 / norm_from_squares(squares);
  if (!by_warp) return taint_of(row, dim, 0, 1);
  return warp_reduce(taint_of(row, dim, lane_id(), kWarp), Sum());
}

// dot / |q|, where q may have overflown.
__device__ __forceinline__ float over_norm(float dot, float inverse) { return inverse == 0 ? 0 : dot * inverse; }

}  // namespace tokenprune
