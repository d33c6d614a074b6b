// Inverse norms (row_inverse_norm) of all query and key vectors: one launch, a warp per vector, 8 warps per block. Every
// vector is summed in the same order, so that equal vectors get equal norms. Reads both operands once.
#pragma once

#include "tokenprune/attention.h"
#include "tokenprune/math.h"
#include "tokenprune/ptx.cuh"
#include "tokenprune/row_reads.cuh"
#include "tokenprune/warp.cuh"

namespace tokenprune {

constexpr int kNormThreads = 256, kNormVectors = kNormThreads / kWarp;

template <class T>
__global__ void __launch_bounds__(kNormThreads) attention_norms_kernel(const AttentionProblem p) {
  let_next_launch_start();
  const int64_t queries = p.queries();
  const int64_t vector = int64_t(blockIdx.x) * kNormVectors + warp_id();
  if (vector >= p.vectors()) return;
  const bool is_key = vector >= queries;
  const int64_t index = is_key ? vector - queries : vector, each = is_key ? p.keys : p.rows;
  const int64_t heads = is_key ? p.key_heads : p.query_heads, head = index / each;
  const VectorStrides& strides = is_key ? p.key_strides : p.query_strides;
  const T* x = static_cast<const T*>(is_key ? p.key : p.query) + head / heads * strides.batch +
               head % heads * strides.head + index % each * strides.row;
  float sum = 0;
  if (is_key ? p.key_aligned : p.query_aligned) {
    constexpr int kUnit = 16 / sizeof(T);
    for (int64_t d = lane_id() * kUnit; d < p.dim; d += kWarp * kUnit) {
      const uint4 bits = *reinterpret_cast<const uint4*>(x + d);
      const T* values = reinterpret_cast<const T*>(&bits);
#pragma unroll
      for (int e = 0; e < kUnit; ++e) sum = __fmaf_rn(to_float(values[e]), to_float(values[e]), sum);
    }
  } else {
    for (int64_t d = lane_id(); d < p.dim; d += kWarp) sum = __fmaf_rn(to_float(x[d]), to_float(x[d]), sum);
  }
  const float inverse = row_inverse_norm(warp_reduce(sum, Sum()), x, p.dim, true);
  if (lane_id() == 0) (is_key ? p.key_inverse_norms : p.query_inverse_norms)[index] = inverse;
}

template <class T>
cudaError_t launch_attention_norms(const AttentionProblem& p, CallStream& stream) {
  return launch({ceil_div<int64_t>(p.vectors(), kNormVectors), dim3(kNormThreads), 0, stream},
                attention_norms_kernel<T>, p);
}

}  // namespace tokenprune
