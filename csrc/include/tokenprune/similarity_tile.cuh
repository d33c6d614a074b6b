// cosine_scores and contrastive_scores for long lists: the maximum over the listed rows by tiles of 64 x 64 dot
// products (tensor cores for 16-bit inputs), the norms of both and the mean from the same pass over shared memory.
//
//   64 features ---+                                                 +--> sums of 64 x 64 products --+
//                  +-- chunks of 128 B per row, ring of 3 stages ----+--> squares of both            +-- cluster --+
//   64 listed rows +                                                 +--> products with the unit sum |   exchange  |
//                                                                                                                  |
//   scores <--- maximum over the tile's rows, kept over the tiles of the list <--- sums over the blocks <----------+
//
// Grid: B * ceil(N / 64) tiles times the cluster, a team of 128 threads and 48 KiB of dynamic shared memory, or two
// teams. When the tiles are few, the blocks of a cluster and their teams share the channels, each team sums up its
// chunks, and each block finishes 64 / cluster of the features from everybody's sums, in the order of the blocks.
// Bytes: the features once per 64 listed rows and those rows once per 64 features, from L2 after the first time; the
// minimum is each once.
//
// In float32 the sums of each chunk start at zero and are added to the totals: over thousands of channels they would
// round too often. On tensor cores DotTile does so anyway.
#pragma once

#include "tokenprune/attention_tile.cuh"
#include "tokenprune/similarity.cuh"

namespace tokenprune {

static_assert(kTileVectors == kSimilarityTile && kTileThreads == kSimilarityThreads);

struct SimilarityTileShared {
  const void* rows[2 * kSimilarityTile];  // features, then listed rows; null: does not count
  float feature_inverse[kSimilarityTile], mean[kSimilarityTile], best[kSimilarityTile];
  float row_inverse[kSimilarityTile];                       // negative: the row does not count
  float unit_sum[kSimilarityMaxTeams][2][kChunkBytes / 2];  // of the chunk at hand and the next one
};

static_assert(sizeof(SimilarityTileShared) + 512 <= kSimilarityStaticShared);

// What the blocks of a cluster read of each other lies in the ring, once that is free: a row per feature of its
// products with the listed rows, the square of it, its product with the unit sum, and the square of the listed row of
// that number. The rows' length puts neighbouring features in distinct banks.
enum { kFeatureSquare = kSimilarityTile, kWithSum, kRowSquare };
constexpr int kSumStride = kSimilarityTile + 4;
static_assert(kSimilarityTile * kSumStride * sizeof(float) <= kSimilarityTeamBytes);
static_assert(2 * kTileStages * kChunkTileBytes == kSimilarityTeamBytes);

// The thread's part of the squares of a tile's row (half of each chunk), and of the products with the unit sum. Summed
// chunk by chunk, like the products: one sum over thousands of channels would round as often.
template <class T>
__device__ __forceinline__ void add_squares(const unsigned char* chunk, const float* unit_sum, float& squares,
                                            float& with_sum) {
  float of_chunk = 0, sum_of_chunk = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int u = tile_thread() % 2 * 4 + i;
    float x[kReadUnit<T>];
    read_unit(reinterpret_cast<const T*>(DotTile<T>::unit(chunk, tile_thread() / 2, u)), 0, kReadUnit<T>, true, x);
    of_chunk = add_dot(x, x, of_chunk);
    if (unit_sum == nullptr) continue;
#pragma unroll
    for (int e = 0; e < kReadUnit<T>; ++e) sum_of_chunk = __fmaf_rn(x[e], unit_sum[u * kReadUnit<T> + e], sum_of_chunk);
  }
  squares += of_chunk;
  with_sum += sum_of_chunk;
}

// The thread's part in copying a chunk of 64 rows: the same unit of every 16th. Entries of the table that do not count
// get the list's first row, which always exists: nobody asks for their products. Aligned rows are held as offsets from
// that one, in units of 16 bytes, which take half the registers of pointers.
constexpr int kCopiedRows = kSimilarityTile / 16;

template <class T>
struct CopiedRows {
  const T* base;
  uint32_t offset[kCopiedRows];

  __device__ __forceinline__ CopiedRows(const void* const* rows, const T* first) : base(first) {
#pragma unroll
    for (int i = 0; i < kCopiedRows; ++i) offset[i] = static_cast<uint32_t>((row(rows, i) - first) / kReadUnit<T>);
  }

  __device__ __forceinline__ const T* row(const void* const* rows, int i) const {
    const void* found = rows[tile_thread() / 8 + 16 * i];
    return found != nullptr ? static_cast<const T*>(found) : base;
  }

  // Asynchronously, from `element` on; zeros if that is beyond `dim`.
  __device__ __forceinline__ void copy(unsigned char* to, int element, int dim) const {
    const T* from = base + element;
#pragma unroll
    for (int i = 0; i < kCopiedRows; ++i)
      cp_async_16(to + i * 16 * kChunkBytes, from + int64_t(offset[i]) * kReadUnit<T>, element < dim);
  }

