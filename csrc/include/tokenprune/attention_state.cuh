// Softmax statistics of a row that is seen in parts: the online update, and how parts are combined.
//
// With the largest logit m of a part and t = (s - m) log2(e) <= 0, the part is (m, sum 2^t, sum t 2^t). Parts are
// brought to a common m and added. In the end lse = m + log(sum) and H = log(sum) - ln(2) weighted / sum: nothing
// cancels, because t is measured from the maximum.
//
// 2^t is exp2_approx, relative error 2^-22, and rounding t adds |t| 2^-24. Over the row the relative error of the sum
// is at most 2^-22 + 2^-24 E|t| with E|t| <= log2(N), the mean under P: two units in the last place of lse, where the
// logits themselves are rounded to |s| 2^-24.
#pragma once

#include "tokenprune/attention.h"
#include "tokenprune/ptx.cuh"
#include "tokenprune/warp.cuh"

namespace tokenprune {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

struct RowState {
  float max, sum, weighted;

  __device__ __forceinline__ static RowState empty() { return {-INFINITY, 0.0f, 0.0f}; }

  // Whether the terms of a few logits, measured from a `max` that need not be theirs, are good as they are: t <= 8, and H
  // cancels no more than that. Of +inf and NaN the sum is no small number, -inf makes `weighted` NaN: 0 t.
  __device__ __forceinline__ bool is_little() const {
    constexpr float kMostSum = 256;
    return sum <= kMostSum && weighted == weighted;
  }
};

// Of parts measured from the same maximum.
__device__ __forceinline__ RowState added(const RowState& a, const RowState& b) {
  return {a.max, a.sum + b.sum, a.weighted + b.weighted};
}

// What logits are measured from: their maximum, unless it is infinite. With no visible logit every term is 0 then, and
// with one of +inf the sum becomes +inf (NaN beside a NaN), which is what log-sum-exp is.
__device__ __forceinline__ float reference_logit(float max) { return fabsf(max) == INFINITY ? 0.0f : max; }

// t as a factor of 2^t: where 2^t is 0, t is finite. A NaN is lost here, but not in 2^t.
__device__ __forceinline__ float exponent_factor(float t) { return fmaxf(t, -150.0f); }

__device__ __forceinline__ void add_term(float logit, float reference, float& sum, float& weighted) {
  const float t = (logit - reference) * kLog2e, e = exp2_approx(t);
  sum += e;
  weighted = __fmaf_rn(e, exponent_factor(t), weighted);
}

// `state` measured from a maximum that is not smaller than its own.
__device__ __forceinline__ RowState raised(const RowState& state, float max) {
  const float t = exponent_factor((state.max - reference_logit(max)) * kLog2e), ratio = exp2_approx(t);
  return {max, state.sum * ratio, __fmaf_rn(state.sum, t, state.weighted) * ratio};
}

__device__ __forceinline__ RowState merged(const RowState& a, const RowState& b) {
  const float max = fmaxf(a.max, b.max);
  const RowState x = raised(a, max), y = raised(b, max);
  return {max, x.sum + y.sum, x.weighted + y.weighted};
}

// Adds `count` logits to the state of a row, first to each other: fewer roundings than one long sum.
template <int count, class Logit>
__device__ __forceinline__ void add_logits(RowState& state, Logit&& logit) {
  float max = state.max;
#pragma unroll
  for (int j = 0; j < count; ++j) max = fmaxf(max, logit(j));
  const float reference = reference_logit(max);
  float sum = 0, weighted = 0;
#pragma unroll
  for (int j = 0; j < count; ++j) add_term(logit(j), reference, sum, weighted);
  const RowState before = raised(state, max);
  state = {max, before.sum + sum, before.weighted + weighted};
}

// The terms of `count` logits dot(j) * factor, measured from `max`, in four instructions each.
template <int count, class Dot>
__device__ __forceinline__ RowState dots_from(float max, float factor, Dot&& dot) {
  const float scale = factor * kLog2e, origin = max * kLog2e;
  float sum = 0, weighted = 0;
#pragma unroll
  for (int j = 0; j < count; ++j) {
    const float t = __fmaf_rn(dot(j), scale, -origin), e = exp2_approx(t);
    sum = j == 0 ? e : sum + e;
    weighted = __fmaf_rn(e, t, weighted);
  }
  return {max, sum, weighted};
}

// Adds logits dot(j) * factor as add_logits does. What they are measured from need not be their maximum: the state's
// stays as long as they add little to it, and else becomes that of the logits as well. False, and nothing added, where
// that does not do: infinite or NaN logits.
template <int count, class Dot>
__device__ __forceinline__ bool add_dots(RowState& state, float factor, Dot&& dot) {
#pragma unroll 1
  for (bool raise = state.max == -INFINITY;; raise = true) {
    RowState from = state;
    if (raise) {
      float most = dot(0);
#pragma unroll
      for (int j = 1; j < count; ++j) most = fmaxf(most, dot(j));
      from = raised(state, fmaxf(state.max, most * factor));
    }
    const RowState part = dots_from<count>(from.max, factor, dot);
    if (part.is_little()) {
      state = added(from, part);
      return true;
    }
    if (raise) return false;
  }
}

// The states of the lanes l, l + stride, l + 2 stride, ... below `width`, in lane l < stride. Whole warps only.
__device__ __forceinline__ RowState warp_merged(RowState state, int width, int stride = 1) {
  for (int offset = width / 2; offset >= stride; offset /= 2) {
    const RowState other{__shfl_down_sync(kAllLanes, state.max, offset), __shfl_down_sync(kAllLanes, state.sum, offset),
                         __shfl_down_sync(kAllLanes, state.weighted, offset)};
    state = merged(state, other);
  }
  return state;
}

__device__ __forceinline__ float lse_of(const RowState& s) { return reference_logit(s.max) + logf(s.sum); }
// A row that sees nothing has entropy 0.
__device__ __forceinline__ float entropy_of(const RowState& s) {
  return s.sum == 0 ? 0.0f : logf(s.sum) - kLn2 * (s.weighted / s.sum);
}

// The state of a row from the partial states of all ranges of keys, in lane 0. Whole warps only.
__device__ __forceinline__ RowState combined_row(const float* workspace, int64_t row, int splits) {
  const float4* partials = reinterpret_cast<const float4*>(workspace) + row * splits;
  RowState state = RowState::empty();
  for (int s = lane_id(); s < splits; s += kWarp) {
    const float4 part = partials[s];
    state = merged(state, {part.x, part.y, part.z});
  }
  return warp_merged(state, kWarp);
}

// Writes the result of a row, or of one range of its keys.
__device__ __forceinline__ void write_row(const AttentionRowOutputs& out, int64_t row, const RowState& state,
                                          int split = 0, int splits = 1) {
  if (splits > 1) {
    reinterpret_cast<float4*>(out.workspace)[row * splits + split] =
        make_float4(state.max, state.sum, state.weighted, 0.0f);
    return;
  }
  out.lse[row] = lse_of(state);
  out.entropy[row] = entropy_of(state);
}

}  // namespace tokenprune
