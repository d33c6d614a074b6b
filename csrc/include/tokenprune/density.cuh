// density_peaks: the inner products of all pairs of tokens, then two looks at every token's row of them.
//
//   features ---> density_products (tiles of 64 x 64) ---> products, squares ---> density_means ---> m_i, density
//                                                                    +----------> density_distances ---> distance, value
//   value ---> select_kernel (selection_topk.cuh) ---> indices, counts
//
//   launch             grid                             block  shared memory      global memory
//   density_products   tiles of a triangle, or of a     128    GramTile::kShared  features once per tile, from L2 but for
//                      strip, * parts of the channels                             the first time; 4 n^2 bytes
//   density_means      a block per token                128    RadixScratch       a row of products some 4 times, from L2
//   density_distances  a warp per token                 128    none               a row of products once
//
// A squared distance is |x|^2 + |y|^2 - 2 <x, y>, where a square is the product of a tile on the diagonal: equal tokens
// have a distance of exactly 0, and d_ij and d_ji the same bits. The products of a sample stay in memory up to
// density_byte_limit (8192 tokens); beyond that they are made strip by strip, for the means and again for the distances.
// Masked tokens have products too, which nobody looks at.
#pragma once

#include "tokenprune/density.h"
#include "tokenprune/radix.cuh"
#include "tokenprune/repulsion_gram_tile.cuh"
#include "tokenprune/row_reads.cuh"
#include "tokenprune/squared_gap.cuh"

namespace tokenprune {

using DensityTile = GramTile<kDensityTile>;
static_assert(DensityTile::kThreads == kDensityThreads);

// Some samples, or a strip of the tokens of one, and their workspaces.
struct DensityStrip {
  int64_t sample, first, rows;  // the first sample, the first token and how many
  float *products, *squares, *means, *widest;
};

enum class DensityTiles { kTriangle, kDiagonal, kStrip };

__device__ __forceinline__ bool is_point(const DensityProblem& p, int64_t sample, int64_t token) {
  return p.mask == nullptr || p.mask[sample * p.mask_stride + token];
}

template <class T>
__device__ __forceinline__ const T* point(const DensityProblem& p, int64_t sample, int64_t token) {
  return static_cast<const T*>(p.features) + sample * p.batch_stride + token * p.row_stride;
}

// Tiles of the triangle are written twice, mirrored; those on the diagonal give the squares. Strips need the squares of
// all tokens before: a launch of diagonal tiles, by the same parts of the channels, gives them.
template <class T>
__global__ void __launch_bounds__(kDensityThreads, DensityTile::kBlocks)
    density_products_kernel(const DensityProblem p, const DensityStrip strip, DensityTiles which, uint32_t tiles) {
  constexpr int kTile = kDensityTile;
  TOKENPRUNE_SHARED(int[2][kTile], tokens);
  let_next_launch_start();
  const uint32_t parts = cluster_size(), part = cluster_rank(), tile = blockIdx.x / parts % tiles;
  const int64_t local = blockIdx.x / parts / tiles, n = p.n;
  const int side = static_cast<int>(ceil_div<int64_t>(n, kTile)), index = static_cast<int>(tile);
  const int2 at = which == DensityTiles::kTriangle   ? tile_of(tile)
                  : which == DensityTiles::kDiagonal ? int2{index, index}
                                                     : int2{index / side, index % side};
  const int64_t row0 = at.x * kTile, column0 = at.y * kTile;  // rows count from the strip's first
  for (int r = threadIdx.x; r < kTile; r += kDensityThreads) {
    const int64_t row = strip.first + row0 + r;
    tokens[0][r] = row < n ? static_cast<int>(row) : kNoRow;
    tokens[1][r] = column0 + r < n ? static_cast<int>(column0) + r : kNoRow;
  }
  __syncthreads();
  const TokenRows all{point<T>(p, strip.sample + local, 0), p.row_stride, p.channels, p.aligned};
  float* dots = gram_tile<T, kTile, kDensityThreads>(channels_of<T>(all, part, parts), tokens[0], tokens[1], kTile,
                                                     dynamic_shared());
  add_up_parts<kTile>(dots);
  wait_for_launch_before();  // which may still read the products of other tokens
  const int own = kTile / parts, first = static_cast<int>(part) * own;
  float* products = strip.products + local * strip.rows * n;
  if (which != DensityTiles::kDiagonal) {
    for (int q = threadIdx.x; q < own * kTile; q += kDensityThreads) {
      const int64_t r = first + q / kTile, c = q % kTile;
      if (row0 + r < strip.rows && column0 + c < n)
        products[(row0 + r) * n + column0 + c] = dots[r * DensityTile::kOutPitch + c];
      const int64_t mirrored_r = first + q % own, mirrored_c = q / own;
      if (which == DensityTiles::kTriangle && at.x != at.y && column0 + mirrored_c < n && row0 + mirrored_r < n)
        products[(column0 + mirrored_c) * n + row0 + mirrored_r] =
            dots[mirrored_r * DensityTile::kOutPitch + mirrored_c];
    }
  }
  if (which != DensityTiles::kStrip && at.x == at.y)
    for (int r = first + threadIdx.x; r < first + own && row0 + r < n; r += kDensityThreads)
      strip.squares[local * n + row0 + r] = dots[r * (DensityTile::kOutPitch + 1)];
}

// The squared distances of one token to the others, NaN to those that take no part.
template <class T>
struct DistanceRow {
  const DensityProblem& p;
  const float *products, *squares;
  int64_t sample, token;
  float own;