  __device__ __forceinline__ void copy_unaligned(unsigned char* to, const void* const* rows, int element,
                                                 int dim) const {
#pragma unroll 1
    for (int i = 0; i < kCopiedRows; ++i)
      TileCopy<T>::copy_elements(reinterpret_cast<T*>(to + i * 16 * kChunkBytes), row(rows, i) + element,
                                 dim - element);
  }
};

// What a thread sums up of a tile over its team's channels.
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
  const typename DotTile<T>::Fragments fragments;
  const int dim = static_cast<int>(p.dim), chunks = ceil_div(dim, kChunk);
  const int team = threadIdx.x / kTileThreads, teams = blockDim.x / kTileThreads;
  const int rank = cluster_rank(), size = cluster_size();
  const int begin = static_cast<int>(int64_t(chunks) * rank / size), end = int64_t(chunks) * (rank + 1) / size;
  const bool summed = first_rows && sums.parts != nullptr;
  const int channel = tile_thread();  // of a chunk, for the thread's element of the unit sum

  const CopiedRows<T> features(s.rows, static_cast<const T*>(s.rows[0])),
      listed(s.rows + kSimilarityTile, static_cast<const T*>(p.best_of.rows) + sample * p.best_of.sample_stride);
  const int u = tile_thread() % 8, row = tile_thread() / 8;
  unsigned char* to = ring + row * kChunkBytes + ((u ^ (row & 7)) << 4);  // DotTile::unit, of the first stage
  const auto load = [&](int c, int stage) {
    if (c < end) {
      unsigned char* a = to + stage * 2 * kChunkTileBytes;
      const int element = c * kChunk + u * kReadUnit<T>;
      if (p.aligned) {
        features.copy(a, element, dim);
        listed.copy(a + kChunkTileBytes, element, dim);
      } else {
        features.copy_unaligned(a, s.rows, element, dim);
        listed.copy_unaligned(a + kChunkTileBytes, s.rows + kSimilarityTile, element, dim);
      }
    }
    cp_async_commit();
  };
  const auto unit_sum = [&](int c) {
    const int64_t element = static_cast<int64_t>(c) * kChunk + channel;
    return summed && c < end && channel < kChunk && element < dim ? sums.at(sample, element, dim) : 0.0f;
  };
  mine.products.clear();
  mine.feature_squares = mine.row_squares = mine.with_sum = 0;
  load(begin + team, 0);
  load(begin + team + teams, 1);
  if (first_rows) wait_for_launch_before();  // for the unit sum: features and rows are there before the first launch
  if (channel < kChunk) s.unit_sum[team][0][channel] = unit_sum(begin + team);
  int stage = 0, set = 0;
  for (int first = begin; first < end; first += teams) {
    const int c = first + team;
    cp_async_wait<1>();
    __syncthreads();
    load(c + 2 * teams, stage == 0 ? kTileStages - 1 : stage - 1);
    const float next_sum = unit_sum(c + teams);  // on its way while the chunk is multiplied
    if (c < end) {
      const unsigned char *a = ring + stage * 2 * kChunkTileBytes, *b = a + kChunkTileBytes;
      if constexpr (DotTile<T>::kMma) {
        mine.products.template multiply<kSimilarityTile / 16>(fragments, a, b, dim - c * kChunk, columns);
      } else {
        DotTile<T> part;
        part.clear();
        part.template multiply<kSimilarityTile / 16>(fragments, a, b, dim - c * kChunk, columns);
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) mine.products.sums[i][j] += part.sums[i][j];
      }
      add_squares<T>(b, nullptr, mine.row_squares, mine.with_sum);
      if (first_rows) add_squares<T>(a, summed ? s.unit_sum[team][set] : nullptr, mine.feature_squares, mine.with_sum);
    }
    stage = stage == kTileStages - 1 ? 0 : stage + 1;
    set ^= 1;
    if (channel < kChunk) s.unit_sum[team][set][channel] = next_sum;
  }
  cp_async_wait<0>();
  __syncthreads();  // the ring is free
}

// f(at, sum) for what the thread has summed up; `at` is its place in the block's sums.
template <class T, class F>
__device__ __forceinline__ void each_sum(TileSums<T>& mine, const F& f) {
#pragma unroll
  for (int i = 0; i < DotTile<T>::kThreadA; ++i)
#pragma unroll
    for (int j = 0; j < DotTile<T>::kThreadB; ++j)
      f(DotTile<T>::a(i) * kSumStride + DotTile<T>::b(j), mine.products.at(i, j));
  if (tile_thread() % 2 != 0) return;
  const int row = tile_thread() / 2 * kSumStride;
  f(row + kFeatureSquare, mine.feature_squares);
  f(row + kWithSum, mine.with_sum);
  f(row + kRowSquare, mine.row_squares);
}

