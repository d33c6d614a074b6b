// Sums over the channels of token rows in device memory, by a warp.
#pragma once

#include "tokenprune/repulsion_gram_tile.cuh"

namespace tokenprune {

// The sum over a row's channels of f(element, channel), by a warp, in an order that is the same for every row.
template <class T, class F>
__device__ __forceinline__ float sum_over_row(const TokenRows& rows, int64_t token, F&& f) {
  constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
  const T* row = static_cast<const T*>(rows.data) + token * rows.stride;
  const int64_t whole = rows.aligned ? rows.channels / kChunk * kChunk : 0;
  float sum = 0;
  for (int64_t c = lane_id() * kChunk; c < whole; c += kWarp * kChunk) {
    const uint4 packed = *reinterpret_cast<const uint4*>(row + c);
    const T* element = reinterpret_cast<const T*>(&packed);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) sum += f(to_float(element[e]), c + e);
  }
  for (int64_t c = whole + lane_id(); c < rows.channels; c += kWarp) sum += f(to_float(row[c]), c);
  return warp_reduce(sum, Sum());
}

// <row i, row j>, by a warp, in an order that is the same for every pair of rows.
template <class T>
__device__ __forceinline__ float dot_of_rows(const TokenRows& rows, int64_t i, int64_t j) {
  constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
  const T *left = static_cast<const T*>(rows.data) + i * rows.stride,
          *right = static_cast<const T*>(rows.data) + j * rows.stride;
  const int64_t whole = rows.aligned ? rows.channels / kChunk * kChunk : 0;
  float sum = 0;
#pragma unroll 4
  for (int64_t c = lane_id() * kChunk; c < whole; c += kWarp * kChunk) {
    const uint4 packed[2] = {*reinterpret_cast<const uint4*>(left + c), *reinterpret_cast<const uint4*>(right + c)};
    const T *x = reinterpret_cast<const T*>(&packed[0]), *y = reinterpret_cast<const T*>(&packed[1]);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) sum = __fmaf_rn(to_float(x[e]), to_float(y[e]), sum);
  }
  for (int64_t c = whole + lane_id(); c < rows.channels; c += kWarp)
    sum = __fmaf_rn(to_float(left[c]), to_float(right[c]), sum);
  return warp_reduce(sum, Sum());
}

}  // namespace tokenprune
