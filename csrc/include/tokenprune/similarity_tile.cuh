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
// In float32 the sums of each chunk start at zero and are added to the totals: over thousands of channels they would
// round too often. On tensor cores DotTile does so anyway.
#pragma once

#include "tokenprune/attention_tile.cuh"
#include "tokenprune/similarity.cuh"

namespace tokenprune {

static_assert(kTileVectors == kSimilarityTile && kTileThreads == kSimilarityThreads);

// What the blocks of a cluster read of each other, beside the sums of products.
struct SimilarityTileShared {
  const void* rows[2 * kSimilarityTile];  // features, then listed rows; null: zeros
  float feature_squares[kSimilarityTile], with_sum[kSimilarityTile], row_squares[kSimilarityTile];
  float row_inverse[kSimilarityTile];  // negative: the row does not count
  float best[kSimilarityTile];
  float unit_sum[2][kChunkBytes / 2];  // of the chunk at hand and the next one
};

constexpr int kProductStride = kSimilarityTile + 4;  // neighbouring features in distinct banks
constexpr int kSimilarityTileBytes = 2 * kTileStages * kChunkTileBytes;
static_assert(kSimilarityTile * kProductStride * sizeof(float) <= kSimilarityTileBytes);

// The thread's part of the squares of a tile's row (half of each chunk), and of the products with the unit sum. Summed
// chunk by chunk, like the products: one sum over thousands of channels would round as often.
template <class T>
__device__ __forceinline__ void add_squares(const unsigned char* chunk, const float* unit_sum, float& squares,
                                            float& with_sum) {
  float of_chunk = 0, sum_of_chunk = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int u = threadIdx.x % 2 * 4 + i;
    float x[kReadUnit<T>];
    read_unit(reinterpret_cast<const T*>(DotTile<T>::unit(chunk, threadIdx.x / 2, u)), 0, kReadUnit<T>, true, x);
    of_chunk = add_dot(x, x, of_chunk);
    if (unit_sum == nullptr) continue;
#pragma unroll
    for (int e = 0; e < kReadUnit<T>; ++e) sum_of_chunk = __fmaf_rn(x[e], unit_sum[u * kReadUnit<T> + e], sum_of_chunk);
  }
  squares += of_chunk;
  with_sum += sum_of_chunk;
}

// The thread's part in copying chunk `c` of a stage's 128 rows: the same unit of every 16th.
template <class T>
__device__ __forceinline__ void copy_chunk(const SimilarityTileShared& s, unsigned char* stage, int c, int dim,
                                           bool aligned) {
  const int u = threadIdx.x % 8, element = c * DotTile<T>::kChunk + u * kReadUnit<T>;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = threadIdx.x / 8 + 16 * i;
    const T* from = static_cast<const T*>(s.rows[row]);
    unsigned char* to = const_cast<unsigned char*>(DotTile<T>::unit(stage, row, u));
    if (aligned) {
      const bool exists = from != nullptr && element < dim;
      cp_async_16(to, exists ? from + element : s.rows[0], exists);  // the tile's first feature always exists
      continue;
    }
#pragma unroll
    for (int e = 0; e < kReadUnit<T>; ++e)
      reinterpret_cast<T*>(to)[e] = from != nullptr && element + e < dim ? from[element + e] : from_float<T>(0.0f);
  }
}

// What a thread sums up of a tile over this block's channels.
template <class T>
struct TileSums {
  DotTile<T> products;
  float feature_squares, row_squares, with_sum;
};

// Features only count with the first rows of the list: their squares and products with the unit sum are the same later.
template <class T>
__device__ __forceinline__ void multiply_tile(const SimilarityProblem& p, const UnitSums& sums, int64_t sample,
                                              int columns, bool first_rows, unsigned char* ring,
                                              SimilarityTileShared& s, TileSums<T>& mine) {
  constexpr int kChunk = DotTile<T>::kChunk;
  const int dim = static_cast<int>(p.dim), chunks = ceil_div(dim, kChunk);
  const int rank = cluster_rank(), size = cluster_size();
  const int begin = static_cast<int>(int64_t(chunks) * rank / size), end = int64_t(chunks) * (rank + 1) / size;
  const bool summed = first_rows && sums.parts != nullptr;
  const int channel = threadIdx.x;  // of a chunk, for the thread's element of the unit sum
  const auto stage_of = [&](int c) { return ring + (c - begin) % kTileStages * 2 * kChunkTileBytes; };
  const auto load = [&](int c) {
    if (c < end) copy_chunk<T>(s, stage_of(c), c, dim, p.aligned);
    cp_async_commit();
  };
  const auto unit_sum = [&](int c) {
    const int64_t element = static_cast<int64_t>(c) * kChunk + channel;
    return summed && c < end && channel < kChunk && element < dim ? sums.at(sample, element, dim) : 0.0f;
  };
  mine.products.clear();
  mine.feature_squares = mine.row_squares = mine.with_sum = 0;
  load(begin);
  load(begin + 1);
  if (channel < kChunk) s.unit_sum[0][channel] = unit_sum(begin);
  for (int c = begin; c < end; ++c) {
    cp_async_wait<1>();
    __syncthreads();
    load(c + 2);
    const float next = unit_sum(c + 1);  // on its way while the chunk is multiplied
    const unsigned char *a = stage_of(c), *b = a + kChunkTileBytes;
    if constexpr (DotTile<T>::kMma) {
      mine.products.template multiply<kSimilarityTile / 16>(a, b, dim - c * kChunk, columns);
    } else {
      DotTile<T> part;
      part.clear();
      part.template multiply<kSimilarityTile / 16>(a, b, dim - c * kChunk, columns);
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) mine.products.sums[i][j] += part.sums[i][j];
    }
    add_squares<T>(b, nullptr, mine.row_squares, mine.with_sum);
    if (first_rows)
      add_squares<T>(a, summed ? s.unit_sum[(c - begin) % 2] : nullptr, mine.feature_squares, mine.with_sum);
    if (channel < kChunk) s.unit_sum[(c + 1 - begin) % 2][channel] = next;
  }
  __syncthreads();  // the ring is free
}

