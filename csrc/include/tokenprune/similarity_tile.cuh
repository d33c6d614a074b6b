// cosine_scores and contrastive_scores for long lists: the maximum over the listed rows by tiles of 64 x 64 dot
// products (tensor cores for 16-bit inputs), the norms of both and the mean from the same pass over shared memory.
//
//   64 features ---+                                                 +--> sums of 64 x 64 products --+
//                  +-- chunks of 128 B per row, ring of 3 stages ----+--> squares of both            +-- cluster --+
//   64 listed rows +                                                 +--> products with the unit sum |   exchange  |
//                                                                                                                  |
//   scores <--- maximum over the tile's rows, kept over the tiles of the list <--- sums over the blocks <----------+
//
// Grid: B * ceil(N / 64) tiles times the cluster, 128 threads, 48 KiB of dynamic shared memory. When the tiles are few,
// the blocks of a cluster share the channels, each sums up its part, and each finishes 64 / cluster of the features
// from everybody's sums, in the order of the blocks. Bytes: the features once per 64 listed rows and those rows once
// per 64 features, from L2 after the first time; the minimum is each once.
//
// Tensor cores round sums towards zero, in every step: over thousands of channels that would be an error of many units
// in the last place. So the sums of each chunk start at zero and are added to the totals by the ordinary units.
#pragma once

#include "tokenprune/attention_tile.cuh"
#include "tokenprune/similarity.cuh"

namespace tokenprune {

static_assert(kTileVectors == kSimilarityTile && kTileThreads == kSimilarityThreads);

// What the blocks of a cluster read of each other, beside the sums of products.
struct SimilarityTileShared {
  float feature_squares[kSimilarityTile], with_sum[kSimilarityTile], row_squares[kSimilarityTile];
  float row_inverse[kSimilarityTile];  // negative: the row does not count
  float best[kSimilarityTile];
  float unit_sum[2][kChunkBytes / 2];  // of the chunk at hand and the next one
};

constexpr int kProductStride = kSimilarityTile + 4;  // neighbouring features in distinct banks
constexpr int kSimilarityTileBytes = 2 * kTileStages * kChunkTileBytes;
static_assert(kSimilarityTile * kProductStride * sizeof(float) <= kSimilarityTileBytes);

// The thread's part of the squares of a tile's row (half of each chunk), and of the products with the unit sum.
template <class T>
__device__ __forceinline__ void add_squares(const unsigned char* chunk, const float* unit_sum, float& squares,
                                            float& with_sum) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int u = threadIdx.x % 2 * 4 + i;
    float x[kUnit<T>];
    load_unit(reinterpret_cast<const T*>(DotTile<T>::unit(chunk, threadIdx.x / 2, u)), 0, kUnit<T>, true, x);
    squares = dot(x, x, squares);
    if (unit_sum == nullptr) continue;
#pragma unroll
    for (int e = 0; e < kUnit<T>; ++e) with_sum = __fmaf_rn(x[e], unit_sum[u * kUnit<T> + e], with_sum);
  }
}

// Sums of products of this block's channels, added to `total`. Squares and the products with the unit sum go to the
// other arguments, the features' only with `first_list`.
template <class T>
__device__ __forceinline__ void multiply_tile(const TileLoader<T>& features, const TileLoader<T>& listed, int columns,
                                              bool first_list, const SimilarityProblem& p, const UnitSums& sums,
                                              int64_t sample, unsigned char* ring, SimilarityTileShared& s,
                                              DotTile<T>& total, float& row_squares, float& feature_squares,
                                              float& with_sum) {
  constexpr int kChunk = DotTile<T>::kChunk;
  const int dim = static_cast<int>(p.dim), chunks = ceil_div(dim, kChunk);
  const int rank = cluster_rank(), size = cluster_size();
  const int begin = static_cast<int>(int64_t(chunks) * rank / size), end = int64_t(chunks) * (rank + 1) / size;
  const bool summed = first_list && sums.parts != nullptr;
  const int channel = threadIdx.x;  // of a chunk, for the thread's element of the unit sum
  const auto stage_of = [&](int c) { return ring + (c - begin) % kTileStages * 2 * kChunkTileBytes; };
  const auto load = [&](int c) {
    if (c < end) {
      features.copy(stage_of(c), c, dim);
      listed.copy(stage_of(c) + kChunkTileBytes, c, dim);
    }
    cp_async_commit();
  };
  const auto unit_sum = [&](int c) {
    const int64_t element = static_cast<int64_t>(c) * kChunk + channel;
    return summed && c < end && channel < kChunk && element < dim ? sums.at(sample, element, dim) : 0.0f;
  };
  load(begin);
  load(begin + 1);
  if (channel < kChunk) s.unit_sum[0][channel] = unit_sum(begin);
  for (int c = begin; c < end; ++c) {
    cp_async_wait<1>();
    __syncthreads();
    load(c + 2);
    const float next = unit_sum(c + 1);  // on its way while the chunk is multiplied
    const unsigned char *a = stage_of(c), *b = a + kChunkTileBytes;
    DotTile<T> part;
    part.clear();
    part.multiply(a, b, dim - c * kChunk, columns);
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) total.sums[i][j] += part.sums[i][j];
    add_squares<T>(b, nullptr, row_squares, with_sum);
    if (first_list) add_squares<T>(a, summed ? s.unit_sum[(c - begin) % 2] : nullptr, feature_squares, with_sum);
    if (channel < kChunk) s.unit_sum[(c + 1 - begin) % 2][channel] = next;
  }
  __syncthreads();  // the ring is free
}

