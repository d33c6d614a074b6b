// Softmax statistics of a row that is seen in parts: the online update, and how parts meet.
#pragma once

#include "tokenprune/attention.h"
#include "tokenprune/warp.cuh"

namespace tokenprune {

// Online softmax statistics of a part of a row. `sum` and `weighted` are relative to shift().
struct RowState {
  float max, sum, weighted;

  __device__ __forceinline__ static RowState empty() { return {-INFINITY, 0.0f, 0.0f}; }
  // Infinite maxima are not taken out: with none visible every term is 0, and with a logit of +inf the sum becomes
  // +inf (or NaN beside a NaN), which is what log-sum-exp is then.
  __device__ __forceinline__ static float shift(float max) { return fabsf(max) == INFINITY ? 0.0f : max; }
};

// exp is 0 at the bound, and its product with the bound too; NaN stays.
__device__ __forceinline__ float bounded_exponent(float t) { return t < -150.0f ? -150.0f : t; }

// `state` brought to a maximum that is not smaller.
__device__ __forceinline__ RowState raised(const RowState& state, float max) {
  const float delta = bounded_exponent(state.max - RowState::shift(max)), ratio = expf(delta);
  return {max, state.sum * ratio, (state.weighted + state.sum * delta) * ratio};
}

__device__ __forceinline__ RowState merged(const RowState& a, const RowState& b) {
  const float max = a.max > b.max ? a.max : b.max;
  const RowState x = raised(a, max), y = raised(b, max);
  return {max, x.sum + y.sum, x.weighted + y.weighted};
}

// The states of `width` neighbouring lanes, the same in every one of them up to rounding: take the first one's.
__device__ __forceinline__ RowState warp_merged(RowState state, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2)
    state =
        merged(state, {__shfl_down_sync(kAllLanes, state.max, offset), __shfl_down_sync(kAllLanes, state.sum, offset),
                       __shfl_down_sync(kAllLanes, state.weighted, offset)});
  return state;
}

__device__ __forceinline__ float lse_of(const RowState& s) { return RowState::shift(s.max) + logf(s.sum); }
// A row that sees nothing has entropy 0.
__device__ __forceinline__ float entropy_of(const RowState& s) {
  return s.sum == 0 ? 0.0f : logf(s.sum) - s.weighted / s.sum;
}

// The state of a row from the partial states of all ranges of keys, lane 0's is the result. Whole warps only.
__device__ __forceinline__ RowState combined_row(const float* workspace, int64_t row, int splits) {
  const float4* partials = reinterpret_cast<const float4*>(workspace) + row * splits;
  RowState state = RowState::empty();
  for (int s = lane_id(); s < splits; s += kWarp) {
    const float4 part = partials[s];
    state = merged(state, {part.x, part.y, part.z});
  }
  return warp_merged(state, kWarp);
}

__device__ __forceinline__ void write_row(const AttentionRowOutputs& out, int64_t row, const RowState& state) {
  out.lse[row] = lse_of(state);
  if (out.entropy != nullptr) out.entropy[row] = entropy_of(state);
}

}  // namespace tokenprune