template <class T>
__global__ void __launch_bounds__(kSimilarityThreads, 3)
    tile_similarity_kernel(const SimilarityProblem p, const UnitSums sums) {
  TOKENPRUNE_SHARED(SimilarityTileShared, s);
  unsigned char* ring = dynamic_shared();
  float* products = reinterpret_cast<float*>(ring);  // [feature][listed row], once the ring is free
  const int rank = cluster_rank(), size = cluster_size(), thread = threadIdx.x;
  const int64_t tiles = ceil_div<int64_t>(p.n, kSimilarityTile), tile = blockIdx.x / size;
  const int64_t sample = tile / tiles, first = tile % tiles * kSimilarityTile;
  const T* all = static_cast<const T*>(p.features) + sample * p.sample_stride;
  const auto feature = [&](int i) { return first + i < p.n ? all + (first + i) * p.row_stride : nullptr; };
  if (thread < kSimilarityTile) s.rows[thread] = feature(thread);

  bool any = false, tainted = false;  // a row that counts, one of them with a NaN
  for (int64_t at = 0; at < p.best_of.length; at += kSimilarityTile) {
    if (thread < kSimilarityTile) s.rows[kSimilarityTile + thread] = listed_row<T>(p.best_of, sample, at + thread);
    __syncthreads();
    const int columns = static_cast<int>(min(p.best_of.length - at, int64_t(kSimilarityTile)));
    TileSums<T> mine;
    multiply_tile(p, sums, sample, columns, at == 0, ring, s, mine);
#pragma unroll
    for (int i = 0; i < DotTile<T>::kThreadA; ++i)
#pragma unroll
      for (int j = 0; j < DotTile<T>::kThreadB; ++j)
        products[DotTile<T>::a(i) * kProductStride + DotTile<T>::b(j)] = mine.products.at(i, j);
    mine.row_squares = warp_reduce(mine.row_squares, Sum(), 2);
    mine.feature_squares = warp_reduce(mine.feature_squares, Sum(), 2);
    mine.with_sum = warp_reduce(mine.with_sum, Sum(), 2);
    if (thread % 2 == 0) {
      s.row_squares[thread / 2] = mine.row_squares;
      if (at == 0) {
        s.feature_squares[thread / 2] = mine.feature_squares;
        s.with_sum[thread / 2] = mine.with_sum;
      }
    }
    cluster_sync();

    const auto over_blocks = [&](float* mine) {
      float sum = 0;
      for (int r = 0; r < size; ++r) sum += *cluster_shared(mine, r);
      return sum;
    };
    float inverse = -1;
    if (thread < kSimilarityTile) {
      const T* row = static_cast<const T*>(s.rows[kSimilarityTile + thread]);
      if (row != nullptr) inverse = row_inverse_norm(over_blocks(&s.row_squares[thread]), row, p.dim, false);
      s.row_inverse[thread] = inverse;
    }
    any = __syncthreads_or(!(inverse < 0)) || any;
    tainted = __syncthreads_or(inverse != inverse) || tainted;

    const bool last = at + kSimilarityTile >= p.best_of.length;
    const int share = kSimilarityTile / size;  // this block finishes the features rank * share ...
    for (int i = rank * share + warp_id(); i < (rank + 1) * share && first + i < p.n; i += kSimilarityThreads / kWarp) {
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
      const float own = row_inverse_norm(over_blocks(&s.feature_squares[i]), feature(i), p.dim, true);
      float score = 0;
      if (any) score = own != 0 ? best * own : tainted ? kNan : 0.0f;
      if (sums.parts != nullptr) score += p.mean_sign * sums.mean(sample, p.dim, over_blocks(&s.with_sum[i]), own);
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
    return launch(where, plan.rows_per_warp == 1 ? warp_similarity_kernel<T, 1> : warp_similarity_kernel<T, 4>, p,
                  sums);
  where.shared = kSimilarityTileBytes;
  return launch(where, tile_similarity_kernel<T>, p, sums);
}

}  // namespace tokenprune