  __device__ __forceinline__ DistanceRow(const DensityProblem& p, const DensityStrip& strip, int64_t local, int64_t row)
      : p(p),
        products(strip.products + (local * strip.rows + row) * p.n),
        squares(strip.squares + local * p.n),
        sample(strip.sample + local),
        token(strip.first + row),
        own(squares[token]) {}

  __device__ __forceinline__ float operator()(int64_t other) const {
    if (!is_point(p, sample, other)) return kNan;
    return squared_gap(products[other], own, squares[other], p.channels, point<T>(p, sample, token),
                       point<T>(p, sample, other));
  }
};

// m_i, the mean of the smallest squared distances of a token, by a block: radix selection finds the largest of them.
// Sums are in float64, where the order of their terms hardly matters: tokens with the same distances have equal means.
template <class T>
__global__ void __launch_bounds__(kDensityThreads)
    density_means_kernel(const DensityProblem p, const DensityStrip strip) {
  using Scratch = RadixScratch<uint32_t>;
  TOKENPRUNE_SHARED(Scratch, scratch);
  let_next_launch_start();
  wait_for_launch_before();
  const int64_t local = blockIdx.x / strip.rows, row = blockIdx.x % strip.rows;
  const DistanceRow<T> distances(p, strip, local, row);
  const int64_t at = distances.sample * p.n + distances.token;
  if (!is_point(p, distances.sample, distances.token)) {
    if (threadIdx.x == 0) p.density[at] = 0;
    return;
  }
  const Stretch of_warp = stretch_of_warp(stretch_of_block(static_cast<uint32_t>(p.n)));
  const auto keys = [&](uint32_t j) -> uint32_t {
    const float square = distances(j);
    return square == square ? reversed_key<float>(nonnegative_key(square)) : kNoKey;
  };
  const Threshold<uint32_t> nearest = threshold_of_best(keys, of_warp, p.neighbors, Threshold<uint32_t>{0, 0}, scratch);
  const auto value = [](uint32_t key) { return nonnegative_value_of_key(reversed_key<float>(key)); };
  double sum = 0;
  int count = 0;
  float widest = 0;
  each_token(of_warp, keys, [&](uint32_t, uint32_t key) {
    if (key == kNoKey) return;
    widest = Max()(widest, value(key));
    if (key <= nearest.key) return;
    sum += value(key);
    ++count;
  });
  sum = block_reduce(sum, Sum(), 0.0);
  count = block_reduce(count, Sum(), 0);
  widest = block_reduce(widest, Max(), 0.0f);
  if (threadIdx.x != 0) return;
  if (nearest.ties > 0) sum += static_cast<double>(nearest.ties) * value(nearest.key);
  const float terms = static_cast<float>((count + static_cast<int64_t>(nearest.ties)) * max(p.channels, int64_t(1)));
  const float mean = static_cast<float>(sum) / terms;  // NaN without a neighbour
  strip.means[local * p.n + distances.token] = mean;
  strip.widest[local * p.n + distances.token] = widest;
  p.density[at] = std::exp(-mean);
}

// The distance to the nearest denser token, or of the two that are farthest apart, and what is ranked: by a warp.
template <class T>
__global__ void __launch_bounds__(kDensityThreads)
    density_distances_kernel(const DensityProblem p, const DensityStrip strip, int64_t total) {
  let_next_launch_start();
  wait_for_launch_before();
  const int64_t item = int64_t(blockIdx.x) * (kDensityThreads / kWarp) + warp_id();
  if (item >= total) return;
  const int64_t local = item / strip.rows, row = item % strip.rows;
  const DistanceRow<T> distances(p, strip, local, row);
  const int64_t i = distances.token, at = distances.sample * p.n + i;
  if (!is_point(p, distances.sample, i)) {
    if (lane_id() == 0) p.distance[at] = p.value[at] = 0;
    return;
  }
  const float *means = strip.means + local * p.n, *widest = strip.widest + local * p.n;
  const float mean = means[i];
  float closest = kInfinity;
  bool any = false;
  for (int64_t j = lane_id(); j < p.n; j += kWarp) {
    const float square = distances(j);
    if (!(square == square)) continue;  // before the mean, which those that take no part do not have
    if (!(means[j] < mean || (means[j] == mean && j < i))) continue;
    any = true;
    closest = Min()(closest, square);
  }
  closest = warp_reduce(closest, Min());
  if (!__any_sync(kAllLanes, any)) {
    float most = 0;
    for (int64_t j = lane_id(); j < p.n; j += kWarp)
      if (is_point(p, distances.sample, j)) most = Max()(most, widest[j]);
    closest = warp_reduce(most, Max());
  }
  if (lane_id() != 0) return;
  const float distance = std::sqrt(closest / static_cast<float>(max(p.channels, int64_t(1))));
  p.distance[at] = distance;
  p.value[at] = std::log(distance) - mean;
}

template <class T>
cudaError_t launch_products(const DensityProblem& p, const DensityPlan& plan, const DensityStrip& strip,
                            int64_t samples, DensityTiles which, CallStream& stream) {
  const int64_t side = ceil_div<int64_t>(p.n, kDensityTile);
  const int64_t tiles = which == DensityTiles::kTriangle   ? side * (side + 1) / 2
                        : which == DensityTiles::kDiagonal ? side
                                                           : ceil_div<int64_t>(strip.rows, kDensityTile) * side;
  return launch({samples * tiles * plan.parts, dim3(kDensityThreads), DensityTile::kShared, stream,
                 static_cast<unsigned>(plan.parts)},
                density_products_kernel<T>, p, strip, which, tiles);
}

// f(strip) for all strips of a group of samples, until a launch fails.
template <class F>
cudaError_t over_strips(const DensityPlan& plan, DensityStrip strip, const F& f) {
  cudaError_t status = cudaSuccess;
  for (strip.first = 0; strip.first < plan.n && status == cudaSuccess; strip.first += plan.rows) {
    strip.rows = std::min(plan.rows, plan.n - strip.first);
    status = f(strip);
  }
  return status;
}

template <class T>
cudaError_t launch_density(const DensityProblem& p, const DensityPlan& plan, float* floats, CallStream& stream) {
  const int64_t tokens = plan.samples * p.n;
  float* const squares = floats + plan.product_floats();
  for (int64_t sample = 0; sample < p.batch; sample += plan.samples) {
    const int64_t samples = std::min(plan.samples, p.batch - sample);
    const DensityStrip whole{sample, 0, plan.n, floats, squares, squares + tokens, squares + 2 * tokens};
    const auto products = [&](const DensityStrip& strip) {
      return launch_products<T>(p, plan, strip, samples, plan.strips ? DensityTiles::kStrip : DensityTiles::kTriangle,
                                stream);
    };
    cudaError_t status = cudaSuccess;
    if (plan.strips) status = launch_products<T>(p, plan, whole, samples, DensityTiles::kDiagonal, stream);
    if (status != cudaSuccess) return status;
    status = over_strips(plan, whole, [&](const DensityStrip& strip) {
      const cudaError_t made = products(strip);
      return made != cudaSuccess
                 ? made
                 : launch({samples * strip.rows, dim3(kDensityThreads), 0, stream}, density_means_kernel<T>, p, strip);
    });
    if (status != cudaSuccess) return status;
    status = over_strips(plan, whole, [&](const DensityStrip& strip) {
      const cudaError_t made = plan.strips ? products(strip) : cudaSuccess;
      const int64_t total = samples * strip.rows;
      return made != cudaSuccess
                 ? made
                 : launch({ceil_div<int64_t>(total, kDensityThreads / kWarp), dim3(kDensityThreads), 0, stream},
                          density_distances_kernel<T>, p, strip, total);
    });
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace tokenprune
