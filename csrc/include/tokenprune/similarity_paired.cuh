// paired_cosine: one launch, each row read once.
//
// A pair has 1, 2, 4 or 8 warps of a block, whose threads walk the channels 16 bytes at a time: dot product and squares
// of both rows are registers of one loop. Reading binds, so that a thread has 4 units of each row on their way. They
// come by asynchronous copies: of plain loads ptxas makes as many wait for the sums of others as saves it registers.
// The order of summation, and with it every bit, depends on shapes and device, not on alignment.
//
//   launch                grid                       block  shared memory  global memory
//   paired_cosine_kernel  B * N / (8, 4, 2 or 1 of   256    32 KiB         both rows once, 4 bytes per pair: the minimum,
//                         a block)                                         and of two views of one video half from L2
#pragma once

#include "tokenprune/similarity.cuh"
#include "tokenprune/similarity_paired.h"

namespace tokenprune {

struct PairSums {
  float dot, a, b;  // <a, b> and the squares of both
};

// Elements c .. c + kReadUnit - 1 of a row, on their way to `slot`; zeros from `dim` on.
template <bool aligned, class T>
__device__ __forceinline__ void fetch_unit(uint4& slot, const T* row, int64_t c, int64_t dim) {
  if constexpr (aligned) {
    cp_async_16(&slot, row + (c < dim ? c : 0), c < dim);
  } else {
    T elements[kReadUnit<T>];
#pragma unroll
    for (int e = 0; e < kReadUnit<T>; ++e) elements[e] = c + e < dim ? row[c + e] : from_float<T>(0.0f);
    memcpy(&slot, elements, sizeof slot);
  }
}

template <class T>
__device__ __forceinline__ void add_products(const uint4& of_a, const uint4& of_b, PairSums& sums) {
  T x[kReadUnit<T>], y[kReadUnit<T>];
  memcpy(x, &of_a, sizeof of_a);
  memcpy(y, &of_b, sizeof of_b);
#pragma unroll
  for (int e = 0; e < kReadUnit<T>; ++e) {
    const float a = to_float(x[e]), b = to_float(y[e]);
    sums = {__fmaf_rn(a, b, sums.dot), __fmaf_rn(a, a, sums.a), __fmaf_rn(b, b, sums.b)};
  }
}

template <class T, bool aligned>
__global__ void __launch_bounds__(kPairedThreads) paired_cosine_kernel(const PairedProblem p, int warps) {
  TOKENPRUNE_SHARED(uint4[kPairedInFlight][2][kPairedThreads], ring);  // a thread reads what it has fetched itself
  TOKENPRUNE_SHARED(PairSums[kPairedWarps], partial);
  const int threads = warps * kWarp, thread = threadIdx.x % threads;
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * (kPairedThreads / threads) + threadIdx.x / threads;
  const bool there = pair < p.batch * p.n;
  const int64_t sample = there ? pair / p.n : 0, i = there ? pair - sample * p.n : 0;
  const T* a = static_cast<const T*>(p.a.rows) + sample * p.a.sample_stride + i * p.a.row_stride;
  const T* b = static_cast<const T*>(p.b.rows) + sample * p.b.sample_stride + i * p.b.row_stride;

  const int64_t dim = there ? p.dim : 0, step = threads * kReadUnit<T>;
  const auto fetch = [&](int stage, int64_t c) {
    fetch_unit<aligned>(ring[stage][0][threadIdx.x], a, c, dim);
    fetch_unit<aligned>(ring[stage][1][threadIdx.x], b, c, dim);
    cp_async_commit();
  };
  PairSums sums = {0, 0, 0};
  int64_t c = thread * kReadUnit<T>;
#pragma unroll
  for (int s = 0; c < dim && s < kPairedInFlight; ++s) fetch(s, c + s * step);
  for (int stage = 0; c < dim; c += step, stage = (stage + 1) % kPairedInFlight) {
    cp_async_wait<kPairedInFlight - 1>();
    add_products<T>(ring[stage][0][threadIdx.x], ring[stage][1][threadIdx.x], sums);
    fetch(stage, c + kPairedInFlight * step);
  }
  cp_async_wait<0>();
  sums = {warp_reduce(sums.dot, Sum()), warp_reduce(sums.a, Sum()), warp_reduce(sums.b, Sum())};
  if (warps > 1) {
    if (lane_id() == 0) partial[warp_id()] = sums;
    __syncthreads();
    for (int w = 1; thread < kWarp && w < warps; ++w) {
      const PairSums other = partial[warp_id() + w];
      sums = {sums.dot + other.dot, sums.a + other.a, sums.b + other.b};
    }
  }
  if (!there || thread >= kWarp) return;
  const float of_a = row_inverse_norm(sums.a, a, p.dim, true), of_b = row_inverse_norm(sums.b, b, p.dim, true);
  // A row whose squares overflow is a unit vector of zeros: its cosine is 0, or NaN with a row that has one.
  const float cosine = of_a == 0 || of_b == 0 ? of_a * of_b : sums.dot * of_a * of_b;
  if (lane_id() == 0) p.scores[pair] = cosine;
}

template <class T>
cudaError_t launch_paired_cosine(const PairedProblem& p, const PairedPlan& plan, CallStream& stream) {
  const auto kernel = p.aligned ? paired_cosine_kernel<T, true> : paired_cosine_kernel<T, false>;
  return launch({plan.blocks, dim3(kPairedThreads), 0, stream}, kernel, p, plan.warps);
}

}  // namespace tokenprune
