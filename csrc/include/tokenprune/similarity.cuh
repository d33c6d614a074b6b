// cosine_scores and contrastive_scores: what the kernels share, the launch that sums a list of unit rows, and the
// scoring kernel for short lists. The one for long lists is in similarity_tile.cuh.
//
// A mean of cosines <x/|x|, q_r/|q_r|> over r is <x, s> / |x| / n with s the sum of the n unit rows: a list of any
// length costs one dot product per feature. Features are read once and never normalised; a cosine is a dot product
// divided by two norms after the reduction. Where that differs from normalising first:
//   * squares of finite elements that overflow: the unit vector is 0 (x / inf), and the dot product may be inf - inf;
//   * infinite or NaN elements: the unit vector has a NaN, so that every cosine with it is NaN.
// row_inverse_norm tells these apart (0 and NaN); neither can occur otherwise, and |dot| <= |x| |q| cannot overflow
// when both norms are finite.
//
//   listed rows --- unit_sum_kernel ---> sums of groups of unit rows --- combine_sums_kernel ---> one sum per sample
//                                                    | (up to 4 groups)                             |
//   features, rows of short lists ------------------ warp_similarity_kernel ------------------------+--> scores
//
// unit_sum_kernel: grid groups * B, 256 threads, 0.5 KB shared. Reads each row twice, the second time from the cache.
// combine_sums_kernel: grid ceil(C / 256) * B, 256 threads.
// warp_similarity_kernel: grid B * ceil(N / (4 or 16)), 128 threads, no shared memory. Reads features once from
// memory; every warp reads the listed rows, which its neighbours have brought to the cache.
#pragma once

#include "tokenprune/ptx.cuh"
#include "tokenprune/row_reads.cuh"
#include "tokenprune/similarity.h"
#include "tokenprune/warp.cuh"

namespace tokenprune {

// Entry i of a sample's list, null when it does not count.
template <class T>
__device__ __forceinline__ const T* listed_row(const RowList& list, int64_t sample, int64_t i) {
  if (i >= list.length) return nullptr;
  if (list.mask != nullptr && !list.mask[sample * list.mask_stride + i]) return nullptr;
  const int64_t row = list.indices == nullptr ? i : list.indices[sample * list.index_stride + i];
  if (row < 0 || row >= list.available) return nullptr;
  return static_cast<const T*>(list.rows) + sample * list.sample_stride + row * list.row_stride;
}

// What the scoring kernels read of the sums of unit rows: `parts` vectors per sample that add up to it.
struct UnitSums {
  const float* parts;   // [batch, count, dim], null: none
  const float* listed;  // [batch]: how many rows were summed
  int64_t count;

  // Element c of the sum.
  __device__ __forceinline__ float at(int64_t sample, int64_t c, int64_t dim) const {
    const float* part = parts + sample * count * dim + c;
    float sum = part[0];
    for (int64_t g = 1; g < count; ++g) sum += part[g * dim];
    return sum;
  }