template <class T>
__global__ void __launch_bounds__(kSimilarityMaxTeams* kTileThreads, 1)
    tile_similarity_kernel(const SimilarityProblem p, const UnitSums sums) {
  TOKENPRUNE_SHARED(SimilarityTileShared, s);
  const int team = threadIdx.x / kTileThreads, teams = blockDim.x / kTileThreads;
  unsigned char* ring = dynamic_shared() + team * kSimilarityTeamBytes;  // of the team
  float *block_sums = reinterpret_cast<float*>(dynamic_shared()), *team_sums = reinterpret_cast<float*>(ring);
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
    mine.row_squares = warp_reduce(mine.row_squares, Sum(), 2);
    mine.feature_squares = warp_reduce(mine.feature_squares, Sum(), 2);
    mine.with_sum = warp_reduce(mine.with_sum, Sum(), 2);
    if (team > 0) each_sum(mine, [&](int i, float sum) { team_sums[i] = sum; });
    __syncthreads();
    if (team == 0)
      each_sum(mine, [&](int i, float sum) {
#pragma unroll
        for (int t = 1; t < kSimilarityMaxTeams; ++t)
          if (t < teams) sum += block_sums[t * kSimilarityTeamBytes / sizeof(float) + i];
        block_sums[i] = sum;
      });
    cluster_sync();

    const auto over_blocks = [&](float* mine) {
      float of_block[kMaxCluster], sum = 0;  // all on their way together
#pragma unroll
      for (int r = 0; r < static_cast<int>(kMaxCluster); ++r) of_block[r] = r < size ? *cluster_shared(mine, r) : 0.0f;
#pragma unroll
      for (int r = 0; r < static_cast<int>(kMaxCluster); ++r) sum += of_block[r];
      return sum;
    };
    float inverse = -1;
    if (thread < kSimilarityTile) {
      const T* row = static_cast<const T*>(s.rows[kSimilarityTile + thread]);
      if (row != nullptr)
        inverse = row_inverse_norm(over_blocks(block_sums + thread * kSumStride + kRowSquare), row, p.dim, false);
      s.row_inverse[thread] = inverse;
    }
    any = __syncthreads_or(!(inverse < 0)) || any;
    tainted = __syncthreads_or(inverse != inverse) || tainted;

    const bool last = at + kSimilarityTile >= p.best_of.length;
    const int share = kSimilarityTile / size;  // this block finishes the features rank * share ...
    for (int i = rank * share + warp_id(); i < (rank + 1) * share && first + i < p.n; i += blockDim.x / kWarp) {
      float* of_feature = block_sums + i * kSumStride;
      if (at == 0) {
        const float own = row_inverse_norm(over_blocks(of_feature + kFeatureSquare), feature(i), p.dim, true);
        if (lane_id() == 0) s.feature_inverse[i] = own;
        if (sums.parts != nullptr) {
          const float mean = sums.mean(sample, p.dim, over_blocks(of_feature + kWithSum), own);
          if (lane_id() == 0) s.mean[i] = p.mean_sign * mean;
        }
      }
      float best = at == 0 ? -kInfinity : s.best[i];
#pragma unroll
      for (int j = 0; j < kSimilarityTile / kWarp; ++j) {
        const int column = lane_id() + j * kWarp;
        const float row_inverse = s.row_inverse[column];
        if (!(row_inverse < 0)) best = nan_max(best, over_norm(over_blocks(of_feature + column), row_inverse));
      }
      best = warp_reduce(best, NanMax());
      if (lane_id() != 0) continue;
      s.best[i] = best;
      if (!last) continue;
      float score = 0;
      const float own = s.feature_inverse[i];
      if (any) score = own != 0 ? best * own : tainted ? kNan : 0.0f;
      if (sums.parts != nullptr) score += s.mean[i];
      p.scores[sample * p.n + first + i] = score;
    }
    cluster_sync();  // everybody has read this tile's sums
  }
}

template <class T>
cudaError_t launch_similarity(const SimilarityProblem& p, const SimilarityPlan& plan, CallStream& stream) {
  UnitSums sums;
  const cudaError_t status = launch_unit_sums<T>(p, plan, sums, stream);
  if (status != cudaSuccess) return status;
  Launch where{plan.blocks, dim3(kSimilarityThreads), 0, stream, plan.cluster};
  if (!plan.tiles)
    return launch(where, plan.rows_per_warp == 1 ? warp_similarity_kernel<T, 1> : warp_similarity_kernel<T, 4>, p,
                  sums);
  where.block.x = plan.teams * kTileThreads;
  where.shared = plan.teams * kSimilarityTeamBytes;
  return launch(where, tile_similarity_kernel<T>, p, sums);
}

}  // namespace tokenprune