template <class T>
__global__ void __launch_bounds__(kSimilarityThreads)
    tile_similarity_kernel(const SimilarityProblem p, const UnitSums sums) {
  TOKENPRUNE_SHARED(SimilarityTileShared, s);
  unsigned char* ring = dynamic_shared();
  float* products = reinterpret_cast<float*>(ring);  // [feature][listed row], once the ring is free
  const int rank = cluster_rank(), size = cluster_size(), thread = threadIdx.x;
  const int64_t tiles = ceil_div<int64_t>(p.n, kSimilarityTile), tile = blockIdx.x / size;
  const int64_t sample = tile / tiles, first = tile % tiles * kSimilarityTile;
  const T* all = static_cast<const T*>(p.features) + sample * p.sample_stride;
  const auto feature = [&](int i) { return first + i < p.n ? all + (first + i) * p.row_stride : nullptr; };
  TileLoader<T> features, listed;
  features.aligned = listed.aligned = p.aligned;
#pragma unroll
  for (int i = 0; i < 4; ++i) features.vectors[i] = feature(thread / 8 + 16 * i);

  bool any = false, tainted = false;  // a row that counts, one of them with a NaN
  for (int64_t at = 0; at < p.best_of.length; at += kSimilarityTile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) listed.vectors[i] = listed_row<T>(p.best_of, sample, at + thread / 8 + 16 * i);
    const int columns = static_cast<int>(min(p.best_of.length - at, int64_t(kSimilarityTile)));
    DotTile<T> total;
    total.clear();
    float row_squares = 0, feature_squares = 0, with_sum = 0;
    multiply_tile(features, listed, columns, at == 0, p, sums, sample, ring, s, total, row_squares, feature_squares,
                  with_sum);
#pragma unroll
    for (int i = 0; i < DotTile<T>::kThreadA; ++i)
#pragma unroll
      for (int j = 0; j < DotTile<T>::kThreadB; ++j)
        products[DotTile<T>::a(i) * kProductStride + DotTile<T>::b(j)] = total.at(i, j);
    row_squares = warp_reduce(row_squares, Sum(), 2);
    feature_squares = warp_reduce(feature_squares, Sum(), 2);
    with_sum = warp_reduce(with_sum, Sum(), 2);
    if (thread % 2 == 0) {
      s.row_squares[thread / 2] = row_squares;
      if (at == 0) {
        s.feature_squares[thread / 2] = feature_squares;
        s.with_sum[thread / 2] = with_sum;
      }
    }
    cluster_sync();

    const auto over_blocks = [&](const float* mine) {
      float sum = 0;
      for (int r = 0; r < size; ++r) sum += *cluster_shared(mine, r);
      return sum;
    };
    float inverse = -1;
    if (thread < kSimilarityTile) {
      const T* row = listed_row<T>(p.best_of, sample, at + thread);
      if (row != nullptr) inverse = inverse_norm(over_blocks(&s.row_squares[thread]), row, p.dim, false);
      s.row_inverse[thread] = inverse;
    }
    any = __syncthreads_or(!(inverse < 0)) || any;
    tainted = __syncthreads_or(inverse != inverse) || tainted;

    const bool last = at + kSimilarityTile >= p.best_of.length;
    const int mine = kSimilarityTile / size;  // this block finishes the features rank * mine ...
    for (int i = rank * mine + warp_id(); i < (rank + 1) * mine && first + i < p.n; i += kSimilarityThreads / kWarp) {
      float best = at == 0 ? -kInfinity : s.best[i];
#pragma unroll
      for (int j = 0; j < kSimilarityTile / kWarp; ++j) {
        const int column = lane_id() + j * kWarp;
        const float row_inverse = s.row_inverse[column];
        if (!(row_inverse < 0))
          best = nan_max(best, over_norm(over_blocks(products + i * kProductStride + column), row_inverse));
      }
      best = warp_reduce(best, NanMax());
      if (lane_id() == 0) s.best[i] = best;
      if (!last) continue;
      const float own = inverse_norm(over_blocks(&s.feature_squares[i]), feature(i), p.dim, true);
      float score = 0;
      if (any) score = own != 0 ? best * own : tainted ? best - best + NAN : 0.0f;
      if (sums.parts != nullptr)
        score += p.mean_sign * sums.mean(sample, p.dim, over_blocks(&s.with_sum[i]), own);
      if (lane_id() == 0) p.scores[sample * p.n + first + i] = score;
    }
    cluster_sync();  // everybody has read this tile's sums
  }
}

template <class T>
cudaError_t launch_similarity(const SimilarityProblem& p, const SimilarityPlan& plan, cudaStream_t stream) {
  UnitSums sums;
  const cudaError_t status = launch_unit_sums<T>(p, plan, sums, stream);
  if (status != cudaSuccess) return status;
  Launch where{dim3(plan.blocks), dim3(kSimilarityThreads), 0, stream, plan.cluster};
  if (!plan.tiles)
    return launch(where, plan.rows_per_warp == 1 ? warp_similarity_kernel<T, 1> : warp_similarity_kernel<T, 4>, p, sums);
  where.shared = kSimilarityTileBytes;
  return launch(where, tile_similarity_kernel<T>, p, sums);
}

}  // namespace tokenprune