  // The mean of the cosines of a feature; `product` is its dot product with the sum. The whole warp calls it.
  __device__ __forceinline__ float mean(int64_t sample, int64_t dim, float product, float inverse) const {
    const float rows = listed[sample];
    if (rows == 0) return 0;
    if (inverse != 0) return product * inverse / rows;
    float taint = 0;
    for (int64_t c = lane_id(); c < dim; c += kWarp) taint += 0 * at(sample, c, dim);
    return warp_reduce(taint, Sum());
  }
};

// --- sums of unit rows -----------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kUnitSumThreads)
    unit_sum_kernel(const RowList list, int64_t dim, int64_t groups, int64_t rows_per_group, bool aligned, float* parts,
                    float* listed) {
  TOKENPRUNE_SHARED(const T* [kUnitSumRows], rows);
  TOKENPRUNE_SHARED(float[kUnitSumRows], inverses);
  let_next_launch_start();
  const int64_t sample = blockIdx.x / groups, group = blockIdx.x % groups;
  for (int64_t i = warp_id(); i < rows_per_group; i += kUnitSumThreads / kWarp) {
    const T* row = listed_row<T>(list, sample, group * rows_per_group + i);
    float inverse = 0;
    if (row != nullptr) {
      float squares = 0;
      for (int64_t c = lane_id() * kReadUnit<T>; c < dim; c += kWarp * kReadUnit<T>) {
        float x[kReadUnit<T>];
        read_unit(row, c, dim, aligned, x);
        squares = add_dot(x, x, squares);
      }
      inverse = row_inverse_norm(warp_reduce(squares, Sum()), row, dim, true);
    }
    if (lane_id() == 0) {
      rows[i] = row;
      inverses[i] = inverse;
    }
  }
  __syncthreads();
  float* out = parts + blockIdx.x * dim;
  for (int64_t c = threadIdx.x * kReadUnit<T>; c < dim; c += kUnitSumThreads * kReadUnit<T>) {
    float sum[kReadUnit<T>] = {};
    for (int i = 0; i < rows_per_group; ++i) {
      if (rows[i] == nullptr) continue;
      float x[kReadUnit<T>];
      read_unit(rows[i], c, dim, aligned, x);
#pragma unroll
      for (int e = 0; e < kReadUnit<T>; ++e) sum[e] = __fmaf_rn(x[e], inverses[i], sum[e]);
    }
#pragma unroll
    for (int e = 0; e < kReadUnit<T>; ++e)
      if (c + e < dim) out[c + e] = sum[e];
  }
  if (group > 0) return;
  int count = 0;
  for (int64_t i = threadIdx.x; i < list.length; i += kUnitSumThreads)
    count += listed_row<T>(list, sample, i) != nullptr;
  count = block_reduce(count, Sum(), 0);
  if (threadIdx.x == 0) listed[sample] = static_cast<float>(count);
}

// In float64: there may be hundreds of groups, and the sum should be as good as that of one group.
__global__ void __launch_bounds__(kUnitSumThreads)
    combine_sums_kernel(const float* parts, int64_t groups, int64_t dim, float* sums) {
  let_next_launch_start();
  wait_for_launch_before();
  const int64_t blocks = ceil_div<int64_t>(dim, kUnitSumThreads), sample = blockIdx.x / blocks;
  const int64_t c = blockIdx.x % blocks * kUnitSumThreads + threadIdx.x;
  if (c >= dim) return;
  double sum = 0;
  for (int64_t g = 0; g < groups; ++g) sum += parts[(sample * groups + g) * dim + c];
  sums[sample * dim + c] = static_cast<float>(sum);
}

// --- scores, short lists ---------------------------------------------------------------------------------------------

// A warp compares `rows` features with up to kDirectRows listed rows (those of best_of, then, if they all fit, those of
// mean_of) and with the sum of unit rows. Everything is in registers; nothing depends on `rows` but how often the
// listed rows are read.
template <class T, int rows>
__global__ void __launch_bounds__(kSimilarityThreads)
    warp_similarity_kernel(const SimilarityProblem p, const UnitSums sums) {
  constexpr int kWarps = kSimilarityThreads / kWarp;
  wait_for_launch_before();
  const int64_t blocks = ceil_div<int64_t>(p.n, rows * kWarps), sample = blockIdx.x / blocks;
  const int64_t first = (blockIdx.x % blocks * kWarps + warp_id()) * rows;
  if (first >= p.n) return;
  const T* features = static_cast<const T*>(p.features) + sample * p.sample_stride;
  const auto feature = [&](int r) { return features + min(first + r, p.n - 1) * p.row_stride; };
  const T* queries[kDirectRows];
#pragma unroll
  for (int q = 0; q < kDirectRows; ++q) {
    queries[q] = listed_row<T>(p.best_of, sample, q);
    if (sums.parts == nullptr && q >= p.best_of.length)
      queries[q] = listed_row<T>(p.mean_of, sample, q - p.best_of.length);
  }

  float dots[rows][kDirectRows] = {}, squares[rows] = {}, with_sum[rows] = {}, query_squares[kDirectRows] = {};
  for (int64_t c = lane_id() * kReadUnit<T>; c < p.dim; c += kWarp * kReadUnit<T>) {
    float x[rows][kReadUnit<T>], y[kReadUnit<T>];
#pragma unroll
    for (int r = 0; r < rows; ++r) read_unit(feature(r), c, p.dim, p.aligned, x[r]);
#pragma unroll
    for (int r = 0; r < rows; ++r) squares[r] = add_dot(x[r], x[r], squares[r]);
#pragma unroll
    for (int q = 0; q < kDirectRows; ++q) {
      if (queries[q] == nullptr) continue;
      read_unit(queries[q], c, p.dim, p.aligned, y);
      query_squares[q] = add_dot(y, y, query_squares[q]);
#pragma unroll
      for (int r = 0; r < rows; ++r) dots[r][q] = add_dot(x[r], y, dots[r][q]);
    }
    if (sums.parts == nullptr) continue;
#pragma unroll
    for (int e = 0; e < kReadUnit<T>; ++e) y[e] = c + e < p.dim ? sums.at(sample, c + e, p.dim) : 0.0f;
#pragma unroll
    for (int r = 0; r < rows; ++r) with_sum[r] = add_dot(x[r], y, with_sum[r]);
  }

  float taint_best = 0, taint_mean = 0;  // NaN when a listed row has one
  int count_best = 0, count_mean = 0;
#pragma unroll
  for (int q = 0; q < kDirectRows; ++q) {
    if (queries[q] == nullptr) continue;
    query_squares[q] = row_inverse_norm(warp_reduce(query_squares[q], Sum()), queries[q], p.dim, true);
    const bool of_best = q < p.best_of.length;
    count_best += of_best;
    count_mean += !of_best;
    (of_best ? taint_best : taint_mean) += 0 * query_squares[q];
  }
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    const float inverse = row_inverse_norm(warp_reduce(squares[r], Sum()), feature(r), p.dim, true);
    float best = -kInfinity, sum = 0;
#pragma unroll
    for (int q = 0; q < kDirectRows; ++q) {
      if (queries[q] == nullptr) continue;
      const float value = over_norm(warp_reduce(dots[r][q], Sum()), query_squares[q]);
      if (q < p.best_of.length)
        best = nan_max(best, value);
      else
        sum += value;
    }
    float score = 0;
    if (count_best > 0) score = inverse == 0 ? taint_best : best * inverse;
    if (sums.parts != nullptr)
      score += p.mean_sign * sums.mean(sample, p.dim, warp_reduce(with_sum[r], Sum()), inverse);
    else if (count_mean > 0)
      score += p.mean_sign * (inverse == 0 ? taint_mean : sum * inverse / count_mean);
    if (lane_id() == 0 && first + r < p.n) p.scores[sample * p.n + first + r] = score;
  }
}

// --- launches --------------------------------------------------------------------------------------------------------

template <class T>
cudaError_t launch_unit_sums(const SimilarityProblem& p, const SimilarityPlan& plan, UnitSums& sums,
                             CallStream& stream) {
  sums = {};
  if (plan.groups == 0) return cudaSuccess;
  float *parts = p.workspace, *total = parts + plan.group_floats(), *listed = total + plan.sum_floats();
  const cudaError_t status = launch({p.batch * plan.groups, dim3(kUnitSumThreads), 0, stream}, unit_sum_kernel<T>,
                                    p.mean_of, p.dim, plan.groups, plan.rows_per_group, p.aligned, parts, listed);
  sums = {plan.combine ? total : parts, listed, plan.combine ? 1 : plan.groups};
  if (status != cudaSuccess || !plan.combine) return status;
  return launch({ceil_div<int64_t>(p.dim, kUnitSumThreads) * p.batch, dim3(kUnitSumThreads), 0, stream},
                combine_sums_kernel, parts, plan.groups, p.dim, total);
}

}  // namespace tokenprune
